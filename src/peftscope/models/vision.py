"""The vision tower of a vision-language model: the number of its weights, by arithmetic. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Vision(NamedTuple):
    """A vision tower with its projector, in numbers of values.

    Attributes:
        layers: How many blocks it has.
        block: The matrices of the linear layers of one block. 4-bit loading quantises these.
        outside: The matrices of linear layers outside of blocks, which are quantised as well.
        other: Everything else: biases, norms, embeddings of patches and positions.
    """

    layers: int
    block: int
    outside: int
    other: int

    @property
    def parameters(self) -> int:
        """The number of all weights."""
        return self.layers * self.block + self.outside + self.other


class Kind(NamedTuple):
    """What the towers of a kind of model have in common.

    Attributes:
        family: The ``model_type`` of the language model that the closed form knows, or empty without a closed form.
        matrices: The matrices of a block's feed-forward layer.
        biases: The biases of the linear layers and of the embedding of patches, 1 or 0 each.
        norm: The values of a norm for each of its width: 2 with a bias.
        tower: The sizes of the tower that a ``config.json`` may leave out.
        text: The sizes of the language model that it may leave out.
    """

    family: str
    matrices: int
    biases: tuple[int, int]
    norm: int
    tower: dict[str, Any]
    text: dict[str, Any]


_QWEN2 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "patch_size": 14}
_QWEN3 = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 16,
    "num_position_embeddings": 2304,
}
_SIGLIP = {"num_hidden_layers": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14, "image_size": 896}
_PIXTRAL = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14}
_GEMMA3 = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072}

KINDS: dict[str, Kind] = {
    "qwen2_5_vl": Kind("qwen2", 3, (1, 0), 1, _QWEN2, {}),
    "qwen3_vl": Kind("qwen3", 2, (1, 1), 2, _QWEN3 | {"deepstack_visual_indexes": (8, 16, 24)}, {}),
    "qwen3_vl_moe": Kind("qwen3_moe", 2, (1, 1), 2, _QWEN3 | {"deepstack_visual_indexes": (8, 16, 24)}, {}),
    "qwen3_5": Kind("", 2, (1, 1), 2, _QWEN3, {}),
    "qwen3_5_moe": Kind("", 2, (1, 1), 2, _QWEN3, {}),
    "gemma3": Kind("gemma3_text", 2, (1, 1), 2, _SIGLIP, _GEMMA3),
    "mistral3": Kind("mistral", 3, (0, 0), 1, _PIXTRAL, {}),
}
"""Kinds of vision-language models by ``model_type``. Sizes are transformers' defaults, but for Qwen2.5-VL's width,
SigLIP and Pixtral's patches. Those are of models on the hub, whose totals follow exactly."""


def vision_of(kind: str, config: Mapping[str, Any], hidden: int) -> Vision:
    """Returns the tower that a ``vision_config`` describes, for a language model of this hidden size.

    Raises:
        KeyError: A size is missing; its name is the argument.
        TypeError: A size is not a whole number above 0.
    """
    known, sizes = KINDS[kind], {**KINDS[kind].tower, **config}
    width, inner, patch = sizes["hidden_size"], sizes["intermediate_size"], sizes["patch_size"]
    layers = sizes["depth"] if "depth" in sizes else sizes["num_hidden_layers"]
    if any(type(size) is not int or size < 1 for size in (width, inner, patch, layers, hidden)):
        raise TypeError
    biased, biased_patches = known.biases
    beside = biased * (5 * width + (known.matrices - 1) * inner) + 2 * known.norm * width
    images = sizes.get("temporal_patch_size", 2 if "depth" in known.tower else 1)
    other = layers * beside + (3 * patch**2 * images + biased_patches) * width
    merged = width * sizes.get("spatial_merge_size", 2) ** 2
    if kind == "gemma3":  # its projector is a parameter, not a layer
        outside, places = 0, (sizes["image_size"] // patch) ** 2
        other += (places + known.norm + hidden + 1) * width
    elif kind == "mistral3":
        outside = merged * width + width * hidden + hidden**2
        other += 2 * width
    else:
        deep = len(sizes.get("deepstack_visual_indexes") or ())
        outside = (1 + deep) * merged * (merged + hidden)
        other += sizes.get("num_position_embeddings", 0) * width
        other += (1 + deep) * (merged + hidden) + known.norm * (width + deep * merged)
    return Vision(layers, (4 * width + known.matrices * inner) * width, outside, other)


def text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of the language model inside that of a vision-language model."""
    known, text = KINDS[config["model_type"]], config.get("text_config") or config
    tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    text = {**known.text, **text, **tied, "model_type": known.family or text["model_type"]}
    return {key: value for key, value in text.items() if key not in ("text_config", "vision_config")}

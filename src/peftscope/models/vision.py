"""The vision tower of a vision-language model: the number of its weights, by arithmetic. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
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
    """The common properties of a kind of model's towers.

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


KINDS_FILE = Path(__file__).with_name("vision.json")
KINDS: dict[str, Kind] = {
    name: Kind(**known) for name, known in json.loads(KINDS_FILE.read_text(encoding="utf-8")).items()
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

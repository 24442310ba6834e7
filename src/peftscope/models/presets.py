"""Shapes of well-known base models, so that the memory calculator need not download anything. No torch.

Each preset names the public code that lists its shape; a test compares the parameter counts with the published ones.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from peftscope.errors import close_match
from peftscope.models.shapes import Experts, ModelShape


class Simulated(NamedTuple):
    """A base model of a kind without a closed form: where its ``config.json`` differs from transformers' defaults."""

    hub_id: str
    config: dict[str, Any]
    source: str


class Preset(NamedTuple):
    """A well-known base model.

    Attributes:
        hub_id: Its hub id.
        shape: Its sizes.
        source: The public code that lists them: repository, file and commit, and what is from elsewhere.
    """

    hub_id: str
    shape: ModelShape
    source: str


PRESETS_FILE = Path(__file__).with_name("presets.csv")
"""The presets, one a row. Columns are named as the fields of ``Preset`` and of its shape; an empty cell is not said."""


def _preset(row: dict[str, str]) -> Preset:
    said = {column: value for column, value in row.items() if value}
    hub_id, source = said.pop("hub_id"), said.pop("source")
    experts = {part: said.pop(f"experts.{part}") for part in Experts.model_fields if f"experts.{part}" in said}
    return Preset(hub_id, ModelShape.model_validate(said | {"experts": experts or None}), source)


with PRESETS_FILE.open(newline="", encoding="utf-8") as _file:
    PRESETS: dict[str, Preset] = {row.pop("name"): _preset(row) for row in csv.DictReader(_file)}
"""The well-known base models by the names that commands take."""

TRANSFORMERS = "huggingface/transformers src/transformers/models/{} @ {}"
_GEMMA4 = TRANSFORMERS.format("gemma4/convert_gemma4_weights.py", "0f3f0632a38798af2adf264adc752130ecc5fa66")


def _simulated(hub_id: str, kind: str, length: int, beside: str = "", **config: Any) -> Simulated:
    source = TRANSFORMERS.format(kind.removesuffix("_text"), f"5.24.0, the defaults of its configuration{beside}")
    return Simulated(hub_id, {"model_type": kind, "max_position_embeddings": length, **config}, source)


def _gemma4(size: str, sizes: tuple[int, ...], length: int, local: int = 5, **more: Any) -> Simulated:
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    layers = [*["sliding_attention"] * local, "full_attention"] * (sizes[2] // (local + 1))
    config = {"model_type": "gemma4_text", "max_position_embeddings": length, "final_logit_softcapping": 30.0}
    config |= {**dict(zip(names, sizes, strict=True)), "layer_types": layers, **more}
    return Simulated(f"google/gemma-4-{size}-it", config, f"{_GEMMA4}; the text model alone")


_WIDE = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "sliding_window": 1024}
_EXPERTS = {"enable_moe_block": True, "num_experts": 128, "moe_intermediate_size": 704, "top_k_experts": 8}
_OF_20B = ", but the layers and experts of arXiv 2508.10925, table 1"
_TEXT = "; the text model alone"

SIMULATED: dict[str, Simulated] = {
    "gpt-oss-20b": _simulated(
        "openai/gpt-oss-20b", "gpt_oss", 131072, _OF_20B, num_hidden_layers=24, num_local_experts=32
    ),
    "gpt-oss-120b": _simulated("openai/gpt-oss-120b", "gpt_oss", 131072),
    "deepseek-v3": _simulated("deepseek-ai/DeepSeek-V3", "deepseek_v3", 163840, ", but its hub's longest sequence"),
    "llama-4-scout": _simulated("meta-llama/Llama-4-Scout-17B-16E", "llama4_text", 131072, _TEXT),
    "qwen3.5-9b": _simulated("Qwen/Qwen3.5-9B", "qwen3_5_text", 262144, _TEXT),
    "qwen3.5-35b-a3b": _simulated("Qwen/Qwen3.5-35B-A3B", "qwen3_5_moe_text", 262144, _TEXT),
    "gemma-4-e2b": _gemma4("E2B", (1536, 6144, 35, 8, 1), 131072, 4, num_kv_shared_layers=20, use_double_wide_mlp=True),
    "gemma-4-e4b": _gemma4("E4B", (2560, 10240, 42, 8, 2), 131072, num_kv_shared_layers=18),
    "gemma-4-31b": _gemma4("31B", (5376, 21504, 60, 32, 16), 262144, num_global_key_value_heads=4, **_WIDE),
    "gemma-4-26b-a4b": _gemma4(
        "26B-A4B", (2816, 2112, 30, 16, 8), 262144, num_global_key_value_heads=2, **_WIDE, **_EXPERTS
    ),
}
"""Well-known base models whose kind has no closed form, by the names that commands take."""

VARIANT = re.compile(r"^meta-|-(instruct|chat|it|hf|base|2507)(?=-|$)|[^a-z0-9]")
"""The parts of a model's name that do not change its shape."""
SIZE = re.compile(r"(?<![\d.x])(?<!-a)\d+(\.\d+)?[bm](?![a-z0-9])")
"""The size in a model's name; of 8x7b and 30b-a3b a part stays, because a dense model is none of theirs."""
ALIKE = 0.85
"""From this similarity on, two words count as one that is misspelt: llama with one l less, but not mixtral."""


def same_shape(name: str) -> str | None:
    """Returns the preset whose name, or whose hub id without its owner, differs only by the kind of tuning."""
    if name.lower() in {*PRESETS, *(preset.hub_id.lower() for preset in PRESETS.values())}:
        return None  # it is a preset
    bare = _bare(name)
    return next((name for name, preset in PRESETS.items() if bare in (_bare(name), _bare(preset[0]))), None)


def _bare(name: str) -> str:
    """Returns the part of a model's name that decides its shape.

    >>> _bare("NousResearch/Meta-Llama-3-8B-Instruct"), _bare("llama3_8b")
    ('llama38b', 'llama38b')
    """
    return VARIANT.sub("", name.rstrip("/").split("/")[-1].lower().replace("_", "-"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "did you mean ...?" for a name of the same family and version, or where the known ones are listed.

    A name that goes on from the one that was asked for comes before one that is alike.

    >>> did_you_mean("lama-2-7b", PRESETS), did_you_mean("qwen3-30b", PRESETS), did_you_mean("llama-4", PRESETS)
    ('did you mean `llama-2-7b`?', 'did you mean `qwen3-30b-a3b`?', '`peftscope models` lists the known ones')
    """
    asked = _family(name)
    known = list(known)
    longer = [other for other in known if other.startswith(name.lower())]
    kin = longer or [other for other in known if _are_kin(asked, _family(other))]
    return close_match(name.lower(), kin) or "`peftscope models` lists the known ones"


def _family(name: str) -> list[str]:
    """Returns the words and numbers of a model's name without its size and its kind of tuning.

    >>> _family("Llama-3.1-8B-Instruct"), _family("mixtral-8x7b"), _family("qwen2.5-vl-7b")
    (['llama', '3.1'], ['mixtral', '8', 'x', '7', 'b'], ['qwen', '2.5', 'vl'])
    """
    bare = SIZE.sub("", name.lower())
    return re.findall(r"[a-z]+|\d+(?:\.\d+)?", re.sub(r"-(instruct|chat|it|hf|base)(?=-|$)", "", bare))


def _are_kin(asked: list[str], other: list[str]) -> bool:
    """Returns whether one family begins with the other's words, which may be misspelt, and has its numbers."""
    return 0 < len(asked) <= len(other) and all(
        first == second or (first.isalpha() and SequenceMatcher(None, first, second).ratio() >= ALIKE)
        for first, second in zip(asked, other, strict=False)
    )

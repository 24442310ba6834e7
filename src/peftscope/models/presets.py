"""Shapes of well-known base models, so that the memory calculator need not download anything. No torch.

Each preset names the public code that lists its shape; a test compares the parameter counts with the published ones.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from peftscope.errors import close_match
from peftscope.models.shapes import Experts, ModelShape
from peftscope.models.vision import Vision, vision_of


class Simulated(NamedTuple):
    """A base model of a kind without a closed form: where its ``config.json`` differs from transformers' defaults."""

    hub_id: str
    config: dict[str, Any]
    source: str
    vision: Vision | None = None


class Preset(NamedTuple):
    """A well-known base model.

    Its source is the public code that lists its sizes: repository, file and commit, and what is from elsewhere.
    """

    hub_id: str
    shape: ModelShape
    source: str
    vision: Vision | None = None

    @property
    def parameters(self) -> int:
        """The number of all weights."""
        return self.shape.parameters + (self.vision.parameters if self.vision else 0)


PRESETS_FILE = Path(__file__).with_name("presets.csv")
"""The presets, one a row. Columns are named as the fields of ``Preset`` and of its shape; an empty cell is not said.

``tower`` is the kind of its vision tower, which has the usual sizes of its kind where the row gives none.
"""
TOWER = ("depth", "hidden_size", "intermediate_size")


def _preset(row: dict[str, str]) -> Preset:
    said = {column: value for column, value in row.items() if value}
    hub_id, source = said.pop("hub_id"), said.pop("source")
    experts = {part: said.pop(f"experts.{part}") for part in Experts.model_fields if f"experts.{part}" in said}
    kind = said.pop("tower", "")
    tower = {part: int(said.pop(f"tower.{part}")) for part in TOWER if f"tower.{part}" in said}
    shape = ModelShape.model_validate(said | {"experts": experts or None})
    return Preset(hub_id, shape, source, vision_of(kind, tower, shape.hidden_size) if kind else None)


with PRESETS_FILE.open(newline="", encoding="utf-8") as _file:
    PRESETS: dict[str, Preset] = {row.pop("name"): _preset(row) for row in csv.DictReader(_file)}
"""The well-known base models by the names that commands take."""

SIMULATED_FILE = Path(__file__).with_name("simulated.json")
SIMULATED: dict[str, Simulated] = {
    name: Simulated(**known) for name, known in json.loads(SIMULATED_FILE.read_text(encoding="utf-8")).items()
}
"""Well-known base models whose kind has no closed form, by the names that commands take."""
for _name, _hidden in (("qwen3.5-9b", 4096), ("qwen3.5-35b-a3b", 2048)):
    SIMULATED[_name] = SIMULATED[_name]._replace(vision=vision_of("qwen3_5", {}, _hidden))

VARIANT = re.compile(
    r"^meta-|-(instruct|thinking|chat|it|pt|sft|full|hf|base|checkpoints|fp16|2507|unsloth|bnb-4bit|awq|gptq(-int4)?)(?=-|$)|[^a-z0-9]"
)
"""The parts of a model's name that do not change its shape."""
SIZE = re.compile(r"(?<![\d.x])(?<!-a)\d+(\.\d+)?[bm](?![a-z0-9])")
"""The size in a model's name; of 8x7b and 30b-a3b a part stays, because a dense model is none of theirs."""
ALIKE = 0.85
"""From this similarity on, two words count as one that is misspelt: llama with one l less, but not mixtral."""


def same_shape(name: str) -> str | None:
    """Returns the preset whose name, or hub id without its owner, differs only by the kind of tuning or of storage."""
    if name.lower() in {*PRESETS, *(preset.hub_id.lower() for preset in PRESETS.values())}:
        return None  # it is a preset
    bare, known = _bare(name), dict[str, Preset | Simulated]({**PRESETS, **SIMULATED})
    return next((name for name, preset in known.items() if bare in (_bare(name), _bare(preset.hub_id))), None)


def _bare(name: str) -> str:
    """Returns the part of a model's name that decides its shape.

    >>> _bare("NousResearch/Meta-Llama-3-8B-Instruct"), _bare("llama3_8b"), _bare("unsloth/llama-3-8b-bnb-4bit")
    ('llama38b', 'llama38b', 'llama38b')
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

"""The catalogue of base models, ``experiments/models.yaml``. No torch."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.files.content import HUB_ID_PATTERN, REVISION_PATTERN, CountOrZero, HubId, Strict, read_yaml
from peftscope.files.problems import validated
from peftscope.files.wheel import SplitFile
from peftscope.layout import MODELS_FILE, MODELS_FOLDER, shipped, why_not_read
from peftscope.models.presets import PRESETS, did_you_mean
from peftscope.models.shapes import ModelShape

# Without ``trust_remote_code=False``, transformers would ask on the terminal whether to run a model's own code.
LOCAL: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
"""The options with which every model is loaded: from its folder, without pickles, without its own code."""


class RandomSource(Strict):
    """Random weights drawn once from a seed. ``like`` names a preset whose shape is written in bf16, shard by shard."""

    kind: Literal["random"]
    seed: CountOrZero = 0
    like: str | None = None

    @model_validator(mode="after")
    def _like_a_preset(self) -> RandomSource:
        if self.like is not None and self.like not in PRESETS:
            raise ValueError(f"like={self.like!r} is not a preset; {close_match(self.like, PRESETS)}")
        return self


class WheelSource(SplitFile):
    """A GGUF file inside a PyPI wheel or in parts in several, or safetensors with the files in their folder."""

    kind: Literal["wheel"]
    download_bytes: Annotated[int, Field(gt=0)]


class HubSource(Strict):
    """A model of a Hugging Face hub. A spec's own revision overrides the revision that is pinned here."""

    kind: Literal["hub"]
    repository: HubId
    revision: Annotated[str, Field(pattern=REVISION_PATTERN)] | None = None


class BaseModelEntry(Strict):
    """One base model: its source, its licence, and its shape if it is known."""

    source: Annotated[RandomSource | WheelSource | HubSource, Field(discriminator="kind")]
    licence: str = ""
    terms: Annotated[str, Field(description="where the terms stand that its user agrees to; told as it is fetched")] = (
        ""
    )
    note: str = ""
    shape: ModelShape | None = None


@lru_cache
def _catalog() -> dict[str, BaseModelEntry]:
    path = shipped(MODELS_FILE)
    fields = [*BaseModelEntry.model_fields, *ModelShape.model_fields]
    return validated(dict[HubId, BaseModelEntry], read_yaml(path), path, fields)


def find_model(name: str, where: str = "model") -> BaseModelEntry:
    """Returns the entry of a model in the catalogue, or a new entry for a preset or a hub id.

    Raises:
        InputError: The name is not in the catalogue and is neither a preset nor a hub id.
    """
    entry = _catalog().get(name)
    if entry is not None:
        return entry if entry.shape else entry.model_copy(update={"shape": _known_shape(entry.source)})
    if name in PRESETS:
        preset = PRESETS[name]
        return BaseModelEntry(source=HubSource(kind="hub", repository=preset.hub_id), shape=preset.shape)
    if "/" not in name or not re.fullmatch(HUB_ID_PATTERN, name):
        hint = (
            f"{did_you_mean(name, [*_catalog(), *PRESETS])}; a hub id has the form org/name{why_not_read(MODELS_FILE)}"
        )
        raise InputError(Problem(where, f"unknown model (got {shown(name)})", hint))
    source = HubSource(kind="hub", repository=name)
    return BaseModelEntry(source=source, shape=_known_shape(source))


def _known_shape(source: RandomSource | WheelSource | HubSource) -> ModelShape | None:
    """Returns the shape of a source that is a preset of the memory calculator, or None."""
    if isinstance(source, RandomSource) and source.like:
        return PRESETS[source.like].shape
    shapes = {preset.hub_id: preset.shape for preset in PRESETS.values()}
    return shapes.get(source.repository) if isinstance(source, HubSource) else None


def model_folder(name: str, revision: str | None = None) -> Path:
    """Returns the folder of a fetched model.

    >>> model_folder("org/Name", "v1").as_posix()
    'resources/models/org--name@v1'
    """
    return MODELS_FOLDER / (name + (f"@{revision}" if revision else "")).replace("/", "--").lower()

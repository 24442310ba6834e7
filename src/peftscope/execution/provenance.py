"""The provenance of a record: its code, versions, hardware and data."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import psutil
import torch

from peftscope.data.benchmarks import benchmark_folder
from peftscope.data.tasks import task_folder
from peftscope.evaluation.retention import PROSE_SHA256
from peftscope.files.manifest import read_manifest
from peftscope.hardware.bf16 import chosen_way
from peftscope.hardware.cards import PRETENDED
from peftscope.hardware.device import driver_version, processor_name, system_name
from peftscope.hardware.meter import allocator_settings, pci_address
from peftscope.hardware.nvml import driver_reserve_bytes, find_card, other_processes, reading, used_bytes
from peftscope.methods import versions_of
from peftscope.models.catalog import model_folder
from peftscope.record import PACKAGES
from peftscope.spec import RunSpec
from peftscope.words import spoken_bytes


def provenance(spec: RunSpec, rank: int = 0) -> dict[str, Any]:
    """Returns the facts that a reader needs to judge or repeat a run. Call this before the run uses its card."""
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": git_state(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES} | versions_of(spec.method.name),
        "hardware": hardware(spec.device, rank),
        # Only bf16 on a processor has two ways to compute products.
        "bf16_products": chosen_way() if spec.device == "cpu" and spec.precision != "fp32" else None,
        "environment": {
            name: os.environ.get(name)
            for name in (
                "PYTORCH_ALLOC_CONF",
                "PYTORCH_CUDA_ALLOC_CONF",
                "CUDA_VISIBLE_DEVICES",
                "CUDA_DEVICE_ORDER",
                "OMP_NUM_THREADS",
                "MKL_NUM_THREADS",
                "SLURM_JOB_ID",
            )
        },
        "card": _card(rank) if spec.device == "cuda" else None,
        "model": read_manifest(model_folder(spec.model, spec.revision)),
        "task": read_manifest(task_folder(spec.task)),
        "benchmarks": {name: read_manifest(benchmark_folder(name)) for name in spec.benchmarks},
        "prose_sha256": PROSE_SHA256,
    }


def _version(package: str) -> str | None:
    """Returns a package's version, or None if it is not installed: a sweep needs neither lm-eval nor an install."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any]:
    """Returns the commit, and whether the working tree differs from it; both are None outside of a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def hardware(device: str, rank: int = 0) -> dict[str, Any]:
    """Returns the processor, the number of cores, the memory, and the card if the run uses one."""
    facts: dict[str, Any] = {
        "cpu": processor_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": system_name(),
        "gpu": None,
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(rank)
        name = f"{PRETENDED} {card.name}" if torch.version.cuda == PRETENDED else card.name
        facts |= {"gpu": name, "gpu_memory_bytes": card.total_memory, "cuda": torch.version.cuda}
        facts |= {"compute_capability": f"{card.major}.{card.minor}", "driver": driver_version()}
    return facts


def _card(index: int) -> dict[str, Any]:
    """Returns a card's state before the run uses it, and warns on stderr of other processes that use it."""
    card = find_card(pci_address(index))
    others = other_processes(card)
    for other in others or []:
        used = "unknown memory" if other["used_bytes"] is None else spoken_bytes(other["used_bytes"], 1)
        print(f"process {other['pid']} uses the card as well ({used}): times and peaks include it", file=sys.stderr)
    return {
        "at_start": reading(card),
        "used_bytes": used_bytes(card),
        "driver_reserve_bytes": driver_reserve_bytes(card),
        "other_processes": others,
        "allocator_settings": allocator_settings(),
    }


def card_reading() -> dict[str, float | None]:
    """Returns the clocks, the power and the temperature of the current card."""
    return reading(find_card(pci_address()))

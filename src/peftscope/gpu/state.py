"""What is known of a card before anything is measured on it: its state, who else uses it, how fast it can be."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from peftscope.errors import spoken_bytes
from peftscope.hardware import nvml
from peftscope.hardware.cards import Gpu
from peftscope.hardware.device import processor_name
from peftscope.hardware.meter import allocator_settings, pci_address
from peftscope.spec import RunSpec
from peftscope.training.ceilings import measure_ceilings

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def measure_state(gpu: Gpu, device: str) -> dict[str, Any]:
    """Returns the content of ``card.json``: both ceilings, and the clocks and power right after that load.

    Args:
        gpu: The card, or the processor that stands in for one.
        device: ``cuda`` or ``cpu``.
    """
    handle = nvml.find_card(pci_address()) if device == "cuda" else None
    idle = nvml.reading(handle)
    spec = RunSpec(model=gpu.name, task="memory", method={"name": "none"}, learning_rate=0, device=device)
    ceilings = measure_ceilings(spec).model_dump()
    return {
        "device": device,
        "name": gpu.name if device == "cuda" else processor_name(),
        "memory_bytes": gpu.memory_bytes,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "ceilings": ceilings,
        "idle": idle,
        "loaded": nvml.reading(handle),
        "allocator_settings": allocator_settings() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "versions": {name: version(name) for name in PACKAGES},
    }


def other_processes(device: str) -> list[dict[str, int | None]]:
    """Returns who else computes on the card, and says so on standard error: times and peaks include them."""
    found = nvml.other_processes(nvml.find_card(pci_address())) if device == "cuda" else None
    for other in found or []:
        used = "unknown memory" if other["used_bytes"] is None else spoken_bytes(other["used_bytes"], 1)
        print(f"process {other['pid']} uses the card as well ({used}): times and peaks include it", file=sys.stderr)
    return found or []

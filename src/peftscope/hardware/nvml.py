"""What NVML says of a CUDA card: bytes in use, clocks, other processes. It only reads. No torch.

NVML is optional: without it, and for what a card does not tell, the answers are None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

MILLI = 1000


def find_card(address: str) -> Any | None:
    """Returns NVML's handle of the card at a PCI address (``CUDA_VISIBLE_DEVICES`` renumbers torch's, not NVML's)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
    except Exception:  # no library, no driver, no permission
        return None


def used_bytes(card: Any | None) -> int | None:
    """Returns the bytes in use on a card, whoever uses them: torch's own counters miss the context and paged states."""
    return _asked(card, lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(card).used))


def reading(card: Any | None) -> dict[str, float | None]:
    """Returns a card's clocks in MHz, its power and its limit in watts, and its temperature in degrees Celsius."""
    return {
        "sm_clock_mhz": _asked(card, lambda nvml: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM)),
        "memory_clock_mhz": _asked(card, lambda nvml: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM)),
        "power_watts": _asked(card, lambda nvml: nvml.nvmlDeviceGetPowerUsage(card) / MILLI),
        "power_limit_watts": _asked(card, lambda nvml: nvml.nvmlDeviceGetEnforcedPowerLimit(card) / MILLI),
        "temperature_celsius": _asked(
            card, lambda nvml: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)
        ),
    }


def other_processes(card: Any | None) -> list[dict[str, int | None]] | None:
    """Returns ``pid`` and ``used_bytes`` of every process that computes on a card, this one aside.

    In a container NVML may number processes as the host does: ask before this one has used the card.
    """

    def list_others(nvml: Any) -> list[dict[str, int | None]]:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(card)
        return [{"pid": p.pid, "used_bytes": p.usedGpuMemory} for p in processes if p.pid != os.getpid()]

    return _asked(card, list_others)


def _asked(card: Any | None, question: Callable[[Any], T]) -> T | None:
    if card is None:
        return None
    try:
        import pynvml

        return question(pynvml)
    except Exception:  # not every card answers every question
        return None

"""Readings of a CUDA card from NVML: bytes in use, clocks, other processes. Nothing is changed on the card. No torch.

NVML is optional. Without it, and for values that a card does not report, the answers are None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

MILLI = 1000


def find_card(address: str) -> Any | None:
    """Returns NVML's handle of the card at a PCI address (``CUDA_VISIBLE_DEVICES`` renumbers torch's cards only)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
    except Exception:  # no library, no driver, no permission
        return None


def used_bytes(card: Any | None) -> int | None:
    """Returns the bytes that all processes use on a card. torch's own counters miss the context and paged states."""
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
    """Returns ``pid`` and ``used_bytes`` of every other process that computes on a card.

    In a container, NVML may use the host's process numbers and then not recognise this process. Ask before it uses the
    card.
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
    except Exception:  # not every card reports every value
        return None

"""Readings of a CUDA card from NVML: bytes in use, clocks, other processes. Nothing is changed on the card. No torch.

NVML is optional. Without it, and for values that a card does not report, the answers are None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

MILLI = 1000


def find_card(address: str) -> Any | None:
    """Returns NVML's handle of the card at a PCI address (``CUDA_VISIBLE_DEVICES`` renumbers torch's cards only).

    Of a card in slices (MIG) it is that of this process's slice, and None if that is not known: the card's own would
    tell what all tenants use.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
        parts, named = slices(pynvml, card), os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
        if parts and named.startswith("MIG-"):
            return pynvml.nvmlDeviceGetHandleByUUID(named.encode())
        return None if len(parts) > 1 else next(iter(parts), card)
    except Exception:  # no library, no driver, no permission
        return None


def slices(nvml: Any, card: Any) -> list[Any]:
    """Returns the handles of the slices (MIG) of a card; none of a card that is whole."""
    found: list[Any] = []
    with suppress(Exception):  # most cards have no such mode
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card) if nvml.nvmlDeviceGetMigMode(card)[0] else 0):
            with suppress(Exception):  # no slice has this number
                found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index))
    return found


def capability_of(card: Any) -> float:
    """Returns the compute capability of a card; 0 if NVML does not tell."""
    major, minor = _asked(card, lambda nvml: nvml.nvmlDeviceGetCudaComputeCapability(card)) or (0, 0)
    return float(major + minor / 10)


def memory(nvml: Any, card: Any) -> Any:
    """Returns a card's ``total`` and ``used`` bytes, and the driver's ``reserved`` ones.

    The first version of the call, which counts these as used, stands in with old drivers and with some of WSL2.
    """
    try:
        return nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2)
    except Exception:
        return nvml.nvmlDeviceGetMemoryInfo(card)


def used_bytes(card: Any | None) -> int | None:
    """Returns the bytes that all processes use on a card. torch's own counters miss the context and paged states."""
    return _asked(card, lambda nvml: int(memory(nvml, card).used))


def driver_reserve_bytes(card: Any | None) -> int | None:
    """Returns the bytes that the driver keeps for itself; None where ``used_bytes`` contains them."""
    return _asked(card, lambda nvml: int(memory(nvml, card).reserved))


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

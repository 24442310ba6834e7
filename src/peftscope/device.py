"""What this machine is, and which device runs use on it, found without loading torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from peftscope.errors import InputError, Problem
from peftscope.spec import Device


def detect_device() -> Device:
    """Returns ``cuda`` where NVML sees a card that this process may use, else ``cpu``.

    ``PEFTSCOPE_DEVICE`` decides it by hand.

    Raises:
        InputError: ``PEFTSCOPE_DEVICE`` is neither.
    """
    wish = os.environ.get("PEFTSCOPE_DEVICE")
    if wish:
        if wish not in ("cpu", "cuda"):
            raise InputError(Problem("PEFTSCOPE_DEVICE", f"unknown device (got {wish!r})", "use cpu or cuda"))
        return wish  # type: ignore[return-value]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "cpu"
    return "cuda" if gpu_names() else "cpu"


def gpu_names() -> list[str]:
    """Returns the names of the machine's NVIDIA cards; none where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    except Exception:  # no library, no driver, no permission: no card for us
        return []
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def gpu_memories() -> list[int]:
    """Returns the bytes of memory of the cards of ``gpu_names``; none where the driver does not say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]
    except Exception:
        return []


def processor_name() -> str:
    """Returns the processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

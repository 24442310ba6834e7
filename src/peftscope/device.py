"""What this machine is, and which device runs use on it, found without loading torch."""

from __future__ import annotations

import os
import platform
import shutil
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


def find_compiler(device: Device) -> str | None:
    """Returns the compiler that torch.compile calls: of C++ on a processor, of C (by Triton) for a card; None: none."""
    variable, names = ("CXX", ("g++", "clang++")) if device == "cpu" else ("CC", ("gcc", "clang"))
    wish = os.environ.get(variable)
    return next((found for name in ([wish] if wish else names) if (found := shutil.which(name))), None)


def processor_name() -> str:
    """Returns the processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

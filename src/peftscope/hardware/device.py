"""This machine's cards, processor and compiler, and the device that runs use. No torch."""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from peftscope.errors import InputError, Problem
from peftscope.files.lock import locked

Device = Literal["cpu", "cuda"]

DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver on Linux describes each card, also to those who lack the library that asks it."""


def detect_device() -> Device:
    """Returns ``cuda`` if there is a card that this process may use, and ``cpu`` otherwise.

    ``PEFTSCOPE_DEVICE`` overrides the detection.

    Raises:
        InputError: ``PEFTSCOPE_DEVICE`` is neither ``cpu`` nor ``cuda``.
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
    """Returns the names of the machine's NVIDIA cards, or an empty list without a driver."""
    names = _of_cards(lambda nvml, card: nvml.nvmlDeviceGetName(card))
    if names is None:
        return _names_by_driver()
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _of_cards(question: Callable[[Any, Any], Any]) -> list[Any] | None:
    """Returns what NVML answers of each card; None without its library, which is optional."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [question(pynvml, card) for card in cards]
    except Exception:  # no driver or no permission: no card can be used
        return []


def _names_by_driver() -> list[str]:
    try:
        files = [path.read_text(errors="replace") for path in sorted(DRIVER.glob("*/information"))]
    except OSError:  # no permission
        return []
    return [line.partition(":")[2].strip() for text in files for line in text.splitlines() if line.startswith("Model:")]


def visible_cards() -> list[str]:
    """Returns the cards that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(len(gpu_names()))]
    return [card.strip() for card in visible.split(",") if card.strip() not in ("", "-1")]


@contextmanager
def cards_claimed(count: int, folder: Path | None = None) -> Iterator[list[str]]:
    """Claims ``count`` cards that no other job of this user on this machine holds, and makes only these visible.

    Snakemake counts the cards of a machine but does not assign them to jobs. If only ``count`` cards are visible, a
    cluster's scheduler has assigned them, and there is nothing to claim. A claim is a file lock, which the system
    releases if the process dies. Claim cards before torch is imported. Tests use a folder of their own for the locks.

    Raises:
        InputError: Fewer cards are visible.
    """
    cards = visible_cards() if count else []
    if len(cards) < count:
        message = f"the run needs {count} cards, {len(cards)} are visible (CUDA_VISIBLE_DEVICES, PEFTSCOPE_DEVICE)"
        raise InputError(Problem("device", message, "ask the scheduler for more, or run it elsewhere"))
    if len(cards) == count:
        yield cards
        return
    folder = folder or Path(tempfile.gettempdir()) / f"peftscope-cards-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as claims:
        mine: list[str] = []
        while True:
            for card in cards:
                if len(mine) < count and card not in mine:
                    with suppress(InputError):  # another job holds it
                        claims.enter_context(locked(folder / re.sub(r"\W", "-", card), seconds=0))
                        mine.append(card)
            if len(mine) == count:
                break
            # Two jobs that each hold some cards while they wait for more would wait for each other for ever.
            claims.close()
            mine.clear()
            time.sleep(random.uniform(0.5, 1.5))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        yield mine


def find_compiler(device: Device) -> str | None:
    """Returns the compiler that torch.compile calls, or None: C++ on a processor, C (called by Triton) for a card."""
    variable, names = ("CXX", ("g++", "clang++")) if device == "cpu" else ("CC", ("gcc", "clang"))
    wish = os.environ.get(variable)
    return next((found for name in ([wish] if wish else names) if (found := shutil.which(name))), None)


def gpu_memories() -> list[int]:
    """Returns the bytes of memory of each card of ``gpu_names``, or an empty list if the driver does not tell."""
    return _of_cards(lambda nvml, card: int(nvml.nvmlDeviceGetMemoryInfo(card).total)) or []


def processor_name() -> str:
    """Returns the name of the processor's model, or of its architecture if the system does not tell the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

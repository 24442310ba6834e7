"""This machine's cards, processor and compiler, and the device that runs use. No torch."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from peftscope.errors import InputError, Problem
from peftscope.files.lock import locked
from peftscope.hardware.nvml import capability_of, memory, slices

Device = Literal["cpu", "cuda"]

DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver on Linux describes each card, also to those who lack the library that asks it."""
WSL = " (WSL2)"
DEVICES = Path("/dev/nvidiactl"), Path("/dev/dxg")
"""The devices by which Linux, and Linux on Windows (WSL2), reach a card."""


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
    return "cuda" if cards() else "cpu"


class Card(NamedTuple):
    """A card of this machine, or a slice of one (MIG).

    Attributes:
        key: What ``CUDA_VISIBLE_DEVICES`` calls it.
        name: The driver's name.
        memory_bytes: Its memory; 0 if the driver does not tell.
        capability: Its compute capability; 0 if the driver does not tell.
    """

    key: str
    name: str
    memory_bytes: int = 0
    capability: float = 0.0


def cards() -> list[Card]:
    """Returns the machine's NVIDIA cards, or an empty list without a driver.

    NVML tells them or, where it is missing or broken, the driver's own files or torch.
    """
    return _cards_by_nvml() or _cards_by_driver() or _cards_by_torch()


def _cards_by_nvml() -> list[Card]:
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            capability = capability_of(card)
            for handle in slices(nvml, card) or [card]:
                key = str(index) if handle is card else _text(nvml.nvmlDeviceGetUUID(handle))
                size = int(memory(nvml, handle).total)
                found.append(Card(key, _text(nvml.nvmlDeviceGetName(handle)), size, capability))
    except Exception:  # no library, no driver, or one of another version
        return []
    return found


def driver_version() -> str:
    """Returns the version of NVIDIA's driver, by NVML or its own file; empty if neither tells."""
    with suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        return _text(pynvml.nvmlSystemGetDriverVersion())
    with suppress(OSError):
        found = re.search(r"Module\D*([\d.]+)", DRIVER.with_name("version").read_text())
        return found[1] if found else ""
    return ""


def system_name() -> str:
    """Returns the operating system; on WSL2, a driver of Windows may move a card's memory to the host."""
    return platform.system() + (WSL if "microsoft" in platform.release().lower() else "")


def _text(told: str | bytes) -> str:
    """Returns the text that NVML told; older versions of the library tell bytes."""
    return told.decode() if isinstance(told, bytes) else told


def _cards_by_driver() -> list[Card]:
    try:
        files = [path.read_text(errors="replace") for path in sorted(DRIVER.glob("*/information"))]
    except OSError:  # no permission
        return []
    lines = [line for text in files for line in text.splitlines() if line.startswith("Model:")]
    return [Card(str(index), line.partition(":")[2].strip()) for index, line in enumerate(lines)]


@cache
def _cards_by_torch() -> list[Card]:
    """Asks torch, where the system has a card's device: in a process of its own, for CUDA does not survive a fork."""
    if not any(path.exists() for path in DEVICES):
        return []
    code = (
        "import json, torch; cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()));"
        "print(json.dumps([(card.name, card.total_memory, card.major + card.minor / 10) for card in cards]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    try:
        command = [sys.executable, "-c", code]
        told = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=99).stdout
        return [Card(str(index), *card) for index, card in enumerate(json.loads(told.splitlines()[-1]))]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []


def visible_cards() -> list[str]:
    """Returns the cards that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [card.key for card in cards()]
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
        if "CUDA_VISIBLE_DEVICES" not in os.environ:  # the numbers are NVML's, and CUDA would count by speed
            os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        yield mine


def find_compiler(device: Device) -> str | None:
    """Returns the compiler that torch.compile calls, or None: C++ on a processor, C (called by Triton) for a card."""
    variable, names = ("CXX", ("g++", "clang++")) if device == "cpu" else ("CC", ("gcc", "clang"))
    wish = os.environ.get(variable)
    return next((found for name in ([wish] if wish else names) if (found := shutil.which(name))), None)


def processor_name() -> str:
    """Returns the name of the processor's model, or of its architecture if the system does not tell the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""Phases of a run: their seconds and their memory peaks, reset between phases and kept apart."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from peftscope.record import Memory, PhaseMemory, RankMemory, Seconds

SAMPLE_SECONDS = 0.02


class Phases:
    """Measures a run phase by phase; a phase that is entered twice adds its seconds and keeps its larger peak.

    Attributes:
        seconds: Wall seconds, ``importing`` counted from the process's start.
        memory: Peaks; ``load`` and ``initialise`` both count as load.
    """

    def __init__(self, device: str, began: float) -> None:
        """Starts from ``began``, the ``perf_counter`` of the process's start."""
        self.device = device
        self.seconds = Seconds()
        self.memory = Memory()
        self._began = began

    def mark_imported(self) -> None:
        """Ends the phase that began with the process."""
        self.seconds.importing = time.perf_counter() - self._began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a block as (part of) a phase of ``Seconds``."""
        sampler = _start_peaks(self.device)
        began = time.perf_counter()
        try:
            yield
        finally:
            peaks = _stop_peaks(self.device, sampler)
            setattr(self.seconds, name, getattr(self.seconds, name) + time.perf_counter() - began)
            target = {"load": "load", "initialise": "load", "train": "train", "evaluate": "evaluate"}.get(name)
            if target:
                keep_larger(getattr(self.memory, target), peaks)

    def gather_ranks(self, parameter_bytes: int, from_all: Callable[[RankMemory], list[RankMemory]]) -> None:
        """Notes what each process of a sharded run held, and raises the peaks to the largest.

        Args:
            parameter_bytes: What this process holds of the model.
            from_all: Returns what every process gives to it.
        """
        peaks = {phase: getattr(self.memory, phase).model_copy() for phase in ("load", "train", "evaluate")}
        self.memory.ranks = from_all(RankMemory(parameter_bytes=parameter_bytes, **peaks))
        for rank in self.memory.ranks:
            for phase in peaks:
                keep_larger(getattr(self.memory, phase), getattr(rank, phase).model_dump())

    def finish(self) -> None:
        """Sets the wall seconds of the whole job so far."""
        self.seconds.wall = time.perf_counter() - self._began


def keep_larger(memory: PhaseMemory, peaks: dict[str, int | None]) -> None:
    """Raises the peaks of ``memory`` to those given."""
    for field, value in peaks.items():
        if value is not None:
            setattr(memory, field, max(value, getattr(memory, field) or 0))


def _start_peaks(device: str) -> _DeviceSampler | None:
    _reset_resident_peak()
    if device != "cuda":
        return None
    # What earlier phases left in the cache would count as this one's reserved and device memory.
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return _DeviceSampler(torch.cuda.current_device())


def _stop_peaks(device: str, sampler: _DeviceSampler | None) -> dict[str, int | None]:
    peaks: dict[str, int | None] = {"peak_resident_bytes": resident_peak_bytes()}
    if sampler is not None:
        peaks |= {
            "peak_device_bytes": sampler.stop(),
            "peak_tensor_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return peaks


def _reset_resident_peak() -> None:
    # Not Linux, or not allowed: the peak is then the process's so far.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak_bytes() -> int | None:
    """Returns the most memory this process has held, by the kernel's own mark; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


class _DeviceSampler:
    """Polls NVML for the card's used bytes; torch's own counters miss the context and paged states."""

    def __init__(self, index: int) -> None:
        self._peak: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, args=(index,), daemon=True)
        self._thread.start()

    def _poll(self, index: int) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            # By PCI address, because CUDA_VISIBLE_DEVICES renumbers torch's cards and not NVML's.
            properties: Any = torch.cuda.get_device_properties(index)
            address = f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
            while True:
                self._peak = max(self._peak or 0, int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))
                if self._done.wait(SAMPLE_SECONDS):
                    return
        except Exception:  # NVML is optional: without it the peak stays null and is listed as unavailable
            return

    def stop(self) -> int | None:
        """Returns the largest value seen."""
        self._done.set()
        self._thread.join()
        return self._peak

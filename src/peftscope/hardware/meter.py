"""Meters of a device: memory peaks since a reset, and the seconds of a step."""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from peftscope.hardware.cards import CONTEXT_BYTES
from peftscope.hardware.nvml import find_card, used_bytes

SAMPLE_SECONDS = 0.02


class Meter:
    """Measures peaks and times on the processor, which works synchronously; the system's kernel records the peak."""

    def reset(self) -> None:
        """Resets the peaks to the memory in use now, if the system allows it."""
        with contextlib.suppress(OSError):  # not Linux, or no permission: the peak is then that since the start
            Path("/proc/self/clear_refs").write_text("5")

    def peaks(self) -> dict[str, int | None]:
        """Returns the peaks since the last reset: the fields of ``PhaseMemory`` that this device can measure."""
        return {"peak_resident_bytes": resident_peak_bytes()}

    def synchronise(self) -> None:
        """Waits until the device has finished all submitted work."""

    def clock(self) -> Callable[[], float]:
        """Starts a clock. The returned function waits for the device and returns the elapsed seconds."""
        began = time.perf_counter()
        return lambda: time.perf_counter() - began


class CudaMeter(Meter):
    """Measures a card as well: tensors by torch's counters, the whole card by NVML, time by events."""

    _sampler: PeakSampler | None = None

    def reset(self) -> None:
        """Empties the cache, which would otherwise count as reserved, and resets all peaks."""
        super().reset()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        card = find_card(pci_address())
        self._sampler = PeakSampler(lambda: used_bytes(card))

    def peaks(self) -> dict[str, int | None]:
        """Returns the peaks of tensors, of the allocator, of the card, and of the process on the host."""
        assert self._sampler is not None
        return super().peaks() | {
            "peak_device_bytes": self._sampler.stop(),
            "peak_tensor_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    def synchronise(self) -> None:
        """Waits for the card."""
        torch.cuda.synchronize()

    def clock(self) -> Callable[[], float]:
        """Starts a clock on the card after the card has become idle."""
        torch.cuda.synchronize()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()

        def seconds() -> float:
            ended.record()
            ended.synchronize()
            return began.elapsed_time(ended) / 1000

        return seconds


def make_meter(device: str) -> Meter:
    """Returns the meter of a device."""
    return CudaMeter() if device == "cuda" else Meter()


class PeakSampler:
    """Polls a value from a thread until it is stopped, or until the value is None, and keeps the largest."""

    def __init__(self, ask: Callable[[], int | None]) -> None:
        self._ask = ask
        self._peak: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while (value := self._ask()) is not None:
            self._peak = max(self._peak or 0, value)
            if self._done.wait(SAMPLE_SECONDS):
                return

    def stop(self) -> int | None:
        """Stops polling and returns the largest value, including one last reading."""
        self._done.set()
        self._thread.join()
        last = self._ask()
        return self._peak if last is None else max(self._peak or 0, last)


def resident_peak_bytes() -> int | None:
    """Returns the process's peak resident bytes as the kernel records them, or None if it does not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def pci_address(index: int | None = None) -> str:
    """Returns the PCI address of one of torch's cards as NVML writes it; the default is the current card."""
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"


@contextlib.contextmanager
def limited_memory(limit_bytes: int) -> Iterator[int]:
    """Limits torch's allocator, inside this context, to what a smaller card would leave to it: the bytes it yields.

    What the allocator takes beyond raises ``torch.OutOfMemoryError``. The CUDA context is not the allocator's, so its
    size is subtracted: that of this process, or of the worst card so far, whichever is larger. A limit above this
    card's own memory limits nothing.
    """
    card = find_card(pci_address())
    before = used_bytes(card)
    torch.empty(1, device="cuda")  # creates the context
    used = used_bytes(card)
    context = used - before - torch.cuda.memory_reserved() if used is not None and before is not None else 0
    left = limit_bytes - max(context, CONTEXT_BYTES)
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, left / total)))
    try:
        yield left
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def allocator_settings() -> str | None:
    """Returns the settings of torch's CUDA allocator, such as expandable segments, or None if this torch hides them."""
    ask = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    return ask() if ask else None


@contextlib.contextmanager
def if_room() -> Iterator[None]:
    """Ends this context early, without an error, where memory runs out: a good run can lack what is measured in it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def paged_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of bitsandbytes' paged states. They are managed memory, which torch does not count."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    paged = [value for value in states if isinstance(value, torch.Tensor) and getattr(value, "is_paged", False)]
    return sum(tensor.numel() * tensor.element_size() for tensor in paged)


LEAST_FREE_BYTES = 2**29
"""cuBLAS and cuDNN do not say why they cannot begin; with less than this left on the card, it is for lack of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the card or the host is out of memory."""
    if re.search(r"CU(BLAS|DNN)_STATUS_NOT_INITIALIZED", str(error)):
        return torch.cuda.mem_get_info()[0] < LEAST_FREE_BYTES
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "std::bad_alloc")
    # Where nothing at all is left, torch has no memory for its own message either, and cuts it after 15 characters.
    cut = "[enforce fail at alloc_cpu.cpp".startswith(str(error)[:30] or "?")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or cut or any(part in str(error) for part in words)

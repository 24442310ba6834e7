"""Memory on a card: the peaks of two equal training steps and an evaluation, predicted and measured, phase by phase."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import torch

from peftscope.gpu.model import config_of, random_base, random_batch
from peftscope.hardware import nvml
from peftscope.hardware.cards import CUBLAS_BYTES
from peftscope.hardware.meter import pci_address
from peftscope.memory.allocator import reserved_bytes
from peftscope.memory.answer import peaks_by_formula, peaks_of
from peftscope.memory.probe import track_evaluation, track_steps
from peftscope.memory.question import Question
from peftscope.memory.simulate import empty_batch, simulate
from peftscope.memory.trace import PHASES, Peak
from peftscope.memory.tracker import MemoryTracker, tensors_of
from peftscope.training.build import apply_method
from peftscope.training.load import attention
from peftscope.training.step import make_optimizer


def predict(question: Question) -> dict[str, Any]:
    """Returns the simulation's bytes: ``phases``, ``reserved`` and ``device``; loading is left out."""
    spec = question.spec
    width, responses = spec.seq_len, question.responses
    cublas = question.gpu.cublas_bytes if question.gpu else CUBLAS_BYTES
    training, evaluation = simulate(
        spec,
        config_of(question),
        [empty_batch(rows=spec.batch_size, width=width, responses=responses)] * 2,
        empty_batch(rows=spec.eval_batch_size, width=width, responses=responses),
        cublas,
    )
    assert evaluation is not None
    peaks = peaks_of(question, training, evaluation)
    reserved = max(reserved_bytes(training), reserved_bytes(evaluation))
    return {
        "phases": {phase: peaks.phases[phase] for phase in PHASES},
        "reserved": reserved,
        "device": reserved + peaks.device_bytes - peaks.reserved_bytes,
    }


def predict_by_formula(question: Question) -> dict[str, Any]:
    """Returns what ``predict`` does, by the closed form: at once, and less exact."""
    peaks = peaks_by_formula(question)
    return {
        "phases": {phase: peaks.phases[phase] for phase in PHASES},
        "reserved": peaks.reserved_bytes,
        "device": peaks.device_bytes,
    }


def measure(question: Question, device: str) -> dict[str, Any]:
    """Runs two training steps and an evaluation on random weights, and returns the bytes that they took.

    The starting points of LoftQ and PiSSA are not computed: they take minutes, and no tensor more.

    Args:
        question: Says what; it must not be packed.
        device: ``cpu``, where only tensors are known, or ``cuda``, in a process that has not used it.

    Returns:
        ``phases`` and, on CUDA: ``reserved``; ``requested`` before the allocator rounds; ``device``, all that NVML sees
        in use on the card, or None; and ``workspace`` of cuBLAS.

    Raises:
        torch.OutOfMemoryError: The card is too small.
    """
    spec = question.spec.model_copy(update={"device": device})
    trained = apply_method(random_base(question, device), spec, spec.method.build_empty)
    model = trained.model
    batch = random_batch(question, spec.batch_size).to(device)
    training: Any = MemoryTracker(tensors_of(model, batch)) if device == "cpu" else CudaPeaks()
    optimizer = make_optimizer(model, spec)
    track_steps(training, trained, [batch, batch], optimizer, spec)
    # An evaluation is predicted for a model without anything of its training.
    del optimizer, batch
    trained.loss_function.nll = None
    batch = random_batch(question, spec.eval_batch_size).to(device)
    evaluation: Any = MemoryTracker(tensors_of(model)) if device == "cpu" else CudaPeaks()
    with attention(model, spec.attention):
        track_evaluation(evaluation, model, batch, spec)
    found = {
        "phases": {name: peak.size for part in (training, evaluation) for name, peak in part.trace.peaks().items()}
    }
    if device == "cpu":
        return found
    used = [part.used for part in (training, evaluation) if part.used is not None]
    return found | {
        "reserved": max(training.reserved, evaluation.reserved),
        "requested": max(training.requested, evaluation.requested),
        "device": max(used, default=None),
        "workspace": _workspace_bytes(),
    }


class CudaPeaks(nullcontext[None]):
    """Stands where a ``MemoryTracker`` and its trace do, and reads the peaks that torch's CUDA allocator keeps.

    Attributes:
        reserved: Largest reserved bytes.
        requested: Largest sum of the sizes that were asked for.
        used: Largest number of bytes that NVML saw in use on the card; None: NVML gives no answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reserved = self.requested = 0
        self.used: int | None = None
        self._phase = ""
        self._peaks: dict[str, int] = {}
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    @property
    def trace(self) -> CudaPeaks:
        """Itself."""
        return self

    def add(self, tensor: torch.Tensor) -> None:
        """Does nothing: the allocator knows every tensor."""

    def begin(self, phase: str) -> None:
        """Ends a phase and begins another; the empty one is the time outside of steps."""
        torch.cuda.synchronize()
        if self._phase:
            statistics = torch.cuda.memory_stats()
            self._peaks[self._phase] = max(self._peaks.get(self._phase, 0), statistics["allocated_bytes.all.peak"])
            self.reserved = max(self.reserved, statistics["reserved_bytes.all.peak"])
            self.requested = max(self.requested, statistics["requested_bytes.all.peak"])
        if not phase:
            # The cache still holds what the step took.
            used = used_bytes()
            self.used = used if self.used is None or used is None else max(self.used, used)
        torch.cuda.reset_peak_memory_stats()
        self._phase = phase

    def peaks(self) -> dict[str, Peak]:
        """Returns the allocated peak of each phase."""
        return {phase: Peak(size, 0) for phase, size in self._peaks.items()}


def used_bytes() -> int | None:
    """Returns the bytes in use on the card, whoever uses them; None: NVML gives no answer."""
    return nvml.used_bytes(nvml.find_card(pci_address()))


def _workspace_bytes() -> int:
    """Returns what cuBLAS's workspaces, one for each stream and handle, take of the allocated bytes; frees them."""
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated()

"""The memory probe: a few training steps, with the peak of each phase from the byte tracker or the card's allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from peftscope.data.batching import Batch
from peftscope.evaluation.heldout import losses_of, response_logits
from peftscope.memory.trace import Peak
from peftscope.memory.tracker import MemoryTracker, tensors_of
from peftscope.spec import RunSpec
from peftscope.training.step import TrainedModel, make_optimizer, train_step


class AllocatorPeaks(nullcontext[None]):
    """Stands in for a ``MemoryTracker`` and its trace on a card, whose allocator keeps the peak of tensors itself."""

    def __init__(self) -> None:
        super().__init__()
        self._phase = ""
        self._peaks: dict[str, Peak] = {}

    @property
    def trace(self) -> AllocatorPeaks:
        """Itself."""
        return self

    @property
    def live_bytes(self) -> int:
        """The bytes of the tensors that are alive now."""
        return torch.cuda.memory_allocated()

    def begin(self, phase: str) -> None:
        """Ends a phase and begins another; the empty one is the time between steps."""
        torch.cuda.synchronize()
        peak = Peak(torch.cuda.max_memory_allocated(), 0)
        if self._phase and (self._phase not in self._peaks or peak.size > self._peaks[self._phase].size):
            self._peaks[self._phase] = peak
        torch.cuda.reset_peak_memory_stats()
        self._phase = phase

    def peaks(self) -> dict[str, Peak]:
        """Returns the largest peak of each phase."""
        return self._peaks


def probe_training(trained: TrainedModel, batch: Batch, spec: RunSpec) -> tuple[dict[str, int], int]:
    """Returns the peak of live tensor bytes in ``forward``, ``backward`` and ``optimizer``, and those between steps.

    The larger peak of all ``spec.probe_steps`` steps counts. Optimizer states are allocated in the first step, so the
    second is a typical one. The probe changes the weights, so it must run last. It makes its own optimizer.
    """
    tracker = AllocatorPeaks() if spec.device == "cuda" else MemoryTracker(tensors_of(trained.model, batch))
    resident = []

    def note(phase: str) -> None:
        if not phase:
            resident.append(tracker.live_bytes)

    optimizer = make_optimizer(trained.model, spec)
    track_steps(tracker, trained, [batch] * spec.probe_steps, optimizer, spec, before_phase=note)
    return {phase: peak.size for phase, peak in tracker.trace.peaks().items()}, max(resident)


def track_steps(
    tracker: MemoryTracker | AllocatorPeaks,
    trained: TrainedModel,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    spec: RunSpec,
    before_phase: Callable[[str], None] = lambda phase: None,
) -> None:
    """Runs a training step on each batch under a tracker. A gradient accumulation uses the same batch throughout."""

    def begin(phase: str) -> None:
        before_phase(phase)
        tracker.trace.begin(phase)

    trained.model.train()
    with tracker:
        for batch in batches:
            # In step 0, AdaLoRA updates its importance scores but prunes nothing.
            train_step(trained, [batch] * spec.gradient_accumulation, optimizer, spec, step=0, at_phase=begin)
            begin("")


def probe_evaluation(model: Any, batch: Batch, spec: RunSpec) -> int:
    """Returns the peak of live tensor bytes while a held-out batch is scored."""
    tracker = MemoryTracker(tensors_of(model))
    track_evaluation(tracker, model, batch, spec)
    return tracker.peak_bytes


def track_evaluation(tracker: MemoryTracker, model: Any, batch: Batch, spec: RunSpec) -> None:
    """Computes the losses of a held-out batch under a tracker. The model stays in evaluation mode."""
    model.eval()
    for tensor in tensors_of(batch):
        tracker.add(tensor)
    with tracker:
        tracker.trace.begin("evaluate")
        losses_of(response_logits(model, batch, spec, spec.method.logit_offset()), batch)
        tracker.trace.begin("")

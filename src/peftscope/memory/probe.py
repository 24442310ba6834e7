"""The memory probe: a few training steps under the byte tracker, for devices that record no peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from peftscope.data.batching import Batch
from peftscope.evaluation.heldout import heldout_losses
from peftscope.memory.tracker import MemoryTracker, tensors_of
from peftscope.spec import RunSpec
from peftscope.training.step import TrainedModel, make_optimizer, train_step


def probe_training(trained: TrainedModel, batch: Batch, spec: RunSpec) -> dict[str, int]:
    """Returns the peak of live tensor bytes in ``forward``, ``backward`` and ``optimizer``.

    The larger peak of all ``spec.probe_steps`` steps counts. Optimizer states are allocated in the first step, so the
    second is a typical one. The probe changes the weights, so it must run last. It makes its own optimizer.
    """
    tracker = MemoryTracker(tensors_of(trained.model, batch))
    track_steps(tracker, trained, [batch] * spec.probe_steps, make_optimizer(trained.model, spec), spec)
    return {phase: peak.size for phase, peak in tracker.trace.peaks().items()}


def track_steps(
    tracker: MemoryTracker,
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
        heldout_losses(model, batch, spec)
        tracker.trace.begin("")

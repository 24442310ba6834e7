"""The memory probe: the same step, a few times, under the byte tracker. For devices that keep no peak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftscope.data.batching import Batch, Example
from peftscope.evaluation.heldout import heldout_nll
from peftscope.memory.tracker import MemoryTracker, tensors_of
from peftscope.spec import RunSpec
from peftscope.training.step import CausalLoss, make_optimizer, train_step


def probe_training(model: Any, batch: Batch, spec: RunSpec, loss_function: CausalLoss) -> dict[str, int]:
    """Returns the peaks of ``spec.probe_steps`` steps on a batch, as ``track_steps`` does.

    Runs after everything else, with an optimizer of its own: it changes the weights.
    """
    return track_steps(model, batch, spec, loss_function, steps=spec.probe_steps)


def track_steps(model: Any, batch: Batch, spec: RunSpec, loss_function: CausalLoss, steps: int) -> dict[str, int]:
    """Returns the peak of live tensor bytes in ``forward``, ``backward`` and ``optimizer``.

    The optimizer's states appear at the first step, so the second is the steady one; the larger peak counts.
    """
    model.train()
    optimizer = make_optimizer(model, spec)
    peaks = dict.fromkeys(("forward", "backward", "optimizer"), 0)
    tracker = MemoryTracker(tensors_of(model, batch))
    current: list[str] = []

    def close_phase() -> None:
        if current:
            peaks[current[0]] = max(peaks[current[0]], tracker.peak_bytes)
        tracker.reset_peak()

    def enter_phase(phase: str) -> None:
        close_phase()
        current[:] = [phase]

    with tracker:
        for _ in range(steps):
            train_step(
                model,
                [batch] * spec.gradient_accumulation,
                optimizer,
                spec,
                loss_function,
                # Step 0 is before any pruning: AdaLoRA then updates its importance scores and changes no rank.
                after_optimizer_step=lambda: spec.method.after_optimizer_step(model, 0),
                at_phase=enter_phase,
            )
            close_phase()
            current.clear()
    return peaks


@torch.no_grad()
def probe_evaluation(model: Any, examples: Sequence[Example], spec: RunSpec, pad_token_id: int) -> int:
    """Returns the peak of live tensor bytes over the held-out batch with the longest sequence."""
    start = max(
        range(0, len(examples), spec.eval_batch_size),
        key=lambda first: max(len(example.tokens) for example in examples[first : first + spec.eval_batch_size]),
    )
    model.eval()
    tracker = MemoryTracker(tensors_of(model))
    with tracker:
        heldout_nll(model, examples[start : start + spec.eval_batch_size], spec, pad_token_id)
    return tracker.peak_bytes

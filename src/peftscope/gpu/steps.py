"""Speed of a training step: seconds, tokens a second, and their share of what the card reaches at a matrix product."""

from __future__ import annotations

from statistics import median, quantiles
from typing import Any

import torch

from peftscope.gpu.model import random_base, random_batch
from peftscope.hardware import nvml
from peftscope.hardware.meter import make_meter, pci_address
from peftscope.memory.probe import probe_training
from peftscope.memory.question import Question
from peftscope.training.build import apply_method
from peftscope.training.ceilings import count_work
from peftscope.training.step import make_optimizer, train_step

WARM_UP = 3
MEASURED = 2
"""Steps whose peaks are taken: the allocator holds a little more in the second."""
TIMED = {"cuda": 20, "cpu": 5}
BUDGET_SECONDS = 40.0
"""After so long no further step is timed."""
FEWEST = 3


def time_steps(question: Question, device: str) -> dict[str, Any]:
    """Returns the time and the peaks of training steps that are all alike, on random weights.

    Peaks are those of two steps after the warm-up, ``resident`` what is left between two of them; times come after, so
    that nothing is asked of the card between its steps.

    Raises:
        torch.OutOfMemoryError: The card is too small.
    """
    spec = question.spec.model_copy(update={"device": device})
    trained = apply_method(random_base(question, device), spec, spec.method.build_empty)
    batch = random_batch(question, spec.batch_size).to(device)
    tracked = probe_training(trained, batch, spec) if device == "cpu" else {}
    optimizer, meter = make_optimizer(trained.model, spec), make_meter(device)
    trained.model.train()

    def step() -> None:
        # Half way through a run AdaLoRA rates, prunes and masks in every step.
        train_step(trained, [batch], optimizer, spec, step=spec.steps // 2)

    for _ in range(WARM_UP):
        step()
    meter.reset()
    resident = torch.cuda.memory_allocated() if device == "cuda" else None
    for _ in range(MEASURED):
        step()
    meter.synchronise()
    peaks = meter.peaks()
    seconds: list[float] = []
    while len(seconds) < FEWEST or (len(seconds) < TIMED[device] and sum(seconds) < BUDGET_SECONDS):
        stop = meter.clock()
        step()
        seconds.append(stop())
    state = nvml.reading(nvml.find_card(pci_address())) if device == "cuda" else {}
    tokens, responses = int(batch.attention_mask.sum()), int(batch.response_tokens)
    return {
        "allocated": max(tracked.values()) if tracked else peaks["peak_tensor_bytes"],
        "reserved": peaks.get("peak_reserved_bytes"),
        "device": peaks.get("peak_device_bytes"),
        "resident": resident,
        "seconds": seconds,
        "tokens": tokens,
        "useful_flops": count_work(trained.model).of_step(tokens, responses),
        "state": state,
    }


def speed_of(timed: dict[str, Any], matmul_flops_per_second: float | None) -> dict[str, Any]:
    """Returns the columns of speed; the share is None where the card's own rate was not measured.

    Args:
        timed: From ``time_steps``.
        matmul_flops_per_second: The card's rate at a large matrix product.
    """
    seconds = timed["seconds"]
    lower, middle, upper = quantiles(seconds, n=4, method="inclusive")
    rate = timed["useful_flops"] / middle
    return {
        "step_seconds": middle,
        "step_seconds_lower_quartile": lower,
        "step_seconds_upper_quartile": upper,
        "timed_steps": len(seconds),
        "tokens_per_second": timed["tokens"] / median(seconds),
        "useful_flops_per_second": rate,
        "matmul_share": rate / matmul_flops_per_second if matmul_flops_per_second else None,
        **timed["state"],
        "samples": {"step": [float(f"{value:.6g}") for value in seconds]},
    }

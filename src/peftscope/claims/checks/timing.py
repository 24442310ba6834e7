"""Times on this machine's processor: two kinds of work in turns, so that what slows the machine slows both.

Weights are random. A run is given by the options of ``peftscope memory``, beside those of ``RUN``. Each pair times both
works, and every second pair begins with the other one. The quantity is the median of the pairs' ratios, with the
interval of its order statistics. Run these checks on an idle machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from peftscope.analysis.stats import median_interval
from peftscope.claims.checks.memory import _question
from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import random_model
from peftscope.data.batching import Example, collate
from peftscope.evaluation.latency import passes
from peftscope.hardware.device import processor_name
from peftscope.memory.question import Question
from peftscope.training.build import apply_method
from peftscope.training.step import make_optimizer, train_step

MODEL = "smollm2-135m"
RUN = {"batch_size": 1, "seq_len": 128, "precision": "fp32"}
WARM_UP = 2
Work = Callable[[], Any]


def step_ratio(run: dict[str, Any], against: dict[str, Any], pairs: int = 12) -> Measurement:
    """Returns the time of a training step over that of another run's, on weights of the model's shape."""
    return _paired(_training_step(run), _training_step(against), pairs)


def latency_ratio(run: dict[str, Any], work: Literal["prompt", "token"], pairs: int = 30) -> Measurement:
    """Returns the time of a forward pass with PEFT's adapter apart over that with the adapter merged.

    The work is a whole prompt, or one further token with a key-value cache.
    """
    apart, merged = (_forward(run, work, merge) for merge in (False, True))
    return _paired(apart, merged, pairs)


def _paired(above: Work, below: Work, pairs: int) -> Measurement:
    """Returns the median ratio of two works' times over pairs of turns."""
    for work in (above, below) * WARM_UP:
        work()
    seconds: dict[Work, list[float]] = {above: [], below: []}
    for pair in range(pairs):
        for work in (above, below) if pair % 2 == 0 else (below, above):
            began = time.perf_counter()
            work()
            seconds[work].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    low, high = median_interval(ratios)
    evidence = {
        "above the line, seconds, median": statistics.median(seconds[above]),
        "below the line, seconds, median": statistics.median(seconds[below]),
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
    }
    model = f"random weights of {MODEL}'s shape"
    return Measurement(statistics.median(ratios), low, high, pairs, evidence=evidence, model=model)


def _random_base(question: Question) -> Any:
    torch.manual_seed(0)
    return random_model(question.model.config)


def _training_step(run: dict[str, Any]) -> Work:
    question = _question(MODEL, {**RUN, **run})
    spec = question.spec
    trained = apply_method(_random_base(question), spec, spec.method.build_empty)
    rows = torch.randint(question.model.config["vocab_size"], (spec.batch_size, spec.seq_len)).tolist()
    batch = collate([Example(tuple(row), spec.seq_len - question.responses) for row in rows], pad_token_id=0)
    optimizer = make_optimizer(trained.model, spec)
    trained.model.train()
    # Half way through a run AdaLoRA rates, prunes and masks in every step.
    return lambda: train_step(trained, [batch], optimizer, spec, step=spec.steps // 2)


def _forward(run: dict[str, Any], work: str, merge: bool) -> Work:
    question = _question(MODEL, {**RUN, **run})
    spec = question.spec
    adapted = spec.method.build(_random_base(question).requires_grad_(False), spec).eval()
    served = adapted.merge_and_unload() if merge else adapted
    tokens = torch.randint(question.model.config["vocab_size"], (spec.batch_size, spec.seq_len))

    once, tidy = passes(served, tokens)[work]

    @torch.inference_mode()
    def pass_once() -> None:
        once()
        tidy()

    return pass_once

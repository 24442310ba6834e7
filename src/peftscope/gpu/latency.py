"""What serving an adapter costs: seconds of a prompt and of one further token, for base, adapter apart, and merged."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from peftscope.gpu.model import random_base
from peftscope.hardware.meter import Meter, make_meter
from peftscope.memory.question import Question
from peftscope.training.build import seed_everything

STATES = ("base", "apart", "merged")
PASSES = ("prompt", "token")
"""All tokens of a prompt at once, and one more token with a key-value cache."""
WARM_UP = 5
REPEATS = {"cuda": 60, "cpu": 10}
BUDGET_SECONDS = 15.0
"""After so long no further pass of a kind is timed."""
FEWEST = 5


def measure_latency(question: Question, device: str) -> dict[str, Any]:
    """Returns ``samples``: seconds by state and pass, of a model whose weights are random.

    The states follow each other: first the base, then with PEFT's adapter around its layers, at last after
    ``merge_and_unload``, which leaves the base's own layers.
    """
    spec = question.spec.model_copy(update={"device": device})
    seed_everything(0)
    base, meter = random_base(question, device).eval(), make_meter(device)
    tokens = torch.randint(base.config.vocab_size, (spec.batch_size, spec.seq_len), device=device)
    samples = {"base": _time_passes(base, tokens, meter, device)}
    wrapped = spec.method.build(base.requires_grad_(False), spec).eval()
    samples["apart"] = _time_passes(wrapped, tokens, meter, device)
    merged = wrapped.merge_and_unload()
    samples["merged"] = _time_passes(merged, tokens, meter, device)
    return {"samples": samples}


@torch.inference_mode()
def _time_passes(model: Any, tokens: torch.Tensor, meter: Meter, device: str) -> dict[str, list[float]]:
    def prompt() -> None:
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)

    seconds = {"prompt": _timed(prompt, lambda: None, meter, device)}
    cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    last = tokens[:, -1:]

    def token() -> None:
        model(input_ids=last, past_key_values=cache, use_cache=True)

    seconds["token"] = _timed(token, lambda: cache.crop(-1), meter, device)
    return seconds


def _timed(work: Any, tidy: Any, meter: Meter, device: str) -> list[float]:
    seconds: list[float] = []
    count = WARM_UP + REPEATS[device]
    while len(seconds) < WARM_UP + FEWEST or (len(seconds) < count and sum(seconds) < BUDGET_SECONDS):
        stop = meter.clock()
        work()
        seconds.append(float(f"{stop():.6g}"))
        tidy()
    return seconds[WARM_UP:]


def latencies(samples: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Returns the columns of latency: the median of each state and pass, and ratios of these."""
    medians = {(state, name): median(samples[state][name]) for state in STATES for name in PASSES}
    row: dict[str, Any] = {f"{state}_{name}_seconds": value for (state, name), value in medians.items()}
    for name in PASSES:
        row[f"{name}_apart_over_merged"] = medians["apart", name] / medians["merged", name]
        row[f"{name}_merged_over_base"] = medians["merged", name] / medians["base", name]
    return row | {"repeats": min(len(samples[state][name]) for state in STATES for name in PASSES), "samples": samples}

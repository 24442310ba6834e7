"""The latency of one forward pass: a whole prompt, and one further token with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from peftscope.hardware.meter import make_meter
from peftscope.record import Timing
from peftscope.spec import RunSpec
from peftscope.training.load import attention

WARM_UP = 5
REPEATS = {"cuda": 60, "cpu": 10}
BUDGET_SECONDS = 15.0
"""The seconds after which no further pass of a kind is timed."""
FEWEST = 5


@torch.inference_mode()
def passes(model: Any, tokens: torch.Tensor) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Returns the passes of a whole ``prompt`` and of one further ``token`` with a cache, each with what tidies up."""
    cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    prompt = partial(model, input_ids=tokens, use_cache=False, logits_to_keep=1)
    token = partial(model, input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)
    return {"prompt": (prompt, lambda: None), "token": (token, lambda: cache.crop(-1))}


@torch.inference_mode()
def time_passes(model: Any, spec: RunSpec) -> dict[str, Timing]:
    """Returns the times of ``passes`` for ``batch_size`` random prompts of ``latency_tokens`` tokens."""
    model.eval()
    shape = (spec.batch_size, spec.latency_tokens)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(spec.device)
    with attention(model, spec.attention):
        return {name: _time(once, tidy, spec.device) for name, (once, tidy) in passes(model, tokens).items()}


def _time(work: Callable[[], Any], tidy: Callable[[], Any], device: str) -> Timing:
    meter, count = make_meter(device), WARM_UP + REPEATS[device]
    seconds: list[float] = []
    while len(seconds) < WARM_UP + FEWEST or (len(seconds) < count and sum(seconds) < BUDGET_SECONDS):
        stop = meter.clock()
        work()
        seconds.append(stop())
        tidy()
    lower, median, upper = np.quantile(seconds[WARM_UP:], [0.25, 0.5, 0.75]).tolist()
    return Timing(
        repeats=len(seconds) - WARM_UP,
        seconds_median=median,
        seconds_lower_quartile=lower,
        seconds_upper_quartile=upper,
    )

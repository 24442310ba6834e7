"""Measures the rates of this device at a large matrix product and a large copy, and counts the useful work of a step.

Useful work is what the mathematics requires: for each weight and token, two operations in the forward pass, two for the
gradient of the input, and two for the gradient of the weight if it is trained. The head counts at response positions
only. The products inside attention, padding and recomputation do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import torch

from peftscope.hardware.bf16 import Way, bf16_products, chosen_way
from peftscope.hardware.cards import Rates
from peftscope.hardware.meter import make_meter
from peftscope.record import Ceilings
from peftscope.spec import RunSpec

SIDES = {"cuda": 8192, "cpu": 512}
"""The sides of the square matrices: large enough for a card's full rate, a tenth of a second at most on a processor."""
COPIED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 26}
WARM_UP, REPEATS = 3, 15
BUDGET_SECONDS = 0.3
"""The seconds after which the measurement stops, so that a busy processor does not prolong it."""


def count_work(model: Any) -> tuple[int, int]:
    """Returns the useful floating-point operations of a training step, for each token and for each response token.

    They are those of the model's linear layers, including adapters, with the weights that train now.
    """
    head = model.get_output_embeddings()
    counts = {"body": 0, "head": 0}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            # A 4-bit weight packs two values per byte. Its quantisation state has the real shape.
            size = (getattr(weight, "quant_state", None) or weight).shape.numel()
            counts["head" if module is head else "body"] += size * (6 if weight.requires_grad else 4)
    return counts["body"], counts["head"]


def measure_ceilings(spec: RunSpec) -> Ceilings:
    """Returns the device's rates in the precision of a spec, measured once per process."""
    return _measured(spec.device, _dtype(spec))


def processor_rates(spec: RunSpec) -> Rates | None:
    """Returns this processor's rates at the precision of a spec, or None for a run on a card."""
    return _processor_rates(_dtype(spec)) if spec.device == "cpu" else None


def bf16_rates() -> dict[Way, float]:
    """Returns this processor's rate at a large product of bf16 matrices, for each way to compute it."""
    rates: dict[Way, float] = {}
    for way in get_args(Way):
        with bf16_products(way):
            rates[way] = _matmul_rate("cpu", torch.bfloat16)
    return rates


def _dtype(spec: RunSpec) -> torch.dtype:
    return torch.float32 if spec.precision == "fp32" else torch.bfloat16


@cache
def _processor_rates(dtype: torch.dtype) -> Rates:
    """Returns the rates of all threads or, for products, of one alone if that is higher.

    On a busy machine all threads wait for the one that another program holds up, for ten times as long and more.
    """
    threads = torch.get_num_threads()
    try:
        with bf16_products():
            together, copied = _matmul_rate("cpu", dtype), _copy_rate("cpu")
            torch.set_num_threads(1)
            return Rates(max(together, _matmul_rate("cpu", dtype)), copied, chosen_way() == "fp32")
    finally:
        torch.set_num_threads(threads)


@cache
def _measured(device: str, dtype: torch.dtype) -> Ceilings:
    return Ceilings(
        dtype=str(dtype).removeprefix("torch."),
        matmul_flops_per_second=_matmul_rate(device, dtype),
        copy_bytes_per_second=_copy_rate(device),
    )


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    side, generator = SIDES[device], torch.Generator(device).manual_seed(0)
    # Random values, because a card draws less power on zeros and then clocks higher.
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * side**3 / _best_seconds(device, lambda: torch.mm(left, right, out=product))


def _copy_rate(device: str) -> float:
    source = torch.zeros(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Every byte is read and written.
    return 2 * COPIED_BYTES[device] / _best_seconds(device, lambda: target.copy_(source))


def _best_seconds(device: str, work: Callable[[], Any]) -> float:
    meter = make_meter(device)
    seconds: list[float] = []
    while len(seconds) <= WARM_UP or (len(seconds) < WARM_UP + REPEATS and sum(seconds) < BUDGET_SECONDS):
        stop = meter.clock()
        work()
        seconds.append(stop())
    return min(seconds[WARM_UP:])  # other work of the machine can only add time

"""How long runs will take, from records of the same model and method; this machine's come before published ones.

A record's matrix products are scaled by the rate of a large product, there and here. The rest, mostly the overhead of
many small operators, is taken as it was: it differs less from one processor to another.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

from peftscope.errors import InputError
from peftscope.layout import record_paths
from peftscope.models.catalog import find_model
from peftscope.planning.published import all_published_records
from peftscope.spec import RunSpec

PRODUCTS = 1.3
"""A run's matrix products take this many times what its useful work takes at the rate of a large product: 1.28 in
training and 1.22 in evaluation, from LoRA's seconds at two rates of one processor (1,300 and 303 GFLOP/s)."""
FALLBACK_SHARE = 0.3
"""Of the rate of a large product that a step of a small model reaches, where no such run was recorded."""
FALLBACK_FLOPS = 1.2e11
"""Floating-point operations a second of a step, where no rate was measured either."""
FALLBACK_TOKENS = 16
FALLBACK_OVERHEAD_SECONDS = 6.0
FALLBACK_SECONDS_PER_PARAMETER = 1.5e-7
"""Loading, evaluation and probe."""


EVALUATION = ("validation_items", "heldout_items", "generation_items", "retention_tokens", "probe_steps")
"""Fields of a spec that decide how long a run takes beside its training."""


@lru_cache
def _measured() -> dict[tuple[Any, ...], dict[str, Any]]:
    """Returns the best record of each kind of run (model, method, device), and of each kind and evaluation."""
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    published: list[dict[str, Any] | None] = []
    with suppress(ImportError):  # without pyarrow, as a sweep may be, published records cannot be read
        published = [_ended_well(text) for *_, text in all_published_records()]
    own = (_ended_well(path.read_text()) for path in sorted(record_paths(), key=lambda path: path.stat().st_mtime))
    # The last one stays: this machine's latest; of the published ones, one that says how fast its machine was.
    for record in [*sorted(filter(None, published), key=_has_rate), *filter(None, own)]:
        kind, evaluation = _kind(record["spec"])
        records[kind] = records[kind + evaluation] = record
    return records


def _ended_well(text: str) -> dict[str, Any] | None:
    """Returns a record as JSON content; None where it is damaged or did not end well."""
    try:
        record: dict[str, Any] = json.loads(text)
        _kind(record["spec"])
        return record if record["status"] == "ok" else None
    except (ValueError, KeyError):
        return None


def _has_rate(record: dict[str, Any]) -> bool:
    return bool(record.get("ceilings", {}).get("matmul_flops_per_second"))


def _kind(spec: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns model, method and device of a run, and how it is evaluated."""
    return (spec["model"], spec["method"]["name"], spec["device"]), tuple(spec.get(field) for field in EVALUATION)


def measured_runs() -> list[dict[str, Any]]:
    """Returns one record each of a model, method and device that ended well, as JSON content."""
    return [record for key, record in _measured().items() if len(key) == 3]


def estimate_seconds(spec: RunSpec, rate_of: Callable[[RunSpec], float | None] = lambda spec: None) -> float:
    """Returns the wall seconds that a run will take, to within a factor of about 1.5.

    Args:
        spec: The run.
        rate_of: Returns the rate of a large matrix product on this machine as the run computes it, in operations a
            second; None takes the machine of the record for this one.
    """
    work = spec.steps * spec.batch_size * spec.gradient_accumulation
    kind, evaluation = _kind(spec.model_dump(mode="json"))
    record = _measured().get(kind + evaluation) or _measured().get(kind)
    if record:
        seconds, before = record["seconds"], record["spec"]
        scale = work / (before["steps"] * before["batch_size"] * before["gradient_accumulation"])
        computing = scale * seconds["train"] + seconds["evaluate"] + seconds["probe"]
        rest = seconds["wall"] - seconds["train"] - seconds["evaluate"] - seconds["probe"]
        return float(rest + computing * _slower(record, rate_of(spec)))
    try:
        shape = find_model(spec.model).shape
    except InputError:
        shape = None
    parameters = shape.parameters if shape else 10**9
    flops = 6 * parameters * work * FALLBACK_TOKENS * (1 if spec.method.trains else 0)
    rate = rate_of(spec)
    reached = FALLBACK_SHARE * rate if rate else FALLBACK_FLOPS
    return FALLBACK_OVERHEAD_SECONDS + FALLBACK_SECONDS_PER_PARAMETER * parameters + flops / reached


def _slower(record: dict[str, Any], rate: float | None) -> float:
    """Returns how many times a record's seconds its computing takes at another rate of a large matrix product."""
    before = record.get("ceilings", {}).get("matmul_flops_per_second")
    share = record["speed"].get("matmul_share")
    if not (rate and before and share):
        return 1.0
    products = min(1.0, PRODUCTS * share)
    return float(1 - products + products * before / rate)


def spoken(seconds: float) -> str:
    """Returns a duration as people say it.

    >>> spoken(75), spoken(7300)
    ('1 min 15 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

"""Estimates how long runs take, from records of the same model and method. This machine's records come first.

The time of a record's matrix products is scaled by the rates of a large product on both machines. The remaining time is
mostly the overhead of many small operators. It is not scaled, because it differs less between processors.
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
"""The time of a run's matrix products, over the time of its useful work at the rate of a large product. It was 1.28 in
training and 1.22 in evaluation, from LoRA's seconds at two rates of one processor (1,300 and 303 GFLOP/s)."""
FALLBACK_SHARE = 0.3
"""The share of the rate of a large product that a step of a small model is assumed to reach without a record."""
FALLBACK_FLOPS = 1.2e11
"""The floating-point operations per second of a step that are assumed if no rate was measured either."""
FALLBACK_TOKENS = 16
FALLBACK_OVERHEAD_SECONDS = 6.0
FALLBACK_SECONDS_PER_PARAMETER = 1.5e-7
"""The assumed time of loading, evaluation and probe."""


ONE_THREAD = ("one thread",)
ONE_THREAD_SLOWER = 1.55
"""How many times as long as on two threads a step takes on one of two cores, while the other has a run as well."""
EVALUATION = (
    *("validation_items", "validation_every", "heldout_items"),
    *("generation_items", "retention_tokens", "retention_every", "probe_steps"),
)
"""The fields of a spec that decide how long a run takes outside of training."""


@lru_cache
def _measured() -> dict[tuple[Any, ...], dict[str, Any]]:
    """Returns the best record of each kind of run (model, method, device), and of each kind with each evaluation."""
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    published: list[dict[str, Any] | None] = []
    with suppress(ImportError):  # without pyarrow, as a sweep may be, published records cannot be read
        published = [_ended_well(text) for *_, text in all_published_records()]
    own = (_ended_well(path.read_text()) for path in sorted(record_paths(), key=lambda path: path.stat().st_mtime))
    # The last record wins: this machine's latest, or else a published one, if possible one with its machine's rate.
    for record in [*sorted(filter(None, published), key=_has_rate), *filter(None, own)]:
        kind, evaluation = _kind(record["spec"])
        is_one_thread = record.get("provenance", {}).get("threads") == 1
        for key in (kind, kind + evaluation):
            if is_one_thread:
                records[ONE_THREAD + key] = record
                records.setdefault(key, record)
            else:
                records[key] = record
    return records


def _ended_well(text: str) -> dict[str, Any] | None:
    """Returns a record as JSON content, or None if it is damaged or did not end ``ok``."""
    try:
        record: dict[str, Any] = json.loads(text)
        _kind(record["spec"])
        return record if record["status"] == "ok" else None
    except (ValueError, KeyError):
        return None


def _has_rate(record: dict[str, Any]) -> bool:
    return bool(record.get("ceilings", {}).get("matmul_flops_per_second"))


def _kind(spec: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns (model, method, device) of a run, and the values of its ``EVALUATION`` fields."""
    return (spec["model"], spec["method"]["name"], spec["device"]), tuple(spec.get(field, 0) for field in EVALUATION)


def measured_runs() -> list[dict[str, Any]]:
    """Returns one record, as JSON content, for each model, method and device with a run that ended ``ok``."""
    return [record for key, record in _measured().items() if len(key) == 3]


def estimate_seconds(
    spec: RunSpec, rate_of: Callable[[RunSpec], float | None] = lambda spec: None, *, one_thread: bool = False
) -> float:
    """Returns the estimated wall seconds of a run, to within a factor of about 1.5.

    Args:
        spec: The run.
        rate_of: Returns the rate of a large matrix product on this machine, at the run's precision, in operations per
            second. None means that this machine is assumed to be as fast as the record's.
        one_thread: Whether the run has one thread, beside as many others as there are cores. Records of such runs come
            first; with others, the computing takes longer.
    """
    work = spec.steps * spec.batch_size * spec.gradient_accumulation
    kind, evaluation = _kind(spec.model_dump(mode="json"))
    records, slower = _measured(), 1.0
    record = records.get(kind + evaluation) or records.get(kind)
    if one_thread:
        own = records.get(ONE_THREAD + kind + evaluation) or records.get(ONE_THREAD + kind)
        record, slower = (own, 1.0) if own else (record, ONE_THREAD_SLOWER)
    if record:
        seconds, before = record["seconds"], record["spec"]
        scale = work / (before["steps"] * before["batch_size"] * before["gradient_accumulation"])
        computing = scale * seconds["train"] + seconds["evaluate"] + seconds["probe"]
        rest = seconds["wall"] - seconds["train"] - seconds["evaluate"] - seconds["probe"]
        return float(rest + slower * computing * (1.0 if one_thread else _slower(record, rate_of(spec))))
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
    """Returns the factor by which a record's computing time changes at another rate of a large matrix product."""
    before = record.get("ceilings", {}).get("matmul_flops_per_second")
    share = record["speed"].get("matmul_share")
    if not (rate and before and share):
        return 1.0
    products = min(1.0, PRODUCTS * share)
    return float(1 - products + products * before / rate)


def spoken(seconds: float) -> str:
    """Returns a duration as text.

    >>> spoken(75), spoken(7300)
    ('1 min 15 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

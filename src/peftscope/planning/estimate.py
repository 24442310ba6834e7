"""Estimates how long runs take, from records of the same model and method, or else of LoRA. This machine's come first.

Training and evaluation are scaled by the tokens of a task's items. The time of a record's matrix products is scaled by
the rates of a large product on both machines. The remaining time is mostly the overhead of many small operators. It is
not scaled, because it differs less between processors.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

from peftscope.data.tasks import USUAL_TOKENS, item_tokens
from peftscope.errors import InputError
from peftscope.layout import record_paths
from peftscope.models.catalog import find_model
from peftscope.planning.published import all_published_records
from peftscope.record import is_restored
from peftscope.spec import RunSpec

PRODUCTS = 1.3
"""The time of a run's matrix products, over the time of its useful work at the rate of a large product. It was 1.28 in
training and 1.22 in evaluation, from LoRA's seconds at two rates of one processor (1,300 and 303 GFLOP/s)."""
FALLBACK_SHARE = 0.3
"""The share of the rate of a large product that a step of a small model is assumed to reach without a record."""
FALLBACK_FLOPS = {"cpu": 1.2e11, "cuda": 2e13}
"""The floating-point operations per second of a step that are assumed if no rate was measured either, by device."""
FALLBACK_OVERHEAD_SECONDS = 6.0
FALLBACK_SECONDS_PER_PARAMETER = 1.5e-7
"""The assumed time of loading, evaluation and probe."""


ONE_THREAD = ("one thread",)
ONE_THREAD_SLOWER = 1.55
"""How many times as long as on two threads a step takes on one of two cores, while the other has a run as well."""
LIKE_OTHERS = "lora"
"""The method whose records stand in for one that has none."""
EVALUATION = (
    *("validation_items", "validation_every", "heldout_items"),
    *("generation_items", "retention_tokens", "retention_every", "probe_steps"),
)
"""The fields of a spec that decide how long a run takes outside of training."""


@lru_cache
def _measured() -> dict[tuple[Any, ...], dict[str, Any]]:
    """Returns a record of each kind of run (model, method, device), and of each kind with each evaluation.

    Records of this machine come before published ones, and among those the ones with their machine's rate. Of several,
    the one at the lower quartile of training time counts: runs that waited for the machine say too much, and runs that
    were resumed too little.
    """
    kinds: dict[tuple[Any, ...], list[tuple[int, float, dict[str, Any]]]] = defaultdict(list)
    for order, record in _finished():
        spec = record["spec"]
        kind, evaluation = _kind(spec)
        entry = (order, record["seconds"]["train"] / max(1, _sequences(spec) * _length(spec)), record)
        for key in (kind, kind + evaluation):
            if record.get("provenance", {}).get("threads") == 1:
                kinds[ONE_THREAD + key].append(entry)
            else:
                kinds[key].append(entry)
    for key in [key for key in kinds if key[:1] == ONE_THREAD]:
        kinds.setdefault(key[1:], kinds[key])
    return {key: _lower_quartile(entries) for key, entries in kinds.items()}


def _sequences(spec: dict[str, Any]) -> int:
    return int(spec["steps"] * spec["batch_size"] * spec["gradient_accumulation"])


def _length(spec: dict[str, Any]) -> float:
    """Returns the tokens of a usual sequence of a run."""
    return float(spec["seq_len"] if spec["packing"] else min(spec["seq_len"], _item_tokens(spec["task"])))


def _scored_tokens(spec: dict[str, Any], length: float) -> float:
    """Returns the tokens that a run's evaluation reads if the items of its task have this length."""
    items = sum(spec.get(field, 0) for field in ("validation_items", "heldout_items", "generation_items"))
    return float(items * length + spec.get("retention_tokens", 0))


@lru_cache
def _item_tokens(task: str) -> float:
    try:
        return item_tokens(task)
    except InputError:  # of a record, whose task is not known here
        return USUAL_TOKENS


def _lower_quartile(entries: list[tuple[int, float, dict[str, Any]]]) -> dict[str, Any]:
    first = min(order for order, *_ in entries)
    best = sorted((entry for entry in entries if entry[0] == first), key=lambda entry: entry[1])
    return best[len(best) // 4][2]


def _finished() -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (order, record) of runs that ended ``ok``. The order is 0 for this machine, 2 for others with no rate."""
    for path in record_paths():
        if not is_restored(path.parent) and (record := _ended_well(path.read_text())):
            yield 0, record
    with suppress(ImportError):  # without pyarrow, as a sweep may be, published records cannot be read
        for *_, text in all_published_records():
            if record := _ended_well(text):
                yield 1 if record.get("ceilings", {}).get("matmul_flops_per_second") else 2, record


def _ended_well(text: str) -> dict[str, Any] | None:
    """Returns a record as JSON content, or None if it is damaged or did not end ``ok``."""
    try:
        record: dict[str, Any] = json.loads(text)
        _kind(record["spec"])
        return record if record["status"] == "ok" else None
    except (ValueError, KeyError, TypeError):
        return None


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
    wanted = spec.model_dump(mode="json")
    kind, evaluation = _kind(wanted)
    records, slower = _measured(), 1.0
    if kind not in records and spec.method.trains:
        kind = (spec.model, LIKE_OTHERS, spec.device)
    record = records.get(kind + evaluation) or records.get(kind)
    if one_thread:
        own = records.get(ONE_THREAD + kind + evaluation) or records.get(ONE_THREAD + kind)
        record, slower = (own, 1.0) if own else (record, ONE_THREAD_SLOWER)
    if record:
        seconds, before = record["seconds"], record["spec"]
        longer = _sequences(wanted) * _length(wanted) / (_sequences(before) * _length(before))
        scored = _scored_tokens(before, _length(wanted)) / max(1, _scored_tokens(before, _length(before)))
        computing = longer * seconds["train"] + scored * seconds["evaluate"] + seconds["probe"]
        rest = seconds["wall"] - sum(seconds.get(name, 0.0) for name in ("train", "evaluate", "probe", "wait"))
        return float(rest + slower * computing * (1.0 if one_thread else _slower(record, rate_of(spec))))
    try:
        shape = find_model(spec.model).shape
    except InputError:
        shape = None
    parameters = shape.parameters if shape else 10**9
    flops = 6 * parameters * _sequences(wanted) * _length(wanted) * (1 if spec.method.trains else 0)
    rate = rate_of(spec)
    reached = FALLBACK_SHARE * rate if rate else FALLBACK_FLOPS[spec.device]
    return FALLBACK_OVERHEAD_SECONDS + FALLBACK_SECONDS_PER_PARAMETER * parameters + flops / reached


def _slower(record: dict[str, Any], rate: float | None) -> float:
    """Returns the factor by which a record's computing time changes at another rate of a large matrix product."""
    before = record.get("ceilings", {}).get("matmul_flops_per_second")
    share = record["speed"].get("matmul_share")
    if not (rate and before and share):
        return 1.0
    products = min(1.0, PRODUCTS * share)
    return float(1 - products + products * before / rate)

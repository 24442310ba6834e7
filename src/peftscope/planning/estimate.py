"""Estimates how long runs take, from records of the same model and method, or else of LoRA. This machine's come first.

What differs from the record is scaled by the time model (``sizing/speed.py``): its method, its batches and its length,
and the rates at which both machines compute a large product and copy. docs/time.md compares it with step times.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from statistics import median
from typing import Any

from pydantic import ValidationError

from peftscope.data.tasks import USUAL_TOKENS, item_tokens
from peftscope.errors import InputError
from peftscope.hardware.cards import Rates, Speed
from peftscope.layout import record_paths
from peftscope.memory.base import Model
from peftscope.memory.question import Question
from peftscope.models.catalog import find_model
from peftscope.models.shapes import ModelShape
from peftscope.planning.published import all_published_records
from peftscope.record import is_restored
from peftscope.sizing.processor import processor_passes, processor_step
from peftscope.sizing.speed import step_time
from peftscope.spec import RunSpec

USUAL_RATES = {"cpu": 3e11, "cuda": 1e14}
"""The floating-point operations per second of a large product that are assumed where none was measured, by device."""
COPIED_BYTES = {"cpu": 2.7e10, "cuda": 1e12}
"""The bytes per second of a large copy that are assumed where none was measured, by device."""
RESPONSE_SHARE = 0.5
"""The share of a batch's positions at which a row has a response token: 0.52 of packed sums, at four rows a batch."""
UNKNOWN_PARAMETERS, UNKNOWN_SHARE = 10**9, 0.3
"""The assumed size of a model whose shape is not known, and the share of the rate that a step of it reaches."""
START_SECONDS = 6.0
LOAD_SECONDS_PER_PARAMETER = 1.5e-7
"""The assumed time of a start and of loading, without a record."""

BENCHMARK_TOKENS = 1024
"""The tokens of the longest usual question: GSM8K's, with five worked examples."""
BENCHMARK_ITEMS = 1319
"""The number of items if no limit is set: that of GSM8K's test split."""
CHOICES, CHOICE_TOKENS = 4, 100
"""The number of sequences of a multiple-choice item, and their usual length."""
GENERATING = ("gsm8k",)
"""The benchmarks with generated answers."""

ONE_THREAD = ("one thread",)
ONE_THREAD_SLOWER = 1.55
"""How many times as long as on two threads a step takes on one of two cores, while the other has a run as well."""
CEILINGS = ("matmul_flops_per_second", "copy_bytes_per_second")
"""The fields of a record on its machine."""
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

    Records of this machine come before published ones, and among those the ones with their machine's rate. A run that
    shared its machine gets the rate of others on a machine of its kind. Of several records, the one at the lower
    quartile of training time counts: runs that waited say too much, and runs that were resumed too little.
    """
    kinds: dict[tuple[Any, ...], list[tuple[int, float, dict[str, Any]]]] = defaultdict(list)
    rates: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    found = list(_finished())
    for order, record in found:
        if order == 1:
            rates[_machine(record)].append(record["ceilings"])
    for order, record in found:
        if order == 2 and (known := rates.get(_machine(record))):
            record["ceilings"] = {name: median(one[name] for one in known) for name in CEILINGS}
        spec = record["spec"]
        kind, evaluation = _kind(spec)
        tokens = spec["steps"] * spec["batch_size"] * spec["gradient_accumulation"] * _length(spec)
        entry = (order, record["seconds"]["train"] / max(1, tokens), record)
        for key in (kind, kind + evaluation):
            if record.get("provenance", {}).get("threads") == 1:
                kinds[ONE_THREAD + key].append(entry)
            else:
                kinds[key].append(entry)
    for key in [key for key in kinds if key[:1] == ONE_THREAD]:
        kinds.setdefault(key[1:], kinds[key])
    chosen = {key: _lower_quartile(entries) for key, entries in kinds.items()}
    return {key: record for key, record in chosen.items() if _is_current(record["spec"])}


def _machine(record: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what decides the rate of a machine: processor, cores and the way of its products, or the card."""
    provenance = record.get("provenance", {})
    hardware = provenance.get("hardware", {})
    return *(hardware.get(name) for name in ("cpu", "cores", "gpu")), provenance.get("bf16_products")


def _is_current(spec: dict[str, Any]) -> bool:
    """Returns whether a record's spec is one of today's; an outdated one may have fields that are gone."""
    try:
        return bool(RunSpec.model_validate(spec))
    except ValidationError:
        return False


def _length(spec: dict[str, Any]) -> float:
    """Returns the tokens of a usual sequence of a run."""
    return float(spec["seq_len"] if spec["packing"] else min(spec["seq_len"], _item_tokens(spec["task"])))


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
    spec: RunSpec, rates_of: Callable[[RunSpec], Rates | None] = lambda spec: None, *, one_thread: bool = False
) -> float:
    """Returns the estimated wall seconds of a run, to within a factor of about 1.5.

    Args:
        spec: The run.
        rates_of: Returns the rates of this machine at the run's precision. None means that it is assumed to be as fast
            as the record's.
        one_thread: Whether the run has one thread, beside as many others as there are cores. Records of such runs come
            first; with others, the computing takes longer.
    """
    record, slower = _nearest(spec, one_thread)
    usual = Rates(USUAL_RATES[spec.device], COPIED_BYTES[spec.device], spec.device == "cpu")
    here = rates_of(spec)
    if record is None:
        shape = _shape_of(spec)
        parameters = shape.parameters if shape else UNKNOWN_PARAMETERS
        computing = sum(computing_seconds(spec, here or usual))
        return START_SECONDS + LOAD_SECONDS_PER_PARAMETER * parameters + slower * computing
    seconds, before = record["seconds"], RunSpec.model_validate(record["spec"])
    flops, copied = (record.get("ceilings", {}).get(name) for name in CEILINGS)
    casts = record.get("provenance", {}).get("bf16_products") == "fp32"
    there = Rates(flops, copied, casts) if flops and copied else here or usual
    now, then = computing_seconds(spec, here or there), computing_seconds(before, there)
    train, evaluate = (new / old if old else 1.0 for new, old in zip(now, then, strict=True))
    computing = train * seconds["train"] + evaluate * seconds["evaluate"] + seconds["probe"]
    rest = seconds["wall"] - sum(seconds.get(name, 0.0) for name in ("train", "evaluate", "probe", "wait"))
    return float(rest + slower * computing)


def computing_seconds(spec: RunSpec, rates: Rates) -> tuple[float, float]:
    """Returns the seconds of a run's training and of its evaluation, by the time model and its machine's rates."""
    length = max(1, round(_length(spec.model_dump(mode="json"))))
    step, forward = _step(spec.model_copy(update={"seed": 0, "init_seed": None, "learning_rate": 0.0}), length, rates)
    return (spec.steps * step if spec.method.trains else 0.0), evaluated_tokens(spec) * forward


def evaluated_tokens(spec: RunSpec) -> float:
    """Returns the tokens that a run's evaluations read."""
    length = min(spec.seq_len, _item_tokens(spec.task))
    validations = 1 + (spec.steps - 1) // spec.validation_every if spec.validation_every else 1
    scored = validations * spec.validation_items + spec.heldout_items + spec.generation_items
    retentions = 2 + ((spec.steps - 1) // spec.retention_every if spec.retention_every else 0)
    tokens = scored * length + retentions * spec.retention_tokens
    items = spec.benchmark_items or BENCHMARK_ITEMS
    tokens += sum(
        items * (BENCHMARK_TOKENS if name in GENERATING else CHOICES * CHOICE_TOKENS) for name in spec.benchmarks
    )
    return float(tokens)


@lru_cache(4096)
def _step(spec: RunSpec, length: int, rates: Rates) -> tuple[float, float]:
    """Returns the seconds of a step, and of the forward pass of a token."""
    shape, tokens = _shape_of(spec), spec.batch_size * length
    if shape is None:
        forward = 2 * UNKNOWN_PARAMETERS / (UNKNOWN_SHARE * rates.flops)
        return 3 * forward * tokens * spec.gradient_accumulation, forward
    each = spec.model_copy(update={"seq_len": length})
    responses = max(1, round(RESPONSE_SHARE * length))
    question = Question(Model(spec.model, shape.to_config(), shape), each, responses, None, 1)
    if spec.device == "cpu":
        passes = processor_passes(question, casts=rates.casts)
        seconds, forward = processor_step(passes, rates.flops, rates.copied_bytes)
        return seconds, forward / tokens
    step = step_time(question, Speed(rates.flops, rates.flops, rates.copied_bytes))
    return step.seconds, step.forward_seconds / tokens


def _shape_of(spec: RunSpec) -> ModelShape | None:
    try:
        return find_model(spec.model).shape
    except InputError:  # of a record, whose model is not known here
        return None


def _nearest(spec: RunSpec, one_thread: bool) -> tuple[dict[str, Any] | None, float]:
    """Returns the record that a run's estimate rests on, and how many times as long its computing takes."""
    kind, evaluation = _kind(spec.model_dump(mode="json"))
    records = _measured()
    if kind not in records and spec.method.trains:
        kind = (spec.model, LIKE_OTHERS, spec.device)
    if one_thread and (own := records.get(ONE_THREAD + kind + evaluation) or records.get(ONE_THREAD + kind)):
        return own, 1.0
    return records.get(kind + evaluation) or records.get(kind), ONE_THREAD_SLOWER if one_thread else 1.0

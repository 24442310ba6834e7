"""Compares runs of ``experiments/gpu-check.yaml`` on CUDA cards. Nothing is measured here; rows of a CPU never count.

A run is given by the options of ``peftscope memory``. If several cards measured it, the most extreme value counts, and
the evidence shows the others. Contributed cards count where none of ours has measured, and the measurement says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, ParamSpec

from peftscope.analysis.cards import Row, find_run, is_contributed, limit_of, quartiles, read_cards
from peftscope.analysis.stats import median_ratio_interval
from peftscope.claims.measurement import Measurement, NotRunError, Quantity
from peftscope.layout import CONTRIBUTED_RESULTS, PUBLISHED_RESULTS, RESULTS
from peftscope.words import GIB

GB = 10**9
MODEL = "llama-2-7b"
FOLDERS = (str(RESULTS), str(PUBLISHED_RESULTS), str(CONTRIBUTED_RESULTS))
"""The folders of results of this machine, of the published ones, and of those that others contributed."""
PHASES = ("load", "train", "evaluate")

Run = dict[str, Any]
Extreme = Literal["smallest", "largest"]
Options = ParamSpec("Options")


def _ours_first(check: Callable[Options, Measurement]) -> Callable[Options, Measurement]:
    """Returns a check that asks contributed cards if none of ours has measured what it needs."""

    @wraps(check)
    def measure(*arguments: Options.args, **options: Options.kwargs) -> Measurement:
        given: Any = options
        ours: list[str] = []
        theirs: list[str] = []
        for folder in given.get("results", FOLDERS):
            (theirs if is_contributed(folder) else ours).append(folder)
        try:
            return check(*arguments, **given | {"results": tuple(ours)})
        except NotRunError as missing:
            try:
                found = check(*arguments, **given | {"results": tuple(theirs)})
            except NotRunError:
                raise missing from None
        return replace(found, model=f"{found.model} (contributed)", contributed=True)

    return measure


@dataclass(frozen=True)
class _Found:
    """The quantity of one card in one setting, with its interval if it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@_ours_first
def fits(
    card: str, runs: list[Run], model: str = MODEL, headroom: float = 0, results: tuple[str, ...] = FOLDERS
) -> Measurement:
    """Returns whether any of the runs fits into the memory of a card, on whichever card that was tried.

    Args:
        card: The card to whose memory the runs were limited, from ``peftscope.hardware.cards.GPUS``.
        runs: The options of each run. The answer is no only if all were tried.
        model: The base model.
        headroom: The share of the card that stays free.
        results: The folders of results.
    """
    limit = limit_of(card, headroom)
    answers: dict[str, bool] = {}
    evidence: dict[str, Quantity] = {}
    for name, rows in _cards(results).items():
        found = [find_run(rows, model, run, limit) for run in runs]
        tried = [row for row in found if row is not None and (row["status"] == "ok" or _is_enough(row, limit))]
        fit = any(_fits(row, limit) for row in tried)
        if not tried or (not fit and len(tried) < len(runs)):
            continue
        answers[name] = fit
        evidence["of the card, GiB"] = limit
        for row in tried:
            evidence[f"{row['run_id']}, {name}, GiB"] = _peak(row) / GIB if row["status"] == "ok" else "out of memory"
    if not answers:
        raise _missing(model, runs, limit)
    return Measurement(all(answers.values()), evidence=evidence, n=len(answers), model=_on(model, answers))


def _is_enough(row: Row, limit: float) -> bool:
    """Returns whether the card that measured had the memory of the limit: running out of less decides nothing."""
    return float(row["gpu_memory_bytes"] or 0) >= limit * GIB


def _fits(row: Row, limit: float) -> bool:
    return row["status"] == "ok" and _peak(row) <= limit * GIB


def _peak(row: Row) -> float:
    """Returns the most bytes that a run took of its card, or those of its allocator where NVML gave no answer."""
    used = [value for phase in PHASES if (value := row[f"{phase}_peak_device_bytes"]) is not None]
    if used:
        return float(max(used) - (row["gpu_used_before_bytes"] or 0))
    return float(max(row[f"{phase}_peak_reserved_bytes"] or 0 for phase in PHASES))


@_ours_first
def peak(run: Run, model: str = MODEL, results: tuple[str, ...] = FOLDERS) -> Measurement:
    """Returns the peak of tensors in a training step, in GB."""
    return _over_cards([run], lambda rows: _tensors(rows[0]), "largest", model, results)


@_ours_first
def activations(run: Run, model: str = MODEL, results: tuple[str, ...] = FOLDERS) -> Measurement:
    """Returns the GB of a training step's peak beyond the memory that is in use between two steps.

    With few trained parameters, these are activations, logits and temporaries.
    """

    def beyond(rows: list[Row]) -> float:
        return _tensors(rows[0]) - rows[0]["resident_tensor_bytes"] / GB

    return _over_cards([run], beyond, "largest", model, results, measured="resident_tensor_bytes")


@_ours_first
def smallest_increase(runs: list[Run], model: str = MODEL, results: tuple[str, ...] = FOLDERS) -> Measurement:
    """Returns the smallest increase of the peak, in GB, from one run of a list to the next."""

    def increase(rows: list[Row]) -> float:
        return min(after - before for before, after in pairwise(map(_tensors, rows)))

    return _over_cards(runs, increase, "smallest", model, results)


@_ours_first
def best_speed_ratio(
    run: Run, against: Run, batch_sizes: tuple[int, ...], model: str = MODEL, results: tuple[str, ...] = FOLDERS
) -> Measurement:
    """Returns the ratio of two runs' tokens per second with its interval, each at the batch size where it is fastest.

    If several cards measured both, the smallest ratio counts.
    """
    count = len(batch_sizes)
    runs = [options | {"batch_size": size} for options in (run, against) for size in batch_sizes]

    def ratio(rows: list[Row]) -> _Found | None:
        best = []
        for tried in (rows[:count], rows[count:]):
            ok = [row for row in tried if row["status"] == "ok"]
            best += [max(ok, key=lambda row: row["tokens_per_second"])] if ok else []
        if len(best) < 2:
            return None
        value = best[0]["tokens_per_second"] / best[1]["tokens_per_second"]
        middle, low, high = median_ratio_interval(*(quartiles(row, "step") for row in reversed(best)))
        return _Found("", value, value * low / middle, value * high / middle)

    return _over_cards(runs, ratio, "smallest", model, results, with_oom=True)


@_ours_first
def peak_ratio(
    run: Run,
    against: Run,
    batch_sizes: tuple[int, ...] = (1,),
    extreme: Extreme = "largest",
    model: str = MODEL,
    results: tuple[str, ...] = FOLDERS,
) -> Measurement:
    """Returns the ratio of the peaks of two runs at the batch size where it is most extreme.

    Args:
        run: The options of the numerator's run.
        against: The options of the denominator's run.
        batch_sizes: The batch sizes. If a run ran out of memory, there is no ratio, and the evidence says so.
        extreme: Whether the smallest or the largest ratio counts.
        model: The base model.
        results: The folders of results.
    """

    def ratio(above: Row, below: Row) -> list[_Found]:
        return [_Found("", _tensors(above) / _tensors(below))]

    return _over_batches([run, against], batch_sizes, ratio, extreme, model, results)


@_ours_first
def step_ratio(
    run: Run,
    against: Run,
    batch_sizes: tuple[int, ...] = (1,),
    extreme: Extreme = "largest",
    model: str = MODEL,
    results: tuple[str, ...] = FOLDERS,
) -> Measurement:
    """Returns the ratio of two runs' median step times with its interval. Arguments are those of ``peak_ratio``."""

    def ratio(above: Row, below: Row) -> list[_Found]:
        return [_Found("", *median_ratio_interval(quartiles(above, "step"), quartiles(below, "step")))]

    return _over_batches([run, against], batch_sizes, ratio, extreme, model, results)


@_ours_first
def latency_ratio(
    run: Run,
    state: Literal["base", "apart", "merged"],
    over: Literal["base", "apart", "merged"],
    passes: tuple[Literal["prompt", "token"], ...],
    batch_sizes: tuple[int, ...],
    extreme: Extreme = "largest",
    model: str = MODEL,
    results: tuple[str, ...] = FOLDERS,
) -> Measurement:
    """Returns the ratio of two median latencies with its interval, in the setting where it is most extreme.

    Args:
        run: The options of the adapter.
        state: The numerator: the base alone, the adapter apart, or merged.
        over: The denominator.
        passes: A whole prompt, or one further token.
        batch_sizes: The numbers of prompts at once.
        extreme: Whether the smallest or the largest ratio counts.
        model: The base model.
        results: The folders of results.
    """

    def ratios(row: Row) -> list[_Found]:
        found = []
        for name in passes:
            above, below = (quartiles(row, f"latency_{which}_{name}") for which in (state, over))
            found.append(_Found(f", {name}", *median_ratio_interval(above, below)))
        return found

    measured = f"latency_{state}_token_repeats"
    return _over_batches([run], batch_sizes, ratios, extreme, model, results, measured)


def _tensors(row: Row) -> float:
    return float(row["train_peak_tensor_bytes"]) / GB


def _over_cards(
    runs: list[Run],
    value: Callable[[list[Row]], float | _Found | None],
    extreme: Extreme,
    model: str,
    results: tuple[str, ...],
    measured: str = "status",
    with_oom: bool = False,
) -> Measurement:
    """Returns the most extreme value of all cards that measured every run."""
    found: list[_Found] = []
    for card, rows in _cards(results).items():
        mine = [row for run in runs if (row := find_run(rows, model, run, measured=measured)) is not None]
        if len(mine) == len(runs) and (with_oom or all(row["status"] == "ok" for row in mine)):
            quantity = value(mine)
            if quantity is not None:
                found.append(replace(quantity, name=card) if isinstance(quantity, _Found) else _Found(card, quantity))
    if not found:
        raise _missing(model, runs)
    return _most(found, extreme, {}, model, {item.name for item in found})


def _over_batches(
    runs: list[Run],
    batch_sizes: tuple[int, ...],
    compare: Callable[..., list[_Found]],
    extreme: Extreme,
    model: str,
    results: tuple[str, ...],
    measured: str = "status",
) -> Measurement:
    """Returns the most extreme ratio over batch sizes and cards. A card counts if it tried every run at every size."""
    found: list[_Found] = []
    evidence: dict[str, Quantity] = {}
    cards = set()
    for card, rows in _cards(results).items():
        tried = {
            size: [find_run(rows, model, run | {"batch_size": size}, measured=measured) for run in runs]
            for size in batch_sizes
        }
        if any(row is None for group in tried.values() for row in group):
            continue
        for size, group in tried.items():
            setting = f"{card}, batch {size}"
            if all(row is not None and row["status"] == "ok" for row in group):
                found += [_Found(setting + item.name, item.value, item.low, item.high) for item in compare(*group)]
                cards.add(card)
            else:
                evidence[setting] = "out of memory"
    if not found:
        raise _missing(model, [run | {"batch_size": size} for run in runs for size in batch_sizes])
    return _most(found, extreme, evidence, model, cards)


def _most(
    quantities: list[_Found], extreme: Extreme, evidence: dict[str, Quantity], model: str, cards: set[str]
) -> Measurement:
    chosen = (min if extreme == "smallest" else max)(quantities, key=lambda item: item.value)
    shown = {item.name: item.value for item in quantities} if len(quantities) > 1 else {}
    return Measurement(
        chosen.value,
        low=chosen.low,
        high=chosen.high,
        evidence={**shown, **evidence},
        n=len(cards),
        model=_on(model, cards),
    )


def _cards(results: tuple[str, ...]) -> dict[str, list[Row]]:
    cards = read_cards(map(Path, results))
    if not cards:
        raise NotRunError("no run on a CUDA card; run make gpu-check on a machine with one")
    return cards


def _missing(model: str, runs: list[Run], limit: float | None = None) -> NotRunError:
    named = [", ".join(f"{name} {value}" for name, value in run.items()) for run in runs]
    limited = f" within {limit:g} GiB" if limit else ""
    return NotRunError(f"no card has measured {model}{limited}: {'; '.join(named)}; run make gpu-check")


def _on(model: str, cards: Any) -> str:
    return f"random weights of {model}'s shape on {', '.join(sorted(cards))}"

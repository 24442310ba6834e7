"""Compares runs of ``experiments/gpu-check.yaml`` on CUDA cards. Nothing is measured here; rows of a CPU never count.

A run is given by the options of ``peftscope memory``. If several cards measured it, the most extreme value counts, and
the evidence shows the others. Contributed cards count where none of ours has measured, and the measurement says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from peftscope.analysis.cards import Row, find_run, is_contributed, quartiles, read_cards
from peftscope.analysis.stats import median_ratio_interval
from peftscope.claims.measurement import Measurement, NotRunError, Quantity
from peftscope.hardware.cards import without_bf16
from peftscope.layout import CONTRIBUTED_RESULTS, PUBLISHED_RESULTS, RESULTS

MODEL = "llama-2-7b"
FOLDERS = (str(RESULTS), str(PUBLISHED_RESULTS), str(CONTRIBUTED_RESULTS))
"""The folders of results of this machine, of the published ones, and of those that others contributed."""

Run = dict[str, Any]
Extreme = Literal["smallest", "largest"]


@dataclass(frozen=True)
class _Found:
    """The ratio of one card in one setting, with its interval."""

    name: str
    value: float
    low: float
    high: float


def step_ratio(
    run: Run,
    against: Run,
    batch_sizes: tuple[int, ...] = (1,),
    extreme: Extreme = "largest",
    model: str = MODEL,
    results: tuple[str, ...] = FOLDERS,
) -> Measurement:
    """Returns the ratio of two runs' median step times with its interval, where it is most extreme.

    Args:
        run: The options of the numerator's run.
        against: The options of the denominator's run.
        batch_sizes: The batch sizes. If a run ran out of memory, there is no ratio, and the evidence says so.
        extreme: Whether the smallest or the largest ratio counts.
        model: The base model.
        results: The folders of results.
    """

    def ratio(above: Row, below: Row) -> list[_Found]:
        return [_Found("", *median_ratio_interval(quartiles(above, "step"), quartiles(below, "step")))]

    return _over_batches([run, against], batch_sizes, ratio, extreme, model, results)


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


def _over_batches(
    runs: list[Run],
    batch_sizes: tuple[int, ...],
    compare: Callable[..., list[_Found]],
    extreme: Extreme,
    model: str,
    results: tuple[str, ...],
    measured: str = "status",
) -> Measurement:
    """Returns the most extreme ratio over batch sizes and cards: ours, or if none of them has measured, contributed."""

    def on(folders: Iterable[str]) -> Measurement:
        return _most_extreme(runs, batch_sizes, compare, extreme, model, _cards(folders), measured)

    try:
        return on(folder for folder in results if not is_contributed(folder))
    except NotRunError as missing:
        try:
            found = on(filter(is_contributed, results))
        except NotRunError:
            raise missing from None
    return replace(found, model=f"{found.model} (contributed)", contributed=True)


def _most_extreme(
    runs: list[Run],
    batch_sizes: tuple[int, ...],
    compare: Callable[..., list[_Found]],
    extreme: Extreme,
    model: str,
    cards: dict[str, list[Row]],
    measured: str,
) -> Measurement:
    """Returns the most extreme ratio over batch sizes and cards. A card counts if it tried every run at every size."""
    found: list[_Found] = []
    evidence: dict[str, Quantity] = {}
    on = set()
    for card, rows in cards.items():
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
                on.add(card)
            else:
                evidence[setting] = "out of memory"
    if not found:
        wanted = [run | {"batch_size": size} for run in runs for size in batch_sizes]
        named = "; ".join(", ".join(f"{name} {value}" for name, value in run.items()) for run in wanted)
        raise NotRunError(f"no card has measured {model}: {named}; run make gpu-check")
    chosen = (min if extreme == "smallest" else max)(found, key=lambda item: item.value)
    shown = {item.name: item.value for item in found} if len(found) > 1 else {}
    return Measurement(
        chosen.value,
        low=chosen.low,
        high=chosen.high,
        evidence={**shown, **evidence},
        n=len(on),
        model=f"random weights of {model}'s shape on {', '.join(sorted(on))}",
    )


def _cards(results: Iterable[str]) -> dict[str, list[Row]]:
    """Returns the runs of each card whose times can decide a claim."""
    cards = read_cards(map(Path, results))
    if not cards:
        raise NotRunError("no run on a CUDA card; run make gpu-check on a machine with one")
    timed = {card: rows for card, rows in cards.items() if not without_bf16(card)}
    if not timed:
        raise NotRunError(f"{', '.join(cards)} computes no bf16 products itself: its memory counts, its times do not")
    return timed

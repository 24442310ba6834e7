"""Compares runs of ``experiments/gpu-check.yaml`` on CUDA cards. Nothing is measured here; rows of a CPU never count.

A run is given by the options of ``peftscope memory``. If several cards measured it, the most extreme value counts, the
smallest or the largest, and the evidence shows the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from peftscope.analysis.cards import Row, find_run, quartiles, read_cards
from peftscope.analysis.stats import median_ratio_interval
from peftscope.claims.measurement import Measurement, NotRunError, Quantity
from peftscope.hardware.cards import without_bf16
from peftscope.hardware.device import WSL
from peftscope.layout import PUBLISHED_RESULTS, RESULTS

MODEL = "llama-2-7b"
FOLDERS = (str(RESULTS), str(PUBLISHED_RESULTS))
"""The folders of results of this machine and of the published ones."""

Run = dict[str, Any]
Extreme = Literal["smallest", "largest"]
State = Literal["base", "apart", "merged"]
Found = tuple[str, tuple[float, float, float]]
"""Timings with their card and batch size, and their ratio with both bounds."""


def step_ratio(
    run: Run, against: Run, batch_sizes: tuple[int, ...] = (1,), extreme: Extreme = "largest", model: str = MODEL
) -> Measurement:
    """Returns the ratio of two runs' median step times with its interval, where it is most extreme.

    At a batch size at which a run ran out of memory there is no ratio, and the evidence says so.
    """

    def ratio(above: Row, below: Row) -> list[Found]:
        return [("", median_ratio_interval(quartiles(above, "step"), quartiles(below, "step")))]

    return _most_extreme([run, against], batch_sizes, ratio, extreme, model)


def latency_ratio(
    run: Run,
    state: State,
    over: State,
    passes: tuple[Literal["prompt", "token"], ...],
    batch_sizes: tuple[int, ...],
) -> Measurement:
    """Returns the ratio of two median latencies with its interval, in the setting where it is largest.

    Args:
        state: The numerator: the base alone, the adapter apart, or merged.
        over: The denominator.
        passes: A whole prompt, or one further token.
        batch_sizes: The numbers of prompts at once.
    """

    def ratios(row: Row) -> list[Found]:
        both = {name: [quartiles(row, f"latency_{which}_{name}") for which in (state, over)] for name in passes}
        return [(f", {name}", median_ratio_interval(*pair)) for name, pair in both.items()]

    measured = f"latency_{state}_token_repeats"
    return _most_extreme([run], batch_sizes, ratios, "largest", MODEL, measured)


def _decides(row: Row) -> bool:
    """Returns whether a card computed bf16 itself, under a driver that lets it run out of memory."""
    return not without_bf16(row["gpu"], row.get("compute_capability")) and WSL not in str(row.get("system"))


def _most_extreme(
    runs: list[Run],
    batch_sizes: tuple[int, ...],
    compare: Callable[..., list[Found]],
    extreme: Extreme,
    model: str,
    measured: str = "status",
) -> Measurement:
    """Returns the most extreme ratio over batch sizes and cards. A card counts if it tried every run at every size."""
    found: dict[str, tuple[float, float, float]] = {}
    evidence: dict[str, Quantity] = {}
    on = set()
    every = read_cards(map(Path, FOLDERS))
    if not every:
        raise NotRunError("no run on a CUDA card; run make gpu-check on a machine with one")
    cards = {card: kept for card, rows in every.items() if (kept := [row for row in rows if _decides(row)])}
    if not cards:
        why = "no bf16 products of its own, or WSL2, so that its times do not count"
        raise NotRunError(f"{', '.join(every)}: {why}")
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
                found |= {setting + name: ratio for name, ratio in compare(*group)}
                on.add(card)
            else:
                evidence[setting] = "out of memory"
    if not found:
        wanted = [run | {"batch_size": size} for run in runs for size in batch_sizes]
        named = "; ".join(", ".join(f"{name} {value}" for name, value in run.items()) for run in wanted)
        raise NotRunError(f"no card has measured {model}: {named}; run make gpu-check")
    value, low, high = (min if extreme == "smallest" else max)(found.values())
    shown = {name: ratio for name, (ratio, *_) in found.items()} if len(found) > 1 else {}
    named = f"random weights of {model}'s shape on {', '.join(sorted(on))}"
    return Measurement(value, low, high, len(on), evidence={**shown, **evidence}, model=named)

"""The result of a check: a measured quantity with its evidence, and never a verdict. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from peftscope.analysis.compare import compare
from peftscope.analysis.stats import mean_interval

if TYPE_CHECKING:
    from peftscope.analysis.study import StudyResults

Quantity = float | int | bool | str
WITHIN, POINTS, TOKENS = "smallest margin of sameness", "points of exact match", "points of argmax tokens"
"""The names, in a comparison's evidence, of its bound and of its differences in answers and in their tokens."""


class NotRunError(Exception):
    """A check lacks its input. The message says what is missing."""


@dataclass(frozen=True)
class Measurement:
    """A measured quantity.

    Attributes:
        value: The quantity that the claim's rule judges, in the claim's unit.
        low: The lower bound of its 95 % interval; None for deterministic quantities.
        high: The upper bound.
        n: The number of independent things behind it: seeds, matrices, settings.
        samples: The paired differences behind an interval, one per seed; empty for deterministic quantities.
        tuning_error: The standard error that the choice of learning rates adds to the mean of the samples.
        evidence: Other measured quantities that explain the value, by name.
        curves: The curves of a small figure: {curve: {x: y}}.
        axes: The labels of the figure's axes.
        model: The model on which the value was measured.
        run_ids: The training runs behind the value.
        spoiled_by: Why the value says nothing about the claim, which leaves the verdict open; empty if it does.
        p_adjusted: The p of a difference after correction for all comparisons of its study; None without one.
        matters: The smallest difference that matters, in the claim's unit; 0 where none was declared before the runs,
            as between arms at one rate each.
    """

    value: Quantity
    low: float | None = None
    high: float | None = None
    n: int = 1
    samples: tuple[float, ...] = ()
    tuning_error: float = 0.0
    evidence: Mapping[str, Quantity] = field(default_factory=dict)
    curves: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")
    model: str = ""
    run_ids: tuple[str, ...] = ()
    spoiled_by: str = ""
    p_adjusted: float | None = None
    matters: float = 0.0


def mean_of(values: Sequence[float], **fields: Any) -> Measurement:
    """Returns the mean of a sample as a measurement with its interval. ``fields`` are further ones of the measurement.

    Both bounds of values without spread are their common value.
    """
    interval = mean_interval(values)
    if interval is None:
        raise ValueError("there are no values")
    low, high = interval.low, interval.high
    if interval.n > 1 and low is None:
        low = high = interval.mean
    return Measurement(interval.mean, low, high, interval.n, **fields)


def runs_of(results: StudyResults, *arms: str) -> tuple[str, ...]:
    """Returns the ids of the runs of some arms."""
    return tuple(run for arm in arms for run in results.arm_runs(arm)["run_id"])


def over_seeds(
    results: StudyResults,
    values: Iterable[float],
    evidence: Mapping[str, Quantity],
    runs: Iterable[str],
    tuning_error: float = 0.0,
) -> Measurement:
    """Returns the mean of values, one per seed, with its interval, which includes the error that tuning adds.

    Args:
        runs: The ids of the runs behind them, each once or more often.
        tuning_error: The standard error that the choice of learning rates adds.

    Raises:
        NotRunError: There are no values.
    """
    sample = tuple(map(float, values))
    if not sample:
        raise NotRunError(f"the study `{results.name}` has no such runs")
    ids = tuple(dict.fromkeys(runs))
    found = Measurement(sample[0], samples=sample, evidence=evidence, model=results.subject, run_ids=ids)
    if len(sample) == 1:
        return found
    difference = compare(sample, math.inf, tuning_error)
    low, high = difference.interval()
    return replace(found, value=difference.mean, low=low, high=high, n=difference.n, tuning_error=tuning_error)


def geometric_mean_of(logarithms: Sequence[float], **fields: Any) -> Measurement:
    """Returns the geometric mean of a sample of ratios, given by their logarithms, with its interval."""
    found = mean_of(logarithms, **fields)
    low, high = (None if bound is None else math.exp(bound) for bound in (found.low, found.high))
    return replace(found, value=math.exp(float(found.value)), low=low, high=high)


def log_slope(
    sizes: Sequence[int], seeds: int, value: Callable[[int, int], float], quantity: str, axis: str, model: str
) -> Measurement:
    """Returns the mean slope of log(value(seed, size)) over log(size), one slope for each seed, with its interval."""
    import numpy as np  # not for those who read what was published

    values = np.array([[value(seed, size) for size in sizes] for seed in range(seeds)])
    slopes = np.polyfit(np.log(sizes), np.log(values).T, 1)[0].tolist()
    curve = dict(zip(map(float, sizes), values.mean(axis=0).tolist(), strict=True))
    return mean_of(slopes, samples=tuple(slopes), curves={quantity: curve}, axes=(axis, quantity), model=model)

"""Statistics: a thin layer over scipy. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over n independent runs; the bounds are None where n = 1, or values without spread, give none."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Returns the mean with its Student t interval, or None without values.

    >>> interval = mean_interval([1.0, 2.0, 3.0])
    >>> round(interval.low, 3), interval.mean, round(interval.high, 3)
    (-0.484, 2.0, 4.484)
    """
    sample = np.asarray([value for value in values if value is not None and np.isfinite(value)], dtype=float)
    if sample.size == 0:
        return None
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, None, None, 1)
    error = float(stats.sem(sample))
    if error == 0:
        return Interval(mean, None, None, int(sample.size))
    low, high = stats.t.interval(confidence, sample.size - 1, loc=mean, scale=error)
    return Interval(mean, float(low), float(high), int(sample.size))

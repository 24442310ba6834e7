"""Statistics: a thin layer over scipy and statsmodels. No torch.

How often an interval covers the true mean of normal values, by simulation (a test repeats it):

========  =================  ==============================  ==============================
 values    Student t, 95 %    expanded bootstrap, 95 %        between the equivalence bounds
========  =================  ==============================  ==============================
    3           95 %                     76 %                             90 %
    5           95 %                     92 %                             90 %
    8           95 %                     94 %                             90 %
========  =================  ==============================  ==============================

The t interval is the primary one. The bootstrap stands beside it, and is too narrow below eight values. Below six
pairs no exact test can reach p < 0.05.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MOST_PAIRS = 1_000_000
"""No one runs more."""


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


def bootstrap_interval(
    values: Sequence[float], confidence: float = CONFIDENCE, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Returns the bounds of the expanded percentile bootstrap of a mean.

    The plain percentile interval is too narrow at few values. The expanded one takes wider percentiles, such that for
    normal values it is about as wide as Student's. Source: Hesterberg 2015, arXiv 1411.5279, section 6.2.
    """
    sample = np.asarray(values, dtype=float)
    n = sample.size
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1))
    draws = np.random.default_rng(seed).choice(sample, size=(resamples, n)).mean(axis=1)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Returns the exact two-sided p of paired differences under flips of their signs.

    >>> sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    0.03125
    """
    sample = np.asarray(differences, dtype=float)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=sample.size)))
    sums = np.abs(signs @ sample)
    return float(np.mean(sums >= abs(sample.sum()) * (1 - 1e-12)))


def equivalence_interval(differences: Sequence[float], alpha: float = 1 - CONFIDENCE) -> tuple[float, float] | None:
    """Returns the interval that must lie between the margins for two one-sided t tests to pass at ``alpha``.

    None for a single value. Values without spread are their own interval.

    Source: Schuirmann 1987; the same decision as ``statsmodels.stats.weightstats.ttost_paired``.
    """
    if len(differences) < 2:
        return None
    interval = mean_interval(differences, 1 - 2 * alpha)
    assert interval is not None
    if interval.low is None or interval.high is None:
        return interval.mean, interval.mean
    return interval.low, interval.high


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted for their number within one family. Source: Holm 1979."""
    from statsmodels.stats.multitest import multipletests  # its import takes two seconds, which few commands need

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def trend_p(rows: Sequence[Sequence[float]]) -> float:
    """Returns the p of Page's test that values grow along each row's columns; one row a seed, one column a level."""
    return float(stats.page_trend_test(np.asarray(rows, dtype=float)).pvalue)


def pairs_needed(differences: Sequence[float], effect: float, power: float = 0.8) -> int | None:
    """Returns how many pairs a t test needs to see ``effect`` with this power; None where they show no spread.

    At most ``MOST_PAIRS``.
    """
    from statsmodels.stats.power import TTestPower

    spread = float(np.std(np.asarray(differences, dtype=float), ddof=1))
    if spread == 0 or effect == 0:
        return None

    def reached(pairs: int) -> bool:
        found = TTestPower().power(abs(effect) / spread, pairs, 1 - CONFIDENCE)
        return not found < power  # not a number where even two pairs are more than enough

    return 2 + bisect_left(range(2, MOST_PAIRS), True, key=reached)


def paired_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p of a paired t test: below 0.05 exactly where the 95 % interval excludes 0.

    Differences without spread are no chance: 0 if they differ from 0, else 1.

    >>> round(paired_p([1.0, 2.0, 3.0]), 3)
    0.074
    """
    sample = np.asarray(differences, dtype=float)
    if np.ptp(sample) == 0:
        return float(sample[0] == 0)
    return float(stats.ttest_1samp(sample, 0).pvalue)


def false_positive_rate(differences: Sequence[float], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Returns how often our rule would call an arm different from itself, and the Monte-Carlo error of that rate.

    Each of the resamples draws as many pairs as there are, with replacement, and tosses a coin over which of the two
    runs of a pair comes first: there is no difference left but chance. The error is the half-width within which a rate
    at the nominal level would fall in 95 % of such simulations.

    Args:
        differences: Of runs of the same arm, one a seed; arms that always agree give a rate of 0.
        resamples: How many samples of pairs.
        seed: Of the draws.
    """
    random = np.random.default_rng(seed)
    sample = np.asarray(differences, dtype=float)
    shape = (resamples, sample.size)
    draws = random.choice(sample, shape) * random.choice([-1.0, 1.0], shape)
    nominal = 1 - CONFIDENCE
    called = sum(paired_p(draw) < nominal for draw in draws)
    error = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(nominal * (1 - nominal) / resamples)
    return called / resamples, error

"""Statistics: a thin layer over scipy and statsmodels. No torch.

The table says how often an interval covers the true mean of normal values, by simulation (a test repeats it):

========  =================  ==============================  ==============================
 values    Student t, 95 %    expanded bootstrap, 95 %        between the equivalence bounds
========  =================  ==============================  ==============================
    3           95 %                     76 %                             90 %
    5           95 %                     92 %                             90 %
    8           95 %                     94 %                             90 %
========  =================  ==============================  ==============================

The t interval is the primary one. The bootstrap is shown beside it, and is too narrow below eight values. Below six
pairs, no exact test can reach p < 0.05.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
MOST_PAIRS = 1_000_000
FEWEST_PAIRS = 6
"""With fewer pairs, no exact test reaches p < 0.05, and resamples repeat too often to be informative."""


@dataclass(frozen=True)
class Interval:
    """The mean of n independent runs and its interval. The bounds are None if n = 1 or the values have no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Returns the mean of the values with its Student t interval, or None if there are no values.

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
    if np.ptp(sample) == 0:
        return Interval(mean, None, None, int(sample.size))
    # This computes the quantile directly: scipy's distributions spend ten times as long on checking arguments.
    reach = special.stdtrit(sample.size - 1, (1 + confidence) / 2) * sample.std(ddof=1) / math.sqrt(sample.size)
    return Interval(mean, float(mean - reach), float(mean + reach), int(sample.size))


def bootstrap_interval(
    values: Sequence[float], confidence: float = CONFIDENCE, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Returns the bounds of the expanded percentile bootstrap of a mean.

    The plain percentile interval is too narrow for few values. The expanded one uses wider percentiles, so that for
    normal values it is about as wide as Student's. Source: Hesterberg 2015, arXiv 1411.5279, section 6.2.
    """
    sample = np.asarray(values, dtype=float)
    n = sample.size
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1))
    draws = np.random.default_rng(seed).choice(sample, size=(resamples, n)).mean(axis=1)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the two order statistics between which the median lies with at least this confidence.

    Fewer than six values have no such pair at 95 %, and their range is returned. No shape of the values is assumed.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    (2.0, 8.0)
    """
    ordered = sorted(values)
    beyond = max(0, int(stats.binom.ppf((1 - confidence) / 2, len(ordered), 0.5)) - 1)
    return ordered[beyond], ordered[-1 - beyond]


def share_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the bounds of a share. Source: Wilson 1927.

    >>> [round(bound, 3) for bound in share_interval(8, 12)]
    [0.391, 0.862]
    """
    found = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def median_ratio_interval(
    above: Sequence[float], below: Sequence[float], resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Returns the ratio of two medians with the bounds of its 95 % percentile bootstrap.

    The bounds describe the spread within the two samples, for example of repeated times of one process.

    >>> median_ratio_interval([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    (2.0, 2.0, 2.0)
    """
    random = np.random.default_rng(seed)
    draws = [np.median(random.choice(sample, (resamples, len(sample))), axis=1) for sample in (above, below)]
    low, high = np.quantile(draws[0] / draws[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(np.median(above) / np.median(below)), float(low), float(high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p of paired differences under sign flips, which is exact up to 16 pairs.

    >>> sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    0.03125
    """
    sample = (np.asarray(differences, dtype=float),)
    # For a few hundred pairs, all flips at once take a gigabyte. Batches give the same p.
    found = stats.permutation_test(
        sample, np.sum, permutation_type="samples", n_resamples=2**16, batch=1024, random_state=0
    )
    return float(found.pvalue)


def equivalence_interval(differences: Sequence[float], alpha: float = 1 - CONFIDENCE) -> tuple[float, float] | None:
    """Returns the interval that must lie between the margins for two one-sided t tests to pass at ``alpha``.

    A single value has no interval (None). The interval of values without spread is their common value.

    Source: Schuirmann 1987. The decision equals that of ``statsmodels.stats.weightstats.ttost_paired``.
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
    from statsmodels.stats.multitest import multipletests  # this import takes two seconds, and few commands need it

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def pairs_needed(
    differences: Sequence[float], effect: float, power: float = 0.8, alpha: float = 1 - CONFIDENCE
) -> int | None:
    """Returns how many pairs a two-sided t test needs to detect ``effect`` with this power, at most ``MOST_PAIRS``.

    Without spread or without an effect, the answer is None.
    """
    from statsmodels.stats.power import TTestPower

    sample = np.asarray(differences, dtype=float)
    if np.ptp(sample) == 0 or effect == 0:
        return None
    spread = float(np.std(sample, ddof=1))

    def reached(pairs: int) -> bool:
        found = TTestPower().power(abs(effect) / spread, pairs, alpha)
        return not found < power  # the power is not a number if even two pairs are more than enough

    return 2 + bisect_left(range(2, MOST_PAIRS), True, key=reached)


def paired_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p of a paired t test, which is below 0.05 exactly if the 95 % interval excludes 0.

    For differences without spread, p is 0 if they differ from 0, and 1 otherwise.

    >>> round(paired_p([1.0, 2.0, 3.0]), 3)
    0.074
    """
    sample = np.asarray(differences, dtype=float)
    if np.ptp(sample) == 0:
        return float(sample[0] == 0)
    return float(stats.ttest_1samp(sample, 0).pvalue)


@dataclass(frozen=True)
class FalsePositives:
    """The rate at which the paired t test calls an arm different from itself, and the range that chance allows."""

    rate: float
    low: float
    high: float


def false_positives(differences: Sequence[float], resamples: int = 1000, seed: int = 0) -> FalsePositives | None:
    """Returns how often our rule would call an arm different from itself, or None below ``FEWEST_PAIRS``.

    Each resample draws as many pairs as there are, with replacement, and decides by a coin which run of a pair comes
    first, so that only chance differences remain. With few pairs, the rate varies from one study to the next. The range
    holds 95 % of the rates that the same number of normal pairs would give.

    Args:
        differences: The differences between runs of the same arm, one per seed. If all are 0, the rate is 0.
        resamples: The number of resamples.
        seed: The seed of the draws.
    """
    n = len(differences)
    if n < FEWEST_PAIRS:
        return None
    random = np.random.default_rng(seed)
    rates = [_called_different(random.normal(size=n), resamples, random) for _ in range(500)]
    low, high = np.quantile(rates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    rate = _called_different(np.asarray(differences, dtype=float), resamples, random)
    return FalsePositives(rate, float(low), float(high))


def _called_different(sample: np.ndarray, resamples: int, random: np.random.Generator) -> float:
    """Returns the share of resamples whose ``paired_p`` is below the nominal level."""
    shape = (resamples, sample.size)
    draws = random.choice(sample, shape) * random.choice([-1.0, 1.0], shape)
    limit = stats.t.ppf((1 + CONFIDENCE) / 2, sample.size - 1)
    return float(np.mean(np.abs(draws.mean(axis=1)) > limit * stats.sem(draws, axis=1)))

"""Statistics: a thin layer over scipy. No torch; NumPy and scipy are loaded by what computes.

The table says how often an interval covers the true mean of normal values, by simulation (a test repeats it):

========  =================  ==============================  ==============================
 values    Student t, 95 %    expanded bootstrap, 95 %    Student t, 90 % (decides sameness)
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of n independent runs and its interval. The bounds are None if n = 1 or the values have no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Returns the mean of the values with its 95 % Student t interval, or None if there are no values.

    >>> interval = mean_interval([1.0, 2.0, 3.0])
    >>> round(interval.low, 3), interval.mean, round(interval.high, 3)
    (-0.484, 2.0, 4.484)
    """
    import numpy as np
    from scipy import special

    sample = np.asarray([value for value in values if value is not None and np.isfinite(value)], dtype=float)
    if sample.size == 0:
        return None
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean, None, None, int(sample.size))
    # This computes the quantile directly: scipy's distributions spend ten times as long on checking arguments.
    quantile = special.stdtrit(sample.size - 1, (1 + CONFIDENCE) / 2)
    reach = quantile * sample.std(ddof=1) / math.sqrt(sample.size)
    return Interval(mean, float(mean - reach), float(mean + reach), int(sample.size))


FEWEST_TRIMMED = 5
"""The fewest values of which the lowest and the highest are left out."""


def trimmed_mean(values: Sequence[float]) -> float:
    """Returns the mean of the values without the lowest and the highest, or of all if they are fewer than five.

    >>> trimmed_mean([9.0, 2.0, 1.0, 3.0, 4.0]), trimmed_mean([1.0, 3.0])
    (3.0, 2.0)
    """
    kept = sorted(values)[1:-1] if len(values) >= FEWEST_TRIMMED else values
    return sum(kept) / len(kept)


def jackknife(estimate: Callable[[Sequence[int]], float], n: int) -> list[float]:
    """Returns n values, two or more, whose mean is the estimate, and whose t interval is that of the jackknife.

    Each is the estimate plus what leaving out one of n things, times n - 1, changes from the mean of such changes.
    Source: Tukey 1958, centred at the estimate itself.

    ``estimate`` computes it from the indices that are kept.

    >>> jackknife(lambda kept: sum([1.0, 2.0, 6.0][i] for i in kept) / len(kept), 3)
    [1.0, 2.0, 6.0]
    """
    whole = estimate(range(n))
    without = [estimate([i for i in range(n) if i != left]) for left in range(n)]
    centre = sum(without) / n
    return [whole + (n - 1) * (centre - one) for one in without]


def of_trimmed_means(estimate: Callable[..., float], *sides: Sequence[float]) -> list[float]:
    """Returns the values of a jackknife over seeds of what follows from the trimmed means of some sides.

    Each side has one value for each seed, two seeds or more.

    >>> of_trimmed_means(float.__sub__, [5.0, 9.0], [1.0, 1.0])
    [4.0, 8.0]
    """
    return jackknife(lambda kept: estimate(*(trimmed_mean([side[i] for i in kept]) for side in sides)), len(sides[0]))


def widened(values: Sequence[float], error: float) -> list[float]:
    """Returns values of the same mean, whose standard error has another ``error`` of that mean in it.

    Both fall with the number of values. Values that are all the same are spread evenly.

    >>> widened([1.0, 2.0, 3.0], 1.0), widened([2.0, 2.0, 2.0], 1.0)
    ([0.0, 2.0, 4.0], [0.2679491924311228, 2.0, 3.732050807568877])
    """
    import numpy as np

    sample = np.asarray(values)
    mean, spread = sample.mean(), sample.std(ddof=1)
    apart = sample - mean if spread else np.linspace(-1, 1, sample.size)
    return (mean + apart * math.hypot(spread, error * math.sqrt(sample.size)) / apart.std(ddof=1)).tolist()


def edits(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns the fewest insertions, deletions and replacements that make one sequence of another.

    >>> edits("CH EY N JH ER".split(), "CH EY N ER".split()), edits("abc", "xbd"), edits("", "ab")
    (1, 2, 2)
    """
    row = list(range(len(second) + 1))
    for done, one in enumerate(first):
        beside, row[0] = row[0], done + 1
        for place, other in enumerate(second):
            least = min(row[place] + 1, row[place + 1] + 1, beside + (one != other))
            beside, row[place + 1] = row[place + 1], least
    return row[-1]


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """Returns the bounds of the expanded percentile bootstrap of a mean.

    The plain percentile interval is too narrow for few values. The expanded one uses wider percentiles, so that for
    normal values it is about as wide as Student's. Source: Hesterberg 2015, arXiv 1411.5279, section 6.2.
    """
    import numpy as np
    from scipy import stats

    sample = np.asarray(values, dtype=float)
    n = sample.size
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    draws = np.random.default_rng(0).choice(sample, size=(resamples, n)).mean(axis=1)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the two order statistics between which the median lies with at least 95 % confidence.

    Fewer than six values have no such pair at 95 %, and their range is returned. No shape of the values is assumed.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    (2.0, 8.0)
    """
    from scipy import stats

    ordered = sorted(values)
    beyond = max(0, int(stats.binom.ppf((1 - CONFIDENCE) / 2, len(ordered), 0.5)) - 1)
    return ordered[beyond], ordered[-1 - beyond]


def share_interval(successes: int, n: int) -> tuple[float, float]:
    """Returns the bounds of a share's 95 % interval. Source: Wilson 1927.

    >>> [round(bound, 3) for bound in share_interval(8, 12)]
    [0.391, 0.862]
    """
    from scipy import stats

    found = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def median_ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Returns the ratio of two medians and the bounds of its 95 % interval.

    The bounds describe the spread within the two samples, for example of repeated times of one process. The standard
    error of a median follows from the quartiles, which outliers do not move; those of the two logarithms are added.
    Source: McGill, Tukey and Larsen 1978, the notches of box plots.

    Args:
        above: The lower quartile, the median, the upper quartile and the number of values of the numerator.
        below: The same of the denominator.

    >>> [round(value, 3) for value in median_ratio_interval((1.98, 2.0, 2.02, 25), (1.0, 1.0, 1.0, 25))]
    [2.0, 1.985, 2.015]
    """
    from scipy import stats

    errors = [1.2533 / 1.349 * (upper - lower) / middle / math.sqrt(n) for lower, middle, upper, n in (above, below)]
    ratio, reach = above[1] / below[1], stats.norm.ppf((1 + CONFIDENCE) / 2) * math.hypot(*errors)
    return ratio, float(ratio * math.exp(-reach)), float(ratio * math.exp(reach))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p of paired differences under sign flips, which is exact up to 16 pairs.

    >>> sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), sign_flip_p([1.0])
    (0.03125, 1.0)
    """
    import numpy as np
    from scipy import stats

    if len(differences) == 1:
        return 1.0  # either sign is as far from zero
    sample = (np.asarray(differences, dtype=float),)
    # For a few hundred pairs, all flips at once take a gigabyte. Batches give the same p.
    found = stats.permutation_test(
        sample, np.sum, permutation_type="samples", n_resamples=2**16, batch=1024, random_state=0
    )
    return float(found.pvalue)


def where_reached(curve: Sequence[float], at: Sequence[float], wanted: float) -> float:
    """Returns where a curve first falls to a value, between two of its points interpolated; not a number if never.

    >>> [where_reached(curve, [0.0, 0.2, 0.6], 1.5) for curve in ([4.0, 2.0, 1.0], [4.0, 2.0, 1.8], [1.4, 2.0, 1.0])]
    [0.4, nan, 0.0]
    """
    import numpy as np

    values, places = np.asarray(curve, dtype=float), np.asarray(at, dtype=float)
    below = np.flatnonzero(values <= wanted)
    if not len(below):
        return math.nan
    if not (last := int(below[0])):
        return float(places[0])
    return float(np.interp(-wanted, -values[last - 1 : last + 1], places[last - 1 : last + 1]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted for their number within one family. Source: Holm 1979."""
    import numpy as np

    order = np.argsort(p_values)
    raised = np.maximum.accumulate(np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1))
    return np.minimum(raised, 1.0)[np.argsort(order)].tolist()

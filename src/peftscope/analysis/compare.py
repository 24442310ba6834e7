"""Verdicts on paired differences: the same, different by more than a margin, different, or open. No torch.

NumPy and scipy are loaded by what computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from peftscope.analysis.stats import CONFIDENCE, jackknife, trimmed_mean

Tunings = Sequence[Sequence[Sequence[float]]]

LARGEST_PAIRS = 10_000
MARGIN = 0.025
"""Arms whose losses differ by less than this share of the task gain count as the same, unless a claim has its own."""


class Outcome(StrEnum):
    """The verdict of a comparison."""

    SAME = "same"
    SAME_BUT_DIFFERS = "same, but differs"
    MORE = "differs by more than the margin"
    DIFFERS = "differs, size open"
    OPEN = "open"


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its two intervals, in the unit of the differences.

    Attributes:
        mean: The mean difference.
        spread: The standard deviation of single differences.
        tuning_error: The standard error that the choice of both learning rates adds; 0 if none was chosen.
        n: The number of pairs.
        margin: Two arms within plus and minus this count as the same; not a number if there is no yardstick for it.
        others: The standard errors of further sources of chance, such as the draw of the items, each with its degrees
            of freedom.
    """

    mean: float
    spread: float
    tuning_error: float
    n: int
    margin: float
    others: tuple[tuple[float, int], ...] = ()

    def half_width(self, confidence: float = CONFIDENCE, pairs: int | None = None) -> float:
        """Returns how far the interval of the mean reaches to either side; with another number of pairs, if given."""
        from scipy import special

        n = pairs or self.n
        if n < 2:
            return math.inf
        return float(special.stdtrit(self._freedom(n), (1 + confidence) / 2)) * self._error(n)

    def _error(self, n: int) -> float:
        return math.hypot(self._own_error(n), *(error for error, _ in self.others))

    def _own_error(self, n: int) -> float:
        return math.sqrt(self.spread**2 / n + self.tuning_error**2)

    def _freedom(self, n: int) -> float:
        """Returns the degrees of freedom of the error, which are those of the pairs unless there are other sources.

        Source: Welch 1947.
        """
        if not self._error(n) or not self.others:
            return n - 1
        parts = [(self._own_error(n), n - 1), *self.others]
        return self._error(n) ** 4 / sum(error**4 / freedom for error, freedom in parts)

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Returns the bounds of the interval of the mean."""
        reach = self.half_width(confidence)
        return self.mean - reach, self.mean + reach

    @property
    def is_same(self) -> bool:
        """Whether two one-sided t tests at 5 % pass at the margin: the 90 % interval lies within it.

        Source: Schuirmann 1987.
        """
        return self.bound < self.margin

    @property
    def bound(self) -> float:
        """The smallest margin at which two one-sided t tests at 5 % pass."""
        return abs(self.mean) + self.half_width(2 * CONFIDENCE - 1)

    @property
    def differs(self) -> bool:
        """Whether the 95 % interval excludes 0."""
        low, high = self.interval()
        return low > 0 or high < 0

    @property
    def exceeds_margin(self) -> bool:
        """Whether the 95 % interval lies beyond the margin, on one side."""
        low, high = self.interval()
        return low > self.margin or high < -self.margin

    @property
    def error(self) -> float:
        """The standard error of the mean, from all sources."""
        return self._error(self.n)

    @property
    def p(self) -> float:
        """The two-sided p of a t test, which is below 0.05 exactly if the 95 % interval excludes 0."""
        from scipy import special

        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * special.stdtr(self._freedom(self.n), -abs(self.mean) / self.error))

    @property
    def outcome(self) -> Outcome:
        """The verdict of the comparison."""
        return self.outcome_at(self.p)

    def outcome_at(self, p: float) -> Outcome:
        """Returns what the comparison says, given its p after correction for the comparisons of its family."""
        differs = p < 1 - CONFIDENCE
        if self.is_same:
            return Outcome.SAME_BUT_DIFFERS if differs else Outcome.SAME
        if differs:
            return Outcome.MORE if self.exceeds_margin else Outcome.DIFFERS
        return Outcome.OPEN

    def pairs_to_decide(self, correction: float = 1.0) -> int | None:
        """Returns how many pairs would decide between same and more than the margin if the mean stayed where it is.

        None if ``LARGEST_PAIRS`` would not: the tuning alone leaves too much open, or the mean is at the margin.

        Args:
            correction: The factor by which p is corrected for the comparisons of a family. A difference beyond the
                margin has to be one after the correction as well.
        """
        pairs = self.pairs_to_reach(*self.deciding_width)
        if pairs is None or abs(self.mean) < self.margin:
            return pairs
        corrected = self.pairs_to_reach(abs(self.mean), 1 - (1 - CONFIDENCE) / correction)
        return None if corrected is None else max(pairs, corrected)

    @property
    def deciding_width(self) -> tuple[float, float]:
        """The half-width below which it would be decided if the mean stayed where it is, and its confidence.

        Without a margin, it is decided whether the two differ.
        """
        margin = 0.0 if math.isnan(self.margin) else self.margin
        inside = abs(self.mean) < margin
        return abs(margin - abs(self.mean)), 2 * CONFIDENCE - 1 if inside else CONFIDENCE

    def pairs_to_reach(self, half_width: float, confidence: float = CONFIDENCE) -> int | None:
        """Returns how many pairs would make the interval narrower than this to either side; None: too many."""
        return next((n for n in range(2, LARGEST_PAIRS) if self.half_width(confidence, n) < half_width), None)


def lowest_mean(losses: Sequence[Sequence[float]], seeds: Sequence[int]) -> float:
    """Returns the lowest over rates of the trimmed mean over some seeds; ``losses`` has a sequence for each rate."""
    return min(trimmed_mean([of_rate[seed] for seed in seeds]) for of_rate in losses)


def pair_values(first: Tunings, second: Tunings) -> list[float]:
    """Returns one value for each seed of two arms: how far the first is ahead, the second's loss minus the first's.

    If one of them ran at several rates, its loss is the lowest over rates of the mean over seeds without the best and
    the worst, and of an arm that was tuned more than once the mean of these. The values are then those of a jackknife,
    which chooses all rates anew without each seed.

    Args:
        first: For each time that an arm was tuned, and for each rate there, in any order, its loss by seed.
        second: The same for the other arm, with the same seeds.
    """
    if len([losses for tuned in (*first, *second) for losses in tuned]) == 2:
        return [other - mine for mine, other in zip(first[0][0], second[0][0], strict=True)]

    def loss(of_arm: Tunings, kept: Sequence[int]) -> float:
        return sum(lowest_mean(losses, kept) for losses in of_arm) / len(of_arm)

    return jackknife(lambda kept: loss(second, kept) - loss(first, kept), len(first[0][0]))


def compare(differences: Sequence[float], margin: float, tuning_error: float = 0.0) -> Difference:
    """Returns what paired differences say, one per seed.

    Args:
        differences: One arm's value minus the other's, two or more.
        margin: Of sameness, in the same unit.
        tuning_error: The standard error that the choice of both learning rates adds.

    >>> [str(compare(values, margin=1).outcome) for values in ([0.1, 0.2, 0.3], [5.0, 5.1, 5.2])]
    ['same', 'differs by more than the margin']
    """
    import numpy as np

    sample = np.asarray(differences, dtype=float)
    return Difference(float(sample.mean()), float(sample.std(ddof=1)), tuning_error, int(sample.size), margin)

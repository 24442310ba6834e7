"""What paired differences say: the same, different by more than a margin, different, or open. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from peftscope.analysis.stats import CONFIDENCE

LARGEST_PAIRS = 10_000


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its two intervals, in the unit of the differences.

    Attributes:
        mean: The mean difference.
        spread: The standard deviation of single differences.
        tuning_error: The standard error that the choice of both learning rates adds; 0 if none was chosen.
        n: The number of pairs.
        margin: Two arms within plus and minus this count as the same; not a number if there is no yardstick for it.
    """

    mean: float
    spread: float
    tuning_error: float
    n: int
    margin: float

    def half_width(self, confidence: float = CONFIDENCE, pairs: int | None = None) -> float:
        """Returns how far the interval of the mean reaches to either side; with another number of pairs, if given."""
        n = pairs or self.n
        if n < 2:
            return math.inf
        error = math.sqrt(self.spread**2 / n + self.tuning_error**2)
        return float(special.stdtrit(n - 1, (1 + confidence) / 2)) * error

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Returns the bounds of the interval of the mean."""
        reach = self.half_width(confidence)
        return self.mean - reach, self.mean + reach

    @property
    def is_same(self) -> bool:
        """Whether two one-sided t tests at 5 % pass at the margin: the 90 % interval lies within it.

        Source: Schuirmann 1987.
        """
        low, high = self.interval(2 * CONFIDENCE - 1)
        return -self.margin < low and high < self.margin

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
    def is_precise(self) -> bool:
        """Whether the 90 % half-width is at most half of the margin, which a study plans for."""
        return self.half_width(2 * CONFIDENCE - 1) <= self.margin / 2

    @property
    def outcome(self) -> str:
        """One of: same; same, but differs; differs by more than the margin; differs, size open; open."""
        if self.is_same:
            return "same, but differs" if self.differs else "same"
        if self.exceeds_margin:
            return "differs by more than the margin"
        return "differs, size open" if self.differs else "open"

    def pairs_to_decide(self) -> int | None:
        """Returns how many pairs would decide between same and more than the margin if the mean stayed where it is.

        None if ``LARGEST_PAIRS`` would not: the tuning alone leaves too much open, or the mean is at the margin.
        """
        room = abs(self.margin - abs(self.mean))
        confidence = 2 * CONFIDENCE - 1 if abs(self.mean) < self.margin else CONFIDENCE
        sizes = range(2, LARGEST_PAIRS)
        return next((n for n in sizes if self.half_width(confidence, n) < room), None)


def compare(differences: Sequence[float], margin: float, tuning_error: float = 0.0) -> Difference:
    """Returns what paired differences say, one per seed.

    Args:
        differences: One arm's value minus the other's, two or more.
        margin: Of sameness, in the same unit.
        tuning_error: The standard error that the choice of both learning rates adds.

    >>> compare([0.1, 0.2, 0.3], margin=1).outcome, compare([5.0, 5.1, 5.2], margin=1).outcome
    ('same', 'differs by more than the margin')
    """
    sample = np.asarray(differences, dtype=float)
    return Difference(float(sample.mean()), float(sample.std(ddof=1)), tuning_error, int(sample.size), margin)

"""The search for the largest size that fits, with as few questions as possible. No torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable


def largest(
    takes: Callable[[int, bool], float], expected: Callable[[int], float], capacity: int, limit: int, start: int
) -> int | None:
    """Returns a number up to ``limit`` that fits while the next larger one does not, or None if 1 does not fit.

    If bytes never fall as the number grows, this is the largest number that fits. Reserved bytes do fall sometimes,
    because some lengths fragment less, so a larger number may fit as well.

    Args:
        takes: Returns the bytes that a number takes. It is slow. Told to say only whether the number fits, it may
            return any number over the capacity if it does not.
        expected: Returns an estimate of these bytes that is off by about the same amount for every number. It is fast
            and never falls.
        capacity: The bytes that are available.
        limit: The largest number to try.
        start: The number to try first.

    >>> def takes(n, only_whether):
    ...     return 10 + 3 * n
    >>> largest(takes, lambda n: 2 * n, 100, 1000, 1), largest(takes, float, 12, 1000, 8)
    (30, None)
    """
    low, high, stride = 0, limit + 1, 1
    value = min(start, limit)
    while high - low > 1:
        size = takes(value, value == low + 1)  # that it does not fit would end the search
        fits, crept = size <= capacity, value == high - 1 < limit
        low, high = (value, high) if fits else (low, value)
        # The bytes that the expected part may take, if the rest is as large as here.
        left = capacity - size + expected(value)
        guess = bisect_right(range(limit + 1), left, lo=1, key=expected) - 1
        if fits and guess < low + stride:
            value, stride = min(low + stride, high - 1), 2 * stride  # the first of these steps ends most searches
        elif low == 0 or high > limit:
            value, stride = min(max(guess, low + 1), high - 1), 1  # no number on that side was tried yet
        elif low < guess < high and not crept:
            value, stride = guess, 1
        else:
            value, stride = (low + high) // 2, 1  # the estimate failed: bisect
    return low or None

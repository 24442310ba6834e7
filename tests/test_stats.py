"""Intervals against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from peftscope.stats import mean_interval


def test_interval_is_students() -> None:
    sample = [0.3, 0.5, 0.1, 0.9]
    interval = mean_interval(sample)
    wanted = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((wanted.low, wanted.high))


def test_two_values_by_hand() -> None:
    interval = mean_interval([0.0, 2.0])
    assert interval.mean == 1
    assert interval.high - interval.mean == pytest.approx(12.706, abs=1e-3)


def test_one_value_has_no_interval_and_none_has_nothing() -> None:
    assert (mean_interval([3.0]).low, mean_interval([3.0]).n) == (None, 1)
    assert mean_interval([math.nan, None]) is None


def test_values_without_spread_say_nothing_of_their_uncertainty() -> None:
    assert (mean_interval([2.0, 2.0]).low, mean_interval([2.0, 2.0]).n) == (None, 2)


def test_coverage_is_nominal() -> None:
    random = np.random.default_rng(0)
    hits = sum(i.low <= 0 <= i.high for i in (mean_interval(random.normal(size=5)) for _ in range(4000)))
    assert hits / 4000 == pytest.approx(0.95, abs=0.015)

"""What paired differences say, and how often the whole rule says something wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.error_rates import PAGE, PUBLISHED, Setting, error_rates, with_table
from peftscope.analysis.compare import Difference, Outcome, compare

MARGIN = 1.0


@pytest.mark.parametrize(
    ("mean", "spread", "outcome"),
    [
        (0.0, 0.5, "same"),
        (0.5, 0.3, "same, but differs"),
        (2.0, 0.5, "differs by more than the margin"),
        (1.0, 0.5, "differs, size open"),
        (0.5, 2.0, "open"),
        (-2.0, 0.5, "differs by more than the margin"),
    ],
)
def test_every_outcome_is_reached(mean: float, spread: float, outcome: str) -> None:
    assert Difference(mean, spread, 0.0, 8, MARGIN).outcome == outcome


def test_intervals_are_students_and_grow_by_the_tuning() -> None:
    sample = np.random.default_rng(0).normal(0.2, 1, 8)
    difference = compare(list(sample), MARGIN)
    wanted = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert difference.interval() == pytest.approx((wanted.low, wanted.high))
    wider = compare(list(sample), MARGIN, tuning_error=float(stats.sem(sample)))
    assert wider.half_width() == pytest.approx(math.sqrt(2) * difference.half_width())


def test_the_pairs_to_decide_are_those_at_which_it_is_decided() -> None:
    difference = Difference(0.4, 2.0, 0.0, 8, MARGIN)
    needed = difference.pairs_to_decide()
    assert needed is not None and difference.outcome == "open"
    assert Difference(0.4, 2.0, 0.0, needed, MARGIN).is_same
    assert not Difference(0.4, 2.0, 0.0, needed - 1, MARGIN).is_same
    far, factor = Difference(6.0, 6.0, 0.0, 8, MARGIN), 10.0
    for correction in (1.0, factor):
        needed = far.pairs_to_decide(correction)
        assert needed is not None
        enough, one_less = (Difference(6.0, 6.0, 0.0, n, MARGIN) for n in (needed, needed - 1))
        assert enough.outcome_at(correction * enough.p) == Outcome.MORE
        assert one_less.outcome_at(correction * one_less.p) != Outcome.MORE
    assert (far.pairs_to_decide(factor) or 0) > (far.pairs_to_decide() or 0)
    assert Difference(0.4, 2.0, 5.0, 8, MARGIN).pairs_to_decide() is None  # the tuning alone leaves too much open


def test_without_a_yardstick_nothing_is_the_same() -> None:
    assert Difference(0.0, 0.1, 0.0, 8, math.nan).outcome == "open"
    assert Difference(1.0, 0.1, 0.0, 8, math.nan).outcome == "differs, size open"


def test_the_choice_among_rates_neither_biases_nor_narrows() -> None:
    """At most 0.2 % of the task gain and 93 %, as in the table; 1,000 comparisons know it within 0.7 points."""
    found = error_rates([Setting(8, (3.0, 3.0)), Setting(5, (1.2, 3.0))], draws=1000)
    assert (found["bias"].abs() < 0.2).all()
    assert (found["coverage"] > 0.93 - 0.014).all() and (found["coverage"] < 0.99).all()
    assert (found["half-width"] < 2.5).all() and found["half-width"][0] < found["half-width"][1]


def test_where_a_tenth_of_the_runs_end_on_the_rise_at_the_best_rate_the_arm_looks_worse() -> None:
    biased = error_rates([Setting(8, (0.8, 3.0))], draws=300)
    assert biased["bias"][0] < -0.4


def test_the_bound_is_the_smallest_margin_of_sameness() -> None:
    difference = Difference(0.4, 0.3, 0.0, 8, 1.0)
    for margin, is_same in ((difference.bound + 1e-9, True), (difference.bound - 1e-9, False)):
        assert replace(difference, margin=margin).is_same is is_same
    assert difference.bound == pytest.approx(0.4 + stats.t.ppf(0.95, 7) * 0.3 / math.sqrt(8))


def test_the_page_shows_the_published_rates(repository: Path) -> None:
    page = (repository / PAGE).read_text()
    assert page == with_table(page, pd.read_csv(repository / PUBLISHED)) and "| 1.2 and 3 |" in page

"""Checks of rank, alpha and learning rate: against independent values."""

from __future__ import annotations

import math

import pytest
from ledger_parts import claims

from peftscope.claims.checks import scaling
from peftscope.claims.verdict import Rule, Verdict, judge

RANKS = (4, 8, 16, 32, 64, 128, 256)


def test_products_of_thin_matrices_have_rank_r_and_such_matrices_factor() -> None:
    found = scaling.product_rank_excess(30)
    assert (found.value, found.evidence["smallest"]) == (0, 0)
    assert float(scaling.factorisation_error(30).value) < 1e-11


def test_powers_of_two_cancel_exactly_in_adam_and_others_up_to_rounding() -> None:
    exact = scaling.trajectory_gap(1 / 16, 2, 2, 8, epsilon=1e-30, steps=30)
    rounded = scaling.trajectory_gap(1 / 15, 3, 3, 5, epsilon=1e-30, steps=30)
    assert exact.value == 0
    assert 0 < float(rounded.value) < 1e-10


def test_usual_epsilon_breaks_the_invariance_a_little() -> None:
    gap = float(scaling.trajectory_gap(1 / 16, 2, 2, 8, epsilon=1e-8, steps=30).value)
    assert 0 < gap < 1e-2


def test_epsilon_of_zero_gives_no_number() -> None:
    """Trap 22 of the ledger: A has no gradient in the first step, and Adam divides zero by zero."""
    found = scaling.trajectory_gap(1 / 16, 2, 2, 8, epsilon=0, steps=2)
    assert math.isnan(float(found.value))
    assert judge(Rule(at_most=1e-8), found)[0] is Verdict.OPEN


def test_alpha_is_the_learning_rate_of_b_alone() -> None:
    b_alone = scaling.trajectory_gap(2, 1, 1, 0.5, epsilon=1e-30, steps=30)
    both = scaling.trajectory_gap(2, 1, 0.5, 0.5, epsilon=1e-30, steps=30)
    assert b_alone.value == 0
    assert float(both.value) > 1e-3


def test_gradient_falls_with_the_root_of_the_rank_and_not_at_all_with_a_stabilised_scale() -> None:
    """The slopes that independent numpy code gave: -0.496 and +0.004."""
    plain = scaling.gradient_slope(False, RANKS, seeds=5)
    stabilised = scaling.gradient_slope(True, RANKS, seeds=5)
    assert plain.value == pytest.approx(-0.5, abs=0.03)
    assert stabilised.value == pytest.approx(0, abs=0.03)
    assert float(stabilised.value) - float(plain.value) == pytest.approx(0.5, abs=1e-3)
    assert plain.low is not None
    assert plain.high is not None
    assert plain.low < float(plain.value) < plain.high


def test_settings_are_counted() -> None:
    """PEFT's own default, 8/8, is a setting like the others; the interval is that of a sample of practice."""
    settings = [
        scaling.Setting(name=n, source="a paper, table 1", value=v) for n, v in {"a": 8, "c": 2, "d": 0.25}.items()
    ]
    found = scaling.share_of_settings(settings, low=1, high=2, default="lora_alpha/r")
    assert (found.value, found.n, found.evidence["PEFT's default (LoraConfig)"]) == (0.5, 4, 1)
    assert 0.1 < found.low < 0.5 < found.high < 0.9
    matrices = {"qv": ["q", "v"], "q": ["q"], "qk": ["q", "k"]}
    placements = [scaling.Placement(name=n, source="a paper, table 1", matrices=m) for n, m in matrices.items()]
    beyond = scaling.placements_beyond(placements, ["q", "v"])
    assert (beyond.value, beyond.evidence["qk (a paper, table 1)"]) == (1, "q, k")


@pytest.mark.parametrize("claim", ["S26", "S30", "S45"])
def test_a_listed_setting_without_its_place_is_refused(claim: str) -> None:
    from pydantic import ValidationError

    for part in claims()[claim].parts:
        for name, model in (("settings", scaling.Setting), ("placements", scaling.Placement)):
            for entry in part.with_.get(name, []):
                model.model_validate(entry)
                with pytest.raises(ValidationError):
                    model.model_validate({key: value for key, value in entry.items() if key != "source"})

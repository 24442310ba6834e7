"""Derives a verdict from a measured quantity and a rule. No other module decides. No torch."""

from __future__ import annotations

import math
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from peftscope.analysis.stats import CONFIDENCE, equivalence_interval, paired_p, pairs_needed
from peftscope.claims.measurement import Measurement


class Verdict(StrEnum):
    """The verdict on a claim."""

    EXACT = "EXACT"
    EXACT_WRONG = "EXACT-WRONG"
    SUPPORTED = "SUPPORTED"
    REFUTED = "REFUTED"
    EQUIVALENT = "EQUIVALENT"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_RUN = "NOT-RUN"
    NOT_TESTABLE_HERE = "NOT-TESTABLE-HERE"


_NO_INTERVAL = "n = {n} gives no interval"
UNDECIDED = (Verdict.NOT_RUN, Verdict.NOT_TESTABLE_HERE)


class Rule(BaseModel):
    """The rule for when a claim holds: ``equals``, ``at_least`` and ``at_most``, ``better_by``, or ``same_within``.

    A quantity without an interval is decided by its value. A quantity with an interval is decided only if the whole
    interval lies on one side.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    equals: StrictBool | float | str | None = None
    relative: float = Field(0, ge=0, description="tolerance of equals, as a share of it")
    absolute: float = Field(0, ge=0, description="tolerance of equals, in the claim's unit")
    at_least: float | None = None
    at_most: float | None = None
    better_by: float | None = Field(
        None, ge=0, description="a difference in the claim's favour above 0, and at least this"
    )
    same_within: float | None = Field(None, gt=0, description="a difference between minus and plus this")

    @model_validator(mode="after")
    def _one_kind(self) -> Rule:
        ranged = self.at_least is not None or self.at_most is not None
        kinds = [self.equals is not None, ranged, self.better_by is not None, self.same_within is not None]
        if sum(kinds) != 1:
            raise ValueError("must have one of: equals, at_least and at_most, better_by, same_within")
        if (self.relative or self.absolute) and not isinstance(self.equals, float | int):
            raise ValueError("a tolerance needs a number under equals")
        if ranged and self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least={self.at_least} is above at_most={self.at_most}")
        return self

    def bounds(self) -> tuple[float, float]:
        """Returns the range in which a numeric claim holds."""
        if self.same_within is not None:
            return -self.same_within, self.same_within
        if self.better_by is not None:
            return 0.0, math.inf
        if isinstance(self.equals, float | int):
            slack = max(self.absolute, self.relative * abs(self.equals))
            return self.equals - slack, self.equals + slack
        low = -math.inf if self.at_least is None else self.at_least
        return low, math.inf if self.at_most is None else self.at_most

    def __str__(self) -> str:
        """Returns the words that follow "the claim holds if it"."""
        if self.same_within is not None:
            return f"is within ±{self.same_within:g} of the other"
        if self.better_by is not None:
            return "is better" + (f" by {self.better_by:g} or more" if self.better_by else "")
        if self.equals is not None:
            if isinstance(self.equals, bool | str):
                return f"is {str(self.equals).lower() if isinstance(self.equals, bool) else self.equals}"
            tolerance = f" ± {self.absolute:g}" if self.absolute else ""
            return f"is {self.equals:g}" + (f" ± {100 * self.relative:g} %" if self.relative else tolerance)
        low, high = self.bounds()
        if math.isinf(high):
            return f"is at least {low:g}"
        return f"is at most {high:g}" if math.isinf(low) else f"is {low:g} to {high:g}"


def judge(rule: Rule, measurement: Measurement, p_adjusted: float | None = None) -> tuple[Verdict, str]:
    """Returns the verdict on a measurement, and the reason for it.

    Args:
        rule: The rule for when the claim holds.
        measurement: The measured quantity.
        p_adjusted: The p of a directional contrast after correction within its family; None without a family.
    """
    if isinstance(measurement.value, str | bool) or isinstance(rule.equals, str | bool):
        return (Verdict.EXACT if measurement.value == rule.equals else Verdict.EXACT_WRONG), ""
    if not math.isfinite(measurement.value):
        return Verdict.INCONCLUSIVE, "the measured quantity is not a number"
    low, high = rule.bounds()
    if rule.same_within is not None and measurement.samples:
        return _judge_sameness(rule.same_within, measurement)
    if measurement.low is None or measurement.high is None:
        if measurement.samples:
            return Verdict.INCONCLUSIVE, _NO_INTERVAL.format(n=measurement.n)
        return (Verdict.EXACT if low <= measurement.value <= high else Verdict.EXACT_WRONG), ""
    if rule.better_by is not None:
        return _judge_benefit(rule.better_by, measurement, p_adjusted)
    if low <= measurement.low and measurement.high <= high:
        return Verdict.SUPPORTED, "the whole interval lies where the claim says"
    if measurement.high < low or high < measurement.low:
        return Verdict.REFUTED, "the whole interval lies outside of what the claim says"
    return Verdict.INCONCLUSIVE, _what_is_missing(
        measurement, min(abs(measurement.value - b) for b in (low, high)), 1 - CONFIDENCE
    )


def _judge_benefit(least: float, measurement: Measurement, p_adjusted: float | None) -> tuple[Verdict, str]:
    assert measurement.low is not None
    assert measurement.high is not None
    if measurement.low == measurement.high == 0:
        return Verdict.REFUTED, "there is no difference at all"
    decided = measurement.low > 0 or measurement.high < 0
    if decided and p_adjusted is not None and p_adjusted >= 1 - CONFIDENCE:
        return Verdict.INCONCLUSIVE, f"the interval excludes 0, but p = {p_adjusted:.3g} after correction in its family"
    if measurement.low > 0 and measurement.low >= least:
        return Verdict.SUPPORTED, "the whole interval lies where the claim says"
    if measurement.high < 0 or measurement.high < least:
        return Verdict.REFUTED, "the interval excludes the claimed benefit"
    return Verdict.INCONCLUSIVE, _what_is_missing(measurement, abs(float(measurement.value) - least), 1 - CONFIDENCE)


def _judge_sameness(margin: float, measurement: Measurement) -> tuple[Verdict, str]:
    interval = equivalence_interval(measurement.samples)
    if interval is None:
        return Verdict.INCONCLUSIVE, _NO_INTERVAL.format(n=measurement.n)
    differ = ", though the two differ within it" if paired_p(measurement.samples) < 1 - CONFIDENCE else ""
    if -margin < interval[0] and interval[1] < margin:
        bounds = f"{interval[0]:.3g} to {interval[1]:.3g}"
        return Verdict.EQUIVALENT, f"both one-sided tests pass at ±{margin:g} (90 % interval {bounds}){differ}"
    if (
        measurement.low is not None
        and measurement.high is not None
        and (measurement.low > margin or measurement.high < -margin)
    ):
        return Verdict.REFUTED, f"the interval lies outside ±{margin:g}"
    room = margin - abs(float(measurement.value))
    if room <= 0:
        return (
            Verdict.INCONCLUSIVE,
            f"the mean lies outside ±{margin:g}, the interval reaches in; more pairs would refute",
        )
    return Verdict.INCONCLUSIVE, _what_is_missing(measurement, room, 2 * (1 - CONFIDENCE))


def _what_is_missing(measurement: Measurement, effect: float, alpha: float) -> str:
    """Returns how wide the interval is, and how many pairs would decide if the mean stayed where it is."""
    assert measurement.low is not None
    assert measurement.high is not None
    text = f"the interval is too wide (half-width {(measurement.high - measurement.low) / 2:.3g})"
    needed = pairs_needed(measurement.samples, effect, alpha=alpha) if len(measurement.samples) > 1 else None
    return f"{text}; about {needed} pairs would decide" if needed and needed > len(measurement.samples) else text

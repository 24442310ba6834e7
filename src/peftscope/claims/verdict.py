"""Derives a verdict from a measured quantity and a rule. No other module decides. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from peftscope.analysis.stats import CONFIDENCE, equivalence_interval, mean_interval, pairs_needed
from peftscope.claims.measurement import Measurement, spoken_number

ALPHA = 1 - CONFIDENCE


class Verdict(StrEnum):
    """The verdict on a claim, or on one of its parts, which never holds in part."""

    HOLDS = "holds"
    IN_PART = "holds in part"
    WRONG = "wrong"
    OPEN = "open"
    NOT_RUN = "not run"

    @classmethod
    def _missing_(cls, value: object) -> Verdict | None:
        """Returns the verdict that an older ``claims.json`` states in other words."""
        return _OLDER_WORDS.get(value)


_OLDER_WORDS: dict[object, Verdict] = {
    **dict.fromkeys(("EXACT", "SUPPORTED", "EQUIVALENT"), Verdict.HOLDS),
    **dict.fromkeys(("EXACT-WRONG", "REFUTED"), Verdict.WRONG),
    "INCONCLUSIVE": Verdict.OPEN,
    **dict.fromkeys(("NOT-RUN", "NOT-TESTABLE-HERE"), Verdict.NOT_RUN),
}


def combine(verdicts: Collection[Verdict]) -> Verdict:
    """Returns the verdict on a claim from those on the parts that decide.

    >>> [str(combine(parts)) for parts in (["holds", "wrong", "open"], ["wrong", "wrong"], ["holds", "not run"])]
    ['holds in part', 'wrong', 'not run']
    """
    if {Verdict.HOLDS, Verdict.WRONG} <= set(verdicts):
        return Verdict.IN_PART
    return next(verdict for verdict in (Verdict.OPEN, Verdict.NOT_RUN, *Verdict) if verdict in verdicts)


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
            return self.better_by, math.inf
        if isinstance(self.equals, float | int):
            slack = max(self.absolute, self.relative * abs(self.equals))
            return self.equals - slack, self.equals + slack
        low = -math.inf if self.at_least is None else self.at_least
        return low, math.inf if self.at_most is None else self.at_most

    def words(self, unit: str = "") -> str:
        """Returns what counts as right, with its tolerance and unit.

        >>> Rule(equals=14, relative=0.05).words("GB"), Rule(at_least=0.5).words(), Rule(equals=True).words()
        ('14 GB ± 5 %', 'at least 0.5', 'yes')
        """
        tolerance = (
            f"± {100 * self.relative:g} %"
            if self.relative
            else f"± {spoken_number(self.absolute)}" * bool(self.absolute)
        )
        if self.equals is not None:
            return " ".join(filter(None, (spoken_number(self.equals), unit, tolerance)))
        low, high = map(spoken_number, self.bounds())
        if self.same_within is not None:
            text = f"a difference within ±{high}"
        elif self.better_by is not None:
            text = f"at least {low}" if self.better_by else "above 0"
        elif self.at_most is None:
            text = f"at least {low}"
        else:
            text = f"at most {high}" if self.at_least is None else f"{low} to {high}"
        return f"{text} {unit}".strip()


@dataclass(frozen=True)
class Comparison:
    """What paired differences say about a margin. They can be the same within it and differ from zero at once."""

    margin: float
    mean: float
    same: bool
    """Two one-sided tests pass at the margin."""
    differs: bool
    """The interval excludes zero."""
    more: bool
    """The interval lies outside of the margin."""
    pairs: int | None
    """The pairs that would decide between the two sides of the nearest threshold, if more are needed."""

    def __str__(self) -> str:
        """Returns the outcome in words."""
        if self.more:
            return f"differs by more than the margin of {self.margin:g}"
        if self.same:
            sign = f", and {'above' if self.mean > 0 else 'below'} zero" if self.differs else ""
            return f"the same within ±{self.margin:g}{sign}"
        return "differs, size open" if self.differs else "open"


def compare(differences: Sequence[float], margin: float) -> Comparison | None:
    """Returns the outcome of a comparison of paired runs, or None for fewer than two pairs.

    Args:
        differences: One difference a pair.
        margin: The largest difference that counts as none.
    """
    inner, outer = equivalence_interval(differences), mean_interval(differences)
    if inner is None or outer is None:
        return None
    low, high = (outer.mean, outer.mean) if outer.low is None or outer.high is None else (outer.low, outer.high)
    same = -margin < inner[0] and inner[1] < margin
    more = low > margin or high < -margin
    inside = abs(outer.mean) < margin
    pairs = None
    if not same and not more:
        pairs = pairs_needed(differences, margin - abs(outer.mean), alpha=2 * ALPHA if inside else ALPHA)
    return Comparison(margin, outer.mean, same, low > 0 or high < 0, more, pairs)


def judge(rule: Rule, measurement: Measurement, p_adjusted: float | None = None) -> tuple[Verdict, str]:
    """Returns the verdict on a measurement, and what a reader must know beside the numbers.

    Args:
        rule: The rule for when the claim holds.
        measurement: The measured quantity.
        p_adjusted: The p of a directional contrast after correction within its family; None without a family.
    """
    value, low, high = measurement.value, measurement.low, measurement.high
    if isinstance(value, str | bool) or isinstance(rule.equals, str | bool):
        return (Verdict.HOLDS if value == rule.equals else Verdict.WRONG), ""
    if not math.isfinite(value):
        return Verdict.OPEN, "the measured quantity is not a number"
    if measurement.samples and len(measurement.samples) < 2:
        return Verdict.OPEN, f"n = {measurement.n} gives no interval"
    if rule.same_within is not None and (comparison := compare(measurement.samples, rule.same_within)):
        return _judge_sameness(comparison, measurement)
    least, most = rule.bounds()
    if low is None or high is None:
        low = high = value
    if rule.better_by is not None:
        if low == high == 0:
            return Verdict.WRONG, "there is no difference at all"
        if (low > 0 or high < 0) and p_adjusted is not None and p_adjusted >= ALPHA:
            return Verdict.OPEN, f"the interval excludes 0, but p = {p_adjusted:.3g} after correction in its family"
        if high < 0 or high < least:
            return Verdict.WRONG, ""
        if low > 0:
            return (Verdict.HOLDS, "") if low >= least else (Verdict.OPEN, _spans(measurement, "differs, size open"))
    elif high < least or most < low:
        return Verdict.WRONG, ""
    elif least <= low and high <= most:
        return Verdict.HOLDS, ""
    nearest = min((bound for bound in (least, most) if math.isfinite(bound)), key=lambda bound: abs(value - bound))
    pairs = pairs_needed(measurement.samples, value - nearest) if measurement.samples else None
    return Verdict.OPEN, _spans(measurement, f"{nearest:g} lies within the interval", pairs)


def _judge_sameness(comparison: Comparison, measurement: Measurement) -> tuple[Verdict, str]:
    if comparison.more:
        return Verdict.WRONG, str(comparison)
    if not comparison.same:
        outcome = f"{comparison}, with a margin of {comparison.margin:g}"
        return Verdict.OPEN, _spans(measurement, outcome, comparison.pairs)
    inner = equivalence_interval(measurement.samples)
    assert inner is not None
    return Verdict.HOLDS, f"{comparison} (90 % interval {inner[0]:.3g} to {inner[1]:.3g})"


def _spans(measurement: Measurement, outcome: str, pairs: int | None = None) -> str:
    """Returns an outcome with the half-width of the interval, and with the pairs that would decide."""
    assert measurement.low is not None
    assert measurement.high is not None
    text = f"{outcome} (half-width {(measurement.high - measurement.low) / 2:.3g})"
    return f"{text}; about {pairs} pairs would decide" if pairs and pairs > len(measurement.samples) else text

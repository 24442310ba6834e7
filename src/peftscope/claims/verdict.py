"""Derives a verdict from a measured quantity and a rule. No other module decides. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from decimal import Decimal
from enum import StrEnum
from typing import Literal

from pydantic import Field, StrictBool, model_validator

from peftscope.analysis.compare import Difference, compare
from peftscope.analysis.stats import CONFIDENCE
from peftscope.claims.measurement import Measurement
from peftscope.files.content import Strict
from peftscope.words import scale_of, spoken_number, spoken_quantity

ALPHA = 1 - CONFIDENCE
OF_SIZE = ("by less than matters", "no difference that matters")
"""How the reasons begin that belong to a verdict."""


class Verdict(StrEnum):
    """The verdict on a claim, or on one of its parts, which never holds in part."""

    HOLDS = "holds"
    IN_PART = "holds in part"
    WRONG = "wrong"
    OPEN = "open"
    NOT_RUN = "not run"


UNDECIDED = (Verdict.OPEN, Verdict.NOT_RUN)


def combine(verdicts: Collection[Verdict]) -> Verdict:
    """Returns the verdict on a claim from those on the parts that decide. A wrong part is enough where none holds.

    >>> [str(combine(parts)) for parts in (["holds", "wrong", "open"], ["open", "wrong"], ["holds", "not run"])]
    ['holds in part', 'wrong', 'not run']
    """
    if {Verdict.HOLDS, Verdict.WRONG} <= set(verdicts):
        return Verdict.IN_PART
    return next(verdict for verdict in (Verdict.WRONG, *UNDECIDED, *Verdict) if verdict in verdicts)


Reading = Literal["rounded", "plain", "about"]
READINGS: dict[str, float] = {"plain": 0.05, "about": 0.2}
"""How far from a printed figure counts as equal, as a share of it. A rounded one is equal where all its digits are."""


def _last_digit(figure: float) -> float:
    """Returns the unit of the last digit of a printed figure that is not zero.

    >>> _last_digit(255), _last_digit(8.4e6), _last_digit(0.37)
    (1.0, 100000.0, 0.01)
    """
    return float(Decimal(1).scaleb(int(Decimal(repr(figure)).normalize().as_tuple().exponent)))


class Rule(Strict):
    """The rule for when a claim holds: ``equals``, ``at_least`` and ``at_most``, ``better_by``, or ``same_within``.

    A quantity without an interval is decided by its value. A quantity with an interval is decided only if the whole
    interval lies on one side.
    """

    equals: StrictBool | float | str | None = None
    reads: Reading | None = Field(None, description="how the printed figure, or range, is read")
    absolute: float = Field(0, ge=0, description="tolerance of equals where no figure is printed, in the claim's unit")
    at_least: float | None = None
    at_most: float | None = None
    better_by: float | None = Field(None, ge=0, description="a favourable difference above 0, and at least this")
    same_within: float | None = Field(None, gt=0, description="a difference between minus and plus this")

    @model_validator(mode="after")
    def _one_kind(self) -> Rule:
        ranged = self.at_least is not None or self.at_most is not None
        kinds = [self.equals is not None, ranged, self.better_by is not None, self.same_within is not None]
        if sum(kinds) != 1:
            raise ValueError("must have one of: equals, at_least and at_most, better_by, same_within")
        is_number = isinstance(self.equals, float | int) and not isinstance(self.equals, bool)
        if (self.absolute or self.reads == "rounded") and not is_number:
            raise ValueError("a tolerance needs a number under equals")
        if self.reads and (self.absolute or not (is_number or ranged)):
            raise ValueError("reads is for a number under equals, without absolute, or for at_least and at_most")
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
            if self.reads == "rounded":
                digit = _last_digit(self.equals)
                return self.equals - digit / 2, math.nextafter(self.equals + digit, 0)
            slack = self.absolute + self._share * abs(self.equals)
            return self.equals - slack, self.equals + slack
        low = -math.inf if self.at_least is None else self.at_least * (1 - self._share)
        return low, math.inf if self.at_most is None else self.at_most * (1 + self._share)

    @property
    def _share(self) -> float:
        return READINGS.get(self.reads or "", 0.0)

    def words(self, unit: str = "") -> str:
        """Returns what counts as right, with its tolerance and unit.

        >>> Rule(equals=14, reads="plain").words("GB"), Rule(at_least=0.5).words(), Rule(equals=True).words()
        ('14 GB ± 5 %', 'at least 0.5', 'yes')
        >>> Rule(equals=255, reads="rounded").words("×"), Rule(at_least=2, at_most=3, reads="about").words("GB")
        ('255 ×, rounded or cut off', '2 to 3 GB ± 20 %')
        """
        scale = scale_of(unit)
        points = " points" * (scale > 1)
        tolerance = f" ± {spoken_number(scale * self.absolute)}{points}" * bool(self.absolute)
        if self.reads:
            tolerance = f" ± {100 * self._share:g} %" if self._share else ", rounded or cut off"
        if self.equals is not None:
            return spoken_quantity(self.equals, unit) + tolerance
        if self.reads:
            return f"{Rule(at_least=self.at_least, at_most=self.at_most).words(unit)}{tolerance}"
        low, high = self.bounds()
        if self.same_within is not None:
            # The sign stands before the number, so the number is not told with its unit in words.
            told = spoken_number(scale * high) + " %" * (scale > 1)
            return f"a difference within ±{told} {unit.removeprefix('as a share ')}".strip()
        if self.better_by is not None:
            return f"at least {spoken_quantity(low, unit)}" if self.better_by else f"above {spoken_quantity(0, unit)}"
        if self.at_most is None:
            return f"at least {spoken_quantity(low, unit)}"
        return f"at most {spoken_quantity(high, unit)}" if self.at_least is None else spoken_quantity(low, unit, high)


def _told(number: float, unit: str, form: str = "g") -> str:
    """Returns a number as its quantity is told: a share in percent."""
    scale = scale_of(unit)
    return f"{scale * number:{form}}" + " %" * (scale > 1)


def judge(rule: Rule, measurement: Measurement, unit: str = "") -> tuple[Verdict, str]:
    """Returns the verdict on a measurement, and what a reader must know beside the numbers."""
    if measurement.spoiled_by:
        return Verdict.OPEN, measurement.spoiled_by
    value, low, high = measurement.value, measurement.low, measurement.high
    if isinstance(value, str | bool) or isinstance(rule.equals, str | bool):
        return (Verdict.HOLDS if value == rule.equals else Verdict.WRONG), ""
    if not math.isfinite(value):
        return Verdict.OPEN, "the measured quantity is not a number"
    if measurement.samples and len(measurement.samples) < 2:
        return Verdict.OPEN, f"n = {measurement.n} gives no interval"
    if rule.same_within is not None and measurement.samples:
        difference = compare(measurement.samples, rule.same_within, measurement.tuning_error)
        return _judge_sameness(difference, measurement, unit)
    least, most = rule.bounds()
    if low is None or high is None:
        low = high = value
    if rule.better_by is not None:
        if low == high == 0:
            return Verdict.WRONG, "there is no difference at all"
        corrected = measurement.p_adjusted
        matters = 0.0 if rule.better_by else measurement.matters
        is_small = matters > 0 and compare(measurement.samples, matters, measurement.tuning_error).is_same
        is_untold = corrected is not None and corrected >= ALPHA
        if is_small and (is_untold or low <= 0 <= high):
            return Verdict.WRONG, f"{OF_SIZE[1]}, within ±{_told(matters, unit)}"
        if is_untold and (low > 0 or high < 0):
            return Verdict.OPEN, f"the interval excludes 0, but p = {corrected:.3g} after the study's correction"
        if high < 0 or high < least:
            return Verdict.WRONG, ""
        if low >= least and low > 0:
            return Verdict.HOLDS, f"{OF_SIZE[0]}, {_told(matters, unit)}" * is_small
        if low > 0:
            return Verdict.OPEN, _spans(measurement, "differs, size open", unit)
    elif high < least or most < low:
        return Verdict.WRONG, ""
    elif least <= low and high <= most:
        return Verdict.HOLDS, ""
    nearest = min((bound for bound in (least, most) if math.isfinite(bound)), key=lambda bound: abs(value - bound))
    samples = measurement.samples
    comparison = compare(samples, math.inf, measurement.tuning_error) if samples else None
    pairs = comparison.pairs_to_reach(abs(value - nearest)) if comparison else None
    return Verdict.OPEN, _spans(measurement, f"{_told(nearest, unit)} lies within the interval", unit, pairs)


def _judge_sameness(difference: Difference, measurement: Measurement, unit: str) -> tuple[Verdict, str]:
    margin = _told(difference.margin, unit)
    if difference.exceeds_margin:
        return Verdict.WRONG, f"differs by more than the margin of {margin}"
    if not difference.is_same:
        outcome = f"{difference.outcome}, with a margin of {margin}"
        return Verdict.OPEN, _spans(measurement, outcome, unit, difference.pairs_to_decide())
    sign = f", and {'above' if difference.mean > 0 else 'below'} zero" if difference.differs else ""
    low, high = (_told(end, unit, ".3g") for end in difference.interval(2 * CONFIDENCE - 1))
    return Verdict.HOLDS, f"the same within ±{margin}{sign} (90 % interval {low} to {high})"


def _spans(measurement: Measurement, outcome: str, unit: str, pairs: int | None = None) -> str:
    """Returns an outcome with the half-width of the interval, and with the pairs that would decide."""
    assert measurement.low is not None
    assert measurement.high is not None
    text = f"{outcome} (half-width {_told((measurement.high - measurement.low) / 2, unit, '.3g')})"
    return f"{text}; about {pairs} pairs would decide" if pairs and pairs > len(measurement.samples) else text

"""Runs checks and turns their measurements into verdicts: one for every part, and a headline for every claim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peftscope.analysis.stats import holm, paired_p
from peftscope.claims.ledger import DETERMINISTIC, Claim, Part, find_check
from peftscope.claims.measurement import Measurement, NotRunError, Quantity
from peftscope.claims.verdict import UNDECIDED, Verdict, judge
from peftscope.errors import InputError, printable, shown
from peftscope.hardware.bf16 import bf16_products

SIGNIFICANT_DIGITS = 6
"""The digits that are written of a measured number: further ones depend on the order of sums."""


@dataclass(frozen=True)
class PartFinding:
    """The verdict on one part of a claim, with the measurement behind it."""

    part: Part
    verdict: Verdict
    reason: str = ""
    found: Measurement | None = None
    p_adjusted: float | None = None
    """The p of a contrast after Holm's correction within its family."""

    def to_json(self) -> dict[str, Any]:
        """Returns the finding with its evidence. Numbers are rounded to the digits that are reproducible."""
        found = self.found
        return {
            "kind": self.part.kind,
            "measures": self.part.measures,
            "verdict": self.verdict.value,
            "found": rounded(found.value) if found else None,
            "low": rounded(found.low) if found else None,
            "high": rounded(found.high) if found else None,
            "unit": self.part.unit,
            "n": found.n if found else 0,
            "rule": str(self.part.rule) if self.part.rule else "",
            "check": self.part.check,
            "with": self.part.with_,
            "scope": self.part.scope,
            "model": found.model if found else "",
            "run_ids": list(found.run_ids) if found else [],
            "evidence": {name: rounded(value) for name, value in found.evidence.items()} if found else {},
            "family": self.part.family,
            "p_adjusted": rounded(self.p_adjusted),
            "curves": {
                name: {f"{x:g}": rounded(y) for x, y in curve.items()}
                for name, curve in (found.curves if found else {}).items()
            },
            "axes": list(found.axes) if found else [],
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Finding:
    """The findings on all parts of a claim. The last part decides."""

    claim: Claim
    parts: tuple[PartFinding, ...]

    @property
    def deciding(self) -> PartFinding:
        """Returns the part that the headline rests on."""
        return self.parts[-1]

    @property
    def headline(self) -> tuple[Verdict, str]:
        """Returns the claim's verdict and its reason.

        A claim is inconclusive if other parts are decided, but not the part that counts.
        """
        last = self.deciding
        others = [part for part in self.parts[:-1] if part.verdict not in UNDECIDED]
        if last.verdict in UNDECIDED and others:
            return Verdict.INCONCLUSIVE, f"the part that decides is {last.verdict}: {last.reason}"
        return last.verdict, last.reason

    def to_json(self, hardware: str) -> dict[str, Any]:
        """Returns one entry of claims.json.

        Args:
            hardware: The machine on which the checks of deterministic kinds ran.
        """
        verdict, reason = self.headline
        deciding = self.deciding.to_json()
        return {
            "id": self.claim.id,
            "slug": self.claim.slug,
            "verdict": verdict.value,
            "claimed": self.claim.claimed,
            **{key: deciding[key] for key in ("found", "low", "high", "unit", "n", "rule")},
            "scope": self.claim.scope,
            "run_ids": sorted({run_id for part in self.parts if part.found for run_id in part.found.run_ids}),
            "reason": reason,
            "kind": self.deciding.part.kind,
            "model": deciding["model"],
            "hardware": hardware if self.deciding.part.kind in DETERMINISTIC and self.deciding.found else "",
            "parts": [part.to_json() for part in self.parts],
        }


def evaluate(claims: Iterable[Claim], ledger: Iterable[Claim]) -> Iterator[Finding]:
    """Yields the finding on each claim, one after the other.

    Args:
        claims: The claims to measure.
        ledger: All claims. The p of a contrast is corrected for all contrasts of its family.
    """
    families: dict[str, list[Part]] = {}
    for claim in ledger:
        for part in claim.parts:
            families.setdefault(part.family, []).append(part)
    for claim in claims:
        yield Finding(claim, tuple(evaluate_part(part, families.get(part.family, ())) for part in claim.parts))


def evaluate_part(part: Part, family: Sequence[Part] = ()) -> PartFinding:
    """Returns the finding on one part. If its check cannot run, the finding says why.

    Args:
        part: The part to measure.
        family: The contrasts that Holm's correction takes together, including this one.
    """
    if part.impossible:
        return PartFinding(part, Verdict.NOT_TESTABLE_HERE, part.impossible)
    if part.waits_for:
        return PartFinding(part, Verdict.NOT_RUN, part.waits_for)
    found = _measure(part)
    if isinstance(found, str):
        return PartFinding(part, Verdict.NOT_RUN, found)
    assert part.rule is not None
    p_adjusted = _adjusted_p(part, found, family)
    verdict, reason = judge(part.rule, found, p_adjusted)
    return PartFinding(part, verdict, reason, found, p_adjusted)


def _measure(part: Part) -> Measurement | str:
    """Returns the check's measurement, or the reason why there is none."""
    try:
        with bf16_products():
            return find_check(part.check)(**part.with_)
    except NotRunError as error:
        return str(error)
    except InputError as error:
        return "; ".join(map(str, error.problems))
    except Exception as error:  # an error in one check must not lose the results of the others
        given = ", ".join(f"{name}={shown(value)}" for name, value in part.with_.items())
        said = " ".join(str(error).split())  # one line, for tables
        return printable(f"{part.check} stopped with {type(error).__name__}: {said}; look at what it got: {given}")


def _adjusted_p(part: Part, measurement: Measurement, family: Sequence[Part]) -> float | None:
    """Returns a contrast's p after Holm's correction for the contrasts of its family that have run, or None."""
    if not part.family or len(measurement.samples) < 2:
        return None
    others = [measured for other in family if other != part and not isinstance(measured := _measure(other), str)]
    p_values = [paired_p(m.samples) for m in (measurement, *others) if len(m.samples) > 1]
    return holm(p_values)[0]


def rounded(value: Quantity | None) -> Quantity | None:
    """Returns a number with its reproducible digits, None for NaN and infinity, and any other value unchanged.

    >>> rounded(0.123456789), rounded(True), rounded("uint8"), rounded(16777216), rounded(math.nan)
    (0.123457, True, 'uint8', 16777216, None)
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value

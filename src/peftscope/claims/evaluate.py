"""Running checks and turning what they measure into verdicts: one for every part, and the headline of every claim."""

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
    """What was found about one part of a claim."""

    part: Part
    verdict: Verdict
    reason: str = ""
    found: Measurement | None = None
    p_adjusted: float | None = None
    """The p of a contrast after Holm's correction within its family."""

    def to_json(self) -> dict[str, Any]:
        """Returns the finding with its evidence, numbers rounded to what is reproducible."""
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
    """What was found about a claim; its last part decides."""

    claim: Claim
    parts: tuple[PartFinding, ...]

    @property
    def deciding(self) -> PartFinding:
        """Returns the part that the headline rests on."""
        return self.parts[-1]

    @property
    def headline(self) -> tuple[Verdict, str]:
        """Returns the claim's verdict and its reason.

        A claim with parts that are decided, but not the one that counts, is inconclusive.
        """
        last = self.deciding
        others = [part for part in self.parts[:-1] if part.verdict not in UNDECIDED]
        if last.verdict in UNDECIDED and others:
            return Verdict.INCONCLUSIVE, f"the part that decides is {last.verdict}: {last.reason}"
        return last.verdict, last.reason

    def to_json(self, hardware: str) -> dict[str, Any]:
        """Returns one entry of claims.json.

        Args:
            hardware: What the checks of deterministic kinds ran on.
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
    """Yields what is found about each claim, one after the other.

    Args:
        claims: What to measure.
        ledger: All claims: the p of a contrast is corrected for all that belong to its family.
    """
    families: dict[str, list[Part]] = {}
    for claim in ledger:
        for part in claim.parts:
            families.setdefault(part.family, []).append(part)
    for claim in claims:
        yield Finding(claim, tuple(evaluate_part(part, families.get(part.family, ())) for part in claim.parts))


def evaluate_part(part: Part, family: Sequence[Part] = ()) -> PartFinding:
    """Returns what is found about one part; a check that cannot run says why.

    Args:
        part: What to measure.
        family: The contrasts that were made with this one, itself among them.
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
    """Returns what the check measures, or why it cannot."""
    try:
        with bf16_products():
            return find_check(part.check)(**part.with_)
    except NotRunError as error:
        return str(error)
    except InputError as error:
        return "; ".join(map(str, error.problems))
    except Exception as error:  # one check's values must not cost what the others found
        given = ", ".join(f"{name}={shown(value)}" for name, value in part.with_.items())
        said = " ".join(str(error).split())  # one line, for tables
        return printable(f"{part.check} stopped with {type(error).__name__}: {said}; look at what it got: {given}")


def _adjusted_p(part: Part, measurement: Measurement, family: Sequence[Part]) -> float | None:
    """Returns a contrast's p after Holm's correction for those of its family that have run, None where it is alone."""
    if not part.family or len(measurement.samples) < 2:
        return None
    others = [measured for other in family if other != part and not isinstance(measured := _measure(other), str)]
    p_values = [paired_p(m.samples) for m in (measurement, *others) if len(m.samples) > 1]
    return holm(p_values)[0]


def rounded(value: Quantity | None) -> Quantity | None:
    """Returns a number with the digits that are reproducible, None for what is no number; anything else as it is.

    >>> rounded(0.123456789), rounded(True), rounded("uint8"), rounded(16777216), rounded(math.nan)
    (0.123457, True, 'uint8', 16777216, None)
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value

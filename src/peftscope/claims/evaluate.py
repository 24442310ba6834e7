"""Runs checks and turns their measurements into verdicts: one for every part, and one for every claim."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from peftscope.claims.checks import known_checks
from peftscope.claims.ledger import DETERMINISTIC, Change, Claim, Kind, Part, elsewhere
from peftscope.claims.measurement import Measurement, NotRunError, Quantity
from peftscope.claims.verdict import UNDECIDED, Verdict, combine, judge
from peftscope.errors import InputError, printable, shown
from peftscope.hardware.bf16 import bf16_products
from peftscope.layout import published_paths
from peftscope.words import spoken_quantity

SIGNIFICANT_DIGITS = 6
"""The digits that are written of a measured number: further ones depend on the order of sums."""
KNOWN_BY: dict[Kind, str] = {
    **dict.fromkeys(("software", "arithmetic", "numerics", "literature"), "computed"),
    **{"sampling": "sampled", "simulation": "simulated", "training": "trained", "gpu": "on a card"},
}
"""How the result of a check is known. With an interval, a computed quantity is an estimate, and sampled."""

_STATED = ("kind", "role", "quotes", "declared", "measures", "unit", "check", "scope")
_NOTHING = Measurement("", n=0)


@dataclass(frozen=True)
class PartFinding:
    """The verdict on one part of a claim, with the measurement behind it.

    Attributes:
        part: The part.
        verdict: The verdict.
        reason: What a reader must know beside the numbers.
        found: The measurement, if there is one.
        elsewhere: Whether it was measured in another world than the one that the ledger names.
    """

    part: Part
    verdict: Verdict
    reason: str = ""
    found: Measurement | None = None
    elsewhere: bool = False

    @property
    def known(self) -> str:
        """Returns how the result is known, with the size of a sample; empty if there is none."""
        if not self.found:
            return ""
        word = KNOWN_BY[self.part.kind]
        if word == "trained":
            seeds = f", {self.found.n} seed{'s' * (self.found.n != 1)}" if self.found.samples else ""
            return f"trained{seeds} on {self.found.model}"
        sampled = word == "sampled" or (word == "computed" and self.found.low is not None)
        return f"sampled, n = {self.found.n}" if sampled else word

    @property
    def answer(self) -> str:
        """Returns what the measured value answers in the terms of the claim; empty without a value or such words."""
        words = self.part.answers.get(self.verdict, "") if self.found else ""
        value = rounded(self.found.value) if self.found else None
        size = abs(value) if isinstance(value, int | float) else value
        unit, side = self.part.unit, "ahead of" if isinstance(value, int | float) and value > 0 else "behind"
        told = {"found": spoken_quantity(value, unit), "size": spoken_quantity(size, unit)}
        return words.format(**told, lead=f"{told['size']} {side}")

    def to_json(self) -> dict[str, Any]:
        """Returns the finding with its evidence. Numbers are rounded to the digits that are reproducible."""
        found = self.found or _NOTHING
        rule = self.part.rule
        return {
            **{name: getattr(self.part, name) for name in _STATED},
            "with": self.part.with_,
            "rule": rule.words(self.part.unit) if rule else "",
            "judged": rule.model_dump(exclude_defaults=True) if rule else {},
            "verdict": self.verdict.value,
            "reason": self.reason,
            "known": self.known,
            "found": rounded(found.value) if self.found else None,
            **{n: rounded(getattr(found, n)) for n in ("low", "high", "n", "model", "p_adjusted", "tuning_error")},
            "samples": list(map(rounded, found.samples)),
            "evidence": {name: rounded(value) for name, value in found.evidence.items()},
            "curves": {name: {f"{x:g}": rounded(y) for x, y in curve.items()} for name, curve in found.curves.items()},
            "axes": list(found.axes),
            "run_ids": list(found.run_ids),
            **{n: said for n in ("matters", "spoiled_by") if (said := getattr(found, n))},
            **{n: said for n in ("answer", "elsewhere") if (said := getattr(self, n))},
        }


@dataclass(frozen=True)
class Finding:
    """The findings on all parts of a claim. Its assertions and conditions decide."""

    claim: Claim
    parts: tuple[PartFinding, ...]

    @property
    def deciding(self) -> tuple[PartFinding, ...]:
        """Returns the parts that the verdict rests on."""
        return tuple(part for part in self.parts if part.part.decides)

    @property
    def verdict(self) -> Verdict:
        """Returns the claim's verdict: of the worlds in which it was decided, if it was judged in several.

        A claim in general words that was decided in one of them alone is told with its number of worlds.
        """
        verdicts = set(self.in_worlds.values())
        decided = verdicts - {*UNDECIDED}
        return Verdict.IN_PART if len(decided) > 1 else combine(decided or verdicts)

    @property
    def in_worlds(self) -> dict[str, Verdict]:
        """Returns the verdict in each world by its model and task. Parts that are no training count in all of them.

        A training that is of one model alone, as of a toy model, is a world of its own beside several.
        """
        away = [part for part in self.deciding if part.elsewhere and part.found]
        apart = [part for part in self._at_home if away and part.found and part.part.kind == "training"]
        apart = [part for part in apart if not part.part.general]
        at_home = [part for part in self._at_home if part not in apart]
        named = next((part.found.model for part in at_home if part.found and part.part.asks_of_worlds), "")
        worlds = {named: [part.verdict for part in at_home]}
        shared = [part.verdict for part in at_home if not part.part.asks_of_worlds]
        for part in (*away, *apart):
            assert part.found is not None
            worlds.setdefault(part.found.model, [*shared] if part.elsewhere else []).append(part.verdict)
        return {world: combine(verdicts) for world, verdicts in worlds.items() if world or len(worlds) == 1}

    @property
    def _at_home(self) -> list[PartFinding]:
        return [part for part in self.deciding if not part.elsewhere]

    def _last_run(self) -> str:
        """Returns the day on which the last of the runs that decide at home began; empty if it is not known."""
        from peftscope.analysis.study import StudyResults

        days = [""]
        for part in self._at_home:
            if part.found and part.found.run_ids and (study := part.part.with_.get("study")):
                with suppress(InputError):  # a measurement that was stored outlives the tables of its study
                    table = StudyResults(study).table.set_index("run_id")
                    starts = table.reindex(index=part.found.run_ids, columns=["started_at"])["started_at"].dropna()
                    days += [min(str(day)[:10], first_days().get(run, "9")) for run, day in starts.items()]
        return max(days)

    def to_json(self, hardware: str, history: Sequence[Change] = ()) -> dict[str, Any]:
        """Returns one entry of claims.json, with the numbers of every part.

        Args:
            hardware: The machine on which the checks of deterministic kinds ran.
            history: The changes of what decides claims.
        """
        first = next((part for part in self.deciding if part.verdict == self.verdict), self.deciding[0])
        deciding = first.to_json()
        changes = [change for change in history if change.claim == self.claim.id]
        return {
            "id": self.claim.id,
            "verdict": self.verdict.value,
            "worlds": sorted({part.found.model for part in self.deciding if part.part.asks_of_worlds and part.found}),
            **({"in_worlds": self.in_worlds} if len(self.in_worlds) > 1 else {}),
            "known": "; ".join(dict.fromkeys(part.known for part in self.deciding if part.known and part.found)),
            "claimed": self.claim.claimed,
            **{key: deciding[key] for key in ("found", "low", "high", "unit", "n", "rule")},
            "scope": self.claim.scope,
            "run_ids": sorted({run_id for part in self.parts if part.found for run_id in part.found.run_ids}),
            "reason": deciding["reason"],
            "kind": first.part.kind,
            "model": deciding["model"],
            "hardware": hardware if first.part.kind in DETERMINISTIC and first.found else "",
            "history": [change.model_dump(mode="json", exclude_defaults=True) for change in changes],
            "moved": moved(changes, combine([part.verdict for part in self._at_home]), self._last_run()),
            "parts": [part.to_json() for part in self.parts],
        }


@cache
def first_days() -> dict[str, str]:
    """Returns the day on which each published run first began. One that was repeated stands in several studies."""
    import pandas as pd

    tables = [pd.read_csv(path, usecols=["run_id", "started_at"]) for path in published_paths("runs.csv")]
    runs = pd.concat(tables, ignore_index=True).dropna() if tables else pd.DataFrame(columns=["run_id", "started_at"])
    return runs["started_at"].str[:10].groupby(runs["run_id"]).min().to_dict()


def moved(changes: Sequence[Change], verdict: Verdict, last_run: str) -> list[dict[str, str]]:
    """Returns the changes that moved a verdict after its result was seen, each with its date and the verdict before.

    Args:
        changes: The changes of what decides the claim, oldest first.
        verdict: Today's verdict.
        last_run: The day on which the last of the runs that decide began; empty if it is not known.
    """
    told = [change for change in changes if change.verdict not in (None, Verdict.NOT_RUN)]
    after = [*(change.verdict for change in told), verdict][1:]
    return [
        {"date": change.date, "from": str(change.verdict)}
        for change, now in zip(told, after, strict=True)
        if change.verdict != now and change.date >= last_run and not change.named
    ]


def evaluate(claims: Iterable[Claim], stored: Mapping[str, Measurement] | None = None) -> Iterator[Finding]:
    """Yields the finding on each claim, one after the other.

    Args:
        claims: The claims to judge.
        stored: Measurements that are not made again, each under the ``check_key`` of its check.
    """
    for claim in claims:
        parts = [evaluate_part(part, stored) for part in claim.parts]
        for others in elsewhere(claim):
            found: list[PartFinding] = []
            for part in sorted(others, key=lambda part: part.kind != "training"):  # what takes minutes comes last
                if all(before.found for before in found):
                    found.append(replace(evaluate_part(part, stored), elsewhere=True))
            parts += found if all(part.found for part in found) else []
        yield Finding(claim, tuple(parts))


def evaluate_part(part: Part, stored: Mapping[str, Measurement] | None = None) -> PartFinding:
    """Returns the finding on one part. If its check cannot run, the finding says why. ``stored``: see ``evaluate``."""
    if part.waits_for:
        return PartFinding(part, Verdict.NOT_RUN, part.waits_for)
    found = _measure(part, stored or {})
    if isinstance(found, str):
        return PartFinding(part, Verdict.NOT_RUN, found)
    assert part.rule is not None
    verdict, reason = judge(part.rule, found, part.unit)
    return PartFinding(part, verdict, reason, found)


def check_key(check: str, parameters: Mapping[str, Any]) -> str:
    """Returns one text for a check with its parameters."""
    return f"{check} {json.dumps(parameters, sort_keys=True)}"


def _measure(part: Part, stored: Mapping[str, Measurement]) -> Measurement | str:
    """Returns the check's measurement, or the reason why there is none."""
    if measured := stored.get(check_key(part.check, part.with_)):
        return measured
    try:
        with bf16_products():
            return known_checks()[part.check](**part.with_)
    except NotRunError as error:
        return str(error)
    except InputError as error:
        return "; ".join(map(str, error.problems))
    except Exception as error:  # an error in one check must not lose the results of the others
        given = ", ".join(f"{name}={shown(value)}" for name, value in part.with_.items())
        said = " ".join(str(error).split())  # one line, for tables
        return printable(f"{part.check} stopped with {type(error).__name__}: {said}; look at what it got: {given}")


def rounded(value: Quantity | None) -> Quantity | None:
    """Returns a number with its reproducible digits, None for NaN and infinity, and any other value unchanged.

    >>> rounded(0.123456789), rounded(True), rounded("uint8"), rounded(16777216), rounded(math.nan)
    (0.123457, True, 'uint8', 16777216, None)
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value

"""The ledger of claims, the rules that decide, and what a reader sees of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftscope.analysis.stats import mean_interval, paired_p
from peftscope.claims.evaluate import Finding, PartFinding, evaluate, evaluate_part
from peftscope.claims.ledger import Claim, Part, read_ledger
from peftscope.claims.measurement import Measurement, NotRunError
from peftscope.claims.verdict import Rule, Verdict, judge
from peftscope.cli.main import main
from peftscope.errors import InputError

ENTRY: dict[str, Any] = {
    "id": "S13",
    "slug": "ratio-255x",
    "section": "Low-rank algebra",
    "source": "chapter: What is a low-rank matrix?",
    "statement": "Two factors have 255 times fewer values.",
    "claimed": "255",
    "scope": "arithmetic",
    "parts": [
        {
            "kind": "arithmetic",
            "measures": "values of the matrix over values of its factors",
            "check": "counts.full_to_low_rank_ratio",
            "with": {"rows": 4096, "columns": 4096, "rank": 8},
            "rule": {"equals": 255},
        }
    ],
}


def ledger_of(tmp_path: Path, *entries: dict[str, Any]) -> tuple[Claim, ...]:
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": list(entries)}))
    return read_ledger(path)


# The ledger.


def test_every_claim_of_the_chapter_and_the_papers_has_an_entry() -> None:
    claims = read_ledger()
    assert [claim.id for claim in claims] == [f"S{n}" for n in range(1, 103)] + [f"P{n}" for n in range(1, 29)]


def test_what_is_not_measured_says_why() -> None:
    for claim in read_ledger():
        for part in claim.parts:
            assert part.check or len(part.waits_for or part.impossible) > 20, claim.id


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "X1"}, "claims[0].id"),
        ({"slug": "Not A Slug"}, "claims[0].slug"),
        ({"colour": "red"}, "unknown key"),
        ({"parts": []}, "claims[0].parts"),
        ({"parts": [ENTRY["parts"][0] | {"check": "counts.nothing"}]}, "S13.parts[0].check: no such check"),
        ({"parts": [ENTRY["parts"][0] | {"with": {"rows": 1}}]}, "S13.parts[0].with: missing a required argument"),
        ({"parts": [ENTRY["parts"][0] | {"with": {"rows": 4, "columns": 4, "rank": -1}}]}, "S13.parts[0].with.rank"),
        ({"parts": [ENTRY["parts"][0] | {"rule": {"equals": 1, "at_least": 2}}]}, "must have one of"),
        ({"parts": [ENTRY["parts"][0] | {"rule": {"at_least": 3, "at_most": 2}}]}, "above at_most"),
        ({"parts": [ENTRY["parts"][0] | {"rule": {"equals": "a", "relative": 0.1}}]}, "a tolerance needs a number"),
        ({"parts": [ENTRY["parts"][0] | {"family": "mine"}]}, "a family holds contrasts with a direction"),
        ({"parts": [ENTRY["parts"][0] | {"waits_for": "a study"}]}, "must have one of: check"),
        ({"parts": [{"kind": "training", "measures": "a loss"}]}, "must have one of: check"),
        ({"parts": [{"kind": "magic", "measures": "a loss", "waits_for": "a study"}]}, "parts[0].kind"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="claims") as caught:
        ledger_of(tmp_path, ENTRY | change)
    assert said in str(caught.value)


def test_two_entries_must_differ(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="appears 2 times"):
        ledger_of(tmp_path, ENTRY, ENTRY)


# Rules and verdicts.

NARROW = {"low": 0.9, "high": 1.1, "n": 6, "samples": (0.9, 1.1, 1.0, 0.95, 1.05, 1.0)}
WIDE = {"low": -1.0, "high": 3.0, "n": 3, "samples": (-0.5, 1.0, 2.5)}


@pytest.mark.parametrize(
    ("rule", "found", "verdict"),
    [
        ({"equals": 256}, {"value": 256.0}, Verdict.EXACT),
        ({"equals": 255}, {"value": 256.0}, Verdict.EXACT_WRONG),
        ({"equals": 255, "relative": 0.01}, {"value": 256.0}, Verdict.EXACT),
        ({"equals": 0, "absolute": 1e-6}, {"value": 1e-7}, Verdict.EXACT),
        ({"equals": 0, "absolute": 1e-6}, {"value": 1e-5}, Verdict.EXACT_WRONG),
        ({"equals": "uint8"}, {"value": "uint8"}, Verdict.EXACT),
        ({"equals": "uint8"}, {"value": "float16"}, Verdict.EXACT_WRONG),
        ({"equals": True}, {"value": False}, Verdict.EXACT_WRONG),
        ({"at_least": 0.95}, {"value": 0.95}, Verdict.EXACT),
        ({"at_least": 0.95}, {"value": 0.94}, Verdict.EXACT_WRONG),
        ({"at_most": 4}, {"value": 4.1}, Verdict.EXACT_WRONG),
        ({"at_least": 2, "at_most": 3}, {"value": 2.5}, Verdict.EXACT),
        ({"at_least": 2, "at_most": 3}, {"value": 3.5}, Verdict.EXACT_WRONG),
        ({"at_least": 0.5}, {"value": float("nan")}, Verdict.INCONCLUSIVE),
        ({"at_least": 0.5}, {"value": 1.0, **NARROW}, Verdict.SUPPORTED),
        ({"at_least": 2.0}, {"value": 1.0, **NARROW}, Verdict.REFUTED),
        ({"at_least": 1.0}, {"value": 1.0, **NARROW}, Verdict.INCONCLUSIVE),
        ({"at_least": 0.5, "at_most": 2}, {"value": 1.0, **NARROW}, Verdict.SUPPORTED),
        ({"better_by": 0}, {"value": 1.0, **NARROW}, Verdict.SUPPORTED),
        ({"better_by": 0}, {"value": -1.0, "low": -1.1, "high": -0.9, "samples": (-1.0, -1.1)}, Verdict.REFUTED),
        ({"better_by": 0}, {"value": 1.0, **WIDE}, Verdict.INCONCLUSIVE),
        ({"better_by": 2}, {"value": 1.0, **NARROW}, Verdict.REFUTED),
        ({"same_within": 2}, {"value": 1.0, **NARROW}, Verdict.EQUIVALENT),
        ({"same_within": 0.5}, {"value": 1.0, **NARROW}, Verdict.REFUTED),
        ({"same_within": 1.05}, {"value": 1.0, **NARROW}, Verdict.INCONCLUSIVE),
        ({"same_within": 1}, {"value": 0.0, "n": 3, "samples": (0.0, 0.0, 0.0)}, Verdict.EQUIVALENT),
        ({"same_within": 1}, {"value": 0.2, "n": 1, "samples": (0.2,)}, Verdict.INCONCLUSIVE),
    ],
)
def test_every_rule_reaches_every_verdict(rule: dict[str, Any], found: dict[str, Any], verdict: Verdict) -> None:
    assert judge(Rule(**rule), Measurement(**found))[0] == verdict


def test_a_benefit_must_outlast_the_correction_for_its_family() -> None:
    found = Measurement(1.0, **NARROW)
    assert judge(Rule(better_by=0), found, p_adjusted=0.04)[0] == Verdict.SUPPORTED
    verdict, reason = judge(Rule(better_by=0), found, p_adjusted=0.06)
    assert verdict == Verdict.INCONCLUSIVE and "0.06" in reason


def test_inconclusive_says_what_would_decide() -> None:
    _, reason = judge(Rule(better_by=0), Measurement(1.0, **WIDE))
    assert "half-width 2" in reason and "pairs would decide" in reason


# Findings.


def part(**changes: Any) -> Part:
    return Part.model_validate(ENTRY["parts"][0] | changes)


def finding_of(*verdicts: Verdict) -> tuple[Verdict, str]:
    claim = Claim.model_validate(ENTRY)
    return Finding(claim, tuple(PartFinding(part(), verdict, "because") for verdict in verdicts)).headline


def test_the_last_part_decides_and_until_it_has_run_nothing_is_decided() -> None:
    assert finding_of(Verdict.EXACT_WRONG, Verdict.EXACT)[0] == Verdict.EXACT
    assert finding_of(Verdict.EXACT, Verdict.NOT_RUN) == (
        Verdict.INCONCLUSIVE,
        "the part that decides is NOT-RUN: because",
    )
    assert finding_of(Verdict.NOT_RUN)[0] == Verdict.NOT_RUN
    assert finding_of(Verdict.NOT_RUN, Verdict.NOT_TESTABLE_HERE)[0] == Verdict.NOT_TESTABLE_HERE


def test_a_check_that_cannot_run_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: Any) -> Measurement:
        raise NotRunError("no weights")

    monkeypatch.setattr("peftscope.claims.evaluate.find_check", lambda name: missing)
    found = evaluate_part(part())
    assert (found.verdict, found.reason) == (Verdict.NOT_RUN, "no weights")


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("S13", {"rank": 0}),
        ("S14", {"factor": "C"}),
        ("S38", {"rows": 0, "columns": 0}),
        ("S71", {"rank": 0, "targets": "q_prj\x1b[2J"}),
        ("P24", {"denominator": 0}),
    ],
)
def test_values_that_a_check_cannot_take_cost_nothing_but_its_verdict(claim: str, values: dict[str, Any]) -> None:
    parts = (part for entry in read_ledger() if entry.id == claim for part in entry.parts)
    asked = next(part for part in parts if values.keys() <= part.with_.keys())
    found = evaluate_part(asked.model_copy(update={"with_": asked.with_ | values}))
    assert found.verdict == Verdict.NOT_RUN
    assert f"{asked.check} stopped with " in found.reason
    assert all(f"{name}={value!r}" in found.reason for name, value in values.items())
    assert found.reason.isprintable()


def test_no_check_stopped_when_the_published_verdicts_were_made(repository: Path) -> None:
    files = list(repository.glob("results/published/claims.json"))
    assert files and not [file for file in files if " stopped with " in file.read_text()]


def test_what_is_written_is_the_same_every_time() -> None:
    first, second = (json.dumps(evaluate_part(part()).to_json(), sort_keys=True) for _ in range(2))
    assert first == second


def test_a_contrast_is_corrected_for_its_family_even_when_it_is_measured_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three contrasts of p = 0.03 each are three chances, whichever of them someone asks about."""
    samples = (1.0, 2.0, 0.1, 0.3, 1.2, 0.4)
    interval = mean_interval(samples)
    assert 0.02 < paired_p(samples) < 0.04
    found = Measurement(interval.mean, interval.low, interval.high, 6, samples)
    monkeypatch.setattr("peftscope.claims.evaluate.find_check", lambda name: lambda **_: found)

    def claims(family: str) -> tuple[Claim, ...]:
        changes = {"kind": "training", "rule": {"better_by": 0}, "family": family}
        parts = [ENTRY["parts"][0] | changes | {"measures": name} for name in ("one", "two", "three")]
        return ledger_of(
            tmp_path, *(ENTRY | {"id": f"P{i}", "slug": f"c{i}", "parts": [p]} for i, p in enumerate(parts))
        )

    def verdict(family: str) -> tuple[Verdict, str]:
        ledger = claims(family)
        (finding,) = evaluate(ledger[:1], ledger)
        return finding.headline

    assert verdict("")[0] == Verdict.SUPPORTED
    assert verdict("variants")[0] == Verdict.INCONCLUSIVE
    assert "after correction in its family" in verdict("variants")[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--id", "S130"], "--id: no such claim (got 'S130') -> did you mean"),
        (["--kind", "numeric"], "--kind: no such kind (got 'numeric') -> did you mean `numerics`?"),
        (["--write", "--id", "S64"], "--write: writes all claims -> leave --id and --kind out"),
    ],
)
def test_a_wrong_question_is_answered_with_a_hint(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peftscope", "claims", *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_one_claim_is_measured_and_shown_with_its_evidence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peftscope", "claims", "--id", "S13", "--json"])
    with pytest.raises(SystemExit):
        main()
    (finding,) = json.loads(capsys.readouterr().out)
    asked = {
        "id",
        "slug",
        "verdict",
        "claimed",
        "found",
        "low",
        "high",
        "unit",
        "n",
        "rule",
        "scope",
        "run_ids",
        "reason",
    }
    assert asked <= finding.keys() and (finding["id"], finding["verdict"]) == ("S13", "EXACT-WRONG")

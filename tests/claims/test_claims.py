"""The ledger of claims, the rules that decide, and what a reader sees of them."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import REPOSITORY, Command
from ledger_parts import PUBLISHED_CLAIMS, changed_part, claims, published_findings

from peftscope.claims.evaluate import Finding, PartFinding, evaluate, evaluate_part, first_days, moved
from peftscope.claims.ledger import Change, Claim, Part, arms_named_in, elsewhere, read_history, read_ledger
from peftscope.claims.measurement import Measurement
from peftscope.claims.stored import read_findings, unexplained_changes
from peftscope.claims.verdict import READINGS, Reading, Rule, Verdict, judge
from peftscope.cli.claims import _measure
from peftscope.errors import InputError
from peftscope.report.claims import write_claims_page
from peftscope.report.findings import write_findings
from peftscope.report.publish import publish
from peftscope.report.spoken import spoken_finding, told
from peftscope.report.svg import interval

CHECK = "counts.quotient"
FACTORS = "counts.factor_values"
ENTRY: dict[str, Any] = {
    "id": "S13",
    "section": "Low-rank algebra",
    "source": "chapter: What is a low-rank matrix?",
    "statement": "Two factors have 255 times fewer values.",
    "claimed": "255",
    "scope": "arithmetic",
    "parts": [
        {
            "kind": "arithmetic",
            "quotes": "255 times fewer",
            "measures": "values of the matrix over values of its factors",
            CHECK: {"numerator": 16777216, "denominator": 65536},
            "rule": {"equals": 255},
        }
    ],
}

PART: dict[str, Any] = ENTRY["parts"][0]
KINDER = ENTRY | {"parts": [PART | {"rule": {"equals": 255, "reads": "plain"}}]}
WORDS = {"was": "one rule.", "became": "another.", "why": "a reason."}
"""Of a change of what decides a claim."""


def file_of(*entries: dict[str, Any], **shared: Any) -> str:
    """Returns the text of a ledger: every entry below its section and its id."""
    sections: dict[str, dict[str, Any]] = {}
    for entry in entries:
        content = {name: value for name, value in entry.items() if name not in ("id", "section")}
        sections.setdefault(entry["section"], {})[entry["id"]] = content
    return yaml.safe_dump({"checks": shared, "claims": sections}, sort_keys=False)


def ledger_of(tmp_path: Path, *entries: dict[str, Any], **shared: Any) -> tuple[Claim, ...]:
    path = tmp_path / "claims.yaml"
    path.write_text(file_of(*entries, **shared))
    return read_ledger(path)


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in PART.items() if name not in names}


# The ledger.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "X1"}, "claims.yaml: X1.its.id: "),
        ({"colour": "red"}, "S13.colour: unknown key"),
        ({"parts": []}, "S13.parts: "),
        ({"parts": [without(CHECK) | {"counts.nothing": {}}]}, "S13.parts[0].counts.nothing: no such check"),
        ({"parts": [without(CHECK) | {"check": CHECK}]}, "S13.parts[0].check: unknown key"),
        ({"parts": [PART | {FACTORS: {}}]}, "S13.parts[0]: must have one check"),
        ({"parts": [PART | {CHECK: {"numerator": 1}}]}, f"S13.parts[0].{CHECK}.denominator: Field required"),
        ({"parts": [PART | {CHECK: 8}]}, "S13.parts[0].its.parameters: "),
        ({"parts": [without(CHECK) | {FACTORS: {"rows": 4, "columns": 4, "rank": -1}}]}, f"parts[0].{FACTORS}.rank: "),
        ({"parts": [without("kind")]}, f"S13.parts[0]: has no kind, and `checks` gives none to {CHECK}"),
        ({"parts": [PART | {"rule": {"equals": 1, "at_least": 2}}]}, "S13.parts[0].rule: must have one of"),
        ({"parts": [without("rule")], "rule": {"equals": 1, "at_least": 2}}, "S13.rule: must have one of"),
        ({"rule": {"equals": 1}}, "S13: no part takes the claim's rule"),
        ({"parts": [PART | {"rule": {"at_least": 3, "at_most": 2}}]}, "above at_most"),
        ({"parts": [PART | {"rule": {"equals": "a", "absolute": 0.1}}]}, "a tolerance needs a number"),
        ({"parts": [PART | {"rule": {"equals": True, "reads": "about"}}]}, "reads is for a number"),
        ({"parts": [PART | {"waits_for": "a study"}]}, "must have one of: a check"),
        ({"parts": [{"kind": "training", "measures": "a loss"}]}, "must have one of: a check"),
        ({"parts": [PART | {"quotes": "256 times"}]}, "not in the source's sentence"),
        ({"sentence": "255x smaller!"}, "not in the source's sentence"),
        ({"parts": [without("quotes") | {"declared": "a plan"}]}, "quotes the words that it tests"),
        ({"parts": [PART | {"declared": "a plan"}]}, "S13: needs an assertion"),
        ({"parts": [{"kind": "magic", "measures": "a loss", "waits_for": "a study"}]}, "parts[0].kind"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="claims") as caught:
        ledger_of(tmp_path, ENTRY | change)
    assert said in str(caught.value)


def test_every_claim_of_the_chapter_and_the_papers_is_measured_or_says_why_not() -> None:
    ledger = read_ledger()
    assert [claim.id for claim in ledger] == [f"S{n}" for n in range(1, 103)] + [f"P{n}" for n in range(1, 68)]
    for claim in ledger:
        assert all(part.check or len(part.waits_for) > 20 for part in claim.parts), claim.id


def test_what_a_claim_asks_of_other_worlds_is_what_was_written_down_before_they_ran() -> None:
    rows = []
    for claim in claims().values():
        asked = [[part.with_ for part in parts] for parts in elsewhere(claim)]
        arms = {each[-1]["study"]: ", ".join(arms_named_in(*each)) for each in asked}
        told = f"{arms.get('pronunciation', '-')} | {arms.get('pronunciation-gemma', '-')}"
        rows += [f"| {claim.id} | {told} |"] * bool(arms)
    assert "\n".join(["|---|---|---|", *rows, ""]) in (REPOSITORY / "docs" / "worlds.md").read_text()


def test_two_entries_must_differ(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Papers\.S13: stands in two sections"):
        ledger_of(tmp_path, ENTRY, ENTRY | {"section": "Papers"})
    with pytest.raises(InputError, match="key `S13` appears twice"):
        (path := tmp_path / "claims.yaml").write_text("claims: {Memory: {S13: {}, S13: {}}}")
        read_ledger(path)


def test_a_part_takes_from_its_check_and_its_claim_what_it_does_not_say(tmp_path: Path) -> None:
    own = PART | {"unit": "fold", "rule": {"equals": 255}}
    entry = ENTRY | {"rule": {"at_least": 250}, "parts": [without("kind", "rule"), own]}
    (claim,) = ledger_of(tmp_path, entry, **{"counts": {"kind": "software", "unit": "%"}, CHECK: {"unit": "×"}})
    assert [(part.kind, part.unit, part.rule) for part in claim.parts] == [
        ("software", "×", Rule(at_least=250)),
        ("arithmetic", "fold", Rule(equals=255)),
    ]
    with pytest.raises(InputError, match=r"checks\.count: no part has such a check -> did you mean `counts`"):
        ledger_of(tmp_path, ENTRY, count={"unit": "×"})


def test_printed_figures_are_read_by_one_table() -> None:
    """A figure that is called about is read as that, or the note says why not; a tolerance of ours has no figure."""
    abouts = 0
    for claim in claims().values():
        for part in claim.parts:
            if not part.decides or part.rule is None:
                continue
            is_about = any(word in part.quotes for word in ("~", "≈", "about ", "pproximately "))
            says_why = re.search(r"\bread\b", claim.note.lower())
            figures = {part.rule.equals, part.rule.at_least, part.rule.at_most} - {None, 0}
            printed = [f for f in figures if isinstance(f, float | int) and f"{f:,g}" in part.quotes]
            abouts += is_about
            if is_about and figures:
                assert part.rule.reads == "about" or says_why, claim.id
            if part.rule.absolute and printed:  # none, and rounding errors of floating point
                assert part.rule.absolute < 1e-3, claim.id
    assert abouts > 20
    table = (REPOSITORY / "docs/add-a-claim.md").read_text()
    for reading in get_args(Reading):
        row = next(line for line in table.splitlines() if f"| `{reading}` |" in line)
        assert f"within {100 * READINGS[reading]:g} %" in row if reading in READINGS else "%" not in row


def test_one_reason_may_change_several_claims(tmp_path: Path) -> None:
    words = WORDS | {"date": "2026-01-01"}
    (path := tmp_path / "history.yaml").write_text(
        yaml.safe_dump({"changes": [{"claims": {"S1": "holds", "S2": "wrong"}, **words}, {"claim": "S3", **words}]})
    )
    found = read_history(path)
    assert [(c.claim, c.verdict) for c in found] == [("S1", "holds"), ("S2", "wrong"), ("S3", None)]
    assert {c.was for c in found} == {"one rule."}


# Rules and verdicts.

NARROW = {"low": 0.9, "high": 1.1, "n": 6, "samples": (0.9, 1.1, 1.0, 0.95, 1.05, 1.0)}
WIDE = {"low": -1.0, "high": 3.0, "n": 3, "samples": (-0.5, 1.0, 2.5)}


@pytest.mark.parametrize(
    ("rule", "found", "verdict"),
    [
        ({"equals": 256}, {"value": 256.0}, Verdict.HOLDS),
        ({"equals": 255}, {"value": 256.0}, Verdict.WRONG),
        ({"equals": 255, "reads": "plain"}, {"value": 256.0}, Verdict.HOLDS),
        ({"equals": 255, "reads": "rounded"}, {"value": 254.8}, Verdict.HOLDS),
        ({"equals": 16.7e6, "reads": "rounded"}, {"value": 4096 * 4096}, Verdict.HOLDS),
        ({"equals": 14, "reads": "plain"}, {"value": 13.2}, Verdict.WRONG),
        ({"equals": 14, "reads": "about"}, {"value": 13.2}, Verdict.HOLDS),
        ({"at_least": 2, "at_most": 3, "reads": "about"}, {"value": 3.5}, Verdict.HOLDS),
        ({"equals": 0, "absolute": 1e-6}, {"value": 1e-7}, Verdict.HOLDS),
        ({"equals": "uint8"}, {"value": "uint8"}, Verdict.HOLDS),
        ({"equals": "uint8"}, {"value": "float16"}, Verdict.WRONG),
        ({"at_least": 0.95}, {"value": 0.95}, Verdict.HOLDS),
        ({"at_least": 0.95}, {"value": 0.94}, Verdict.WRONG),
        ({"at_most": 4}, {"value": 4.1}, Verdict.WRONG),
        ({"at_least": 2, "at_most": 3}, {"value": 2.5}, Verdict.HOLDS),
        ({"at_least": 2, "at_most": 3}, {"value": 3.5}, Verdict.WRONG),
        ({"at_least": 0.5}, {"value": float("nan")}, Verdict.OPEN),
        ({"at_least": 0.5}, {"value": 1.0, **NARROW}, Verdict.HOLDS),
        ({"at_least": 2.0}, {"value": 1.0, **NARROW}, Verdict.WRONG),
        ({"at_least": 1.0}, {"value": 1.0, **NARROW}, Verdict.OPEN),
        ({"at_least": 0.5, "at_most": 2}, {"value": 1.0, **NARROW}, Verdict.HOLDS),
        ({"better_by": 0}, {"value": 1.0, **NARROW}, Verdict.HOLDS),
        ({"better_by": 0}, {"value": -1.0, "low": -1.1, "high": -0.9, "samples": (-1.0, -1.1)}, Verdict.WRONG),
        ({"better_by": 0}, {"value": 1.0, **WIDE}, Verdict.OPEN),
        ({"better_by": 0}, {"value": 0.0, "low": -1, "high": 1, "samples": (-0.1, 0.1), "matters": 2}, Verdict.WRONG),
        ({"better_by": 0}, {"value": 1.0, **WIDE, "matters": 2}, Verdict.OPEN),
        ({"better_by": 2}, {"value": 1.0, **NARROW}, Verdict.WRONG),
        ({"same_within": 2}, {"value": 1.0, **NARROW}, Verdict.HOLDS),
        ({"same_within": 0.5}, {"value": 1.0, **NARROW}, Verdict.WRONG),
        ({"same_within": 1.05}, {"value": 1.0, **NARROW}, Verdict.OPEN),
        ({"same_within": 1}, {"value": 0.0, "n": 3, "samples": (0.0, 0.0, 0.0)}, Verdict.HOLDS),
        ({"same_within": 1}, {"value": 0.2, "n": 1, "samples": (0.2,)}, Verdict.OPEN),
    ],
)
def test_every_rule_reaches_every_verdict(rule: dict[str, Any], found: dict[str, Any], verdict: Verdict) -> None:
    assert judge(Rule(**rule), Measurement(**found))[0] == verdict


def test_a_benefit_must_outlast_the_correction_of_its_study() -> None:
    assert judge(Rule(better_by=0), Measurement(1.0, **NARROW, p_adjusted=0.04))[0] == Verdict.HOLDS
    verdict, reason = judge(Rule(better_by=0), Measurement(1.0, **NARROW, p_adjusted=0.06))
    assert verdict == Verdict.OPEN and "0.06" in reason


def test_a_benefit_that_does_not_matter_is_one_all_the_same() -> None:
    said = [judge(Rule(better_by=0), Measurement(1.0, **NARROW, matters=matters)) for matters in (0.5, 2)]
    assert said == [(Verdict.HOLDS, ""), (Verdict.HOLDS, "by less than matters, 2")]
    none = Measurement(0.0, **NARROW | {"low": -0.1, "samples": (-0.1, 0.1, 0.0)}, matters=2)
    assert judge(Rule(better_by=0), none) == (Verdict.WRONG, "no difference that matters, within ±2")
    untold = Measurement(1.0, **NARROW, matters=2, p_adjusted=0.1)
    assert judge(Rule(better_by=0), untold) == judge(Rule(better_by=0), none)


def test_an_open_verdict_says_what_would_decide() -> None:
    _, reason = judge(Rule(better_by=0), Measurement(1.0, **WIDE))
    assert "half-width 2" in reason and "pairs would decide" in reason


# Findings.


def part(**changes: Any) -> Part:
    return Part.model_validate(PART | changes)


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        ("holds", "holds"),
        ("holds, holds", "holds"),
        ("wrong, wrong", "wrong"),
        ("holds, wrong", "holds in part"),
        ("holds, wrong, not run, open", "holds in part"),
        ("holds, open", "open"),
        ("wrong, open, not run", "wrong"),
        ("holds, not run", "not run"),
        ("wrong, not run", "wrong"),
    ],
)
def test_all_assertions_and_conditions_decide_and_nothing_beside_them(verdicts: str, whole: str, tmp_path) -> None:
    (claim,) = ledger_of(tmp_path, ENTRY)
    beside = part(quotes="")
    condition = part(declared="a plan")
    first, *others = (Verdict(word) for word in verdicts.split(", "))
    parts = [PartFinding(part(), first), *(PartFinding(condition, verdict) for verdict in others)]
    for other in Verdict:
        found = Finding(claim, (*parts, PartFinding(beside, other)))
        assert found.verdict == whole


def test_it_says_how_it_is_known() -> None:
    def known(kind: str, **found: Any) -> str:
        return PartFinding(part(kind=kind), Verdict.HOLDS, found=Measurement(1.0, **found)).known

    assert known("arithmetic") == known("software") == known("literature") == "computed"
    assert known("numerics", low=0.9, high=1.1, n=8) == known("sampling", n=8) == "sampled, n = 8"
    assert (known("simulation"), known("gpu", low=0.9, high=1.1)) == ("simulated", "on a card")
    assert known("training", model="toy, sums", **NARROW) == "trained, 6 seeds on toy, sums"
    assert PartFinding(part(), Verdict.NOT_RUN).known == ""


def test_a_claim_is_told_with_its_verdict_and_every_number_that_decides(tmp_path: Path) -> None:
    other = PART | {CHECK: {"numerator": 64, "denominator": 32}, "rule": {"equals": 2}}
    (claim,) = ledger_of(tmp_path, ENTRY | {"parts": [*ENTRY["parts"], other]})
    (finding,) = evaluate([claim])
    said = told(finding.to_json("a processor"), claim.statement)
    assert said == [claim.statement, "holds in part:", "256", "2", "arithmetic", "computed"]


@pytest.mark.parametrize(
    ("left", "verdict", "said"),
    [(2.5, "holds", "fits, 2.5 GiB left"), (-3.0, "wrong", "does not fit, 3 GiB too little")],
)
def test_what_was_found_answers_what_is_claimed(left: float, verdict: str, said: str) -> None:
    answers = {"holds": "fits, {found} left", "wrong": "does not fit, {size} too little"}
    asked = part(unit="GiB", rule={"at_least": 0}, answers=answers)
    found = PartFinding(asked, Verdict(verdict), found=Measurement(left)).to_json()
    assert spoken_finding(found | {"verdict": verdict}) == said
    assert "answer" not in PartFinding(asked, Verdict.OPEN, found=Measurement(left)).to_json()
    with pytest.raises(ValueError, match="an answer may hold"):
        part(answers={"holds": "{value} left"})


def test_a_lead_is_told_as_ahead_or_behind() -> None:
    asked = part(kind="training", unit="of the task gain", rule={"at_least": 0}, answers="DoRA ends {lead} LoRA")
    said = {}
    for value in (0.02, -0.02):
        found = Measurement(value, low=value - 0.03, high=value + 0.01)
        said[value] = spoken_finding(PartFinding(asked, Verdict.OPEN, found=found).to_json())
    assert said[0.02] == "DoRA ends 2 % of the task gain ahead of LoRA [−1, 3]"
    assert said[-0.02] == "DoRA ends 2 % of the task gain behind LoRA [1, 5]"


def test_a_topic_lists_claims_that_stand_below_another_heading(tmp_path: Path) -> None:
    content = yaml.safe_load(file_of(ENTRY, ENTRY | {"id": "S14"}))
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(content | {"topics": {"Sizes": ["S14"]}}))
    assert [claim.section for claim in read_ledger(path)] == ["Low-rank algebra", "Sizes"]
    path.write_text(yaml.safe_dump(content | {"topics": {"Sizes": ["S15"]}}))
    with pytest.raises(InputError, match=r"topics: no such claim \(got S15\)"):
        read_ledger(path)


def test_shares_are_told_in_percent_in_value_rule_and_reason() -> None:
    asked = part(kind="sampling", unit="as a share of settings", rule={"at_least": 0.5})
    found = Measurement(0.7, low=0.4, high=0.9, n=9)
    verdict, reason = judge(asked.rule, found, unit=asked.unit)
    shown = PartFinding(asked, verdict, reason, found).to_json()
    assert (spoken_finding(shown), shown["rule"]) == ("70 % of settings [40, 90]", "at least 50 % of settings")
    assert reason == "50 % lies within the interval (half-width 25 %)"


def test_an_interval_is_drawn_against_what_counts_as_right() -> None:
    asked = part(kind="sampling", unit="GB", rule={"at_least": 6, "at_most": 7})
    drawn = {}
    for low, high in ((6.2, 6.8), (6.5, 7.5)):
        found = Measurement((low + high) / 2, low=low, high=high, n=9)
        drawn[high] = interval(PartFinding(asked, Verdict.OPEN, found=found).to_json())
        (end,) = re.findall(r'whisker" x1="[\d.]+" x2="([\d.]+)"', drawn[high])
        left, width = map(float, re.findall(r'<rect x="([\d.]+)" y="3" width="([\d.]+)"', drawn[high])[0])
        assert (float(end) > left + width) == (high > 7)
        assert ">6 GB<" in drawn[high]
        assert f"[{low:g}, {high:g}]" in drawn[high]
    assert not interval(PartFinding(part(rule={"equals": "yes"}), Verdict.HOLDS, found=Measurement("yes")).to_json())


# Stored files, and changes of what decides.


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[1]",
        '{"a": 1}',
        '[{"verdict": "holds", "parts": []}]',
        '[{"id": "S1", "verdict": "REFUTED", "parts": []}]',
        '[{"id": "S1", "verdict": "holds", "parts": [{"verdict": "yes"}]}]',
    ],
)
def test_another_file_is_refused_as_claims(text: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"claims\.json"):
        read_findings(path)


def test_what_is_measured_anew_is_not_taken_from_another_claim(tmp_path: Path) -> None:
    """S19 and S25 share a check; a file on S19 alone has its measurement."""
    (s19,) = (deepcopy(finding) for finding in published_findings() if finding["id"] == "S19")
    s19["parts"][0]["found"] = 0.5
    (tmp_path / "claims.json").write_text(json.dumps([s19]))
    ledger = tuple(claims().values())

    def shift(anew: list[str]) -> float:
        (finding,) = _measure([claims()["S19"]], ledger, tmp_path / "claims.json", anew)
        return finding["parts"][0]["found"]

    assert shift([]) == 0.5
    assert shift(["S25"]) == 0


def test_what_decides_changes_only_with_an_entry(tmp_path: Path) -> None:
    def changed(entry: dict[str, Any], *entries: Change) -> list[str]:
        return list(unexplained_changes(ledger_of(tmp_path, entry), entries, [published]))

    early = Change(claim="S13", date="2026-01-01", **WORDS)
    late = early.model_copy(update={"date": "2026-02-01"})
    (claim,) = ledger_of(tmp_path, ENTRY)
    (finding,) = evaluate([claim])
    published = finding.to_json("", [early])
    other = ENTRY | {"parts": [PART | {CHECK: {"numerator": 64, "denominator": 16}}]}
    more = ENTRY | {"parts": [*ENTRY["parts"], {"kind": "training", "measures": "a loss", "waits_for": "a study"}]}
    promoted = ENTRY | {"parts": [*ENTRY["parts"], more["parts"][1] | {"quotes": "fewer"}]}
    assert changed(ENTRY) == changed(more) == []
    for entry in (KINDER, other, promoted):
        assert changed(entry) == changed(entry, early) == ["S13"]
        assert changed(entry, early, late) == []


@pytest.mark.slow
def test_verdicts_are_published_only_with_reasons_for_what_changed(own_folder: Path) -> None:
    Path("results/published").mkdir(parents=True)
    Path("reports/published").mkdir(parents=True)

    def write(entry: dict[str, Any], changes: list[dict[str, str]]) -> None:
        Path("experiments/claims.yaml").write_text(file_of(entry))
        Path("experiments/claims-history.yaml").write_text(yaml.safe_dump({"changes": changes}))
        ledger = read_ledger()
        findings = [finding.to_json("", read_history()) for finding in evaluate(ledger)]
        write_claims_page(ledger, findings)
        write_findings(ledger, findings)

    Path("experiments/answers.yaml").write_text("picture: {says: Nothing yet.}")
    write(ENTRY, [])
    publish("claims")
    write(KINDER, [])
    with pytest.raises(InputError, match=r"S13: is decided otherwise .* -> say why in experiments/claims-history"):
        publish("claims")
    change = {"claim": "S13", "date": "2026-01-01", "was": "Exactly.", "became": "Within 1 %.", "why": "It is rounded."}
    write(KINDER, [change])
    publish("claims")
    page = Path("reports/published/claims.html").read_text()
    assert "Right is 255 ± 5 %: holds." in page
    assert "It was: Exactly. It became: Within 1 %. Why: It is rounded." in page
    write(KINDER | {"parts": ENTRY["parts"]}, [change])
    with pytest.raises(InputError, match="S13"):
        publish("claims")


def test_every_change_since_the_last_published_verdicts_is_explained() -> None:
    published = published_findings()
    assert list(unexplained_changes(claims().values(), read_history(), published)) == []


def test_the_history_is_of_claims_and_in_order() -> None:
    history = read_history()
    assert {change.claim for change in history} <= claims().keys()
    assert [change.date for change in history] == sorted(change.date for change in history)


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("S14", {"factor": "C"}),
        ("S38", {"rows": 0, "columns": 0}),
        ("S71", {"rank": 0, "targets": "q_prj\x1b[2J"}),
        ("S13", {"denominator": 0}),
    ],
)
def test_values_that_a_check_cannot_take_cost_nothing_but_its_verdict(claim: str, values: dict[str, Any]) -> None:
    asked = next(part for part in claims()[claim].parts if values.keys() <= part.with_.keys())
    found = evaluate_part(changed_part(asked, **values))
    assert found.verdict == Verdict.NOT_RUN
    assert f"{asked.check} stopped with " in found.reason
    assert all(f"{name}={value!r}" in found.reason for name, value in values.items())
    assert found.reason.isprintable()


def test_no_check_stopped_when_the_published_verdicts_were_made() -> None:
    assert " stopped with " not in PUBLISHED_CLAIMS.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--id", "S130"], "--id: no such claim (got 'S130') -> did you mean"),
        (["--kind", "numeric"], "--kind: no such kind (got 'numeric') -> did you mean `numerics`?"),
        (["--write", "--id", "S64"], "--write: writes all claims -> leave --id and --kind out"),
        (["--reuse", "none.json"], "none.json: no such file"),
        (["--published", "--write"], "--published: measures nothing -> leave --write and --reuse out"),
        (["--published"], "results/published/claims.json: no such file"),
    ],
)
def test_a_wrong_question_is_answered_with_a_hint(options: list[str], said: str, peftscope: Command) -> None:
    code, _, errors = peftscope("claims", *options)
    assert code == 2 and said in errors


def test_one_claim_is_measured_and_shown_with_its_evidence(peftscope: Command) -> None:
    (finding,) = json.loads(peftscope("claims", "--id", "S13", "--json")[1])
    asked = {"claimed", "found", "low", "high", "unit", "n", "rule", "scope", "run_ids", "reason", "known"}
    assert asked <= finding.keys() and (finding["id"], finding["verdict"]) == ("S13", "holds")


def test_the_skeleton_of_a_claim_says_what_it_lacks(own_folder: Path, peftscope: Command) -> None:
    Path("experiments/claims.yaml").write_text(file_of(ENTRY | {"id": "P7"}))
    code, said, _ = peftscope("claims", "--add")
    assert code == 0 and "P8.source: " in said and "P8.parts[0].measures: " in said and "P7." not in said
    *_, last = yaml.safe_load(Path("experiments/claims.yaml").read_text())["claims"].values()
    assert last.keys() == {"P7", "P8"}


def test_a_verdict_says_that_its_rule_moved_it_after_its_result_was_seen() -> None:
    words = WORDS | {"claim": "S13"}
    before = {"2026-01-01": "wrong", "2026-01-02": "not run", "2026-01-03": "open"}
    changes = [Change(**words, date=day, verdict=verdict) for day, verdict in before.items()]
    told = {each["date"]: each["from"] for each in moved(changes, Verdict.HOLDS, "")}
    assert told == {date: verdict for date, verdict in before.items() if verdict != "not run"}
    assert moved(changes, Verdict.OPEN, "2026-01-02") == []  # the first change is older than the runs
    assert moved([Change(**words, date="2026-01-01")], Verdict.HOLDS, "") == []
    assert moved([Change(**words, date="2026-01-03", verdict="open", named=True)], Verdict.HOLDS, "") == []


def test_a_run_that_was_repeated_counts_from_its_first_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for study, day in {"first": "2026-01-01", "repeated": "2026-01-05"}.items():
        path = tmp_path / "results/published" / study / "runs.csv"
        path.parent.mkdir(parents=True)
        path.write_text(f"run_id,started_at\nseen,{day}T08:00:00+00:00\nwithout a day,\n")
    monkeypatch.chdir(tmp_path)
    assert first_days.__wrapped__() == {"seen": "2026-01-01"}

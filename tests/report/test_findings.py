"""The answers that people typed: their numbers, the words on which they rest, and the pages that show them."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import fast_if
from ledger_parts import claims, published_findings

from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError
from peftscope.layout import (
    ANSWERS_FILE,
    CHAPTER_PAGE,
    CLAIMS_PAGE,
    CLAIMS_RESULTS,
    FINDINGS_PAGE,
    STUDIES_PAGE,
    published_paths,
)
from peftscope.planning.published import RETENTION
from peftscope.report.answers import Sources, read_answers, stale
from peftscope.report.contrasts import contrasts, in_brackets, told
from peftscope.report.findings import write_findings
from peftscope.report.front import show_claims, show_study
from peftscope.report.publish import publish, restore
from peftscope.report.spoken import deciding, left_open, spoken_finding, spoken_verdict
from peftscope.words import spoken_bound

COMPARED = [path.parent.parent.name for path in published_paths("tables/contrasts.csv")]


def finding(claim: str) -> dict[str, Any]:
    return next(found for found in published_findings() if found["id"] == claim)


def published_row(study: str, arm: str) -> dict[Any, Any]:
    """The comparison of an arm with LoRA in a study's published table."""
    rows = pd.read_csv(f"results/published/{study}/tables/contrasts.csv").to_dict("records")
    return next(row for row in rows if (row["arm"], row["against"]) == (arm, "lora"))


@pytest.fixture
def changed(own_folder: Path, repository: Path) -> Callable[[str, str], None]:
    """A folder with the published results as the current one; changes a text of the answers there."""
    shutil.copytree(repository / "reports/published", "reports/published", ignore=shutil.ignore_patterns("*.html"))
    Path("results/published").mkdir(parents=True)
    for path in (repository / "results/published").iterdir():
        Path("results/published", path.name).symlink_to(path)

    def change(before: str, after: str) -> None:
        text = ANSWERS_FILE.read_text()
        assert text.count(before) == 1
        ANSWERS_FILE.write_text(text.replace(before, after))

    return change


def test_the_published_answers_agree_with_the_results(in_repository: None, tmp_path: Path) -> None:
    sources = Sources(published_findings())
    assert stale(sources) == []
    page = write_findings(tuple(claims().values()), published_findings(), tmp_path)
    assert "{" not in page.read_text()
    row = published_row("sums", "full")
    assert f"| full fine-tuning | {in_brackets(row, 'percent', '.1f')} same | **+" in page.read_text()


def test_a_reference_is_filled_in_each_form(in_repository: None) -> None:
    fill = Sources(published_findings()).fill
    row, behind = published_row("pronunciation", "full"), published_row("pronunciation", "attention-r21")
    assert fill("{pronunciation/full}") == fill("{full}", "pronunciation") == f"{row['percent']:.1f} %"
    assert fill("{pronunciation/full:about}") == f"{row['percent']:.0f} %"
    ends = f"{-behind['percent_high']:.1f}, {-behind['percent_low']:.1f}"
    assert fill("{pronunciation/attention-r21:interval}") == f"{-behind['percent']:.1f} % [{ends}]"
    assert fill("{pronunciation/full:points}") == f"{row['accuracy']:+.1f}"
    bounds = [published_row("sums", arm)["bound_percent"] for arm in ("r4", "r64")]
    assert fill("{largest within of sums/r4, sums/r64}") == f"{spoken_bound(max(bounds))} %"
    numbers = [part["found"] for part in deciding(finding("P45")) if part["found"] is not None]
    assert fill("{P45.2}") == f"{100 * numbers[1]:.1f} %"
    study = StudyResults("sums", is_published=True)
    assert float(fill("{sums/full:rate}")) == study.rate("full").best
    runs = study.rate_runs("full")
    rise = (runs[RETENTION] - runs[f"{RETENTION}_before"]).groupby(runs["learning_rate"]).mean()
    before = rise[rise.index < study.rate("full").best].iloc[-1]
    assert fill("{sums/full:forgets}") == f"{100 * (1 - before / rise[study.rate('full').best]):.0f} %"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{sums-repeat/full against r64}", "`sums-repeat` does not compare these"),
        ("{S8}", "has 2 numbers -> write S8.1 for the first"),
        ("{S5.2}", "has no part 2, but 1"),
        ("{S5.1:within}", "no such form of a claim (got within)"),
        ("{sums-repeat/full:rates}", "no such form (got rates) -> did you mean `rate`?"),
        ("{full:rate}", "is no pair of arms"),
    ],
)
def test_a_reference_that_names_nothing_is_refused(text: str, said: str, in_repository: None) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        Sources(published_findings()).fill(text)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("studies: [small-data]", "studies: [small-date]", "no such experiment (got small-date)"),
        ("claims: [P7, S80]", "claims: [P7, S801]", "no such claim (got S801)"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(before: str, after: str, said: str, changed: Any) -> None:
    changed(before, after)
    with pytest.raises(InputError, match=re.escape(said)):
        write_findings(tuple(claims().values()), published_findings())


def test_a_word_that_no_longer_agrees_is_named_with_its_line(changed: Any) -> None:
    changed("{S8: holds in part}", "{S8: holds}")
    changed("two-bits/qlora-nf3: behind}", "two-bits/qlora-nf3: behind by 20 to 30}")
    asked = {"S8", "two-bits/qlora-nf3"}
    found = "; ".join(map(str, stale(Sources(published_findings()), lambda place, name: name in asked)))
    assert "questions: What does it take?: while: S8: says `holds`, and it is `holds in part` -> mend" in found
    assert "while: two-bits/qlora-nf3: says `behind by 20 to 30`, and it is 17.6 %" in found


def test_a_number_of_a_pair_has_a_word_that_goes_with_it(changed: Any) -> None:
    changed("{sums/qlora:within}", "{sums/dora:within}")
    changed("ends {two-bits/qlora-nf3:about} behind.", "ends {two-bits/qlora-nf3:about} behind {sums/qlora}.")
    with pytest.raises(InputError) as refused:
        read_answers()
    assert "questions: Does QLoRA cost quality?: {sums/dora:within} has no word" in str(refused.value)
    assert "{sums/qlora} is a size, and `the same` -> write {sums/qlora:within}" in str(refused.value)


def test_publish_refuses_claims_where_the_answer_of_a_question_is_out_of_date(changed: Any) -> None:
    for path in (CLAIMS_PAGE, CLAIMS_PAGE.with_suffix(".md"), CHAPTER_PAGE, FINDINGS_PAGE, STUDIES_PAGE):
        path.write_text("")
    shutil.copyfile("results/published/claims.json", CLAIMS_RESULTS)
    changed("{sums/qlora: the same, two-bits", "{sums/qlora: ahead, two-bits")
    said = "questions: Does QLoRA cost quality?: while: sums/qlora: says `ahead`, and it is `the same`"
    with pytest.raises(InputError, match=re.escape(said)):
        publish("claims")
    assert FINDINGS_PAGE.read_text() == ""


@pytest.mark.slow
def test_publish_refuses_a_study_whose_answer_is_out_of_date(changed: Any) -> None:
    assert restore("sums-repeat") > 50
    changed("while: {full: not told apart}", "while: {full: behind}")
    with pytest.raises(
        InputError, match=r"studies: sums-repeat: while: full: says `behind`, and it is `not told apart`"
    ):
        publish("sums-repeat")
    assert "says `behind`" in Path("reports/sums-repeat/report.html").read_text()


def test_the_readme_shows_the_published_verdicts(repository: Path, changed: Any) -> None:
    shown = (repository / "README.md").read_text()
    linked = re.findall(r"\]\(((?:results|reports|docs|experiments)/[^)#]+)", shown)
    assert len(linked) > 10
    assert all((repository / file).is_file() for file in linked)
    anchors = re.findall(r"claims\.md#([SP]\d+)", shown)
    assert len(anchors) > 3
    page = (repository / "reports/published/claims.md").read_text()
    assert all(f'<b id="{anchor}">' in page for anchor in anchors)

    Path("README.md").write_text(shown.replace("On sums the two", "On sums, the two"))
    paper = (repository / "paper/paper.md").read_text()
    Path("paper").mkdir()
    Path("paper/paper.md").write_text(paper)
    show_claims(published_findings(), read_answers().first)
    assert Path("README.md").read_text() == shown
    assert Path("paper/paper.md").read_text() == paper

    findings = deepcopy(published_findings())
    wrong = sum(finding["verdict"] == "wrong" for finding in findings)
    next(finding for finding in findings if finding["verdict"] == "holds")["verdict"] = "wrong"
    show_claims(findings, read_answers().first)
    assert f"<!--wrong-->{wrong + 1}<!--/-->" in Path("paper/paper.md").read_text()


@pytest.mark.slow
def test_the_readme_shows_its_study_as_it_is_published(repository: Path, in_tmp: None) -> None:
    shown = (repository / "README.md").read_text()
    block = re.compile(r"(?<=<!-- study:sums -->\n).+?(?=<!-- /study -->)", re.DOTALL)
    Path("README.md").write_text(block.sub("", shown))
    show_study("variants-60")
    assert Path("README.md").read_text() == block.sub("", shown) != shown
    show_study("sums")
    assert Path("README.md").read_text() == shown


def test_every_open_or_not_run_claim_says_what_would_decide_it_and_at_what_price(in_repository: None) -> None:
    price, page = re.compile(r"(minutes?|hours?)\b"), Path("reports/published/claims.md").read_text()
    findings = {finding["id"]: finding for finding in published_findings()}
    for name, finding in findings.items():
        said = claims()[name].to_decide
        if finding["verdict"] in ("open", "not run"):
            assert price.search(said) and f"\nTo decide: {said}.\n" in page, (name, said)
    assert spoken_verdict(findings["S97"]) == "not run in full"


def test_a_claim_has_a_row_for_each_world_and_no_difference_is_not_wrong(in_repository: None) -> None:
    page = Path("reports/published/claims.md").read_text()
    said = {name: page.partition(f'<b id="{name}">')[2].partition("</details>")[0] for name in ("S28", "S35")}
    assert all(row in said["S28"] for row in ("\n| two-digit sums | no difference |", "\n| pronunciation | wrong |"))
    assert "|" not in said["S35"] and "within" not in said["S35"].partition("</summary>")[0]
    assert len(page.encode()) <= 80_000


def test_a_claim_that_is_wrong_without_a_part_names_it_and_says_its_price(in_repository: None) -> None:
    page = Path("reports/published/claims.md").read_text()
    left = {finding["id"]: left_open(finding) for finding in published_findings()}
    assert len(left["P22"]) == 1 and not left["P18"]  # one is wrong, of the other a part was not run
    for name in filter(left.get, left):
        said = page.partition(f'<b id="{name}">')[2].partition("</details>")[0]
        assert "; a part is " in said and claims()[name].to_decide in said, name
        assert all(part["measures"] in said.partition("Undecided: ")[2] for part in left[name]), name


def test_numbers_of_several_models_have_their_own_scopes(repository: Path, in_repository: None) -> None:
    findings = {finding["id"]: finding for finding in published_findings()}
    of_two, of_one = (spoken_finding(findings[name]) for name in ("S42", "S35"))
    assert " (SmolLM2-135M, two-digit sums); " in of_two and of_two.endswith(" (Llama-2-7B)")
    assert " (SmolLM2" not in of_one
    trained = next(part for part in findings["S42"]["parts"] if part["kind"] == "training" and part["role"] != "beside")
    there = trained | {"elsewhere": True, "model": "m, words"}
    with_another_world = spoken_finding({"parts": [*findings["S42"]["parts"], there]})
    assert with_another_world == f"{of_two}; {spoken_finding(there)}" and "on words with m" in with_another_world


def test_a_comparison_of_the_same_runs_has_the_same_words_in_every_study(in_repository: None) -> None:
    words: dict[frozenset[str], dict[str, set[str]]] = {}
    for name in COMPARED:
        study = StudyResults(name)
        for row in pd.read_csv(f"results/published/{name}/tables/contrasts.csv").to_dict("records"):
            runs = frozenset(run for arm in (row["arm"], row["against"]) for run in study.arm_runs(arm)["run_id"])
            words.setdefault(runs, {}).setdefault(told(row), set()).add(name)
    assert sum(len(names) > 1 for said in words.values() for names in said.values()) > 10
    assert [said for said in words.values() if len(said) > 1] == []


@pytest.mark.parametrize("name", [fast_if(number % 8 == 0, name) for number, name in enumerate(COMPARED)])
def test_a_comparison_has_one_sign_and_the_same_words_on_every_page(name: str, repository, in_repository: None) -> None:
    assert len(COMPARED) > 20
    study = StudyResults(name)
    table = contrasts(study)
    signs = {(row.arm, row.against): row.difference > 0 for row in table.itertuples()}
    published = pd.read_csv(repository / f"results/published/{name}/tables/contrasts.csv")
    assert {(row.arm, row.against): row.difference > 0 for row in published.itertuples()} == signs
    report = html.unescape((repository / f"reports/published/{name}/report.html").read_text())
    if typed := read_answers().studies.get(name):
        assert f'id="answer">{Sources().fill(typed.says, name)}</p>' in report
    assert all(f"<td>{told(row)}</td>" in report for row in table.to_dict("records"))
    for finding in published_findings():
        for part in finding["parts"]:
            asked = part["with"]
            if part["check"] == "training.heldout_gain" and asked["study"] == name and part["found"]:
                arm, against = asked["arm"], asked["against"]
                ahead = signs.get((arm, against), not signs.get((against, arm), part["found"] <= 0))
                assert (part["found"] > 0) == ahead, f"{finding['id']}: {arm} against {against}"
                corrected = {frozenset((row.arm, row.against)): row.holm_p for row in published.itertuples()}
                pair = frozenset((arm, against))
                if pair in corrected:
                    assert part["p_adjusted"] == pytest.approx(corrected[pair], rel=1e-4)

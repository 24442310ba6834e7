"""The page of findings: topics name real claims, what surprises comes first, and studies show what they decide."""

from __future__ import annotations

import html
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import fast_if
from ledger_parts import claims, published_findings

from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError
from peftscope.layout import published_paths
from peftscope.report.contrasts import answer, contrasts, told
from peftscope.report.findings import read_content, write_findings
from peftscope.report.front import MOST_SURPRISES, show_claims, show_study
from peftscope.report.page import ANSWERS
from peftscope.report.spoken import left_open, spoken_finding, spoken_verdict

TOPIC = {"title": "One topic", "claims": ["S34"], "larger": "More.", "papers": "Other."}
COMPARED = [path.parent.parent.name for path in published_paths("tables/contrasts.csv")]


def test_the_page_says_what_was_found_and_what_waits(own_folder: Path, repository: Path) -> None:
    findings = [deepcopy(finding) | {"in_worlds": {}} for finding in published_findings()]
    by_id = {finding["id"]: finding for finding in findings}
    topic = TOPIC | {"claims": ["S34", "S97", "S6"], "doubt": "The rates are too low."}
    first = [{"claim": "S6", "verdict": "wrong", "says": "It takes {0:.0f} GB."}]
    first += [{"claim": "S34", "verdict": "wrong", "says": "The rank is no bottleneck."}]
    apart = {"P2": {"why": "Words are many.", "test": "More words."}}
    by_id["P2"] |= {"verdict": "holds in part", "in_worlds": {"m, sums": "holds", "m, words": "wrong"}}
    by_id["P1"] |= {"verdict": "wrong", "in_worlds": {"m, sums": "wrong", "m, words": "wrong", "n, words": "open"}}
    by_id["P3"] |= {"verdict": "holds in part", "in_worlds": {"m, x": "holds in part", "m, y": "holds in part"}}
    one = next(part for part in by_id["P3"]["parts"] if part["role"] != "beside")
    by_id["P3"]["parts"] += [one | {"model": "m, x", "verdict": "wrong"}, one | {"model": "m, y", "verdict": "holds"}]
    Path("experiments/findings.yaml").write_text(yaml.safe_dump({"topics": [topic], "first": first, "apart": apart}))
    by_id["S34"]["verdict"], by_id["S97"]["verdict"], by_id["S6"]["verdict"] = "holds", "not run", "wrong"
    page = write_findings(tuple(claims().values()), findings).read_text()
    number = next(part["found"] for part in by_id["S6"]["parts"] if part["role"] != "beside")
    assert f"## What surprised most\n\n- It takes {number:.0f} GB. ([S6](claims.md#S6): Llama-2-7B in BF16)" in page
    assert page.index("It takes") < page.index("## One topic") and "no bottleneck" not in page
    assert page.index("**S6**") < page.index("**S34**") < page.index("Not run, or not in full: [S97](claims.md#S97)")
    assert re.search(r"\n\n\*In doubt.\* The rates are too low.\n\n\*A (much )?larger model \(not tested\).\*", page)
    assert "**Wrong**" in page and "**Holds**" in page and "Words are many. *What would test it.*" in page
    assert "; wrong on words with m**" in page and "3 claims on training" in page and "them: wrong in 2 of 3" in page
    assert page.index("Holds in part in 2 of 2 worlds, another part in each") < page.index("3 claims on training")
    (row,) = [line for line in page.splitlines() if line.startswith("| variants-60 |")]
    for finding in findings:
        if any(p["with"].get("study") == "variants-60" and p["role"] != "beside" for p in finding["parts"]):
            assert f"{finding['id']} {finding['verdict']}" in row


@pytest.mark.slow
def test_a_topic_shows_the_answers_and_pictures_of_its_published_studies(own_folder: Path, repository: Path) -> None:
    for folder in ("results/published/variants", "reports/published/variants"):
        shutil.copytree(repository / folder, folder)
    findings = published_findings()
    topic = TOPIC | {"studies": ["two-bits", "variants"]}
    cut = {"variants-families": "Others came first."}
    Path("experiments/findings.yaml").write_text(yaml.safe_dump({"topics": [topic], "cut": cut}))
    page = write_findings(tuple(claims().values()), findings)
    (line,) = [line for line in page.read_text().splitlines() if line.startswith("**Do the variants differ?**")]
    study = StudyResults("variants")
    assert answer(contrasts(study), study.labels, legend="") in line
    links = re.findall(r"\]\(([^)]+(?:svg|report\.html))\)", page.read_text())
    assert len(links) == 2 and all((page.parent / link).is_file() for link in links)
    assert "\n- `variants-families`. Others came first.\n" in page.read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"topics": [TOPIC | {"studies": ["variant"]}]}, "One topic: no such experiment (got variant)"),
        ({"topics": [TOPIC | {"claims": ["S3456"]}]}, "One topic: no such claim (got S3456)"),
        ({"cut": {"batches": "Others came first."}}, "cut: no such experiment (got batches)"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(changes: dict[str, Any], said: str, own_folder: Path) -> None:
    Path("experiments/findings.yaml").write_text(yaml.safe_dump({"topics": [TOPIC], **changes}))
    with pytest.raises(InputError, match=re.escape(f"findings.yaml: {said}")):
        read_content(list(claims()))


def test_the_readme_shows_the_published_verdicts(repository: Path, in_tmp: None) -> None:
    shown = (repository / "README.md").read_text()
    linked = re.findall(r"\]\(((?:results|reports|docs|experiments)/[^)#]+)", shown)
    assert len(linked) > 10
    assert all((repository / file).is_file() for file in linked)
    anchors = re.findall(r"claims\.md#([SP]\d+)", shown)
    assert len(anchors) == MOST_SURPRISES
    page = (repository / "reports/published/claims.md").read_text()
    assert all(f'<b id="{anchor}">' in page for anchor in anchors)

    findings = deepcopy(published_findings())
    surprises = read_content(list(claims())).first
    Path("README.md").write_text(shown)
    Path("results/published").mkdir(parents=True)
    Path("paper").mkdir()
    paper = (repository / "paper/paper.md").read_text()
    Path("paper/paper.md").write_text(paper)
    show_claims(findings, surprises)
    assert Path("README.md").read_text() == shown
    assert Path("paper/paper.md").read_text() == paper

    (changed,) = [finding for finding in findings if finding["id"] == anchors[0]]
    assert changed["verdict"] == surprises[0].verdict
    changed["verdict"] = "wrong"
    show_claims(findings, surprises)
    assert re.findall(r"claims\.md#([SP]\d+)", Path("README.md").read_text())[:2] == anchors[1:]
    wrong = sum(finding["verdict"] == "wrong" for finding in findings)
    assert f"<!--wrong-->{wrong}<!--/-->" in Path("paper/paper.md").read_text()
    assert f"<!--wrong-->{wrong - 1}<!--/-->" in paper


@pytest.mark.slow
def test_the_readme_shows_its_study_as_it_is_published(repository: Path, in_tmp: None) -> None:
    shown = (repository / "README.md").read_text()
    block = re.compile(r"(?<=<!-- study:sums -->\n).+?(?=<!-- /study -->)", re.DOTALL)
    Path("README.md").write_text(block.sub("", shown))
    show_study("variants-60")
    assert Path("README.md").read_text() == block.sub("", shown) != shown
    show_study("sums")
    assert Path("README.md").read_text() == shown


def test_a_sentence_that_does_not_fit_its_claim_is_refused(repository: Path, in_tmp: None) -> None:
    findings = published_findings()
    first, *_ = read_content(list(claims())).first
    Path("results/published").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{first.claim}: the sentence does not fit the claim's numbers"):
        show_claims(findings, [first.model_copy(update={"says": "It takes {7:.2f} times."})])


def test_every_open_or_not_run_claim_says_what_would_decide_it_and_at_what_price(in_repository: None) -> None:
    price, page = re.compile(r"(minutes?|hours?)\b"), Path("reports/published/claims.md").read_text()
    findings = {finding["id"]: finding for finding in published_findings()}
    for name, finding in findings.items():
        said = claims()[name].to_decide
        if finding["verdict"] in ("open", "not run"):
            assert price.search(said) and f"\nTo decide: {said}.\n" in page, (name, said)
    assert spoken_verdict(findings["S97"]) == "not run in full"


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
    assert " [SmolLM2-135M, two-digit sums]; " in of_two and of_two.endswith(" [Llama-2-7B]")
    assert " [SmolLM2" not in of_one
    assert f"{of_two}.\n" in Path("reports/published/findings.md").read_text()  # and no scope after both
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
    labels, table = study.labels, contrasts(study)
    signs = {(row.arm, row.against): row.difference > 0 for row in table.itertuples()}
    published = pd.read_csv(repository / f"results/published/{name}/tables/contrasts.csv")
    assert {(row.arm, row.against): row.difference > 0 for row in published.itertuples()} == signs
    said, folder = answer(table, labels, legend=""), repository / "results/published" / name / "figures"
    report = html.unescape((repository / f"reports/published/{name}/report.html").read_text())
    assert said in report
    assert all(f"<td>{told(row)}</td>" in report for row in table.to_dict("records"))
    if not any((folder / f"{figure}.svg").is_file() for figure in ANSWERS):  # whose sentences are others
        lines = (repository / "reports/published/findings.md").read_text().splitlines()
        shown = [line for line in lines if f"{name}/report.html)" in line]
        assert all(said in line for line in shown if line.startswith("**"))
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

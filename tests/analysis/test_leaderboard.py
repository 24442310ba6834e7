"""The leaderboard: the numbers and the words of the studies, by their estimates, nothing from unfinished studies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from test_study import GAINS, STUDY, members, record_comparison

from peftscope.analysis.collect import collect_experiment
from peftscope.analysis.study import HELDOUT, StudyResults
from peftscope.layout import record_path
from peftscope.planning.sweep import expand
from peftscope.report.contrasts import contrasts, controls, readable_contrasts, readable_controls
from peftscope.report.leaderboard import Section, read_sections, reference_of, table, write_leaderboard
from peftscope.report.publish import publish

CLOSE = GAINS | {"lora": [2.05, 1.98, 2.02, 1.96, 2.04, 1.99]}
"""LoRA gains as much as full fine-tuning; LoRA of rank 2, "thin", gains half a nat less."""
REFERENCE_AGAIN = "full-a-a"
Compare = Callable[..., None]


@pytest.fixture
def compare_arms(write_experiment) -> Compare:
    """Makes the study ``mine`` finished, with these gains; keywords replace fields of its study."""

    def make(gains: dict[str, list[float]] = CLOSE, **changes: Any) -> None:
        write_experiment("mine", yaml.safe_dump(STUDY | {"study": STUDY["study"] | changes}))
        Path("results/published").mkdir(parents=True)  # so that the published ones of the suite stay out
        record_comparison(gains)
        collect_experiment(expand("mine"))

    return make


def section_of(*names: str) -> Section:
    return next(section for section in read_sections()[0] if list(reference_of(section).said) == list(names))


def test_rows_have_the_numbers_and_the_words_of_their_study(compare_arms: Compare) -> None:
    compare_arms()
    rows, study = table(section_of("mine")).set_index("method"), StudyResults("mine")
    own = readable_contrasts(contrasts(study), study.labels).set_index("arm")
    assert list(own.index) == ["LoRA", "LoRA, thin"]
    for arm in own.index:
        for column in ("pairs", "within (%)", "by (nats/token)"):
            assert rows.loc[arm, column] == own.loc[arm, column]
        shown = rows.loc[arm, "ahead of the reference by (% of the task gain)"]
        assert shown == own.loc[arm, "ahead of full fine-tuning by (% of the task gain)"]
        assert rows.loc[arm, "its study says"] == own.loc[arm, "what it says"]
    assert rows.loc["LoRA, thin", "its study says"] == "behind by more than 2.5 % of the task gain"
    again = readable_controls(controls(study), study.labels).iloc[0]
    assert again["control"] == "LoRA, another initialisation seed (A/A)"
    row = rows.loc["LoRA against itself (A/A)"]
    assert row["by (nats/token)"] == again["ahead of the arm by (nats/token)"] and row["its study says"] == "-"
    assert rows.loc["full fine-tuning", "its study says"] == "the reference"
    assert rows.loc["full fine-tuning", "by (nats/token)"] == "-"
    assert rows["learning rate"].to_dict() == dict.fromkeys(rows.index, "0.001") | {"full fine-tuning": "0.0001"}
    settings = rows["settings other than the reference's"]
    assert "rank 8, alpha 16" in settings["LoRA"] and "rank 2" in settings["LoRA, thin"]


@pytest.mark.parametrize("shift", [-0.02, 0.02])
def test_rows_stand_in_the_order_of_their_estimates_which_is_no_result(shift: float, compare_arms: Compare) -> None:
    compare_arms(CLOSE | {"lora": [gain + shift for gain in CLOSE["full"]]})
    (section,), left_out = read_sections()
    first = ["full fine-tuning", "LoRA"] if shift < 0 else ["LoRA", "full fine-tuning"]
    assert [entry.label for entry in section] == [*first, "LoRA, thin", "LoRA against itself (A/A)"]
    page = write_leaderboard([section], left_out)
    for suffix in (".html", ".md"):
        text = " ".join(page.with_suffix(suffix).read_text().split())
        assert "A place in a list is no result" in text
        assert 'class="sorts"' not in text  # no column orders the rows by its numbers


def test_the_reference_that_entered_twice_is_a_control(compare_arms: Compare) -> None:
    arms, chosen = STUDY["study"]["arms"], STUDY["study"]["chosen_rates"] | {REFERENCE_AGAIN: 1e-4}
    compare_arms(CLOSE | {REFERENCE_AGAIN: CLOSE["lora"]}, arms=arms, a_a="full", chosen_rates=chosen)
    entries = section_of("mine")
    assert [entry.is_control for entry in entries] == [False] * 3 + [True] * 2
    assert "full fine-tuning against itself (A/A)" in {entry.label for entry in entries[3:]}


@pytest.mark.slow
def test_studies_with_the_same_runs_of_the_reference_share_a_table(compare_arms: Compare) -> None:
    compare_arms()
    other = Path("results/other")
    shutil.copytree("results/mine", other)
    entries = section_of("mine", "other")
    assert [list(entry.said) for entry in entries] == [["mine", "other"]] * 4
    # Each study corrects for its own arms, so that two of them may say different things of the same runs.
    assert replace(entries[1], said={"mine": "open", "other": "open"}).outcome == "open"
    assert replace(entries[1], said={"mine": "open", "other": "same"}).outcome == "open (mine); same (other)"
    runs = pd.read_csv(other / "runs.csv")

    def change(arm: str, column: str, by: Any) -> None:
        runs.loc[runs["comparisons"].str.contains(f"arm-{arm}"), column] += by
        runs.to_csv(other / "runs.csv", index=False)

    change("thin", HELDOUT, 0.1)
    labels = [entry.label for entry in section_of("mine", "other")]
    assert {"LoRA, thin (mine)", "LoRA, thin (other)"} < {*labels}  # the same runs, but other numbers
    change("lora", "run_id", "-at-another-rate")
    labels = [entry.label for entry in section_of("mine", "other")]
    assert {"LoRA (mine)", "LoRA (other)"} < {*labels} and "full fine-tuning" in labels
    change("full", "run_id", "-on-other-seeds")
    assert {tuple(reference_of(section).said) for section in read_sections()[0]} >= {("mine",), ("other",)}


def test_an_unfinished_study_is_left_out_with_a_sentence(compare_arms: Compare, peftscope) -> None:
    compare_arms()
    record_path(members("arm-thin")[0]).unlink()
    collect_experiment(expand("mine"))
    sections, left_out = read_sections()
    assert "mine" not in {name for section in sections for name in reference_of(section).said}
    assert left_out["mine"] == "not finished (5 of 6 runs done)"
    _, said, _ = peftscope("leaderboard")
    assert "Left out: mine: not finished (5 of 6 runs done)." in said
    page = Path("reports/leaderboard.html").read_text()
    assert "<li>mine: not finished (5 of 6 runs done).</li>" in page and "LoRA, thin" not in page


def test_the_published_page_shows_published_studies_and_links_their_reports(compare_arms: Compare, peftscope) -> None:
    compare_arms()
    report = Path("reports/mine/report.html")
    report.parent.mkdir(parents=True)
    report.write_text("")
    code, said, _ = peftscope("leaderboard")
    assert code == 0 and "a toy model on two-digit sums, 3 steps of 4, seeds 0 to 5 (mine): 4 rows." in said
    assert '<a href="mine/report.html">mine</a>' in Path("reports/leaderboard.html").read_text()
    page, _ = publish("leaderboard")
    assert page == Path("reports/published/leaderboard.html") and "No study is finished yet." in page.read_text()
    shutil.copytree("results/mine", "results/published/mine")
    page, text = publish("leaderboard")
    assert "<td>mine</td>" in page.read_text() and "| mine |" in text.read_text()
    tables = Path("results/published/mine/tables")
    tables.mkdir()
    contrasts(StudyResults("mine")).assign(percent=12.34).to_csv(tables / "contrasts.csv", index=False)
    assert "+12.3 [" in publish("leaderboard")[1].read_text()  # as it was published, whatever stands here
    assert "+12.3 [" not in write_leaderboard(*read_sections()).read_text()
    shutil.copytree("reports/mine", "reports/published/mine")
    page, text = publish("leaderboard")
    assert '<a href="mine/report.html">mine</a>' in page.read_text()
    assert "[mine](mine/report.html)" in text.read_text()


def test_a_label_of_a_methods_file_stands_on_the_page_as_text(compare_arms: Compare) -> None:
    compare_arms()
    path = Path("results/mine/runs.csv")
    runs = pd.read_csv(path)
    runs.loc[runs["label"] == "LoRA", "label"] = "<script>alert(1)</script>|"
    runs.to_csv(path, index=False)
    page = write_leaderboard(*read_sections())
    assert "<script" not in page.read_text() and "&lt;script&gt;alert(1)" in page.read_text()
    assert "<script" not in page.with_suffix(".md").read_text()

"""The leaderboard: rows with intervals and groups, no order within a group, nothing from unfinished studies."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from test_study import GAINS, STUDY, members, record_comparison

from peftscope.analysis.collect import collect_experiment
from peftscope.analysis.ranking import Ranking
from peftscope.analysis.study import StudyResults
from peftscope.layout import record_path
from peftscope.planning.sweep import expand
from peftscope.report.leaderboard import Section, read_sections, sentences, table, write_leaderboard
from peftscope.report.publish import publish

CLOSE = GAINS | {"lora": [2.05, 1.98, 2.02, 1.96, 2.04, 1.99]}
"""LoRA and full fine-tuning cannot be told apart; LoRA of rank 2, "thin", gains half a nat less."""
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
    return next(section for section in read_sections()[0] if section.names == list(names))


def rows_of(section: Section) -> pd.DataFrame:
    return table(section, {name: name for name in section.names}).set_index("method")


def test_rows_have_an_interval_and_share_a_letter_if_they_cannot_be_told_apart(compare_arms: Compare) -> None:
    compare_arms()
    section = section_of("mine")
    rows = rows_of(section)
    assert rows["group"].to_dict() == {
        "full fine-tuning": "a",
        "LoRA": "a",
        "LoRA, thin": "b",
        "LoRA against itself (A/A)": "A/A",
    }
    interval = r"[+−]\d+\.\d+ \[[+−]\d+\.\d+, [+−]\d+\.\d+\]"
    others = rows.drop("full fine-tuning")
    for column in ("ahead of full fine-tuning by (% of the task gain)", "by (nats/token)"):
        assert others[column].map(lambda text: bool(re.fullmatch(interval, text))).all(), column
        assert rows.loc["full fine-tuning", column] == "-"
    assert rows.loc["full fine-tuning", "its study says"] == "the reference"
    assert rows.loc["LoRA, thin", "its study says"] == "behind by more than 2.5 % of the task gain"
    low, high = StudyResults("mine").difference("thin", "full").interval()
    assert f"[{low:+.4f}, {high:+.4f}]".replace("-", "−") in rows.loc["LoRA, thin", "by (nats/token)"]
    assert list(rows["pairs"]) == ["6"] * 4 and list(rows["rates tried"]) == ["given"] * 4
    settings = rows["settings other than full fine-tuning's"]
    assert "rank 8, alpha 16" in settings["LoRA"] and "rank 2" in settings["LoRA, thin"]
    first, trusted, again = sentences(section)
    assert first.startswith("3 methods, 2 groups: 1 of 3 pairs cannot be told apart.")
    assert first.endswith("any of these 2: full fine-tuning; LoRA.")
    assert re.search(r"the wrong best method in [1-9]\d? of 100 cases", trusted)
    assert again.startswith("LoRA against itself (A/A): ")


@pytest.mark.parametrize("shift", [-0.02, 0.02])
def test_rows_of_one_group_stand_in_the_order_of_the_alphabet(shift: float, compare_arms: Compare) -> None:
    compare_arms(CLOSE | {"lora": [gain + shift for gain in CLOSE["lora"]]})
    (section,), left_out = read_sections()
    assert [entry.arm for entry in section.entries][:3] == ["full", "lora", "thin"]
    page = write_leaderboard([section], left_out)
    for suffix in (".html", ".md"):
        text = " ".join(page.with_suffix(suffix).read_text().split())
        assert "Rows that share a letter cannot be told apart." in text
        assert "stand in the order of the alphabet, which says nothing of them" in text
        assert 'class="sorts"' not in text  # no column orders the rows by its numbers


def test_two_systems_share_a_letter_exactly_if_they_cannot_be_told_apart() -> None:
    random, none = np.random.default_rng(0), np.zeros(0)
    for k in (2, 3, 5, 8):
        p = random.uniform(0, 0.1, (k, k))
        p = np.triu(p, 1) + np.triu(p, 1).T + np.eye(k)
        letters = Ranking([""] * k, none, 2, none, none, p, p, lower_is_better=True).letters
        shared = np.array([[not set(one).isdisjoint(other) for other in letters] for one in letters])
        assert (shared == (p >= 0.05)).all()


def test_the_reference_that_entered_twice_is_a_control_and_no_method(compare_arms: Compare) -> None:
    arms, chosen = STUDY["study"]["arms"], STUDY["study"]["chosen_rates"] | {REFERENCE_AGAIN: 1e-4}
    compare_arms(CLOSE | {REFERENCE_AGAIN: CLOSE["lora"]}, arms=arms, a_a="full", chosen_rates=chosen)
    section = section_of("mine")
    rows = rows_of(section)
    assert rows["group"]["full fine-tuning against itself (A/A)"] == "A/A"
    assert list(rows["group"])[-2:] == ["A/A", "A/A"] and len(section.ranking.systems) == 3


def test_studies_with_the_same_runs_of_the_reference_share_a_table(compare_arms: Compare) -> None:
    compare_arms()
    other = Path("results/other")
    shutil.copytree("results/mine", other)
    entries = section_of("mine", "other").entries
    assert [entry.names for entry in entries] == [["mine", "other"]] * 4
    # Each study corrects for its own arms, so that two of them may say different things of the same runs.
    assert replace(entries[1], outcomes={"mine": "open", "other": "open"}).outcome == "open"
    assert replace(entries[1], outcomes={"mine": "open", "other": "same"}).outcome == "open (mine); same (other)"
    table_of_other = pd.read_csv(other / "runs.csv")
    is_lora = table_of_other["comparisons"].str.contains("arm-lora")
    table_of_other.loc[is_lora, "run_id"] += "-at-another-rate"
    table_of_other.to_csv(other / "runs.csv", index=False)
    shared = section_of("mine", "other")
    assert [entry.label for entry in shared.entries][:4] == [
        "full fine-tuning",
        "LoRA (mine)",
        "LoRA (other)",
        "LoRA, thin",
    ]
    is_reference = table_of_other["comparisons"].str.contains("arm-full")
    table_of_other.loc[is_reference, "run_id"] += "-on-other-seeds"
    table_of_other.to_csv(other / "runs.csv", index=False)
    assert {tuple(section.names) for section in read_sections()[0]} >= {("mine",), ("other",)}


def test_an_unfinished_study_is_left_out_with_a_sentence(compare_arms: Compare, peftscope) -> None:
    compare_arms()
    record_path(members("arm-thin")[0]).unlink()
    collect_experiment(expand("mine"))
    sections, left_out = read_sections()
    assert "mine" not in {name for section in sections for name in section.names}
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
    assert code == 0 and "toy, two-digit-sums, 3 steps, seeds 0 to 5 (mine): 3 methods" in said
    assert '<a href="mine/report.html">mine</a>' in Path("reports/leaderboard.html").read_text()
    page, _ = publish("leaderboard")
    assert page == Path("reports/published/leaderboard.html") and "No study is finished yet." in page.read_text()
    shutil.copytree("results/mine", "results/published/mine")
    page, text = publish("leaderboard")
    assert "<td>mine</td>" in page.read_text() and "| mine |" in text.read_text()
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

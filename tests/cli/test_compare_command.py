"""``peftscope compare`` in words: pairs whose truth is known, refusals, and the page on PEFT's published runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.peft_comparison import PAGE, SCORES, number_of_readme, render, render_stars, stars, stars_by_chance
from peftscope.report.front import README, with_numbers

Command = Any

pytestmark = pytest.mark.usefixtures("in_tmp")
LEVELS = {"one": 1.0, "other": 1.0, "far": 2.0}


def write(name: str, level: float, seeds: int = 8, items: int = 60, first: int = 0, spread: float = 0.02) -> str:
    """Writes scores of some seeds and items whose mean is a level, and returns the file's name."""
    random = np.random.default_rng(sum(map(ord, name)))
    hard = np.random.default_rng(0).normal(0, 1, (1, items))
    values = hard + random.normal(0, spread, (seeds, 1)) + random.normal(0, 0.1, (seeds, items))
    values += level - values.mean()
    rows = [(s, first + i, values[s, i]) for s in range(seeds) for i in range(items)]
    pd.DataFrame(rows, columns=["seed", "item", "score"]).to_csv(f"{name}.csv", index=False)
    return f"{name}.csv"


class TestKnownTruth:
    def test_the_same_system_twice(self, peftscope: Command) -> None:
        code, text, _ = peftscope("compare", write("a", 1.0), write("b", 1.0), "--margin", "0.1")
        assert code == 0
        assert "cannot be told from chance" in text
        assert "Margin ±0.1 (0.1): the same, within 0.0" in text
        assert "To decide" not in text and "Standard error from each source: seeds" in text

    def test_the_same_for_programs(self, peftscope: Command) -> None:
        _, text, _ = peftscope("compare", write("a", 0.5), write("b", 1.0), "--margin", "0.1", "--json")
        found = json.loads(text)
        assert found["outcome"] == "differs by more than the margin" and found["margin"] == 0.1
        assert found["ahead_by"] == pytest.approx(-0.5) and found["a"]["score"] == pytest.approx(0.5)
        low, high = found["interval_95"]
        assert low < -0.5 < high < -0.1 and (found["runs_each"], found["items"], found["is_paired"]) == (8, 60, True)
        _, text, _ = peftscope("compare", write("a", 0.5), write("b", 1.0), "--json")
        assert json.loads(text)["margin"] is None and json.loads(text)["outcome"] is None

    def test_a_ranking_for_programs(self, peftscope: Command) -> None:
        table = pd.concat(pd.read_csv(write(name, level)).assign(name=name) for name, level in LEVELS.items())
        table.to_csv("all.csv", index=False)
        _, text, _ = peftscope("compare", "all.csv", "--all", "--json")
        (found,) = json.loads(text)
        assert found["seed_spread"] is None and found["pairs"] == 3
        assert found["groups"] in ([[1, 1], [2, 3]], [[1, 2], [3, 3]])
        assert sorted(row["system"] for row in found["systems"]) == ["far", "one", "other"]
        assert 0 < found["chances_of_single_runs"]["winner"] <= 1

    def test_one_seed(self, peftscope: Command) -> None:
        _, text, _ = peftscope("compare", write("a", 1.5, seeds=1), write("b", 1.0, seeds=1))
        assert "One run of each shows the chance of the items and nothing of the seeds" in text
        assert "If single runs spread between seeds by more than 0.17" in text
        assert "Margin" not in text and "the same" not in text

    def test_too_few_to_know(self, peftscope: Command) -> None:
        _, text, _ = peftscope(
            "compare", write("a", 1.04, seeds=3, spread=0.2), write("b", 1.0, seeds=3, spread=0.2), "--margin", "0.1"
        )
        assert "Margin ±0.1 (0.1): not told apart, within 0." in text
        assert "seeds of each, or no number of items alone" in text

    def test_right_and_wrong_answers_of_one_seed(self, peftscope: Command) -> None:
        for name, right in (("a", [1] * 90 + [0] * 10), ("b", [1] * 70 + [0] * 30)):
            pd.DataFrame({"item": range(100), "correct": right}).to_csv(f"{name}.csv", index=False)
        _, text, _ = peftscope("compare", "a.csv", "b.csv", "--margin", "2pp")
        assert "A against B: +20.00 pp [+12.02, +27.98] (95 % interval), from 1 pair of runs and 100 items." in text
        assert "correct: 90.00 %" in text and "ahead by more than 2pp" in text

    def test_a_loss_below_one_is_no_share(self, peftscope: Command) -> None:
        for name, level in (("a", 0.3), ("b", 0.2)):
            pd.DataFrame({"item": range(50), "loss": np.linspace(0, 2 * level, 50)}).to_csv(f"{name}.csv", index=False)
        _, text, _ = peftscope("compare", "a.csv", "b.csv")
        assert "A against B: −0.1 [" in text and "loss: 0.3" in text


class TestMargins:
    def test_a_share_of_the_gain_over_a_base(self, peftscope: Command) -> None:
        arguments = ("compare", write("a", 1.0), write("b", 1.0), "--margin", "5%gain")
        _, text, _ = peftscope(*arguments, "--base", write("base", 3.0))
        assert "Margin ±5 % of the task gain (0.1" in text and "): the same, within 0." in text

    def test_the_gain_of_a_study_is_its_own(self, peftscope, in_repository: None) -> None:
        _, text, _ = peftscope("compare", "variants-60:dora", "variants-60:lora", "--margin", "5%gain")
        assert "of the task gain (0.0343 nats per token): not told apart, within 0." in text

    def test_a_published_run_that_is_older_than_a_field_is_one_of_its_arm(self, peftscope: Command) -> None:
        code, text, message = peftscope("compare", "variants:adalora", "variants:lora")
        assert (code, message) == (0, "") and "8 pairs of runs" in text

    def test_two_runs_that_differ_in_one_item(self, peftscope: Command) -> None:
        for name, last in (("x", 0), ("y", 1)):
            rows = [f"{item},{item % 2}" for item in range(39)] + [f"39,{last}"]
            Path(f"{name}.csv").write_text("\n".join(["item,score", *rows]))
        code, text, message = peftscope("compare", "x.csv", "y.csv")
        assert (code, message) == (0, "") and "40 items" in text

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ((), "B: is missing"),
            (("b.csv", "--figure", "d.png"), "--figure: goes with --all only"),
            (("b.csv", "--base", "a.csv", "--margin", "1"), "goes with a margin in %gain only"),
            (("b.csv", "--all"), "does not go with --all"),
            (("--all", "--margin", "1"), "does not go with --all"),
            (("b.csv", "--items", "5"), "goes with --all only"),
            (("a.csv",), "B: is A itself (got 'a.csv')"),
            (("b.csv", "--metric", "skore"), "did you mean `score`?"),
            (("twin.csv",), "all pairs differ by 0, so that there is no spread to judge by"),
            (("--all",), "fewer than two systems"),
            (("--all", "--seed-spread", "1%gain"), "does not fit these scores"),
            (("other.csv",), "other items: 60 and 60, 10 of them in only one"),
            (("odd.csv",), "not a number in row 1 (got 'abc')"),
            (("once.csv,once.csv",), "stands twice on one side -> name each run once"),
            (("b.csv", "--margin", "5%"), "a bare per cent does not say of what"),
            (("b.csv", "--margin", "5e-1 %"), "say 5e-1pp for percentage points of the score, or 5e-1%gain"),
            (("b.csv", "--margin", "2pp"), "does not fit these scores, which are of no known unit"),
            (("b.csv", "--margin", "5%gain"), "the task gain of these scores is not known"),
            (("b.csv", "--margin", "a lot"), "no amount"),
            (("b.csv", "--margin", "0"), "no amount"),
            (("b.csv", "--margin", "1e400"), "no amount"),
        ],
    )
    def test_what_cannot_be_compared_is_said(self, more: tuple[str, ...], said: str, peftscope: Command) -> None:
        write("a", 1.0), write("b", 1.0), write("other", 1.0, first=5)
        Path("twin.csv").write_text(Path("a.csv").read_text())
        Path("odd.csv").write_text("seed,item,score\n0,0,0.5\n1,0,abc\n")
        Path("once.csv").write_text("item,score\n0,0.5\n1,1.5\n")
        code, _, error = peftscope("compare", "a.csv", *more)
        assert code == 2 and said in error


def test_a_ranking_with_its_spread(peftscope: Command) -> None:
    for name, level in (("best", 3.0), ("good", 2.0), ("alike", 2.0)):
        write(name, level)
    code, text, _ = peftscope("compare", ".", "--all", "--figure", "r.png")
    assert code == 0 and Path("r.png").is_file()
    assert "Groups in which no two can be told apart: 1, 2 to 3." in text
    assert "as it was seen" in text and "1 of 3 (33%)" in text and "does not show how far seeds spread" not in text


def test_single_scores_are_ranked_under_a_stated_range(peftscope: Command) -> None:
    rows = [(f"system {n}", 0.4 + 0.004 * n) for n in range(6)]
    pd.DataFrame(rows, columns=["name", "accuracy"]).to_csv("all.csv", index=False)
    _, text, _ = peftscope("compare", "all.csv", "--all", "--items", "1000")
    assert [spread in text for spread in ("0.00 pp", "0.50 pp", "1.00 pp", "2.00 pp")] == [True] * 4
    assert "1 to 6" in text and "the range above is no estimate" in text
    _, text, _ = peftscope("compare", "all.csv", "--all", "--seed-spread", "0.01pp")
    assert "0 of 15 (0%)" in text and "no estimate" not in text


@pytest.mark.slow
def test_the_page_on_pefts_runs_shows_what_their_scores_give(repository: Path) -> None:
    page, scores = (repository / PAGE).read_text(), repository / SCORES
    tables = render(scores)
    assert f"<!-- tables -->\n{tables}\n<!-- /tables -->" in page
    assert "63 | " in tables and "of 1,953" in tables
    readme = (repository / README).read_text()
    assert "orderings by chance" in readme and readme == with_numbers(readme, number_of_readme(scores))


def test_stars_follow_fifths_and_change_with_the_seeds(repository: Path) -> None:
    assert stars(np.arange(10.0)).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert stars(np.array([[0.5, 0.5, 0.4, 0.3, 0.2]])).tolist() == [[5, 5, 3, 2, 1]]  # equal scores share a place
    scores = repository / SCORES
    still = stars_by_chance(0.0, scores)
    assert all(row[str(row["stars"])] == 1 for row in still.to_dict("records"))
    assert f"<!-- stars -->\n{render_stars(scores)}\n<!-- /stars -->" in (repository / PAGE).read_text()

"""``peftscope compare`` in words: pairs whose truth is known, refusals; and the page on PEFT's published runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.peft_comparison import (
    PAGE,
    SCORES,
    number_of_readme,
    rank,
    render,
    render_stars,
    stars,
    stars_by_chance,
    trust,
)
from peftscope.report.front import README, with_numbers

Command = Any

pytestmark = pytest.mark.usefixtures("in_tmp")


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

    def test_arms_at_several_rates_show_the_losses_that_are_subtracted(self, peftscope, in_repository: None) -> None:
        _, text, _ = peftscope("compare", "sums:r1", "sums:lora", "--margin", "2.5%gain")
        mine, other = map(float, re.findall(r"(?:A|B and its A/A) (0\.\d+) nats", text))
        (ahead,) = re.findall(r"A against B: ([−+]0\.\d+)", text)
        assert other - mine == pytest.approx(float(ahead.replace("−", "-")), abs=1.1e-4)
        assert "To decide whether they differ by more than 2.5 % of the task gain or are the same" in text

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
            ((), "Missing argument"),
            (("b.csv", "--base", "a.csv", "--margin", "1"), "goes with a margin in %gain only"),
            (("a.csv",), "B: is A itself (got 'a.csv')"),
            (("b.csv", "--metric", "skore"), "did you mean `score`?"),
            (("twin.csv",), "all pairs differ by 0, so that there is no spread to judge by"),
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


def scored(*scores: float) -> pd.Series:
    return pd.Series(scores, index=[f"s{number}" for number in range(len(scores))])


def test_systems_that_cannot_be_told_apart_share_places() -> None:
    found = rank(scored(0.5001, 0.70, 0.90, 0.5, 0.9001), 0.003)
    assert found.systems == ["s4", "s2", "s1", "s0", "s3"]
    assert found.places == [(1, 2), (1, 2), (3, 3), (4, 5), (4, 5)] and found.first_group == 2
    assert found.undecided(corrected=False) == found.undecided(corrected=True) == 2
    # The draw of the items adds to the chance of seeds.
    pair = scored(0.50, 0.52)
    assert rank(pair, 0.001).undecided(corrected=False) == 0
    assert rank(pair, 0.02).undecided(corrected=False) == rank(pair, 0.001, items=500).undecided(corrected=False) == 1


def test_a_ranking_of_equals_is_a_coin_and_one_of_giants_is_sure() -> None:
    equal, apart = trust(rank(scored(*[0.5] * 5), 0.1)), trust(rank(scored(0.1, 0.3, 0.5, 0.7, 0.9), 1e-4))
    assert 0.4 < equal[1] < 0.6 and equal[2] < 0.1
    assert apart == (1, 1, 1)
    # Two systems as far apart as the seeds spread.
    prior = 0.02**2 / 2 - 0.01**2
    weight = prior / (prior + 0.01**2)
    right = stats.norm.cdf(weight * 0.02 / (0.01 * np.sqrt(2 * weight)))
    assert trust(rank(scored(0.50, 0.52), 0.01), 40_000)[0] == pytest.approx(right, abs=0.01)


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

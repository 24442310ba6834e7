"""Two results: what is read of them, what their difference is worth, and what cannot be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from peftscope.analysis.paired import Pairing, check_side, pair
from peftscope.analysis.scores import read_scores
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError

RANDOM = np.random.default_rng


def crossed(random: np.random.Generator, seeds: int, items: int, of_seeds: float, of_items: float) -> np.ndarray:
    """Returns scores around zero that vary with the seed, with the item, and by themselves."""
    alike = random.normal(0, of_seeds, (seeds, 1)) + random.normal(0, of_items, (1, items))
    return alike + random.normal(0, 1, (seeds, items))


def write_log(folder: Path, correct: list[int], first: int = 0, question: str = "{}?") -> Path:
    """Writes a log of two filters as lm-eval does: the strict one is never right."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "doc_id": first + number,
            "doc": {"question": question.format(number)},
            "target": str(number),
            "arguments": {"gen_args_0": {"arg_0": "ask", "arg_1": {"until": ["\n"]}}},
            "resps": [["7"]],
            "filtered_resps": ["7"],
            "filter": name,
            "metrics": ["exact_match"],
            "doc_hash": question.format(number),
            "prompt_hash": "p",
            "target_hash": str(number),
            "exact_match": float(right) if name == "flexible-extract" else 0.0,
        }
        for number, right in enumerate(correct)
        for name in ("strict-match", "flexible-extract")
    ]
    path = folder / "samples_gsm8k_2026-01-01T00-00-00.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_run(folder: Path, nll: list[float], **spec: Any) -> Path:
    """Writes what a run of the suite leaves: the second item has a token more than the first, and so on."""
    rows = [
        {"item": i, "prompt": f"{i}?", "target": "x", "nll": each, "tokens": 1 + i, "answer": "x", "correct": i}
        for i, each in enumerate(nll)
    ]
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps({"init_seed": None, "method": {"name": "lora"}} | spec))
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "items.jsonl"


class TestStatistics:
    def test_pairs_of_seeds_are_a_paired_t_test_and_unpaired_runs_are_welchs(self) -> None:
        random = RANDOM(0)
        a, b = random.normal(0.5, 1, (6, 1)), random.normal(0, 2, (4, 1))
        one = Pairing((a,)).difference(math.nan)
        wanted = stats.ttest_1samp(a[:, 0], 0)
        assert (one.p, *one.interval()) == pytest.approx((wanted.pvalue, *wanted.confidence_interval(0.95)))
        two = Pairing((a, -b)).difference(math.nan)
        welch = stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)
        assert (two.p, *two.interval()) == pytest.approx((welch.pvalue, *welch.confidence_interval(0.95)))

    @pytest.mark.parametrize(("seeds", "of_seeds", "of_items"), [(3, 0.3, 1.0), (8, 0.0, 1.0)])
    def test_the_interval_covers_other_seeds_and_other_items_at_once(
        self, seeds: int, of_seeds: float, of_items: float
    ) -> None:
        random = RANDOM(0)
        found = [Pairing((crossed(random, seeds, 60, of_seeds, of_items),)).difference(math.nan) for _ in range(500)]
        assert 0.90 < np.mean([low <= 0 <= high for low, high in (one.interval() for one in found)]) < 0.98
        # Where items decide, the seeds' spread alone is far too narrow.
        alone = [abs(one.mean) < stats.t.ppf(0.975, seeds - 1) * one.spread / math.sqrt(seeds) for one in found]
        assert of_seeds or np.mean(alone) < 0.8

    def test_more_seeds_or_more_items_are_asked_for_where_they_help(self) -> None:
        random = RANDOM(1)
        of_seeds = Pairing((crossed(random, 6, 400, 1.0, 0.1) + 0.3,))
        assert of_seeds.seeds_to_decide(math.nan) and of_seeds.items_to_decide(math.nan) is None
        of_items = Pairing((crossed(random, 6, 50, 0.0, 2.0) + 0.3,))
        needed = of_items.items_to_decide(math.nan)
        assert needed and of_items.seeds_to_decide(math.nan) is None
        half_width, confidence = of_items.difference(math.nan).deciding_width
        assert of_items.difference(math.nan, items=needed).half_width(confidence) < half_width
        assert of_items.difference(math.nan, items=needed - 1).half_width(confidence) >= half_width

    def test_few_items_that_differ_are_mcnemars_exact_test(self) -> None:
        differences = np.array([[1.0] * 9 + [-1.0] * 2 + [0.0] * 200])
        assert Pairing((differences,)).p == pytest.approx(stats.binomtest(2, 11).pvalue)

    def test_the_hidden_spread_is_where_one_seed_stops_being_enough(self) -> None:
        pairing = Pairing((RANDOM(0).normal(0.3, 1, (1, 400)),))
        hidden = pairing.hidden_spread
        known = pairing.difference(math.nan)
        error = math.hypot(known.error, math.sqrt(2) * hidden)
        assert hidden > 0 and known.half_width() / known.error * error == pytest.approx(known.mean)
        assert Pairing((RANDOM(0).normal(0.0, 1, (1, 400)),)).hidden_spread == 0


class TestSources:
    def test_an_arm_of_a_study_is_compared_as_the_study_does_it(self, in_repository: None) -> None:
        pairing = pair(read_scores("variants-60:dora"), read_scores("variants-60:lora"))
        study = StudyResults("variants-60").difference("dora", "lora")
        found = pairing.difference(math.nan)
        assert (pairing.seeds, pairing.items) == (6, 810)
        assert (found.mean, found.spread) == pytest.approx((study.mean, study.spread), rel=1e-6)
        ((of_items, _),) = found.others
        assert 35 < found.spread / math.sqrt(6) / of_items < 45  # as the page says
        over_rates = pair(read_scores("sums:full"), read_scores("sums:lora")).difference(math.nan)
        study = StudyResults("sums").difference("full", "lora")
        assert (over_rates.mean, over_rates.spread) == pytest.approx((study.mean, study.spread), rel=1e-6)

    def test_the_suites_items(self, tmp_path: Path) -> None:
        for seed, nll in enumerate(([1.0, 4.0], [2.0, 5.0])):
            write_run(tmp_path / f"lora-s{seed}-{seed}", nll, seed=seed, learning_rate=0.1)
        both = ",".join(str(tmp_path / f"lora-s{seed}-{seed}" / "items.jsonl") for seed in (0, 1))
        runs = read_scores(both)
        assert [(run.system, run.seed, run.metric, run.unit) for run in runs] == [
            ("lora at 0.1", seed, "loss", "nats per token") for seed in (0, 1)
        ]
        assert [run.score for run in runs] == pytest.approx([5 / 3, 7 / 3])  # nats over tokens, not means of means
        assert pair(runs[:1], runs[1:]).mean == pytest.approx(2 / 3)
        assert [run.score for run in read_scores(both, "exact_match")] == [0.5, 0.5]

    def test_lm_evals_logs(self, tmp_path: Path) -> None:
        path = write_log(tmp_path / "mine", [1, 0, 1, 1])
        (run,) = read_scores(str(path))
        assert (run.system, run.metric, run.score, run.seed) == ("mine", "exact_match,flexible-extract", 0.75, None)
        assert read_scores(str(path), "exact_match,strict-match")[0].score == 0

    def test_a_csv_of_seeds_of_items_and_of_both(self, tmp_path: Path) -> None:
        rows = [(s, i, 0.1 * s + i) for s in range(3) for i in range(4)]
        table = pd.DataFrame(rows, columns=["seed", "item", "score"])
        for keys in (["seed"], ["item"], ["seed", "item"]):
            table.groupby(keys)["score"].mean().reset_index().to_csv(tmp_path / f"{'-'.join(keys)}.csv", index=False)
        read = {path.stem: read_scores(str(path)) for path in tmp_path.glob("*.csv")}
        shapes = {name: (len(runs), len(runs[0].items)) for name, runs in read.items()}
        assert shapes == {"seed": (3, 1), "item": (1, 4), "seed-item": (3, 4)}
        both = read_scores(f"{tmp_path / 'seed.csv'}, {tmp_path / 'item.csv'}")
        assert len(both) == 4

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("x.jsonl", "", "is empty"),
            ("x.jsonl", '{"a": 1', "not valid JSON"),
            ("x.jsonl", '{"a": 1}\n', "neither lm-eval's log nor a run's items"),
            ("x.jsonl", '{"doc_id": 0, "metrics": 5, "target": "x"}\n', "does not say which score"),
            ("x.jsonl", '{"doc_id": 0, "metrics": ["acc"], "acc": [1, 2]}\n', "not a number in row 0"),
            ("x.jsonl", '{"doc_id": 0, "acc": 1}\n{"doc_id": 0, "acc": 0}\n', "item 0 appears twice"),
            ("x.jsonl", '{"nll": 1}\n', "no `item` in its rows"),
            ("x.jsonl", '{"item": [], "prompt": "", "target": "", "nll": 1, "tokens": 0}\n', "not a number"),
            ("x.json", "[]", "no format that is known"),
            ("x.csv", "", "cannot be read as CSV"),
            ("x.csv", "score\n1\n2\n", "does not say what a row is"),
            ("x.csv", "seed,score\n0,\n", "not a number in row 0"),
            ("x.csv", "name,score\na,1\na,2\n", "2 rows for name a"),
            ("x.csv", "seed,left,right\n0,1,2\n", "does not say which score"),
            ("x.csv", "seed,score\n", "has no rows"),
            ("x.csv", "name,score\na,1\n,2\n", "name: empty in row 1"),
            ("x.txt", "1", "no format that is known"),
        ],
    )
    def test_a_bad_file_gives_a_sentence(self, name: str, text: str, said: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=said):
            read_scores(str(tmp_path / name))

    def test_a_system_may_have_any_name(self, tmp_path: Path) -> None:
        (tmp_path / "x.csv").write_text("name,seed,score\nNone,0,1\nNone,1,2\nNA,0,3\n007,0,4\n")
        assert [run.system for run in read_scores(str(tmp_path / "x.csv"))] == ["None", "None", "NA", "007"]

    def test_an_empty_source_is_not_this_folder(self, in_tmp: None) -> None:
        for folder in (".", "./"):
            with pytest.raises(InputError, match="no format that is known"):
                read_scores(folder)
        with pytest.raises(InputError, match="names nothing"):
            read_scores("")

    @pytest.mark.parametrize(
        "source", ["nothing", "a:b", "/*none*", "x" * 5000, "\x00", ",", "variants-60:nobody", "variants", "lora-*"]
    )
    def test_a_source_that_is_not_there(self, source: str, in_tmp: None) -> None:
        with pytest.raises(InputError):
            read_scores(source)


def csv(file: str, **columns: Any) -> list[Any]:
    """Writes a table, and returns the scores that are read of it."""
    pd.DataFrame(columns).to_csv(f"{file}.csv", index=False)
    return read_scores(f"{file}.csv")


@pytest.mark.usefixtures("in_tmp")
class TestRefusals:
    def test_the_order_of_items_does_not_matter(self) -> None:
        a, b = csv("a", item=[1, 2, 3], score=[5, 6, 9]), csv("b", item=[3, 1, 2], score=[8, 5, 6])
        assert list(pair(a, b).by_item) == [0, 0, 1]

    def test_other_data_under_the_same_numbers(self, tmp_path: Path) -> None:
        paths = [write_log(tmp_path / name, [1, 0], question=name + "{}") for name in ("what", "who")]
        with pytest.raises(InputError, match="other data: 2 of 2 items ask something else"):
            pair(*(read_scores(str(path)) for path in paths))

    def test_one_score_each(self) -> None:
        a, b = csv("a", score=[0.5]), csv("b", score=[0.4])
        with pytest.raises(InputError, match=r"one score each, 0\.5 and 0\.4: nothing shows how far chance moves them"):
            pair(a, b)

    def test_two_systems_on_one_side(self) -> None:
        a = csv("a", name=["x", "y"], seed=[0, 1], score=[0.5, 0.4])
        with pytest.raises(InputError, match="these are two systems"):
            pair(a, a)

    def test_each_seed_has_its_own_start(self, tmp_path: Path) -> None:
        def run(seed: int, start: str) -> list[Any]:
            folder = tmp_path / f"lora-r8-s{seed}-{len(start)}"
            return read_scores(str(write_run(folder, [0.5, 1.5, 2.5], seed=seed, learning_rate=1e-3, start_from=start)))

        check_side([*run(0, "lora-r4-s0-0123abcd"), *run(1, "lora-r4-s1-89efabcd")])
        with pytest.raises(InputError, match="these are two systems: start_from is 'lora-r4' and 'full-s0-0123abcd'"):
            check_side([*run(2, "lora-r4-s2-0123abcd"), *run(3, "full-s0-0123abcd")])

    def test_one_run_against_several(self) -> None:
        with pytest.raises(InputError, match="1 and 3 runs: one run does not show"):
            pair(csv("a", seed=[7], score=[1]), csv("b", seed=[0, 1, 2], score=[1, 2, 4]))
        with pytest.raises(InputError, match="seed 1 appears twice"):
            pair(csv("c", seed=[1], score=[1]) * 2, csv("d", seed=[1], score=[1]))

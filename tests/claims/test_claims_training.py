"""The interval of a ratio of best learning rates, on synthetic tuning runs whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ledger_parts import changed_part, claims, part_with, write_results

from peftscope.analysis.exact_match import ACCURACY
from peftscope.analysis.study import HELDOUT, VALIDATION
from peftscope.claims import ledger
from peftscope.claims.checks import answers, subspaces, training
from peftscope.claims.evaluate import evaluate, evaluate_part
from peftscope.claims.ledger import Change, Part
from peftscope.claims.measurement import NotRunError
from peftscope.claims.stored import unexplained_changes
from peftscope.claims.verdict import Rule, Verdict, judge
from peftscope.layout import results_folder
from peftscope.planning.published import ITEMS, RETENTION
from peftscope.report import worlds
from peftscope.report.spoken import spoken_finding, spoken_verdict
from peftscope.report.worlds import WORLDS_FIGURE, show_worlds, world_answers

pytestmark = pytest.mark.usefixtures("in_tmp")
COARSE = [10 ** (-k / 2) for k in range(4, 11)]


def write_study(
    best: dict[str, float], noise: float, seed: int = 0, fine: bool = True, spread: float = 0.1, **alphas: float
) -> None:
    """Writes tuning runs of arms whose loss is a parabola over the logarithm of the rate, lowest at ``best``."""
    random = np.random.default_rng(seed)
    rows, arms = [], {}
    for arm, optimum in best.items():
        rates = [rate for rate in COARSE if 0.01 < rate / optimum < 100]
        rates += [optimum * factor for factor in (0.5, 0.7, 1.4, 2.0)] if fine else []
        tried = []
        for index, rate in enumerate(sorted(rates)):
            seed_of_run = 100 if rate in COARSE else 101  # whose losses lie higher, which the fit has to allow for
            loss = 1 + spread * math.log(rate / optimum) ** 2 + noise * random.standard_normal() + (rate not in COARSE)
            row = {"run_id": f"{arm}-{index}", "learning_rate": rate, VALIDATION: loss, "seed": seed_of_run}
            rows.append(row | {"comparisons": "", "alpha": alphas.get(arm, 16)})
            tried.append({"learning_rate": rate, "validation_nll": loss, "run_ids": [f"{arm}-{index}"]})
        best_rate = min(tried, key=lambda each: each["validation_nll"])["learning_rate"]
        arms[arm] = {"learning_rate": best_rate, "tried": tried}
    write_results("synthetic", rows, arms, model="toy", task="sums")


def ratio() -> training.Measurement:
    return training.learning_rate_ratio("synthetic", "lora", "full", resamples=300)


def test_a_ratio_of_best_rates_is_judged_with_its_interval() -> None:
    """Without noise the parabola is found; with noise the interval decides, and it is as wide as the noise makes it."""
    rule = Rule(at_least=5, at_most=20)
    write_study({"lora": 2e-4, "full": 2e-5}, noise=0)
    assert ratio().value == pytest.approx(10, rel=0.05)
    write_study({"lora": 2e-4, "full": 2e-5}, noise=0.01)
    found = ratio()
    assert 5 < found.low < 10 < found.high < 20
    assert found.n > 10 and len(found.run_ids) > 10
    supported = judge(rule, found)[0]
    write_study({"lora": 2e-4, "full": 2e-4}, noise=0.01)
    assert judge(rule, ratio())[0] != supported
    write_study({"lora": 2e-4, "full": 2e-5}, noise=0.3)
    wide = ratio()
    assert wide.high / wide.low > 3 * found.high / found.low
    assert judge(rule, wide)[0] != supported


def test_the_best_of_rates_with_shared_seeds_is_a_vertex_that_a_steep_rise_does_not_move() -> None:
    def found(lora: float, noise: float = 0.0, rise: float = 0.0) -> training.Measurement:
        random = np.random.default_rng(0)
        rows = [
            {"run_id": f"{arm}-{rate}-{seed}", "comparisons": f"rates-{arm}", "seed": seed, "learning_rate": rate}
            | {
                HELDOUT: 0.2
                + 0.1 * math.log(rate / best) ** 2
                + rise * (rate > 1e-2)
                + noise * random.standard_normal()
            }
            | {"status": "ok", "method": arm}
            for arm, best, centre in (("lora", lora, 3e-3), ("full", 1e-4, 1e-4))
            for rate in (centre * 3 ** (step / 2) for step in (-1, 0, 1, 3 if arm == "lora" else 2))
            for seed in range(8)
        ]
        base = {"run_id": "base", "comparisons": "runs", "method": "none", "base_weights": "full", HELDOUT: 3.6}
        write_results("synthetic", [*rows, base], ["lora", "full"], model="toy", task="sums")
        return ratio()

    assert found(2.5e-3).value == found(2.5e-3, rise=5).value == pytest.approx(25)
    assert found(9e-4).evidence["best rate of lora"] == pytest.approx(3e-3 / 3**0.5)  # an end
    assert judge(Rule(at_least=2), found(9e-4)) == (Verdict.OPEN, "the best rate of lora lies at an end of its rates")
    noisy = found(2.5e-3, noise=0.02)
    assert noisy.low < 25 < noisy.high < 2 * noisy.low and noisy.n == 8
    assert judge(Rule(at_least=15, at_most=40), noisy)[0] is Verdict.HOLDS
    assert judge(Rule(equals=10, reads="about"), noisy)[0] is Verdict.WRONG


def test_intervals_of_the_ratio_cover_the_truth() -> None:
    """A nominal 95 %; twenty studies leave room for chance."""
    covered = 0
    for seed in range(20):
        write_study({"lora": 3e-4, "full": 2e-5}, noise=0.05, seed=seed)
        found = ratio()
        covered += found.low <= 15 <= found.high
    assert covered >= 16


def test_too_few_rates_around_the_best_give_no_interval() -> None:
    write_study({"lora": 2e-4, "full": 2e-5}, noise=0.01, fine=False, spread=1.0)
    runs = pd.read_csv(results_folder("synthetic") / "runs.csv")
    runs[VALIDATION] = runs[VALIDATION].where(runs["learning_rate"] > 5e-5)
    runs.to_csv(results_folder("synthetic") / "runs.csv", index=False)
    with pytest.raises(NotRunError, match="fewer than four rates"):
        ratio()


ALPHAS = {"a2": 2, "a8": 8, "a16": 16, "a32": 32}


def correlation() -> training.Measurement:
    return training.rate_correlation("synthetic", list(ALPHAS), "alpha", resamples=300)


def test_best_rates_that_fall_as_alpha_rises_support_s32_and_others_do_not() -> None:
    rule = Rule(at_most=-0.1)
    write_study({arm: 1e-2 / alpha for arm, alpha in ALPHAS.items()}, noise=0.01, **ALPHAS)
    found = correlation()
    assert found.value == pytest.approx(-1) and judge(rule, found)[0] is Verdict.HOLDS
    write_study({arm: 1e-4 * alpha for arm, alpha in ALPHAS.items()}, noise=0.01, **ALPHAS)
    assert correlation().value == pytest.approx(1) and judge(rule, correlation())[0] is Verdict.WRONG
    write_study(dict.fromkeys(ALPHAS, 1e-3), noise=0.05, **ALPHAS)
    assert correlation().low < -0.5 and judge(rule, correlation())[0] is Verdict.OPEN


DIMENSIONS = [10, 100, 1000, 10_000, 100_000]


def write_subspaces(middle: float, noise: float = 0.005) -> None:
    """Writes the arms of a study whose share of full fine-tuning's gain rises over log d, to a half at ``middle``."""
    write_losses({"full": 0.1} | {f"d{d}": 1.1 - 1 / (1 + (middle / d) ** 2) for d in DIMENSIONS}, noise)


def write_losses(of_arms: dict[str, float], noise: float = 0.001, study: str = "synthetic", task: str = "sums") -> None:
    """Writes the arms of a study with their losses. Shuffled labels reach 1.1 nats, and LoRA 0.2 if nothing is said.

    From half of the training on, full fine-tuning forgets no more, and others a tenth of a bit.
    """
    random = np.random.default_rng(1)
    losses = {f"arm-{arm}": loss for arm, loss in ({"lora": 0.2} | of_arms).items()}
    losses["control-shuffled-labels-lora"] = 1.1
    rows = [
        {"run_id": f"{name}-{seed}", "comparisons": name, HELDOUT: loss + noise * random.standard_normal()}
        | {"seed": seed, "status": "ok", "method": "x", "base_weights": ""}
        | {"dimension": float(name[5:]) if name[5:].isdigit() else None}
        for name, loss in losses.items()
        for seed in range(3)
    ]
    base = {"run_id": "base", "comparisons": "runs", "seed": 0, HELDOUT: 3.6, "method": "none", "base_weights": "full"}
    arms = [name[4:] for name in losses if "arm" in name]
    tunes = [{"run_id": f"tune-{arm}", "comparisons": f"tune-{arm}", "seed": 100} for arm in arms]
    table = pd.DataFrame([*rows, base, *tunes])
    table.loc[table["comparisons"] == "arm-lora", "comparisons"] += " control-shuffled-labels-lora"
    chosen = {"learning_rate": 1e-2, "tried": [], "regret_rms": 0.005}
    prose = {VALIDATION: table[HELDOUT], f"{RETENTION}_before": 1.0, "steps": 80}
    prose[RETENTION] = 1.1 + (0.1 + 0.001 * table["seed"]) * table["comparisons"].ne("arm-full")
    write_results(study, table, dict.fromkeys(arms, chosen), model="toy", task=task, learning_rate=1e-2, **prose)
    along = pd.DataFrame({"run_id": table["run_id"], "step": 40, VALIDATION: 2.0, RETENTION: 1.1})
    along.to_csv(results_folder(study) / "losses.csv", index=False)


def test_a_gain_that_comes_late_moves_the_intrinsic_dimension_out_of_its_range() -> None:
    """Nine tenths are reached at three times the middle; bounds of what was tried stand for what lies beyond."""
    rule = Rule(at_least=100, at_most=10_000)

    def found(over: str = "task") -> training.Measurement:
        arms = [f"d{d}" for d in DIMENSIONS]
        return subspaces.intrinsic_dimension("synthetic", arms, "full", 0.9, over, resamples=300)

    write_subspaces(middle=300)
    task = found()
    assert 500 < task.low < task.value < task.high < 2000 and judge(rule, task)[0] is Verdict.HOLDS
    assert found("base").value < task.value
    write_subspaces(middle=20_000)
    assert found().value > 40_000 and judge(rule, found())[0] is Verdict.WRONG
    write_subspaces(middle=1e7)
    never = found()
    assert never.value == 100_000 and never.evidence["whether the share is reached"] is False
    write_subspaces(middle=0.1)
    assert found().value == 10 and judge(rule, found())[0] is Verdict.WRONG
    write_subspaces(middle=300, noise=0.3)
    assert judge(rule, found())[0] is Verdict.OPEN


def test_claims_on_ranks_and_dora_flip_with_the_rates_and_the_losses_of_their_arms() -> None:
    def verdicts(*parts: Part, **more: int) -> str:
        return ", ".join(evaluate_part(changed_part(part, study="synthetic", **more)).verdict for part in parts)

    rates = part_with("P52", "training.learning_rate_ratio"), part_with("P53", "training.learning_rate_spread")
    ranks = rates[1].with_["arms"]
    for best, said in ((2e-3, "holds, wrong"), (1e-4, "wrong, holds")):
        write_study(dict.fromkeys(ranks, 2e-3) | {"r64": best}, noise=0.003)
        assert verdicts(*rates, resamples=300) == said
    ends = [part_with("P53", "training.closest")]
    ends += [part_with(claim, "training.heldout_gain") for claim in ("P50", "P54")]
    for loss, said in ((0.3, "wrong, holds, wrong"), (0.1, "holds, wrong, holds")):
        write_losses(dict.fromkeys(ranks, 0.2) | {"full": loss, "dora": loss, "r16": 0.19})
        assert verdicts(*ends) == said
        assert training.closest("synthetic", ranks, "full").evidence["shown"] == "r16"


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (0.1, "holds in 2 of 2 worlds"),
        (0.5, "depends on the task: holds on sums with a toy model; wrong on words with a toy model"),
        (0.2, "holds in 1 of 2 worlds, open in 1"),
    ],
)
def test_one_rule_judges_a_claim_in_every_world_that_has_run(
    there: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged() -> dict[str, Any]:
        (finding,) = evaluate([claims()["P50"]])
        change = Change(claim="P50", date="2026-01-01", was="w", verdict="holds in part", became="b", why="w")
        assert finding.to_json("", [change])["moved"] == [{"date": change.date, "from": change.verdict}]  # at home
        return finding.to_json("")

    write_losses({"r1": 0.1, "full": 0.2}, study="sums")
    monkeypatch.setattr(ledger, "WORLDS", {"A": "sums"})  # what is published of others is not asked
    assert spoken_verdict(judged()) == "holds here (1 world)"
    monkeypatch.setattr(ledger, "WORLDS", {"A": "sums", "B": "pronunciation"})
    write_losses({"r1": there, "full": 0.2}, study="pronunciation", task="words")
    found = judged()
    assert spoken_verdict(found) == said and " on words with a toy model [" in spoken_finding(found)
    assert not list(unexplained_changes([claims()["P50"]], [], [found]))


def test_the_figure_of_worlds_has_a_point_for_each_that_answers_and_is_for_two_or_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("results/published").mkdir(parents=True)
    said, asked = [], {}
    for study, losses in (("sums", {"full": 0.1}), ("pronunciation", {"full": 0.2, "r64": 0.3})):
        write_losses(losses, study=study, task=study)
        results_folder(study).rename((Path("results/published") / study).absolute())
        monkeypatch.setattr(worlds, "WORLDS", asked := asked | {study: study})
        said.append(show_worlds())
    assert said[0] == "" and "for a toy model on sums and pronunciation. Bars are" in said[1] and "±2.5 %" in said[1]
    figure = WORLDS_FIGURE.read_text()
    assert figure.index("all weights") < figure.index("rank 64") and "feed-forward alone" not in figure  # no empty row
    assert world_answers()["ahead"].tolist() == pytest.approx([11.17, 0.05, -11.07], abs=0.006)


def test_a_destroyed_base_leaves_open_what_a_sound_one_decides() -> None:
    """The toy model's vocabulary of 260 makes a uniform guess cost 5.56 nats."""

    def verdict(**losses: float) -> tuple[Verdict, str]:
        write_subspaces(middle=300)
        table = pd.read_csv(results_folder("synthetic") / "runs.csv")
        base = {"run_id": "rounded", "comparisons": "runs", "seed": 0, "model": "toy", "task": "sums", "method": "none"}
        rows = [base | {"base_weights": code, HELDOUT: loss} for code, loss in losses.items()]
        pd.concat([table, pd.DataFrame(rows)]).to_csv(results_folder("synthetic") / "runs.csv", index=False)
        return judge(Rule(at_least=-0.95), training.heldout_gain_on_base("synthetic", "lora", "nf2", "full"))

    assert verdict(nf2=5.0)[0] is Verdict.HOLDS
    state, reason = verdict(nf2=6.0)
    assert state is Verdict.OPEN and reason.startswith("base destroyed: in nf2 it costs 6 nats")
    found = training.heldout_gain_on_base("synthetic", "lora", "nf2")
    assert found.n == 1 and found.value < -0.95 and found.spoiled_by  # the untouched base stands for the arm
    verdict(nf2=5.0)
    with pytest.raises(NotRunError, match=r"in nf2 the untouched base costs 5 .*; `synthetic` has no arm that"):
        training.heldout_gain_on_base("synthetic", "lora", "nf2")
    with pytest.raises(NotRunError, match="no run of the untouched base in nf2"):
        verdict(nf3=5.0)


def test_another_seed_changes_scores_and_answers_or_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that lie 4 points apart and answers of which a third differ support P51; equal ones do not."""
    scores, right = part_with("P51", "answers.spread_of_scores"), part_with("P51", "answers.share_that_change")

    def verdicts(score: Callable[[int], float], answer: Callable[[int, int], str]) -> list[tuple[Verdict, Any]]:
        def runs(arm: str) -> pd.DataFrame:
            row = {"status": "ok"}
            return pd.DataFrame(row | {"run_id": f"{arm}-{s}", "seed": s, ACCURACY: score(s)} for s in range(8))

        items = [
            {"run_id": f"{arm}-{seed}", "item": item, "answer": answer(seed, item), "correct": 0.0}
            for arm in scores.with_["arms"]
            for seed in range(8)
            for item in range(12)
        ]
        folder = results_folder("ranks")
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(items).to_parquet(folder / ITEMS)
        study = SimpleNamespace(folder=folder, arm_runs=runs, base_runs=runs("none"), subject="toy, sums", name="ranks")
        monkeypatch.setattr(answers, "StudyResults", lambda name: study)
        return [(found.verdict, found.found) for found in map(evaluate_part, (scores, right))]

    apart = verdicts(lambda seed: 0.5 + 0.04 * (seed % 2), lambda seed, item: str(seed if item < 4 else item))
    assert [verdict for verdict, _ in apart] == [Verdict.HOLDS, Verdict.HOLDS]
    assert apart[0][1].value == pytest.approx(4 * math.sqrt(2 / 7)) and apart[1][1].value == pytest.approx(1 / 3)
    alike = verdicts(lambda seed: 0.5 + 0.001 * (seed % 2), lambda seed, item: str(item))
    assert [verdict for verdict, _ in alike] == [Verdict.WRONG, Verdict.WRONG]

"""The interval of a ratio of best learning rates, on synthetic tuning runs whose truth is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from peftscope.analysis.study import VALIDATION
from peftscope.claims.checks import training
from peftscope.claims.measurement import NotRunError
from peftscope.claims.verdict import Rule, Verdict, judge
from peftscope.layout import results_folder

COARSE = [10 ** (-k / 2) for k in range(4, 11)]


def write_study(best: dict[str, float], noise: float, seed: int = 0, fine: bool = True, spread: float = 0.1) -> None:
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
            rows.append(row | {"comparisons": ""})
            tried.append({"learning_rate": rate, "validation_nll": loss, "run_ids": [f"{arm}-{index}"]})
        arms[arm] = {
            "learning_rate": min(tried, key=lambda each: each["validation_nll"])["learning_rate"],
            "tried": tried,
        }
    folder = results_folder("synthetic")
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).assign(model="toy", task="sums").to_csv(folder / "runs.csv", index=False)
    (folder / "tuned.json").write_text(json.dumps({"arms": arms}))


@pytest.fixture(autouse=True)
def workspace_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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


def test_a_spread_of_best_rates_is_told_from_noise() -> None:
    rule, arms = Rule(at_most=2), ["r4", "r16", "r64"]
    write_study(dict.fromkeys(arms, 2e-4), noise=0.003)
    same = training.learning_rate_spread("synthetic", arms, resamples=300)
    assert 1 <= same.low <= same.high < 2 and judge(rule, same)[0] == Verdict.HOLDS
    write_study({"r4": 2e-4, "r16": 4e-4, "r64": 1e-3}, noise=0.003)
    apart = training.learning_rate_spread("synthetic", arms, resamples=300)
    assert apart.value == pytest.approx(5, rel=0.15) and judge(rule, apart)[0] == Verdict.WRONG


def test_intervals_of_the_ratio_cover_the_truth() -> None:
    """A nominal 95 %; forty studies leave room for chance."""
    covered = 0
    for seed in range(40):
        write_study({"lora": 3e-4, "full": 2e-5}, noise=0.05, seed=seed)
        found = ratio()
        covered += found.low <= 15 <= found.high
    assert covered >= 34


def test_too_few_rates_around_the_best_give_no_interval() -> None:
    write_study({"lora": 2e-4, "full": 2e-5}, noise=0.01, fine=False, spread=1.0)
    runs = pd.read_csv(results_folder("synthetic") / "runs.csv")
    runs[VALIDATION] = runs[VALIDATION].where(runs["learning_rate"] > 5e-5)
    runs.to_csv(results_folder("synthetic") / "runs.csv", index=False)
    with pytest.raises(NotRunError, match="fewer than four rates"):
        ratio()

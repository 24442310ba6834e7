"""Claims on overfitting, on synthetic results of the study of few examples."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from ledger_parts import deciding, verdicts_of, write_results

from peftscope.analysis.study import HELDOUT, LOWEST
from peftscope.claims.evaluate import evaluate_part
from peftscope.claims.verdict import Verdict
from peftscope.layout import results_folder
from peftscope.planning.published import VALIDATION

pytestmark = pytest.mark.usefixtures("own_folder")
STEPS = 40
SEEDS = range(6)
GAIN = 1.0
"""Shuffled labels reach 1.5 nats, the reference 0.5."""
OVERFITS: dict[str, Any] = {"train": (1.0, 0.1), "validation": (1.0, 0.8, 1.2)}
"""The first and last training loss, and the validation loss at half of the steps, the lowest, and at the end."""
MILD: dict[str, Any] = {"train": (1.0, 0.6), "validation": (1.0, 0.8, 0.81)}


def write(**worlds: dict[str, Any]) -> None:
    """Writes the results of the study; keywords, with a line for each dash, replace what an arm does."""
    arms = dict.fromkeys(("full", "r8_64", "full_1000", "r8_1000", "dropout", "half_the_steps", "more_data"), MILD)
    arms |= dict.fromkeys(("full_64", "full_overfit", "overfit", "r64_overfit"), OVERFITS)
    arms |= {"lora": {"train": (1.0, 0.4), "validation": (0.9, 0.6, 0.5)}}
    rows: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []

    def run(name: str, comparisons: str, world: dict[str, Any], **fields: Any) -> None:
        for seed in SEEDS:
            middle, lowest, last = (value + 0.01 * seed for value in world["validation"])
            identity = f"{name}-{seed}"
            first, end = world["train"]
            for step in range(1, STEPS + 1):
                along = {10: middle, 20: lowest, 30: lowest + (last - lowest) / 2}.get(step)
                nll = first + (end - first) * step / STEPS
                losses.append({"run_id": identity, "step": step, "nll_nats_per_token": nll, VALIDATION: along})
            identities = {"run_id": identity, "comparisons": comparisons, "seed": seed}
            scores = {VALIDATION: last, LOWEST: min(middle, lowest, last), HELDOUT: last}
            rows.append({"method": "lora", "base_weights": None, **identities, **scores, **fields})

    tuned = []
    for name, world in (arms | worlds).items():
        arm = name.replace("_", "-")
        run(name, f"tune-{arm} arm-{arm}" + (" control-shuffled-labels-lora" if arm == "lora" else ""), world)
        tuned.append(arm)
    run("none", "runs", MILD, method="none", base_weights="full", **{HELDOUT: 4.0})
    run("shuffled", "control-shuffled-labels-lora", {"train": (2.0, 1.5), "validation": (1.6, 1.5, 1.55)})
    sizes = {"steps": STEPS, "batch_size": 16, "gradient_accumulation": 1, "train_items": 64, "dropout": 0.0}
    names = {"status": "ok", "label": "LoRA", "model": "toy", "task": "sums", "learning_rate": 1e-3}
    write_results("small-data", rows, tuned, **sizes, **names)
    pd.DataFrame(losses).to_csv(results_folder("small-data") / "losses.csv", index=False)


def test_a_rise_of_the_validation_loss_is_overfitting_where_the_training_loss_falls() -> None:
    assert verdicts_of("S98") == [Verdict.NOT_RUN]
    write()
    found = evaluate_part(deciding("S98")[0])
    assert found.verdict is Verdict.HOLDS
    assert found.found is not None and found.found.value == pytest.approx(0.4 / GAIN)
    write(overfit=MILD)
    assert verdicts_of("S98") == [Verdict.WRONG]
    # A training that goes wrong raises both losses.
    write(overfit=OVERFITS | {"train": (0.5, 1.5)})
    assert verdicts_of("S98") == [Verdict.WRONG]


@pytest.mark.slow
def test_each_remedy_is_judged_on_its_own() -> None:
    write()
    assert verdicts_of("S99") == [Verdict.HOLDS] * 3
    found = evaluate_part(deciding("S99")[0]).found
    assert found is not None and found.value == pytest.approx(1.2 - 0.81)
    worse = OVERFITS | {"validation": (1.0, 0.8, 1.3)}
    write(dropout=worse, half_the_steps=worse | {"train": (1.0, 0.05)})
    assert verdicts_of("S99") == [Verdict.WRONG, Verdict.WRONG, Verdict.HOLDS]


def test_less_overfitting_than_full_fine_tuning_is_a_smaller_gap() -> None:
    write()
    write(overfit=MILD)
    assert verdicts_of("S100") == [Verdict.HOLDS]
    gap = evaluate_part(deciding("S100")[0]).found
    # The training loss of the last epoch, four steps, is a little above that of the last one.
    assert gap is not None and gap.value == pytest.approx((1.2 - 0.1) - (0.81 - 0.6), abs=0.05)
    write(full_overfit=MILD)
    assert verdicts_of("S100") == [Verdict.WRONG]


@pytest.mark.slow
def test_low_data_compares_losses_at_two_sizes() -> None:
    write()
    assert verdicts_of("P27") == [Verdict.HOLDS] * 2
    write(full_64=MILD, full_1000=OVERFITS)
    assert verdicts_of("P27") == [Verdict.WRONG] * 2


def test_an_arm_that_diverged_has_no_gap() -> None:
    write()
    path = results_folder("small-data") / "runs.csv"
    runs = pd.read_csv(path)
    runs.loc[runs["run_id"] == "overfit-3", "status"] = "diverged"
    runs.to_csv(path, index=False)
    found = evaluate_part(deciding("S100")[0])
    assert found.verdict is Verdict.NOT_RUN
    assert "runs of `overfit` in `small-data` diverged" in found.reason

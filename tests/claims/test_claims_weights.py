"""Claims on the weights of runs and on forgetting: a world in which each holds, and a changed one that flips it."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from ledger_parts import claims, part_of, part_with, verdicts_of, write_results

from peftscope.analysis.forgetting import curves
from peftscope.analysis.study import StudyResults
from peftscope.analysis.weights import collect_weights, measured_runs, weights_path
from peftscope.claims import ledger
from peftscope.claims.checks import forgetting
from peftscope.claims.evaluate import Finding, evaluate, evaluate_part
from peftscope.layout import PUBLISHED_RESULTS, results_folder, run_folder
from peftscope.record import measured_path
from peftscope.report.forgetting import forgetting_sentence
from peftscope.report.plots import draw_figure
from peftscope.report.weights import cuts_table, draw_updates, updates_sentence, updates_table

pytestmark = pytest.mark.usefixtures("in_tmp")
SEEDS = range(8, 13)
LAYERS = range(6)
MODULES = ("q_proj", "down_proj")

Change = Callable[[pd.DataFrame], Any]


def judged(claim: str) -> Finding:
    with patch.object(ledger, "WORLDS", {"A": "sums"}):  # what is published of others is not asked
        (finding,) = evaluate([claims()[claim]])
    return finding


def write_runs(study: str, arms: dict[str, dict[str, Any]], extra: list[dict[str, Any]] = ()) -> pd.DataFrame:
    """Writes the runs of a study whose arms have these columns, each on all seeds; returns the runs of the arms."""
    rows = [{"run_id": "base", "comparisons": "runs", "method": "none", "base_weights": "full", "heldout_nll": 3.6}]
    for arm, columns in arms.items():
        for seed in SEEDS:
            run = {"run_id": f"{arm}-s{seed}", "comparisons": f"tune-{arm} arm-{arm}", "seed": seed, "label": arm}
            rows.append(run | columns | {"heldout_nll": 0.2 + 0.001 * (seed % 3)})
    rows += [{"label": row["method"], **row} for row in extra]
    table = pd.DataFrame(rows).rename(columns={"heldout_nll": "heldout_nll_nats_per_token"})
    table["validation_nll_nats_per_token"] = table["heldout_nll_nats_per_token"]
    return write_results(study, table, arms.keys(), model="toy", task="sums", status="ok", steps=160)


def write_weights(study: str, runs: pd.DataFrame, *changes: Change, steps: tuple[int, ...] = (40, 160)) -> None:
    """Writes what was measured on the weights of runs, each changed before it is written."""
    random = np.random.default_rng(0)
    for run, label in zip(runs["run_id"], runs["label"], strict=True):
        rows = [
            {"kind": "matrix", "step": step, "matrix": f"layers.{layer}.{module}", "module": module, "arm": label}
            | {"rows": 576, "columns": 576, "relative_size": 0.01 * (1 + layer), "rank_90": 10, "energy_8": 0.85}
            | {"stable_rank": 3, "gaussian_rank_90": 400, "intruders_30": 0, "intruders_50": 0, "intruders_70": 1}
            | {"amplification": 9.0, "magnitude_change": layer, "direction_change": layer + random.random()}
            | {"rank_kept": layer, "worth": layer + random.random()}
            for step in steps
            for layer in LAYERS
            for module in MODULES
        ]
        rows += [{"kind": "cut", "arm": label, "cut_rank": rank, "heldout_nll": 0.21} for rank in (8, 10**6)]
        table = pd.DataFrame(rows)
        for change in changes:
            change(table)
        run_folder(run).mkdir(parents=True, exist_ok=True)
        table.drop(columns="arm").to_csv(measured_path(run_folder(run)), index=False)
    collect_weights(study, list(runs["run_id"]))


def where(rows: str, column: str, value: Any) -> Change:
    """Returns a change of a column in the rows that a query finds; a value may depend on the old ones."""

    def change(table: pd.DataFrame) -> None:
        mine = table.eval(rows)
        table.loc[mine, column] = value(table.loc[mine, column]) if callable(value) else value

    return change


def of(arm: str, column: str, value: Any) -> Change:
    return where(f"arm == {arm!r}", column, value)


def at(step: int, module: str, rank: int) -> Change:
    """Returns a change of the rank of a module's updates at a step."""
    return where(f"step == {step} and module == {module!r}", "rank_90", rank)


def weights_world(*changes: Change) -> None:
    """Writes the study `weights` in a world where every claim on it holds, with changes."""
    arms = {"lora": {"rank": 8}, "full": {}, "r64": {"rank": 64}, "dora": {"rank": 8}}
    arms |= {"lora-3e-4": {"rank": 8}, "full-3e-4": {}}
    shuffled = [
        {"run_id": f"x{seed}", "comparisons": "control-shuffled-labels-lora", "seed": seed, "method": "lora"}
        | {"heldout_nll": 1.2, "rank": 8}
        for seed in SEEDS
    ]
    runs = write_runs("weights", arms, shuffled)
    measured = runs[runs["comparisons"].str.contains("arm-")]
    intruders = of("lora", "intruders_50", 2), of("lora-3e-4", "intruders_50", 1)
    opposed = [of(arm, "magnitude_change", lambda values: -values) for arm in ("full", "dora")]
    write_weights("weights", measured, *intruders, *opposed, *changes)


def test_low_rank_is_asked_of_the_update_and_of_what_a_cut_leaves() -> None:
    weights_world()
    assert verdicts_of("S15") == ["holds"] * 3
    assert judged("S15").deciding[2].found.value == pytest.approx(1 - 0.009 / 0.999, abs=0.002)
    weights_world(of("full", "rank_90", 30))
    assert verdicts_of("S15") == ["wrong", "holds", "holds"]  # 5 % of the side
    weights_world(of("full", "rank_90", 300), of("full", "heldout_nll", 0.5))
    assert verdicts_of("S15") == ["wrong"] * 3
    assert judged("S15").deciding[2].found.value == pytest.approx(0.7, abs=0.01)


def test_rank_grows_with_training_and_is_compared_between_the_parts_of_a_block() -> None:
    weights_world(at(160, "q_proj", 20), at(160, "down_proj", 40))
    assert verdicts_of("P48") == ["holds", "holds"]
    assert [part.found.value for part in judged("P48").deciding] == [3, 2]
    weights_world(at(160, "q_proj", 9), at(160, "down_proj", 8))
    assert verdicts_of("P48") == ["wrong", "wrong"]
    wide = where("module == 'down_proj'", "gaussian_rank_90", 1000)
    weights_world(at(160, "q_proj", 20), at(160, "down_proj", 40), wide)
    assert judged("P48").deciding[1].found.value == pytest.approx(0.8)  # noise of its shape has more rank, too


def test_a_spectrum_that_is_spread_further_has_more_entropy() -> None:
    """Eight equal singular values have log 8; the kept sums bound what others have, and may leave the sign open."""

    def verdict(lora: float, dora: float) -> tuple[str, Any]:
        def change(table: pd.DataFrame) -> None:
            table["energy_1"] = np.where(table["arm"] == "dora", dora, lora)
            table["energy_8"] = 1.0

        weights_world(change)
        found = evaluate_part(part_with("P54", "weights.entropy_gain"))
        return found.verdict, found.found

    assert verdict(0.99, 0.3)[0] == "holds"
    assert verdict(0.3, 0.99)[0] == "wrong"
    assert verdict(0.50, 0.45)[0] == "open"
    found = verdict(1.0, 1 / 8)[1]
    log_8, log_7 = np.log(8), np.log(7)
    assert found.evidence["largest possible difference"] == pytest.approx(log_8)
    assert found.evidence["least possible difference"] == pytest.approx(log_8 - 7 / 8 * log_7)


def test_a_preference_for_rank_is_one_that_all_seeds_share() -> None:
    def verdict(more: list[float]) -> str:
        runs = write_runs("adalora", {"lora": {}, "adalora": {}})
        rest = cycle(more)

        def change(table: pd.DataFrame) -> None:
            table["rank_kept"] = np.where(table["module"] == "down_proj", 8 + next(rest), 8)

        write_weights("adalora", runs[runs["label"] == "adalora"], change)
        return evaluate_part(part_with("P55", "weights.rank_preference")).verdict

    assert verdict([3, 2, 4]) == verdict([-3, -2, -4]) == "holds"
    assert verdict([2, -2, 2, -2, 1]) != "holds"


def test_the_rank_of_an_update_is_told_in_ranks_of_lora() -> None:
    """The side of 576 has 180 values in as many parts of 16/4096 as 80."""
    weights_world(of("full", "rank_90", 180))
    assert verdicts_of("P6") == ["holds"] and judged("P6").deciding[0].found.value == 180 / 16
    assert judged("P6").parts[0].found.value == 80
    for rank in (140, 1700):  # below ten times, and above a hundred times
        weights_world(of("full", "rank_90", rank))
        assert verdicts_of("P6") == ["wrong"]
    # The median matrix counts.
    weights_world(of("full", "rank_90", lambda values: [180 if i % 12 < 7 else 1 for i in range(len(values))]))
    assert judged("P6").deciding[0].found.value == 180 / 16
    weights_world(of("full", "rank_90", 180), where("step == 40", "rank_90", 1))
    assert verdicts_of("P6") == ["holds"]


def test_a_small_adjustment_is_one_whose_norm_is_small() -> None:
    weights_world()
    assert verdicts_of("S17") == ["holds"] and judged("S17").deciding[0].found.value == pytest.approx(0.035)
    weights_world(of("full", "relative_size", lambda values: 10 * values))
    assert verdicts_of("S17") == ["wrong"]


def test_intruders_are_counted_under_lora_and_under_full_fine_tuning() -> None:
    weights_world()
    assert verdicts_of("P8") == ["holds", "holds"] and judged("P8").deciding[0].found.value == 2
    weights_world(of("full", "intruders_50", 3))
    assert verdicts_of("P8") == ["holds", "wrong"]
    weights_world(of("lora", "intruders_50", 0))
    assert verdicts_of("P8") == ["wrong", "holds"]


def test_magnitude_and_direction_are_correlated_over_layers_and_steps() -> None:
    weights_world()
    assert verdicts_of("P28") == ["holds"] * 3
    weights_world(of("lora", "magnitude_change", lambda values: -values))
    assert verdicts_of("P28") == ["holds", "holds", "wrong"]
    weights_world(of("dora", "magnitude_change", abs), of("full", "magnitude_change", abs))
    assert verdicts_of("P28") == ["wrong", "wrong", "holds"]

    def along_the_steps(table: pd.DataFrame) -> None:
        late = 10 * (table["step"] == 160)
        table["magnitude_change"] = late - table["magnitude_change"]
        table["direction_change"] = late + table["direction_change"]

    weights_world(along_the_steps)
    within = judged("P28").parts[-1]
    assert judged("P28").deciding[2].found.value > 0 > within.found.value and str(within.verdict) == "wrong"


def test_the_page_tells_each_variants_updates_and_what_their_cuts_leave() -> None:
    weights_world(of("r64", "rank_90", 40), of("full", "intruders_50", 2))
    updates = updates_table("weights").set_index("updates of")
    assert list(updates["runs"]) == [len(SEEDS)] * len(updates)
    assert updates.loc["r64", "rank of 90 %"] == "40"
    assert updates.loc["dora", "size over the weight's"] == "0.035"  # the median of 0.01 to 0.06
    assert list(updates.loc[["full", "dora"], "intruders a matrix"]) == ["2.00", "0.00"]
    cuts = cuts_table("weights").set_index("updates of")
    assert list(cuts.columns) == ["rank 8", "not cut"] and set(cuts.loc["full"]) == {"0.2100"}
    weights_world(where("kind == 'cut' and cut_rank == 8", "heldout_nll", 0.9))
    assert list(cuts_table("weights").set_index("updates of").loc["full"]) == ["0.9000", "0.2100"]


@pytest.mark.slow
def test_ranks_are_set_against_a_worth_of_their_own() -> None:
    runs = write_runs("adalora", {"adalora": {}})
    mine = runs[runs["seed"].notna()]
    random = np.random.default_rng(1)

    def world(*changes: Change) -> None:
        sizes = of("adalora", "relative_size", lambda values: random.permutation(len(values)))
        write_weights("adalora", mine, sizes, *changes, steps=(160,))

    world()
    assert verdicts_of("S94") == ["holds"]
    assert judged("S94").deciding[0].found.value > 0.9
    draw_figure(Path("updates.svg"), lambda axes: draw_updates(axes, "adalora"))
    drawn = Path("updates.svg").read_text()
    assert "rank kept, mean over seeds" in drawn and all(module in drawn for module in MODULES)
    assert re.search(r"a rank correlation of 0\.9\d over all matrices", updates_sentence("adalora"))
    world(of("adalora", "worth", lambda values: -values))
    assert verdicts_of("S94") == ["wrong"]
    # Where only matrices without rank are worth nothing, the correlation among the others says so.
    flat = [0.0, 1.3, 1.1, 1.2, 1.0, 1.4]
    world(of("adalora", "worth", lambda values: np.resize(np.repeat(flat, 2), len(values))))
    every = evaluate_part(part_of("S94", kept=False, given=""))
    assert judged("S94").deciding[0].found.value < every.found.value
    # Where the worth follows the size of the update alone, and the rank does too, importance has no part in it.

    def follow_size(table: pd.DataFrame) -> None:
        table["relative_size"] = table["rank_kept"] + random.normal(0, 1, len(table))
        table["worth"] = table["relative_size"] + random.normal(0, 1, len(table))

    world(follow_size)
    assert judged("S94").deciding[0].found.value < 0.5 < evaluate_part(part_of("S94", given="")).found.value


def test_published_measurements_give_the_same_verdicts_without_weights() -> None:
    weights_world()
    before = {claim: judged(claim).to_json("") for claim in ("S15", "S17", "P6", "P8", "P28")}
    folder = results_folder("weights")
    published = PUBLISHED_RESULTS / "weights"
    published.parent.mkdir(parents=True)
    rows = measured_runs(weights_path(folder))
    folder.rename(published)
    assert {claim: judged(claim).to_json("") for claim in before} == before
    # What comes back to the store gives the same table again.
    for run, table in rows.items():
        table.to_csv(measured_path(run_folder(run)), index=False)
    collect_weights("weights", list(rows))
    found, theirs = (pd.read_parquet(weights_path(each)) for each in (results_folder("weights"), published))
    pd.testing.assert_frame_equal(found, theirs, check_dtype=False, check_like=True)


def forgetting_world(prose: dict[str, Callable[[float], float]]) -> None:
    """Writes the study `sums`: each arm's rise on prose is a function of its loss on the task.

    LoRA runs at a second rate as well, under the name of `lora-fast`.
    """
    arms = {arm: {"comparisons": f"arm-{arm} rates-{arm}", "learning_rate": 1e-3} for arm in ("lora", "full", "r64")}
    runs = write_runs("sums", {**arms, "lora-fast": {"comparisons": "rates-lora", "learning_rate": 4e-3}})
    losses = []
    ends = {"lora": 0.2, "r64": 0.2, "full": 0.5, "lora-fast": 0.3}
    for row in runs[runs["seed"].notna()].to_dict("records"):
        jitter = 0.001 * (row["seed"] % 3)
        for step, task in ((40, 2.0), (80, 1.0), (120, 0.6)):
            score = 1.0 + prose[row["label"]](task) + jitter
            losses.append({"run_id": row["run_id"], "step": step, "nll_nats_per_token": task})
            losses[-1] |= {"validation_nll_nats_per_token": task, "retention_bits_per_byte": score}
            losses[-1]["shift_from_base_nats"] = 3.6 - task
        mine, end = runs["run_id"] == row["run_id"], ends[row["label"]]
        runs.loc[mine, "validation_nll_nats_per_token"] = end
        runs.loc[mine, "retention_bits_per_byte"] = 1.0 + prose[row["label"]](end) + jitter
        runs.loc[mine, "shift_from_base_nats"] = 3.6 - end
    runs["retention_bits_per_byte_before"] = 1.0
    runs.to_csv(results_folder("sums") / "runs.csv", index=False)
    pd.DataFrame(losses).to_csv(results_folder("sums") / "losses.csv", index=False)


def line(slope: float) -> Callable[[float], float]:
    return lambda task: slope * (3.6 - task)


def test_what_is_forgotten_is_compared_where_the_same_was_learned() -> None:
    arms = {"lora": line(0.1), "lora-fast": line(0.15), "r64": line(0.1), "full": line(0.2)}
    forgetting_world(arms)
    assert verdicts_of("P7") == ["holds", "holds"]
    best, along = (part.found for part in judged("P7").deciding)
    # Full fine-tuning ends at 0.5, which LoRA passed on its way to 0.2.
    assert best.evidence["matched loss on the task, nats per token"] == pytest.approx(0.5)
    assert best.value == pytest.approx(0.1 * 3.1, abs=0.002)
    # The frontier goes from there to 2, where least has been learned, and the lines are nearest.
    assert along.evidence["loss on the task, nats per token"] == pytest.approx(2, rel=0.01)
    assert along.value == pytest.approx(0.1 * 1.6, abs=0.002)
    assert "the difference from lora is +0.310 (full), +0.000 (r64)" in forgetting_sentence("sums")
    # Where both have moved as far LoRA has forgotten half as much, so that more than the shift decides.
    assert verdicts_of("P63") == ["wrong"]
    assert judged("P63").deciding[0].found.value == pytest.approx(0.5, abs=0.01)
    forgetting_world(arms | {"lora": line(0.2)})
    assert verdicts_of("P63") == ["holds"]
    # At its end LoRA has forgotten more, because it has learned more.
    forgetting_world(arms | {"lora": line(0.195)})
    found = judged("P7").deciding[0].found
    assert found.value > 0 > found.evidence["difference at the end of the training"]
    # Along the frontier each arm runs at the rate that forgets least.
    forgetting_world(arms | {"lora": line(0.3)})
    assert verdicts_of("P7") == ["wrong", "holds"]
    forgetting_world(arms | {"lora": line(0.3), "lora-fast": line(0.25)})
    assert verdicts_of("P7") == ["wrong", "wrong"]


def test_a_study_that_scored_no_prose_says_so() -> None:
    forgetting_world(dict.fromkeys(("lora", "r64", "full", "lora-fast"), line(0.1)))
    path = results_folder("sums") / "losses.csv"
    results = StudyResults("sums")
    results.losses = results.losses.assign(shift_from_base_nats=None)  # as the records of a wheel give it
    assert all(curve["nearness"].isna().sum() == 3 for _, curve in curves(results, results.arm_runs("full")))
    pd.read_csv(path).assign(retention_bits_per_byte=np.nan).to_csv(path, index=False)
    with pytest.raises(Exception, match="prose was not scored along its training"):
        forgetting.less_forgotten("sums", "lora", "full")

"""Sweeps of thousands of runs: what people see stays small, what it takes stays in bounds."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from benchmarks.scale import NO_OP, REPORT, measure_experiment
from benchmarks.synthetic import SWEEP, make_sweep, make_workspace
from peftscope.analysis.collect import collect_experiment, read_runs
from peftscope.layout import report_path
from peftscope.methods import METHODS
from peftscope.planning.sweep import expand
from peftscope.report.plots import draw_losses, draw_pareto, draw_throughput
from peftscope.report.sentences import sentence
from peftscope.report.tables import MOST_RUNS, MOST_SETTINGS, best_settings, is_crowded, method_summary, notable_runs


@pytest.fixture
def scaled(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace without experiments of its own."""
    make_workspace(tmp_path / "scaled", repository)
    monkeypatch.chdir(tmp_path / "scaled")
    return tmp_path / "scaled"


def test_figures_of_many_settings_name_methods_and_tables_stay_short(scaled: Path) -> None:
    assert make_sweep(500) == 501  # of 51 settings
    collect_experiment(expand(SWEEP))
    sweep = read_runs(SWEEP)
    losses = pd.read_csv(f"results/{SWEEP}/losses.csv")
    labels = {cls.label for cls in METHODS.values()}
    assert is_crowded(sweep)
    for draw in (draw_pareto, lambda axes, runs: draw_losses(axes, runs, losses)):
        _, axes = plt.subplots()
        draw(axes, sweep)
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(names) == len(set(names)) == 6
        assert set(names) <= labels
    _, axes = plt.subplots()
    draw_throughput(axes, sweep)
    assert {text.get_text() for text in axes.get_yticklabels()} == set(names)
    plt.close("all")
    for figure, said in {"pareto": "colours are methods", "losses": "medians"}.items():
        assert said in sentence(figure, sweep, losses)
        few = sweep[(sweep["learning_rate"] == 1e-3) & (sweep["comparisons"] != "runs")]
        assert not is_crowded(few)
        assert said not in sentence(figure, few, losses)
    # Tables for people keep every method and every bad ending.
    methods = method_summary(sweep)
    assert best_settings(methods) is methods
    assert len(notable_runs(sweep)) == MOST_RUNS < len(sweep)
    many = pd.concat([methods.assign(learning_rate=rate) for rate in range(20)], ignore_index=True)
    many.loc[many["label"] == "DoRA", "heldout_nll"] = float("nan")
    shown = best_settings(many)
    assert len(shown) == MOST_SETTINGS
    assert set(shown["label"]) == set(many["label"])
    left = many.drop(shown.index)
    for label, rows in left.groupby("label"):
        assert rows["heldout_nll"].min() >= shown.loc[shown["label"] == label, "heldout_nll"].max() or label == "DoRA"
    several = pd.concat([sweep, sweep.assign(run_id=sweep["run_id"] + "-again")], ignore_index=True)
    seen = notable_runs(several)
    assert len(seen) == MOST_RUNS
    assert (several.drop(seen.index)["status"] == "ok").all()
    assert several["heldout_nll_nats_per_token"].idxmin() in seen.index


@pytest.mark.slow
def test_a_sweep_of_500_runs_stays_in_bounds(scaled: Path, slowness: float) -> None:
    make_sweep(500)
    costs = measure_experiment(SWEEP)
    assert max(cost.peak_bytes for cost in costs.values()) < 2 << 30
    # A third of what 5,000 runs may take: an idle machine needs a quarter of these.
    assert costs[NO_OP].processor_seconds < 10 * slowness
    assert costs[REPORT].processor_seconds < 30 * slowness
    assert report_path(SWEEP).stat().st_size < 5e6

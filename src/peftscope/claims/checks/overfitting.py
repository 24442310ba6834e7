"""Reads how far a study's runs on few examples overfit. Nothing is trained.

Losses along the training are those on validation items; all values are shares of the study's task gain.
"""

from __future__ import annotations

import pandas as pd

from peftscope.analysis.compare import compare
from peftscope.analysis.study import LOWEST, VALIDATION, StudyResults
from peftscope.claims.measurement import Measurement, NotRunError, Quantity, mean_of

Value = float | int


def rise(study: str, field: str, value: Value) -> Measurement:
    """Returns how far the validation loss ends above its lowest along the training, where the training loss falls.

    Args:
        study: A study whose first ladders vary one field at a time around LoRA on few examples, at one rate.
        field: The field of a ladder.
        value: The rung of that ladder whose runs count.
    """
    results = StudyResults(study)
    return _rise(results, _rung(results, field, value))


def rise_of_arm(study: str, arm: str) -> Measurement:
    """Returns the same of an arm of the study, at its own best rate."""
    results = StudyResults(study)
    return _rise(results, results.arm_runs(arm))


def gap_closed(study: str, field: str, value: Value, of_field: str, of_value: Value) -> Measurement:
    """Returns how much smaller the gap between validation and training loss ends than on another rung, by seed."""
    results = StudyResults(study)
    mine, other = _rung(results, field, value), _rung(results, of_field, of_value)
    return _difference(results, _gap(results, other), _gap(results, mine))


def loss_saved(study: str, field: str, value: Value, of_field: str, of_value: Value) -> Measurement:
    """Returns how much lower the validation loss ends than on another rung, by seed."""
    results = StudyResults(study)
    mine, other = (_by_seed(_rung(results, *rung))[VALIDATION] for rung in ((field, value), (of_field, of_value)))
    return _difference(results, other, mine)


def smaller_gap(study: str, arm: str, against: str) -> Measurement:
    """Returns how much smaller an arm's gap between validation and training loss ends than another's, by seed."""
    results = StudyResults(study)
    gaps = (_gap(results, results.arm_runs(name)) for name in (against, arm))
    return _difference(results, *gaps, tuning_error=results.tuning_error(arm, against))


def _rung(results: StudyResults, field: str, value: Value) -> pd.DataFrame:
    """Returns the runs of one rung of a ladder, one row per seed.

    Raises:
        NotRunError: They have not run, or one of them diverged and has no losses at its end.
    """
    table = results.table
    names = table["comparisons"].str.split()
    on_ladder = names.map(lambda cell: any(name.startswith("ladder-") and name.endswith(f"-{field}") for name in cell))
    runs = table[on_ladder & (table[field] == value)] if field in table else table[:0]
    done = runs[runs["status"] == "ok"]
    if runs.empty or len(done) < len(runs):
        raise NotRunError(f"`{results.name}` has {len(done)} of {len(runs)} runs of its ladder at {field} = {value:g}")
    return runs


def _by_seed(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.set_index("seed").sort_index()


def _train_end(results: StudyResults, runs: pd.DataFrame) -> pd.Series:
    """Returns the mean training loss of each run's last epoch, by seed; of half of the steps if that is less."""
    losses, means = results.training_losses(), {}
    for row in runs.to_dict("records"):
        each_step = row["batch_size"] * row["gradient_accumulation"]
        last = min(row["steps"] // 2, max(1, round(row["train_items"] / each_step)))
        means[row["seed"]] = float(losses.loc[row["run_id"]].iloc[-int(last) :].mean())
    return pd.Series(means).sort_index()


def _gap(results: StudyResults, runs: pd.DataFrame) -> pd.Series:
    return _by_seed(runs)[VALIDATION] - _train_end(results, runs)


def _rise(results: StudyResults, runs: pd.DataFrame) -> Measurement:
    """Returns the rise of runs; a run whose training loss rises too does not overfit, and counts as no rise."""
    by_seed, losses = _by_seed(runs), results.losses()
    fell = {}
    for row in runs.to_dict("records"):
        curve = losses.loc[row["run_id"]]
        along = curve[VALIDATION].dropna()
        lowest = along.idxmin() if len(along) and along.min() < row[VALIDATION] else curve.index[-1]
        at_lowest = curve["nll_nats_per_token"].loc[:lowest].iloc[-8:].mean()
        fell[row["seed"]] = float(at_lowest - curve["nll_nats_per_token"].iloc[-8:].mean())
    falls = pd.Series(fell).sort_index()
    rises = (by_seed[VALIDATION] - by_seed[LOWEST]).where(falls >= 0, 0.0) / results.task_gain
    evidence: dict[str, Quantity] = {
        "training loss at the lowest validation loss less that at the end, nats per token": float(falls.mean()),
        "runs whose training loss rose as well": int((falls < 0).sum()),
    }
    return mean_of(
        rises.tolist(),
        samples=tuple(map(float, rises)),
        evidence=evidence,
        model=results.subject,
        run_ids=tuple(runs["run_id"]),
    )


def _difference(results: StudyResults, first: pd.Series, second: pd.Series, tuning_error: float = 0.0) -> Measurement:
    """Returns the mean of paired differences as a share of the task gain, with what the tuning adds."""
    sample = tuple(map(float, (first - second).dropna() / results.task_gain))
    if len(sample) < 2:
        raise NotRunError(f"`{results.name}` has fewer than two such pairs")
    found = compare(sample, float("inf"), tuning_error / results.task_gain)
    low, high = found.interval()
    evidence: dict[str, Quantity] = {
        "mean of the first, nats per token": float(first.mean()),
        "mean of the second, nats per token": float(second.mean()),
    }
    return Measurement(found.mean, low, high, found.n, sample, found.tuning_error, evidence, model=results.subject)

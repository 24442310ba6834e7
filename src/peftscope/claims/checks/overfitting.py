"""Reads how far the arms of a study overfit. Nothing is trained.

Losses along the training are those on validation items; all values are shares of the study's task gain.
"""

from __future__ import annotations

import math

import pandas as pd

from peftscope.analysis.study import LOWEST, VALIDATION, StudyResults
from peftscope.claims.measurement import Measurement, NotRunError, Quantity, over_seeds, runs_of
from peftscope.planning.published import TRAINING

NEAR = 8
"""The steps whose mean is the training loss at some step: a single batch is too noisy."""


def rise(study: str, arm: str) -> Measurement:
    """Returns how far an arm's validation loss ends above its lowest along the training, where the training loss falls.

    A run whose training loss rises from there as well does not overfit, and counts as no rise.
    """
    results = StudyResults(study)
    runs, losses = _complete(results, arm), results.losses
    rises, falls = [], []
    for run, row in runs.iterrows():
        curve = losses.loc[run]
        along = curve[VALIDATION].dropna()
        lowest = along.idxmin() if len(along) and along.min() < row[VALIDATION] else curve.index[-1]
        falls.append(float(curve[TRAINING].loc[:lowest].iloc[-NEAR:].mean() - curve[TRAINING].iloc[-NEAR:].mean()))
        rises.append(float(row[VALIDATION] - row[LOWEST]) / results.task_gain if falls[-1] >= 0 else 0.0)
    evidence: dict[str, Quantity] = {
        "training loss at the lowest validation loss less that at the end, nats per token": sum(falls) / len(falls),
        "runs whose training loss rose as well": sum(fall < 0 for fall in falls),
    }
    return over_seeds(results, rises, evidence, runs.index)


def smaller_gap(study: str, arm: str, against: str) -> Measurement:
    """Returns how much smaller an arm's gap between validation and training loss ends than another's, by seed.

    The training loss at the end is the mean over the last epoch, or over the last steps if an epoch is shorter. Rates
    are taken as they are: what the choice of a rate costs in loss says nothing of the gap.
    """
    results = StudyResults(study)
    mine, other = (_gaps(results, name) for name in (arm, against))
    evidence: dict[str, Quantity] = {
        f"gap of {arm}, nats per token": float(mine.mean()),
        f"gap of {against}, nats per token": float(other.mean()),
    }
    differences = (other - mine).dropna() / results.task_gain
    return over_seeds(results, differences, evidence, runs_of(results, arm, against))


def _gaps(results: StudyResults, arm: str) -> pd.Series:
    """Returns the gap between validation and training loss at the end of each run of an arm, by seed."""
    losses, gaps = results.losses[TRAINING], {}
    for run, row in _complete(results, arm).iterrows():
        epoch = math.ceil(row["train_items"] / (row["batch_size"] * row["gradient_accumulation"]))
        gaps[row["seed"]] = float(row[VALIDATION] - losses.loc[run].iloc[-max(NEAR, epoch) :].mean())
    return pd.Series(gaps).sort_index()


def _complete(results: StudyResults, arm: str) -> pd.DataFrame:
    """Returns the runs of an arm by their id.

    Raises:
        NotRunError: One of them diverged, and has no losses at its end.
    """
    runs = results.arm_runs(arm).set_index("run_id")
    if (runs["status"] != "ok").any():
        raise NotRunError(f"runs of `{arm}` in `{results.name}` diverged, so that they have no loss at their end")
    return runs

"""Reads the results of studies: best learning rates, and paired differences between arms. Nothing is trained.

Gains are shares of the task gain: what the task itself teaches, beyond the form of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from peftscope.analysis.compare import compare
from peftscope.analysis.stats import paired_p, sign_flip_p
from peftscope.analysis.study import VALIDATION, Rate, StudyResults, paired
from peftscope.claims.measurement import Measurement, NotRunError, Quantity


def learning_rate_ratio(study: str, arm: str, against: str) -> Measurement:
    """Returns the ratio of the best learning rates of two arms.

    The bounds are not a confidence interval: they place each best rate between its neighbours among the tried rates.
    The evidence also has the optimum of a parabola through these three over the logarithm of the rate.
    """
    results = StudyResults(study)
    mine, other = results.rate(arm), results.rate(against)
    evidence = {f"best rate of {arm}": mine.best, f"best rate of {against}": other.best}
    fitted = [_fitted_optimum(rate) for rate in (mine, other)]
    evidence |= {"ratio of fitted optima": fitted[0] / fitted[1], "bounds are the neighbours that were tried": True}
    curves = {name: rate.curve for name, rate in ((arm, mine), (against, other))}
    return Measurement(
        mine.best / other.best,
        low=mine.below / other.above,
        high=mine.above / other.below,
        evidence=evidence,
        curves={name: {x: y for x, y in curve.items() if y is not None} for name, curve in curves.items()},
        axes=("learning rate", "validation loss, nats per token"),
        model=results.subject,
        run_ids=tuple(results.tuning_runs(arm)["run_id"]) + tuple(results.tuning_runs(against)["run_id"]),
    )


def heldout_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how much lower an arm's held-out loss is than another's."""
    results = StudyResults(study)
    mine, other = results.arm_runs(arm), results.arm_runs(against)
    both = paired(mine, other)
    evidence: dict[str, Quantity] = {
        f"mean loss of {arm}": float(both["first"].mean()),
        f"mean loss of {against}": float(both["second"].mean()),
        "runs that diverged": int((pd.concat([mine, other])["status"] == "diverged").sum()),
    }
    differences = (both["second"] - both["first"]) / results.task_gain
    error = results.tuning_error(arm, against) / results.task_gain
    return _over_seeds(results, differences, evidence, (*mine["run_id"], *other["run_id"]), error)


def furthest(study: str, arms: dict[str, str], margin: float) -> Measurement:
    """Returns the held-out gain of the arm that contradicts sameness within a margin most.

    That is an arm whose interval lies outside of the margin, if there is one, and otherwise the one that reaches
    furthest.

    Args:
        study: The study's experiment.
        arms: Each arm with the arm that it is compared with.
        margin: The margin as a share of the task gain.
    """
    found = {arm: heldout_gain(study, arm, against) for arm, against in arms.items()}

    def against_sameness(arm: str) -> tuple[float, float]:
        gain = found[arm]
        assert gain.low is not None
        assert gain.high is not None
        reach = compare(gain.samples, margin, gain.tuning_error).interval(0.9)
        return max(0.0, gain.low - margin, -gain.high - margin), max(map(abs, reach))

    chosen = max(found, key=against_sameness)
    evidence: dict[str, Quantity] = {"shown": f"{chosen} against {arms[chosen]}", **found[chosen].evidence}
    evidence |= {f"mean gain of {arm} over {against}": found[arm].value for arm, against in arms.items()}
    evidence["margin, nats per token"] = margin * StudyResults(study).task_gain
    runs = dict.fromkeys(run for gain in found.values() for run in gain.run_ids)
    return replace(found[chosen], evidence=evidence, run_ids=tuple(runs))


def training_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how much lower an arm's mean loss over all steps is, each on batches that it had not yet seen.

    A better start counts as well as faster learning.
    """
    results = StudyResults(study)
    mine, other = results.arm_runs(arm), results.arm_runs(against)
    both = paired(mine, other, results.training_losses().groupby("run_id").mean())
    evidence: dict[str, Quantity] = {
        f"mean loss of {arm}": float(both["first"].mean()),
        f"mean loss of {against}": float(both["second"].mean()),
    }
    differences = (both["second"] - both["first"]) / results.task_gain
    return _over_seeds(results, differences, evidence, (*mine["run_id"], *other["run_id"]))


def steps_saved(study: str, arm: str, against: str, window: int) -> Measurement:
    """Returns how many steps an arm saves on the way to another's last training loss, as a share of the other's steps.

    Losses are means over ``window`` steps. An arm that does not reach the loss needs all steps.
    """
    results = StudyResults(study)
    smooth = results.training_losses().groupby("run_id").rolling(window).mean().droplevel(0).dropna()
    runs = [results.arm_runs(name).set_index("seed")["run_id"] for name in (arm, against)]
    saved = {}
    for seed in runs[0].index.intersection(runs[1].index):
        mine, other = (smooth.xs(of[seed], level="run_id") for of in runs)
        reached = [curve.index[curve <= other.iloc[-1]] for curve in (mine, other)]
        needed = [steps.min() if len(steps) else mine.index.max() for steps in reached]
        saved[seed] = 1 - needed[0] / needed[1]
    return _over_seeds(results, pd.Series(saved), {}, (*runs[0], *runs[1]))


def tuning_of_one_arm(study: str, arm: str, against: str, learning_rate: float) -> Measurement:
    """Returns an arm's gain over another at one common rate, minus its gain at the best rate of each.

    Both come from the tuning runs and their validation loss. This loss chose the best rates, so they look a little too
    good.
    """
    results = StudyResults(study)

    def gains(rate: float, other: float) -> pd.Series:
        both = paired(results.tuning_runs(arm, rate), results.tuning_runs(against, other), VALIDATION)
        return (both["second"] - both["first"]) / results.task_gain

    fixed = gains(learning_rate, learning_rate)
    tuned = gains(results.rate(arm).best, results.rate(against).best)
    evidence = {"gain at one rate": float(fixed.mean()), "gain at tuned rates": float(tuned.mean())}
    runs = (*results.tuning_runs(arm)["run_id"], *results.tuning_runs(against)["run_id"])
    return _over_seeds(results, fixed - tuned, evidence, runs)


def _over_seeds(
    results: StudyResults,
    values: pd.Series,
    evidence: Mapping[str, Quantity],
    runs: tuple[str, ...],
    tuning_error: float = 0.0,
) -> Measurement:
    """Returns the mean of values, one per seed, with its interval, which includes the error that tuning adds."""
    sample = tuple(map(float, values))
    if not sample:
        raise NotRunError(f"the study `{results.name}` has no such runs")
    evidence = {**evidence, "task gain, nats per token": results.task_gain}
    if len(sample) == 1:
        return Measurement(sample[0], n=1, samples=sample, evidence=evidence, model=results.subject, run_ids=runs)
    difference = compare(sample, math.inf, tuning_error)
    evidence |= {"paired t, p": paired_p(sample), "sign flips, p": sign_flip_p(sample)}
    if tuning_error:
        evidence["standard error from tuning"] = tuning_error
    low, high = difference.interval()
    return Measurement(
        difference.mean, low, high, difference.n, sample, tuning_error, evidence, model=results.subject, run_ids=runs
    )


def _fitted_optimum(rate: Rate) -> float:
    """Returns the minimum of the parabola through the best rate and its neighbours; the best rate if one diverged."""
    rates = (rate.below, rate.best, rate.above)
    losses = [loss for x in rates if (loss := rate.curve[x]) is not None]
    if len(losses) < len(rates):
        return rate.best
    curvature, slope, _ = np.polyfit([math.log(x) for x in rates], losses, 2)
    return math.exp(-slope / (2 * curvature))

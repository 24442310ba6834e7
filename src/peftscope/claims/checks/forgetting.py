"""Reads what studies say of forgetting: the loss on English prose, where two arms have learned the same."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pandas as pd

from peftscope.analysis.beside_loss import beside_loss
from peftscope.analysis.compare import lowest_mean
from peftscope.analysis.forgetting import curves, frontier, less_at_equal_loss, matched
from peftscope.analysis.stats import jackknife, trimmed_mean
from peftscope.analysis.study import StudyResults
from peftscope.claims.measurement import Measurement, NotRunError, Quantity, over_seeds


def less_forgotten(study: str, arm: str, against: str) -> Measurement:
    """Returns how much less an arm has forgotten than another where both have the same loss on the task.

    That is the lowest loss on validation items that both reach along the training, and the rise of the code length of
    English prose in bits per byte at that point, interpolated between two measurements. Runs are paired by seed. Of
    arms at several rates, each mean is without the lowest and the highest seed.
    """
    results = StudyResults(study)
    runs, other = results.arm_runs(arm), results.arm_runs(against)
    at_best = matched(results, runs, other)
    if at_best.empty:
        raise NotRunError(f"the study `{study}` has no pair of runs that scored prose along the training")
    mine, theirs = dict(curves(results, runs)), dict(curves(results, other))
    ends = [float(theirs[seed]["rise"].iloc[-1] - mine[seed]["rise"].iloc[-1]) for seed in at_best.index]
    evidence: dict[str, Quantity] = {
        "matched loss on the task, nats per token": fmean(at_best["at"]),
        f"rise on prose there, {arm}": results.mean_of(arm, against)(list(at_best["first"])),
        f"rise on prose there, {against}": results.mean_of(arm, against)(list(at_best["second"])),
        "difference at the end of the training": results.mean_of(arm, against)(ends),
        "runs that diverged": int(runs["status"].eq("diverged").sum() + other["status"].eq("diverged").sum()),
    }
    sample = less_at_equal_loss(results, arm, against)
    return over_seeds(results, sample, evidence, (*runs["run_id"], *other["run_id"]))


def ratio_at_equal_shift(study: str, arm: str, against: str, at_lowest: bool = False) -> Measurement:
    """Returns the ratio of the forgetting of two arms where both have moved their answers as far from the base.

    That is the largest shift that both reach along the training; see ``evaluation.heldout`` and ``less_forgotten``.
    Both run at several rates, and what they have forgotten are means without the lowest and the highest seed. Runs that
    kept no shift are left out.

    Args:
        at_lowest: Whether the first arm is at the lowest of its rates, in place of the best.
    """
    results = StudyResults(study)
    tried = results.rate_runs(arm)
    lowest = tried[tried["learning_rate"] == tried["learning_rate"].min()]

    def at(runs: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
        return matched(results, lowest if at_lowest else runs, other, "nearness")

    runs = [lowest if at_lowest else results.arm_runs(arm), results.arm_runs(against)]
    found = at(*runs)
    if found.empty:
        raise NotRunError(f"the study `{study}` has no pair of runs that both kept the shift of their answers")
    nearness, firsts, seconds = (list(found[name]) for name in found)
    if trimmed_mean(seconds) <= 0:
        raise NotRunError(f"`{against}` has forgotten nothing there that could be compared with")
    evidence: dict[str, Quantity] = {
        "matched shift, nats per answer token": -fmean(nearness),
        f"rise on prose there, {arm}": trimmed_mean(firsts),
        f"rise on prose there, {against}": trimmed_mean(seconds),
        "runs that diverged": sum(int(of_arm["status"].eq("diverged").sum()) for of_arm in runs),
    }
    sample = beside_loss(results, arm, against, at, float.__truediv__)
    return over_seeds(results, sample, evidence, (run for of_arm in runs for run in of_arm["run_id"]))


def least_forgotten(study: str, arm: str, against: str) -> Measurement:
    """Returns how much less an arm has forgotten than another at equal loss, each at the rate that forgets least there.

    Of the losses along that frontier, the one counts that says least for the arm which forgets less over all of them.
    The arms run at several rates and score prose along the training.
    """
    results = StudyResults(study)
    along = frontier(results, (arm, against))

    def gap(mine: list[list[float]], theirs: list[list[float]]) -> list[float]:
        return jackknife(lambda kept: lowest_mean(theirs, kept) - lowest_mean(mine, kept), len(mine[0]))

    gaps = {loss: gap(*sides) for loss, sides in along.items()}
    means = {loss: fmean(values) for loss, values in gaps.items()}
    sign = 1 if sum(means.values()) > 0 else -1
    shown = min(means, key=lambda loss: sign * means[loss])
    evidence: dict[str, Quantity] = {"loss on the task, nats per token": shown}
    evidence |= {f"difference at a loss of {loss:.3g}": mean for loss, mean in means.items()}
    runs = (run for name in (arm, against) for run in results.rate_runs(name)["run_id"])
    found = over_seeds(results, gaps[shown], evidence, runs)
    by_arm = {
        name: {loss: lowest_mean(sides[i], range(len(sides[i][0]))) for loss, sides in along.items()}
        for i, name in enumerate((arm, against))
    }
    return replace(found, curves=by_arm, axes=("loss on the task, nats per token", "rise on prose, bits per byte"))

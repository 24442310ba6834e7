"""Reads what studies say of forgetting: the loss on English prose, where two arms have learned the same."""

from __future__ import annotations

from statistics import fmean

from peftscope.analysis.forgetting import curves, matched_rises
from peftscope.analysis.study import StudyResults
from peftscope.claims.measurement import Measurement, NotRunError, Quantity, over_seeds


def less_forgotten(study: str, arm: str, against: str) -> Measurement:
    """Returns how much less an arm has forgotten than another where both have the same loss on the task.

    That is the lowest loss on validation items that both reach along the training, and the rise of the code length of
    English prose in bits per byte at that point, interpolated between two measurements. Runs are paired by seed.

    Args:
        study: The study's experiment.
        arm: The arm.
        against: The arm to compare with.
    """
    results = StudyResults(study)
    runs, other = results.arm_runs(arm), results.arm_runs(against)
    mine, theirs = dict(curves(results, runs)), dict(curves(results, other))
    matched = {seed: matched_rises(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())}
    if not matched:
        raise NotRunError(f"the study `{study}` has no pair of runs that scored prose along the training")
    losses, firsts, seconds = zip(*matched.values(), strict=True)
    ends = [float(theirs[seed]["rise"].iloc[-1] - mine[seed]["rise"].iloc[-1]) for seed in matched]
    evidence: dict[str, Quantity] = {
        "matched loss on the task, nats per token": fmean(losses),
        f"rise on prose there, {arm}": fmean(firsts),
        f"rise on prose there, {against}": fmean(seconds),
        "difference at the end of the training": fmean(ends),
        "runs that diverged": int(runs["status"].eq("diverged").sum() + other["status"].eq("diverged").sum()),
    }
    sample = [second - first for first, second in zip(firsts, seconds, strict=True)]
    return over_seeds(results, sample, evidence, (*runs["run_id"], *other["run_id"]))

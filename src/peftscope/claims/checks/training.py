"""What studies found: best learning rates, and paired differences between arms. Reads tables, trains nothing.

Differences are shares of what full fine-tuning gains over the base in held-out loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from peftscope.claims.measurement import Measurement, NotRunError, Quantity
from peftscope.stats import bootstrap_interval, equivalence_interval, mean_interval, paired_p, sign_flip_p
from peftscope.study import HELDOUT, VALIDATION, StudyResults, paired


def learning_rate_ratio(study: str, arm: str, against: str) -> Measurement:
    """Returns the best learning rate of one arm over another's.

    The bounds are those of the grids: each best rate is known to lie between its neighbours.
    """
    results = StudyResults(study)
    mine, other = results.rate(arm), results.rate(against)
    curves = {name: results.rate(name).curve for name in (arm, against)}
    return Measurement(
        mine.best / other.best,
        low=mine.below / other.above,
        high=mine.above / other.below,
        evidence={f"best rate of {arm}": mine.best, f"best rate of {against}": other.best},
        curves={name: {x: y for x, y in curve.items() if y is not None} for name, curve in curves.items()},
        axes=("learning rate", "validation loss, nats per token"),
        model=results.subject,
        run_ids=tuple(results.tuning_runs(arm)["run_id"]) + tuple(results.tuning_runs(against)["run_id"]),
    )


def heldout_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how much lower an arm's held-out loss is than another's."""
    return _gain(StudyResults(study), arm, against, HELDOUT)


def training_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how much lower an arm's loss is in the mean over all steps, each on batches that it had not yet seen.

    Above 0 the arm learns faster.
    """
    results = StudyResults(study)
    return _gain(results, arm, against, results.training_losses())


def furthest_from(study: str, arms: list[str], against: str) -> Measurement:
    """Returns the held-out gain of the arm whose difference reaches furthest from zero, by its equivalence interval."""
    found = [heldout_gain(study, arm, against) for arm in arms]

    def reach(measured: Measurement) -> float:
        return max(map(abs, equivalence_interval(measured.samples) or (float(measured.value),)))

    furthest = max(found, key=reach)
    means = {f"mean gain of {arm}": measured.value for arm, measured in zip(arms, found, strict=True)}
    runs = dict.fromkeys(run for measured in found for run in measured.run_ids)
    return replace(furthest, evidence={**furthest.evidence, **means}, run_ids=tuple(runs))


def tuning_of_one_arm(study: str, arm: str, against: str, learning_rate: float) -> Measurement:
    """Returns an arm's gain over another at one rate for both, less its gain at the best rate of each.

    From the tuning runs, by their validation loss.
    """
    results = StudyResults(study)

    def gains(rate: float, other: float) -> pd.Series:
        both = paired(results.tuning_runs(arm, rate), results.tuning_runs(against, other), VALIDATION)
        return (both["second"] - both["first"]) / results.full_gain

    fixed = gains(learning_rate, learning_rate)
    tuned = gains(results.rate(arm).best, results.rate(against).best)
    evidence = {"gain at one rate": float(fixed.mean()), "gain at tuned rates": float(tuned.mean())}
    runs = (*results.tuning_runs(arm)["run_id"], *results.tuning_runs(against)["run_id"])
    return _over_seeds(results, fixed - tuned, evidence, runs)


def _gain(results: StudyResults, arm: str, against: str, values: pd.Series | str) -> Measurement:
    mine, other = results.arm_runs(arm), results.arm_runs(against)
    both = paired(mine, other, values)
    evidence = {
        f"mean loss of {arm}": float(both["first"].mean()),
        f"mean loss of {against}": float(both["second"].mean()),
    }
    differences = (both["second"] - both["first"]) / results.full_gain
    return _over_seeds(results, differences, evidence, (*mine["run_id"], *other["run_id"]))


def _over_seeds(
    results: StudyResults, differences: pd.Series, evidence: Mapping[str, Quantity], runs: tuple[str, ...]
) -> Measurement:
    values = tuple(map(float, differences))
    interval = mean_interval(values)
    if interval is None:
        raise NotRunError(f"the study `{results.name}` has no pair of runs that ended well")
    evidence = {**evidence, "full fine-tuning's gain, nats per token": results.full_gain}
    low, high = interval.low, interval.high
    if interval.n > 1:
        if low is None:  # no spread at all
            low = high = interval.mean
        below, above = bootstrap_interval(values)
        evidence |= {"bootstrap, lower": below, "bootstrap, upper": above}
        evidence |= {"paired t, p": paired_p(values), "sign flips, p": sign_flip_p(values)}
    return Measurement(interval.mean, low, high, interval.n, values, evidence, model=results.subject, run_ids=runs)

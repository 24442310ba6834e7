"""Reads what studies say of forgetting: the loss on English prose, where two arms have learned the same."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from peftscope.analysis.forgetting import curves, frontier, less_at_equal_loss, matched_rises
from peftscope.analysis.stats import of_trimmed_means, trimmed_mean
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
    mine, theirs = dict(curves(results, runs)), dict(curves(results, other))
    matched = {seed: matched_rises(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())}
    if not matched:
        raise NotRunError(f"the study `{study}` has no pair of runs that scored prose along the training")
    losses, firsts, seconds = zip(*matched.values(), strict=True)
    ends = [float(theirs[seed]["rise"].iloc[-1] - mine[seed]["rise"].iloc[-1]) for seed in matched]
    evidence: dict[str, Quantity] = {
        "matched loss on the task, nats per token": fmean(losses),
        f"rise on prose there, {arm}": results.mean_of(arm, against)(firsts),
        f"rise on prose there, {against}": results.mean_of(arm, against)(seconds),
        "difference at the end of the training": results.mean_of(arm, against)(ends),
        "runs that diverged": int(runs["status"].eq("diverged").sum() + other["status"].eq("diverged").sum()),
    }
    sample = less_at_equal_loss(results, arm, against)
    return over_seeds(results, sample, evidence, (*runs["run_id"], *other["run_id"]))


def ratio_at_equal_shift(study: str, arm: str, against: str, at_lowest: bool = False) -> Measurement:
    """Returns what an arm has forgotten over what another has where both have moved their answers as far from the base.

    That is the largest shift that both reach along the training; see ``evaluation.heldout`` and ``less_forgotten``.
    Both run at several rates, and what they have forgotten are means without the lowest and the highest seed.

    Args:
        at_lowest: Whether the first arm is at the lowest of its rates, in place of the best.
    """
    results = StudyResults(study)
    runs = [results.arm_runs(name) for name in (arm, against)]
    if at_lowest:
        tried = results.rate_runs(arm)
        runs[0] = tried[tried["learning_rate"] == tried["learning_rate"].min()]
    mine, theirs = (dict(curves(results, of_arm)) for of_arm in runs)
    all_kept = all(curve["nearness"].notna().all() for curve in (*mine.values(), *theirs.values()))
    if not all_kept or not (seeds := mine.keys() & theirs.keys()):
        raise NotRunError(f"the study `{study}` has no pairs of runs that all kept the shift of their answers")
    matched = [matched_rises(mine[seed], theirs[seed], "nearness") for seed in sorted(seeds)]
    nearness, firsts, seconds = zip(*matched, strict=True)
    if trimmed_mean(seconds) <= 0:
        raise NotRunError(f"`{against}` has forgotten nothing there that could be compared with")
    evidence: dict[str, Quantity] = {
        "matched shift, nats per answer token": -fmean(nearness),
        f"rise on prose there, {arm}": trimmed_mean(firsts),
        f"rise on prose there, {against}": trimmed_mean(seconds),
        "runs that diverged": sum(int(of_arm["status"].eq("diverged").sum()) for of_arm in runs),
    }
    sample = of_trimmed_means(float.__truediv__, firsts, seconds)
    return over_seeds(results, sample, evidence, (run for of_arm in runs for run in of_arm["run_id"]))


def least_forgotten(study: str, arm: str, against: str) -> Measurement:
    """Returns how much less an arm has forgotten than another at equal loss, each at the rate that forgets least there.

    Of the losses along that frontier, the one counts that says least for the arm which forgets less over all of them.
    The arms run at several rates and score prose along the training.
    """
    results = StudyResults(study)
    along = frontier(results, (arm, against))
    gaps = {loss: (theirs - mine).dropna() for loss, (mine, theirs) in along.items()}
    means = {loss: float(gap.mean()) for loss, gap in gaps.items()}
    sign = 1 if sum(means.values()) > 0 else -1
    shown = min(means, key=lambda loss: sign * means[loss])
    evidence: dict[str, Quantity] = {"loss on the task, nats per token": shown}
    evidence |= {f"difference at a loss of {loss:.3g}": mean for loss, mean in means.items()}
    runs = (run for name in (arm, against) for run in results.rate_runs(name)["run_id"])
    found = over_seeds(results, gaps[shown], evidence, runs)
    by_arm = {
        name: {loss: float(rises[i].mean()) for loss, rises in along.items()} for i, name in enumerate((arm, against))
    }
    return replace(found, curves=by_arm, axes=("loss on the task, nats per token", "rise on prose, bits per byte"))

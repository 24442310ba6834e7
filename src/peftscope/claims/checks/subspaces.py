"""Reads from a study of random subspaces how many dimensions fine-tuning needs. Nothing is trained."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import HELDOUT, StudyResults
from peftscope.claims.measurement import Measurement, Quantity


def intrinsic_dimension(
    study: str, arms: list[str], against: str, share: float, over: Literal["task", "base"], resamples: int = 2000
) -> Measurement:
    """Returns the smallest dimension at which a share of full fine-tuning's gain is reached, and its 95 % interval.

    Gains are mean held-out losses below that of training on shuffled labels (``task``), or below the untouched base's.
    Shares are interpolated over the logarithm of the dimension. If not even the largest dimension reaches the share, or
    the smallest one does, the result is that dimension, and the evidence says so. The result says nothing if the best
    rate of an arm next to it lies at an end of its list. The bootstrap draws the losses' seeds anew from the residuals
    of all arms, and an error of each arm's learning rate with them.

    Source: Aghajanyan et al. 2020, arXiv 2012.13255, section 3.1, where the share is 0.9.
    """
    results = StudyResults(study)
    runs = {name: results.arm_runs(name) for name in (*arms, against)}
    dimensions = np.array([float(runs[arm]["dimension"].iloc[0]) for arm in arms])
    losses = [table[HELDOUT] for table in runs.values()]
    means, counts = np.array([of.mean() for of in losses]), list(map(len, losses))
    start = results.base_loss
    if over == "task":
        start = results.task_gain + float(results.arm_runs(results.reference)[HELDOUT].mean())
    pool = np.concatenate([(of - of.mean()) * math.sqrt(len(of) / max(1, len(of) - 1)) for of in losses])
    random = np.random.default_rng(0)
    errors = np.stack([random.choice(pool, (resamples, count)).mean(axis=1) for count in counts], axis=1)
    errors += random.normal(size=errors.shape) * [results.rate(name).regret for name in runs]

    def shares_of(losses: np.ndarray) -> np.ndarray:
        return (start - losses[..., :-1]) / (start - losses[..., -1:])

    reached = shares_of(means)
    found = _first_reach(dimensions, reached, share)
    drawn = [_first_reach(dimensions, each, share) for each in shares_of(means + errors)]
    low, high = map(float, np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    evidence: dict[str, Quantity] = {
        f"held-out loss of {against}": float(means[-1]),
        "loss from which gains are counted": start,
        "largest share reached": float(reached.max()),
        "whether the share is reached": bool((reached >= share).any()),
        "spread of single losses, nats per token": float(pool.std()),
    }
    if not (reached >= share).any():
        evidence["shown"] = f"not reached with {dimensions[-1]:,.0f}, the most that were tried"
    decisive = [arm for arm, dimension in zip(arms, dimensions, strict=True) if dimension <= found][-1:]
    decisive += [arm for arm, dimension in zip(arms, dimensions, strict=True) if dimension > found][:1]
    at_an_end = [arm for arm in decisive if arm in results.arms_at_an_end]
    return Measurement(
        found,
        low,
        high,
        n=min(counts),
        evidence=evidence,
        curves={"share of full fine-tuning's gain": dict(zip(dimensions.tolist(), reached.tolist(), strict=True))},
        axes=("trained dimensions", "share of full fine-tuning's gain"),
        model=results.subject,
        run_ids=tuple(run for table in runs.values() for run in table["run_id"]),
        spoiled_by=f"the best rate of {' and '.join(at_an_end)} lies at an end of its list" if at_an_end else "",
    )


def _first_reach(dimensions: np.ndarray, shares: np.ndarray, wanted: float) -> float:
    """Returns where the shares first reach one that is wanted, at the ends of the dimensions if they do not cross it.

    >>> round(_first_reach(np.array([10.0, 100, 1000]), np.array([0.1, 0.8, 1.0]), 0.9))
    316
    """
    at = int(np.argmax(shares >= wanted)) if (shares >= wanted).any() else len(shares)
    if at in (0, len(shares)):
        return float(dimensions[min(at, len(shares) - 1)])
    logs = np.log(dimensions[at - 1 : at + 1])
    return float(np.exp(np.interp(wanted, shares[at - 1 : at + 1], logs)))

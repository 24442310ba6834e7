"""Forgetting along the training: English prose against the loss on the task. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from peftscope.analysis.beside_loss import beside_loss
from peftscope.analysis.stats import where_reached
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError, Problem
from peftscope.planning.published import RETENTION, SHIFT, VALIDATION


def curves(study: StudyResults, runs: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """Yields for each run its seed, and by step its validation loss (``task``) and its rise on prose (``rise``).

    The rise is in bits per byte, from before the training. ``nearness`` is minus the shift of the answers from the base
    in nats, empty if that was not measured. Step 0 is the base. Runs that diverged are left out.

    Raises:
        InputError: The study did not score both along the training.
    """
    base = study.table[study.table["method"] == "none"][VALIDATION].iloc[0]
    along = study.losses
    for row in runs[runs["status"] == "ok"].to_dict("records"):
        before = row[f"{RETENTION}_before"]
        points = along.loc[row["run_id"]].reindex(columns=[VALIDATION, RETENTION, SHIFT]).astype(float)
        points = points.dropna(subset=[VALIDATION, RETENTION])
        if points.empty or pd.isna(before):
            remedy = "set retention_every and validation_every to the same steps"
            raise InputError(Problem(f"the study `{study.name}`", "prose was not scored along its training", remedy))
        points.loc[0] = (base, before, 0.0)
        points.loc[int(row["steps"])] = (row[VALIDATION], row[RETENTION], row.get(SHIFT, math.nan))
        points = points.sort_index()
        rise, nearness = points[RETENTION] - before, -points[SHIFT]
        yield row["seed"], pd.DataFrame({"task": points[VALIDATION], "rise": rise, "nearness": nearness})


def matched_rises(first: pd.DataFrame, second: pd.DataFrame, by: str = "task") -> tuple[float, float, float]:
    """Returns the lowest value of a column that both curves reach, and the rise on prose of each where it does."""
    lowest = max(first[by].min(), second[by].min())
    one, other = (where_reached(curve[by], curve["rise"], lowest) for curve in (first, second))
    return lowest, one, other


def matched(study: StudyResults, runs: pd.DataFrame, other: pd.DataFrame, by: str = "task") -> pd.DataFrame:
    """Returns a row for each seed: the lowest value that both reach (``at``), and the rises (``first``, ``second``).

    Runs along which it was not measured are left out.
    """
    mine, theirs = (
        {seed: curve for seed, curve in curves(study, side) if curve[by].notna().all()} for side in (runs, other)
    )
    found = {seed: matched_rises(mine[seed], theirs[seed], by) for seed in sorted(mine.keys() & theirs.keys())}
    return pd.DataFrame.from_dict(found, orient="index", columns=["at", "first", "second"], dtype=float)


def less_at_equal_loss(study: StudyResults, arm: str, against: str) -> list[float]:
    """Returns how much less an arm has forgotten than another where both have the same loss; see ``beside_loss``."""
    return beside_loss(study, arm, against, lambda *sides: matched(study, *sides), lambda mine, theirs: theirs - mine)


def frontier(study: StudyResults, arms: Sequence[str]) -> dict[float, list[list[list[float]]]]:
    """Returns for some losses on the task the rise on prose of each arm there, a list by seed for each of its rates.

    The losses are a factor of √2 apart, from the lowest that every arm reaches to four times that. A rate counts where
    all its seeds reach the loss. The seeds are those that all arms have.

    Raises:
        InputError: The study did not score prose along its training, or a seed diverged at every rate of an arm.
    """
    rates = [
        [
            dict(curves(study, runs))
            for _, runs in study.rate_runs(arm).groupby("learning_rate")
            if runs["status"].eq("ok").all()
        ]
        for arm in arms
    ]
    reached = [
        [max(float(curve["task"].min()) for curve in by_seed.values()) for by_seed in of_arm] for of_arm in rates
    ]
    if not all(reached):
        remedy = "add lower rates to its file"
        raise InputError(
            Problem(f"the study `{study.name}`", "an arm has no rate at which all seeds ended well", remedy)
        )
    lowest = max(map(min, reached))
    seeds = sorted(set.intersection(*(set(by_seed) for of_arm in rates for by_seed in of_arm)))

    def rises(by_seed: dict[int, pd.DataFrame], loss: float) -> list[float]:
        return [where_reached(by_seed[seed]["task"], by_seed[seed]["rise"], loss) for seed in seeds]

    return {
        loss: [
            [rises(by_seed, loss) for by_seed, low in zip(of_arm, lows, strict=True) if low <= loss]
            for of_arm, lows in zip(rates, reached, strict=True)
        ]
        for loss in (lowest * 2 ** (step / 2) for step in range(5))
    }

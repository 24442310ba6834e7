"""Compares two arms in what is measured beside the loss: exact match, forgetting, losses of training. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd

from peftscope.analysis.stats import of_trimmed_means, trimmed_mean, widened
from peftscope.analysis.study import StudyResults

DRAWS = 1000
"""How often the seeds are drawn anew to see which rates have the lowest loss."""


def beside_loss(
    study: StudyResults,
    arm: str,
    against: str,
    measured: Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame],
    combine: Callable[[float, float], float] = float.__sub__,
) -> list[float]:
    """Returns how an arm compares with another in what is measured beside the loss, at the best rate of each.

    That is a value for each seed. Where one of them ran at several rates, it is of a jackknife over trimmed means,
    and further from the mean by what the choice of rates adds: how the result spreads over the rates that have the
    lowest loss when seeds are drawn anew. Rates at which it was not measured are left out of that.

    Args:
        measured: Gives the values of both arms by seed, as ``first`` and ``second``, from their runs at a rate of
            each; see ``collect.paired``.
        combine: Makes one number of those of both arms.
    """
    losses, runs = zip(*((study.losses_by_rate(one), study.rate_runs(one)) for one in (arm, against)), strict=True)
    common = losses[0].index.intersection(losses[1].index)

    @cache
    def at(*rates: float) -> list[list[float]]:
        found = measured(*(table[table["learning_rate"] == rate] for table, rate in zip(runs, rates, strict=True)))
        return [list(side) for _, side in found.reindex(common)[["first", "second"]].dropna().items()]

    by_rate = [list(zip(table.columns, table.loc[common].to_numpy().T, strict=True)) for table in losses]

    def best(drawn: np.ndarray) -> tuple[float, ...]:
        return tuple(min((trimmed_mean(of[drawn].tolist()), rate) for rate, of in each)[1] for each in by_rate)

    sides, n = at(*best(np.arange(len(common)))), len(common)
    if not study.has_several_rates(arm, against) or len(sides[0]) < 2:
        return list(map(combine, *sides))
    draws = Counter(best(drawn) for drawn in np.random.default_rng(0).integers(n, size=(DRAWS, n)))
    spread = [combine(*map(trimmed_mean, at(*rates))) for rates in draws.elements() if at(*rates)[0]]
    return widened(of_trimmed_means(combine, *sides), float(np.std(spread)))

"""Many systems at once: which cannot be told apart, and how far a ranking by single runs can be trusted. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import special
from scipy.spatial.distance import squareform

from peftscope.analysis.paired import check_items, check_side, pair
from peftscope.analysis.scored import FRACTION, Scored, unit_of
from peftscope.analysis.stats import CONFIDENCE, holm
from peftscope.errors import InputError, Problem

STATED_SPREADS = (0.0, 0.005, 0.01, 0.02)
"""The spreads of single runs between seeds that are shown for fractions if the spread is not known."""


@dataclass(frozen=True)
class Ranking:
    """Some systems, the best one first.

    Attributes:
        systems: Their names.
        scores: Their mean scores.
        runs: The fewest runs of a system.
        errors: The standard error of each score, in which what is hard for all of them is left out.
        run_errors: The same for the score of a single run.
        p: The p of each pair of systems, k × k.
        holm_p: The same after Holm's correction for the number of pairs.
        lower_is_better: Whether the best score is the lowest.
    """

    systems: list[str]
    scores: np.ndarray
    runs: int
    errors: np.ndarray
    run_errors: np.ndarray
    p: np.ndarray
    holm_p: np.ndarray
    lower_is_better: bool

    @property
    def pairs(self) -> int:
        """The number of pairs of systems."""
        return math.comb(len(self.systems), 2)

    def undecided(self, *, corrected: bool) -> int:
        """Returns how many pairs cannot be told from chance, alone or after correction for all pairs."""
        p = (self.holm_p if corrected else self.p)[np.triu_indices(len(self.systems), 1)]
        return int((p >= 1 - CONFIDENCE).sum())

    @property
    def _is_apart(self) -> np.ndarray:
        return self.holm_p < 1 - CONFIDENCE

    @property
    def places(self) -> list[tuple[int, int]]:
        """The best and the worst place that each system can have: no place is taken by one that is told apart."""
        k = len(self.systems)
        return [(1 + int(self._is_apart[i, :i].sum()), k - int(self._is_apart[i, i + 1 :].sum())) for i in range(k)]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """The first and the last place of each group in which no two can be told apart; groups may overlap."""
        k, groups = len(self.systems), list[tuple[int, int]]()
        for first in range(k):
            last = first
            while last + 1 < k and not self._is_apart[first : last + 1, last + 1].any():
                last += 1
            if not groups or last + 1 > groups[-1][1]:
                groups.append((first + 1, last + 1))
        return groups


@dataclass(frozen=True)
class Trust:
    """The chances that a ranking by single runs is right.

    Attributes:
        winner: That its first is the best.
        pairs: The mean share of pairs that it puts in the right order.
        order: That it is right as a whole.
    """

    winner: float
    pairs: float
    order: float


def rank(systems: Mapping[str, Sequence[Scored]], run_spread: float | None = None, items: int | None = None) -> Ranking:
    """Returns systems in the order of their scores.

    Args:
        run_spread: The standard deviation of single runs between seeds. None: from the runs; with one run of each,
            only the items count.
        items: The number of items behind a fraction whose items were not kept apart: their draw adds a binomial error.

    Raises:
        InputError: There are too few systems, they were not scored alike, or nothing shows how far chance goes.
    """
    _check(systems, run_spread)
    means = {name: np.mean([run.score for run in runs]) for name, runs in systems.items()}
    lower_is_better = next(iter(systems.values()))[0].lower_is_better
    names = sorted(systems, key=lambda name: means[name] if lower_is_better else -means[name])
    all_runs, scores = [systems[name] for name in names], np.array([means[name] for name in names])
    counts = np.array([len(runs) for runs in all_runs])
    spread = _spread(all_runs) if run_spread is None else run_spread
    of_items = _item_errors(all_runs, scores, items)
    errors = np.sqrt(spread**2 / counts + of_items**2)
    if run_spread is None:
        p = [pair(a, b).p for a, b in combinations(all_runs, 2)]
    else:
        apart = ((abs(a - b), math.hypot(d, e)) for (a, d), (b, e) in combinations(zip(scores, errors, strict=True), 2))
        p = [float(2 * special.ndtr(-gap / max(error, 1e-300))) for gap, error in apart]
    run_errors = np.sqrt(spread**2 + of_items**2)
    alone, corrected = (squareform(values) + np.eye(len(names)) for values in (p, holm(p)))
    return Ranking(names, scores, int(counts.min()), errors, run_errors, alone, corrected, lower_is_better)


def _check(systems: Mapping[str, Sequence[Scored]], run_spread: float | None) -> None:
    """Raises InputError as ``rank`` does."""
    if len(systems) < 2:
        raise InputError(Problem(", ".join(systems) or "the folder", "has fewer than two systems", "compare A B"))
    first = next(iter(systems.values()))[0]
    for runs in systems.values():
        check_side(runs)
        if runs[0].metric != first.metric:
            said = f"other scores: `{first.metric}` and `{runs[0].metric}`"
            raise InputError(Problem(f"{first.where} and {runs[0].where}", said, "give --metric"))
        check_items(first, runs[0])
    if run_spread is None and min(map(len, systems.values())) == 1 and not first.has_items:
        said = "one score each: nothing shows how far chance moves them"
        raise InputError(Problem(first.where, said, "give --seed-spread, the standard deviation of single runs"))


def _spread(all_runs: Sequence[Sequence[Scored]]) -> float:
    """Returns the standard deviation of single runs between seeds, pooled over the systems; 0 if each has one run."""
    left = [np.array([run.score for run in runs]) - np.mean([run.score for run in runs]) for runs in all_runs]
    freedom = sum(len(of_one) - 1 for of_one in left)
    return math.sqrt(sum(float((of_one**2).sum()) for of_one in left) / freedom) if freedom else 0.0


def _item_errors(all_runs: Sequence[Sequence[Scored]], scores: np.ndarray, items: int | None) -> np.ndarray:
    """Returns the standard error that the draw of the items adds to each score."""
    first = all_runs[0][0]
    if first.has_items:
        index, weight = first.items.index, first.items["weight"] / first.items["weight"].mean()
        scored = [[weight * run.items["value"].loc[index] for run in runs] for runs in all_runs]
        values = np.array([np.mean(of_one, axis=0) for of_one in scored])
        left = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
        k, n = values.shape
        return np.sqrt((left**2).sum(axis=1) / (n - 1) * k / (k - 1) / n)
    if items and unit_of(run for runs in all_runs for run in runs) == FRACTION:
        return np.sqrt(scores * (1 - scores) / items)
    return np.zeros(len(scores))


def trust(ranking: Ranking, draws: int = 4000) -> Trust:
    """Returns how often a ranking by one run of each system is right, simulated from the spread.

    The true scores are drawn from what is known of them: a normal prior with the spread of the systems, and the scores
    that were seen. If each system has one run, that ranking is the one that was seen. Otherwise it is a new one.
    """
    random = np.random.default_rng(0)
    scores, errors = (-1 if ranking.lower_is_better else 1) * ranking.scores, ranking.errors
    noise = float((errors**2).mean())
    # The floor keeps the order of equal systems random.
    prior = max(float(scores.var(ddof=1)) - noise, 1e-9 * noise)
    weight = prior / (prior + errors**2) if noise else np.ones(len(scores))
    centre, reach = scores.mean() + weight * (scores - scores.mean()), np.sqrt(weight) * errors
    shape = (len(scores), draws)
    truth = centre[:, None] + reach[:, None] * random.normal(size=shape)
    noisy = truth + ranking.run_errors[:, None] * random.normal(size=shape)
    seen = np.broadcast_to(scores[:, None], shape) if ranking.runs == 1 else noisy
    right = np.zeros(draws)
    for i in range(1, len(scores)):
        right += ((truth[:i] > truth[i]) == (seen[:i] > seen[i])).sum(axis=0)
    winner = truth.argmax(axis=0) == seen.argmax(axis=0)
    return Trust(float(winner.mean()), float((right / ranking.pairs).mean()), float((right == ranking.pairs).mean()))

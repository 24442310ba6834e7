"""The difference of two sets of scored runs, with seeds and items as two sources of chance. No torch."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from peftscope.analysis.compare import Difference, Outcome
from peftscope.analysis.scored import LOSS, Scored
from peftscope.analysis.stats import sign_flip_p
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError, Problem, shown

FEW = 16
"""Up to so many items that differ, the p of sign flips is exact and replaces that of the t test."""
MOST = 1_000_000
"""The most seeds or items that are asked for."""
ROUNDING = 1e-12
"""A standard error below this, as a share of the difference or of 1, counts as zero (rounding)."""


@dataclass(frozen=True)
class Pairing:
    """The scores of two sides, as they are compared.

    Attributes:
        sides: One array if runs are paired, with A's scores less B's; otherwise that of A, and that of B negated. Where
            lower scores are better all are negated, so that above zero A is better. Each has a row per seed and a
            column per item, or one column if items were not kept apart.
        tuning_error: The standard error that the choice of both learning rates adds.
        is_over_rates: Whether the mean of each row is what a study at several rates has for that seed.
    """

    sides: tuple[np.ndarray, ...]
    tuning_error: float = 0.0
    is_over_rates: bool = False

    @property
    def seeds(self) -> int:
        """The number of runs of the smaller side."""
        return min(len(side) for side in self.sides)

    @property
    def items(self) -> int:
        """The number of items; 1 if they were not kept apart."""
        return int(self.sides[0].shape[1])

    @property
    def mean(self) -> float:
        """How far A is ahead of B."""
        return float(sum(side.mean() for side in self.sides))

    @cached_property
    def by_item(self) -> np.ndarray:
        """The difference of each item, over all runs."""
        return np.sum([side.mean(axis=0) for side in self.sides], axis=0)

    @cached_property
    def _noise(self) -> list[float]:
        """The variance of single scores, on each side, that neither the seed nor the item explains."""
        noise = []
        for side in self.sides:
            left = side - side.mean(axis=1, keepdims=True) - side.mean(axis=0) + side.mean()
            noise.append(float((left**2).sum()) / max(1, (side.shape[0] - 1) * (side.shape[1] - 1)))
        return noise

    def difference(self, margin: float, seeds: int | None = None, items: int | None = None) -> Difference:
        """Returns the mean difference with its interval, for other seeds and for other items of their kind.

        With one seed, the interval speaks of other items alone. Source: the analysis of variance of two crossed random
        factors, Searle, Casella and McCulloch 1992, chapter 4; its degrees of freedom are those of Welch 1947.

        Args:
            margin: Of sameness, in the unit of the scores; not a number for none.
            seeds: Another number of runs on each side, with the spread as it was seen.
            items: Another number of items.
        """
        count = items or self.items
        if self.seeds == 1:
            return Difference(self.mean, float(self.by_item.std(ddof=1)), self.tuning_error, count, margin)
        sources = []
        for side, noise in zip(self.sides, self._noise, strict=True):
            between = side.mean(axis=1).var(ddof=1) - noise / self.items
            runs = seeds or len(side)
            sources.append((math.sqrt(max(0.0, between + noise / count) / runs), runs - 1))
        if self.items > 1:
            explained = sum(noise / len(side) for side, noise in zip(self.sides, self._noise, strict=True))
            of_items = max(0.0, self.by_item.var(ddof=1) - explained)
            sources.append((math.sqrt(of_items / count), count - 1))
        (error, freedom), *others = sources
        spread = error * math.sqrt(freedom + 1)
        return Difference(self.mean, spread, self.tuning_error, freedom + 1, margin, tuple(others))

    @cached_property
    def p(self) -> float:
        """The two-sided p of no difference."""
        unequal = self.by_item[self.by_item != 0]
        if self.seeds == 1 and len(unequal) <= FEW:
            return sign_flip_p(unequal) if len(unequal) else 1.0
        return self.difference(math.nan).p

    def outcome(self, margin: float) -> Outcome:
        """Returns what the comparison says."""
        return self.difference(margin).outcome_at(self.p)

    def seeds_to_decide(self, margin: float) -> int | None:
        """Returns how many runs on each side would decide, with these items; None if no number would.

        Without a margin, it is the number that would tell the difference from chance, if it stayed as it is.
        """
        return None if self.seeds == 1 else self._fewest(lambda n: self.difference(margin, seeds=n), self.seeds)

    def items_to_decide(self, margin: float) -> int | None:
        """Returns how many items would decide, with these seeds; None if no number would, or none were kept apart."""
        return None if self.items == 1 else self._fewest(lambda n: self.difference(margin, items=n), self.items)

    def _fewest(self, planned: Callable[[int], Difference], least: int) -> int | None:
        half_width, confidence = planned(least).deciding_width
        numbers = range(least, MOST)
        place = bisect_left(numbers, True, key=lambda n: planned(n).half_width(confidence) < half_width)
        return numbers[place] if place < len(numbers) else None

    @property
    def hidden_spread(self) -> float:
        """The spread of single runs between seeds above which the difference of two single runs could be chance.

        It is 0 if the draw of the items alone could explain the difference.
        """
        difference = self.difference(math.nan)
        reach = abs(self.mean) / difference.half_width() * difference.error
        return math.sqrt(max(0.0, reach**2 - difference.error**2) / 2)


def pair(a: Sequence[Scored], b: Sequence[Scored]) -> Pairing:
    """Returns the pairs of two sides: by item where items were kept apart, and by seed where two or more are common.

    Raises:
        InputError: The two cannot be compared: other scores, other items, one score each, or a side of several systems.
    """
    title = f"{a[0].system} and {b[0].system}"
    for side in (a, b):
        check_side(side)
    if a[0].metric != b[0].metric:
        scores = " and ".join(f"`{side[0].metric}`" for side in (a, b))
        raise InputError(Problem(title, f"other scores: {scores}", "give --metric with one that both have"))
    check_items(a[0], b[0])
    first, second = _values(a, a[0]), _values(b, a[0])
    common = [run.seed for run in a if run.seed is not None and run.seed in [other.seed for other in b]]
    if len(a) == len(b) == 1:
        sides: tuple[np.ndarray, ...] = (first - second,)
    elif len(common) > 1:
        rows = [[[run.seed for run in side].index(seed) for seed in common] for side in (a, b)]
        sides = (first[rows[0]] - second[rows[1]],)
    elif min(len(a), len(b)) > 1:
        sides = (first, -second)
    else:
        said = f"{len(a)} and {len(b)} runs: one run does not show how far its seeds spread"
        raise InputError(Problem(title, said, "give one run of each, or several of each"))
    sign = -1 if a[0].lower_is_better else 1
    weighted = tuple(sign * _weighted(side, a[0]) for side in sides)
    if judged := _pairs_of_study(a, b):
        values = np.array([judged[seed] for seed in common])
        weighted = (weighted[0] + (values - weighted[0].mean(axis=1))[:, None],)
    pairing = Pairing(weighted, tuning_error(a, b), is_over_rates=bool(judged))
    if pairing.seeds == pairing.items == 1:
        said = f"one score each, {a[0].score:.4g} and {b[0].score:.4g}: nothing shows how far chance moves them"
        raise InputError(Problem(title, said, "give scores of single items, or runs with more seeds"))
    return pairing


def check_spread(pairing: Pairing) -> None:
    """Raises InputError if all pairs differ by the same, as the same run twice does."""
    if pairing.difference(math.nan).error <= ROUNDING * max(1.0, abs(pairing.mean)):
        said = f"all pairs differ by {pairing.mean:.4g}, so that there is no spread to judge by"
        raise InputError(Problem("A and B", said, "check that these are two different runs, scored on many items"))


def check_side(side: Sequence[Scored]) -> None:
    """Raises InputError if the runs of a side are of several systems, of one seed, or scored on other items."""
    first = side[0]
    for run in side[1:]:
        if run.setting != first.setting:
            both, said = f"{first.where} and {run.where}", _changed(first.setting, run.setting)
            raise InputError(Problem(both, f"these are two systems: {said}", "name runs that differ by seed only"))
        check_items(first, run)
    unseeded = [run.where for run in side if run.seed is None]
    if len(set(unseeded)) < len(unseeded):
        place = max(unseeded, key=unseeded.count)
        raise InputError(Problem(place, "stands twice on one side", "name each run once"))
    seeds = [run.seed for run in side if run.seed is not None]
    if len(set(seeds)) < len(seeds):
        twice = max(seeds, key=seeds.count)
        raise InputError(Problem(first.system, f"seed {twice} appears twice", "give each seed once"))


def _changed(first: str, second: str) -> str:
    """Returns what differs between two settings."""
    one, other = (json.loads(text) if text else {} for text in (first, second))
    if not isinstance(one, dict) or not isinstance(other, dict):
        return "their settings differ"
    one, other = (
        fields | (method if isinstance(method := fields.get("method"), dict) else {}) for fields in (one, other)
    )
    keys = sorted(key for key in {*one, *other} - {"method"} if one.get(key) != other.get(key))
    return "; ".join(f"{key} is {shown(one.get(key))} and {shown(other.get(key))}" for key in keys)


def check_items(one: Scored, other: Scored) -> None:
    """Raises InputError if two runs were not scored on the same items."""
    where = f"{one.where} and {other.where}"
    remedy = "score both on the same items, all of them"
    if one.has_items != other.has_items:
        raise InputError(Problem(where, "only one of them has scores of single items", remedy))
    missing = one.items.index.symmetric_difference(other.items.index)
    if len(missing):
        said = f"other items: {len(one.items)} and {len(other.items)}, {len(missing)} of them in only one"
        raise InputError(Problem(where, said, remedy))
    aligned = other.items.loc[one.items.index]
    differs = (aligned["content"] != one.items["content"]).to_numpy()
    if differs.any():
        first = aligned.index[differs][0]
        said = f"other data: {differs.sum()} of {len(aligned)} items ask something else, item {first} first"
        raise InputError(Problem(where, said, remedy))
    if (aligned["weight"] != one.items["weight"]).any():
        raise InputError(Problem(where, "other tokens: the same text has other lengths", "give --metric exact_match"))


def tuning_error(*sides: Sequence[Scored]) -> float:
    """Returns the standard error that the choice of the learning rates of a study's arms adds; 0 for other runs."""
    arms = dict.fromkeys(side[0].study for side in sides if side[0].study and side[0].metric == LOSS)
    return math.hypot(*(StudyResults(study).tuning_error(arm) for study, arm in arms)) if arms else 0.0


def _pairs_of_study(a: Sequence[Scored], b: Sequence[Scored]) -> dict[int, float]:
    """Returns by seed how far A is ahead if both are runs of one study's arms at several rates; otherwise nothing."""
    (first, *others), (second, *more) = ({run.study for run in side} for side in (a, b))
    if others or more or not (first and second and first[0] == second[0] and a[0].metric == LOSS):
        return {}
    study, arms = StudyResults(first[0]), (first[1], second[1])
    return study.pairs(*arms).to_dict() if study.has_several_rates(*arms) else {}


def _values(side: Sequence[Scored], first: Scored) -> np.ndarray:
    """Returns the scores of a side, a row per run, with the items in the order of another run."""
    return np.array([run.items["value"].loc[first.items.index].to_numpy(float) for run in side])


def _weighted(side: np.ndarray, first: Scored) -> np.ndarray:
    """Returns scores whose plain means are the weighted ones, and which spread as the weighted means do.

    Source: the linearised ratio of two means, Cochran 1977, section 6.
    """
    weights = first.items["weight"].to_numpy(float) / first.items["weight"].mean()
    mean = float((side * weights).mean())
    return mean + weights * (side - mean)

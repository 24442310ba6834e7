"""Reads the results of studies: best learning rates, and paired differences between arms. Nothing is trained.

Gains are shares of the task gain: what the task itself teaches, beyond the form of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from peftscope.analysis.beside_loss import beside_loss
from peftscope.analysis.collect import paired
from peftscope.analysis.compare import MARGIN, compare
from peftscope.analysis.exact_match import ACCURACY, ARGMAX, GREEDY, exact_match, has_whole_split, points
from peftscope.analysis.stats import CONFIDENCE, mean_interval, sign_flip_p, trimmed_mean
from peftscope.analysis.study import HELDOUT, VALIDATION, StudyResults
from peftscope.claims.measurement import POINTS, TOKENS, WITHIN, Measurement, NotRunError, Quantity, over_seeds, runs_of
from peftscope.data.tasks import symbols_of
from peftscope.models.catalog import find_model
from peftscope.words import interval, signed

FEWEST_RATES = 4
REACHES = (3.5, 10.0)
"""The factors around the best rate within which a parabola describes the loss: the first that holds enough runs.

Farther out the loss rises more steeply. Within a factor of ten, LoRA's best rate in `variants` lies apart from its own
(A/A), 0.53 times [0.34, 0.81]; within the window of the tuning's own fit the interval has 1 in it, 0.73 [0.28, 1.81].
"""


def learning_rate_ratio(study: str, arm: str, against: str, resamples: int = 2000) -> Measurement:
    """Returns the ratio of the best learning rates of two arms with the 95 % interval of a bootstrap.

    The best rate of an arm that ran at several with the seeds of its study is the vertex of a parabola in the logarithm
    of the rate. It goes through the lowest held-out loss, a mean without the best and the worst seed, and through those
    at the rates to both sides; an arm whose lowest lies at an end has its best rate there. The bootstrap draws seeds,
    the same for all arms, and finds the lowest anew.

    In earlier studies the parabola is fitted to the validation losses of tuning runs within one of ``REACHES`` of the
    rate with the lowest mean. The bootstrap draws the residuals of all arms' fits from one pool and fits anew. A
    minimum is sought only among the rates that were tried.

    Raises:
        NotRunError: An arm has too few rates around its best for a fit with residuals.
    """
    return _over_rates(StudyResults(study), (arm, against), lambda best: best[0] - best[1], resamples)


def learning_rate_spread(study: str, arms: list[str], resamples: int = 2000) -> Measurement:
    """Returns the largest over the smallest best learning rate of some arms; see ``learning_rate_ratio``.

    The spread of rates that are all the same is above 1, because each is known only roughly. The interval has it too.
    """
    return _over_rates(StudyResults(study), tuple(arms), lambda best: best.max(axis=0) - best.min(axis=0), resamples)


def rate_correlation(study: str, arms: list[str], setting: str, resamples: int = 2000) -> Measurement:
    """Returns Spearman's correlation over arms of the best learning rate with a setting; see ``learning_rate_ratio``.

    A setting is a field of the runs, such as ``alpha``. If all arms have the same best
    rate, as when all stop at the end of their lists, the correlation is 0.
    """
    results = StudyResults(study)
    values = [float(results.tuning_runs(arm)[setting].iloc[0]) for arm in arms]
    return _over_rates(results, tuple(arms), lambda best: _spearman(values, best.T), resamples, lambda value: value)


def _over_rates(
    results: StudyResults,
    arms: tuple[str, ...],
    combine: Callable[[np.ndarray], np.ndarray],
    resamples: int,
    finish: Callable[[Any], Any] = np.exp,
) -> Measurement:
    """Returns a combination of the best learning rates of some arms, with the interval of a bootstrap.

    Args:
        combine: Gives the logarithm of the quantity from those of the rates, of shape (arms, samples).
        finish: Gives the quantity from what ``combine`` gives.
    """
    random, beside, ends = np.random.default_rng(0), dict[str, Quantity](), list[str]()
    if all(results.has_several_rates(arm) for arm in arms):
        runs = {name: results.rate_runs(name) for name in arms}
        losses = {name: results.losses_by_rate(name) for name in arms}
        common = set.intersection(*(set(table.index) for table in losses.values()))
        losses = {name: table[table.index.isin(common)] for name, table in losses.items()}
        n = len(common)
        drawn = random.integers(n, size=(resamples, n))
        draws = np.stack([_vertices(table, drawn) for table in losses.values()])
        best = np.stack([_vertices(table, np.arange(n)[None]) for table in losses.values()])
        means = {name: table.apply(trimmed_mean) for name, table in losses.items()}
        ends = [name for name, mean in means.items() if mean.idxmin() in (mean.index[0], mean.index[-1])]
        kind = "held-out"
    else:
        runs = {name: results.tuning_runs(name) for name in arms}
        fits = {name: _Fit.of(name, table) for name, table in runs.items()}
        pool = np.concatenate([fit.residuals for fit in fits.values()])
        n = len(pool)
        draws = np.stack([fit.optima(random.choice(pool, (resamples, len(fit.x)))) for fit in fits.values()])
        best = np.stack([fit.optima(np.zeros((1, len(fit.x)))) for fit in fits.values()])
        means = {name: table.groupby("learning_rate")[VALIDATION].mean() for name, table in runs.items()}
        kind, beside = "validation", {"spread of the residuals, nats per token": float(pool.std())}
    low, high = finish(np.quantile(combine(draws), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    rates = {f"best rate of {name}": math.exp(value) for name, value in zip(arms, best[:, 0], strict=True)}
    return Measurement(
        float(finish(combine(best)[0])),
        low=float(low),
        high=float(high),
        n=n,
        evidence=rates | beside,
        curves={name: curve.dropna().to_dict() for name, curve in means.items()},
        axes=("learning rate", f"{kind} loss, nats per token"),
        model=results.subject,
        run_ids=tuple(run for table in runs.values() for run in table["run_id"]),
        spoiled_by=f"the best rate of {' and '.join(ends)} lies at an end of its rates" if ends else "",
    )


def heldout_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how much lower an arm's held-out loss is than another's."""
    results = StudyResults(study)
    entries = list(chain(*results.entries(arm, against)))
    evidence: dict[str, Quantity] = {f"mean loss of {name}": results.loss(name) for name in entries}
    evidence |= _doubts(results, arm, against)
    differences = results.pairs(arm, against) / results.task_gain
    error = results.tuning_error(arm, against) / results.task_gain
    found = _over_seeds(results, differences, evidence, runs_of(results, *entries), error)
    is_listed = bool(symbols_of(results.table["task"].iloc[0]))  # hardly any answer is right as a whole
    of_all = is_listed or has_whole_split(results, arm, against)
    if of_all and (more := mean_interval(points(results, arm, against, ARGMAX if is_listed else ""))):
        told = interval(more.mean, more.low, more.high, lambda value: signed(value, ".1f"))
        found = replace(found, evidence={**found.evidence, TOKENS if is_listed else POINTS: told})
    return replace(found, p_adjusted=results.corrected_p(arm, against), matters=_matters(results, arm, against))


def _matters(results: StudyResults, *arms: str) -> float:
    """Returns what matters, as a share of the task gain, where each of some arms ran at several rates, and else 0."""
    return MARGIN * all(results.rate(arm).is_tuned for arm in arms)


def _doubts(results: StudyResults, *arms: str) -> dict[str, Quantity]:
    """Returns how many runs of some arms diverged, and which arms' best rates lie at an end of their lists."""
    diverged = sum(int((results.arm_runs(arm)["status"] == "diverged").sum()) for arm in arms)
    found: dict[str, Quantity] = {"runs that diverged": diverged}
    if at_an_end := [arm for arm in arms if results.rate(arm).is_at_an_end]:
        found["best rate at an end of its list"] = ", ".join(at_an_end)
    return found


def heldout_gain_on_base(study: str, against: str, base_weights: str, arm: str = "") -> Measurement:
    """Returns how much lower an arm's held-out loss is than another's, if the arm's untouched base is sound.

    The base is destroyed, and nothing follows from training on it, if its loss on the held-out items is that of a
    uniform guess over the vocabulary or above it. Then the untouched base itself stands for the arm, which need not be
    trained.

    Args:
        study: The study's experiment, which has a run of the untouched base in these weights.
        base_weights: The weights of the untouched base, such as ``nf2``.
        arm: The arm that trains on this base; empty: none does.

    Raises:
        NotRunError: The study has no such run of the base, or the base is sound and no arm trains on it.
    """
    results = StudyResults(study)
    table = results.table
    bases = table[(table["method"] == "none") & (table["base_weights"] == base_weights)].dropna(subset=[HELDOUT])
    if bases.empty:
        raise NotRunError(f"the study `{study}` has no run of the untouched base in {base_weights}")
    shape = find_model(str(table["model"].iloc[0])).shape
    assert shape is not None
    loss, guess = float(bases[HELDOUT].iloc[0]), math.log(shape.vocab_size)
    evidence: dict[str, Quantity] = {
        f"loss of the untouched base in {base_weights}": loss,
        "loss of a uniform guess": guess,
    }
    if loss < guess:
        if not arm:
            said = f"in {base_weights} the untouched base costs {loss:.3g} nats a token here, a guess {guess:.3g}"
            raise NotRunError(f"{said}; `{study}` has no arm that trains on it")
        found = heldout_gain(study, arm, against)
        return replace(found, evidence={**found.evidence, **evidence})
    other = results.arm_runs(against)
    spoiled = f"base destroyed: in {base_weights} it costs {loss:.3g} nats a token, a uniform guess {guess:.3g}"
    ids = (*bases["run_id"].iloc[:1], *other["run_id"])
    behind = (float(other[HELDOUT].mean()) - loss) / results.task_gain
    return Measurement(behind, n=1, evidence=evidence, model=results.subject, run_ids=ids, spoiled_by=spoiled)


def difference_of_gains(study: str, first: list[str], second: list[str]) -> Measurement:
    """Returns how much larger one gain in held-out loss is than another.

    Args:
        first: An arm and the arm whose loss less its own is the first gain.
        second: The same for the second gain.
    """
    results = StudyResults(study)
    gains = [results.pairs(arm, against) / results.task_gain for arm, against in (first, second)]
    names = [f"mean gain of {arm} over {against}" for arm, against in (first, second)]
    evidence: dict[str, Quantity] = dict(zip(names, map(fmean, gains), strict=True))
    arms = tuple(dict.fromkeys((*first, *second)))
    evidence |= _doubts(results, *arms)
    error = results.tuning_error(*arms) / results.task_gain
    return _over_seeds(results, (gains[0] - gains[1]).dropna(), evidence, runs_of(results, *arms), error)


def accuracy_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how many more held-out questions an arm answers exactly right than another, in percentage points.

    A run that diverged counts with the exact match of the untouched base.
    """
    results = StudyResults(study)
    column = GREEDY if has_whole_split(results, arm, against) else ACCURACY
    scores = 100 * paired(exact_match(results, arm, column), exact_match(results, against, column), column)
    evidence = {f"exact match of {one}, %": mean for one, mean in _means(results, arm, against, scores).items()}
    more = points(results, arm, against)
    return _over_seeds(results, more, evidence, runs_of(results, arm, against))


def smallest_rank(study: str, ranks: dict[str, int], margin: float) -> Measurement:
    """Returns the smallest rank whose held-out loss is shown to be the same as the best rank's, by two one-sided tests.

    The interval goes down to the smallest rank that is not worse by more than the margin, a share of the task gain.
    """
    results = StudyResults(study)
    ordered = sorted(ranks, key=lambda arm: ranks[arm])
    best = max(ordered, key=lambda arm: results.difference(arm, ordered[0]).mean if arm != ordered[0] else 0.0)
    found = {arm: results.difference(arm, best, margin) for arm in ordered if arm != best}
    behind = {arm: -found[arm].mean / results.task_gain if arm in found else 0.0 for arm in ordered}

    def first(is_enough: Callable[[str], bool]) -> int:
        return next(ranks[arm] for arm in ordered if arm == best or is_enough(arm))

    shown = first(lambda arm: found[arm].is_same)
    return Measurement(
        shown,
        low=first(lambda arm: not (found[arm].exceeds_margin and behind[arm] > 0)),
        high=shown,
        n=min((one.n for one in found.values()), default=1),
        evidence={f"rank {ranks[arm]}: loss above the best's, of the task gain": behind[arm] for arm in ordered},
        model=results.subject,
        run_ids=runs_of(results, *ordered),
    )


def furthest(study: str, arms: dict[str, str], margin: float) -> Measurement:
    """Returns the held-out gain of the arm that contradicts sameness within a margin most.

    That is an arm whose interval lies outside of the margin, a share of the task gain, if there is one, and otherwise
    the one that reaches furthest. Each arm is given with the one that it is compared with.
    """
    found = {arm: heldout_gain(study, arm, against) for arm, against in arms.items()}

    def against_sameness(arm: str) -> tuple[float, float]:
        gain = found[arm]
        assert gain.low is not None
        assert gain.high is not None
        reach = compare(gain.samples, margin, gain.tuning_error).interval(0.9)
        return max(0.0, gain.low - margin, -gain.high - margin), max(map(abs, reach))

    chosen = max(found, key=against_sameness)
    beside: dict[str, Quantity] = {f"mean gain of {arm} over {arms[arm]}": gain.value for arm, gain in found.items()}
    beside["margin, nats per token"] = margin * StudyResults(study).task_gain
    return _shown(found, chosen, f"{chosen} against {arms[chosen]}", beside)


def closest(study: str, arms: list[str], against: str) -> Measurement:
    """Returns how far the one of some arms that comes closest to another's held-out loss is behind it."""
    found = {arm: heldout_gain(study, against, arm) for arm in arms}
    chosen = min(found, key=lambda arm: float(found[arm].value))
    return _shown(found, chosen, chosen, {f"{arm} behind {against}": gain.value for arm, gain in found.items()})


def _shown(gains: dict[str, Measurement], chosen: str, named: str, beside: dict[str, Quantity]) -> Measurement:
    """Returns one of several gains, with what is told of all of them, and with the runs of all."""
    runs = dict.fromkeys(run for gain in gains.values() for run in gain.run_ids)
    evidence = {"shown": named, **gains[chosen].evidence, **beside}
    return replace(gains[chosen], evidence=evidence, run_ids=tuple(runs))


def training_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how much lower an arm's mean loss over all steps is, each on batches that it had not yet seen.

    A better start counts as well as faster learning.
    """
    results = StudyResults(study)
    means = results.losses["nll_nats_per_token"].groupby("run_id").mean()
    pairs = paired(results.arm_runs(arm), results.arm_runs(against), means)
    evidence = {f"mean loss of {one}": mean for one, mean in _means(results, arm, against, pairs).items()}
    higher = beside_loss(results, arm, against, lambda mine, other: paired(mine, other, means))
    error = results.tuning_error(arm, against) / results.task_gain
    runs = runs_of(results, arm, against)
    found = _over_seeds(results, [-value / results.task_gain for value in higher], evidence, runs, error)
    return replace(found, matters=_matters(results, arm, against))


def _means(results: StudyResults, arm: str, against: str, pairs: pd.DataFrame) -> dict[str, float]:
    """Returns the mean of each of two arms over the seeds of their pairs, as their comparison takes it."""
    mean = results.mean_of(arm, against) if len(pairs) else lambda _: math.nan
    return {one: mean(list(pairs[side])) for one, side in ((arm, "first"), (against, "second"))}


def _over_seeds(
    results: StudyResults,
    values: Iterable[float],
    evidence: Mapping[str, Quantity],
    runs: tuple[str, ...],
    tuning_error: float = 0.0,
) -> Measurement:
    """Returns the mean of values, one per seed, with its interval, and what two tests say of it."""
    found = over_seeds(results, values, evidence, runs, tuning_error)
    beside: dict[str, Quantity] = {"task gain, nats per token": results.task_gain}
    if found.n > 1:
        difference = compare(found.samples, math.inf, tuning_error)
        beside |= {WITHIN: difference.bound, "paired t, p": difference.p}
        beside["sign flips, p"] = sign_flip_p(found.samples)
    if found.tuning_error:
        beside["standard error from tuning"] = found.tuning_error
    return replace(found, evidence={**found.evidence, **beside})


def _spearman(values: list[float], rows: np.ndarray) -> np.ndarray:
    """Returns the rank correlation of every row with the values, 0 for a row of equal numbers."""
    first, second = rankdata(values), rankdata(rows, axis=1)
    first, second = first - first.mean(), second - second.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(first) * np.linalg.norm(second, axis=1)
    return np.divide(second @ first, norms, out=np.zeros(len(rows)), where=norms > 0)


@dataclass(frozen=True)
class _Fit:
    """A parabola through an arm's losses near its best rate.

    Attributes:
        x: The logarithm of each run's learning rate.
        fitted: The parabola's loss there.
        residuals: The differences of the losses from it, widened for the values that the fit takes.
        design: The terms of the fit: the parabola, and a constant for each tuning seed.
    """

    x: np.ndarray
    fitted: np.ndarray
    residuals: np.ndarray
    design: np.ndarray

    @classmethod
    def of(cls, arm: str, runs: pd.DataFrame) -> _Fit:
        """Returns the fit of an arm. Runs that diverged have no loss and are left out."""
        losses = runs.dropna(subset=[VALIDATION])
        best = losses.groupby("learning_rate")[VALIDATION].mean().idxmin()
        rates = losses["learning_rate"] / best
        within = [losses[(rates <= reach) & (rates >= 1 / reach)] for reach in REACHES]
        # Residuals need more runs than the terms of a parabola and a constant for each seed.
        residual = [near for near in within if len(near) > 2 + near["seed"].nunique()]
        enough = [near for near in residual if near["learning_rate"].nunique() >= FEWEST_RATES]
        if not enough:
            raise NotRunError(f"`{arm}` has fewer than four rates within a factor of {REACHES[-1]:g} of its best")
        near = enough[0]
        x, y = np.log(near["learning_rate"].to_numpy()), near[VALIDATION].to_numpy()
        seeds = pd.get_dummies(near["seed"]).to_numpy(dtype=float)
        design = np.column_stack([x**2, x, seeds])
        fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
        return cls(x, fitted, (y - fitted) * math.sqrt(len(x) / (len(x) - design.shape[1])), design)

    def optima(self, noise: np.ndarray) -> np.ndarray:
        """Returns the logarithm of the best rate for each row of noise that is added to the fitted losses."""
        curvature, slope = np.linalg.lstsq(self.design, (self.fitted + noise).T, rcond=None)[0][:2]
        grid = np.linspace(self.x.min(), self.x.max(), 401)
        return grid[np.argmin(np.outer(curvature, grid**2) + np.outer(slope, grid), axis=1)]


def _vertices(losses: pd.DataFrame, drawn: np.ndarray) -> np.ndarray:
    """Returns the logarithm of an arm's best rate for some draws of its seeds.

    Args:
        losses: The losses of the arm, a row for each seed, a column for each rate, ascending.
        drawn: The places of the seeds of each draw, of shape (draws, seeds).
    """
    rates = np.log(losses.columns.to_numpy(dtype=float))

    def vertex(means: list[float]) -> float:
        lowest = int(np.argmin(means))
        if lowest in (0, len(means) - 1):
            return float(rates[lowest])
        near = slice(lowest - 1, lowest + 2)
        curvature, slope, _ = np.polyfit(rates[near], means[near], 2)
        return float(-slope / (2 * curvature))

    by_draw = (draw.T.tolist() for draw in losses.to_numpy()[drawn])
    return np.array([vertex(list(map(trimmed_mean, of_rates))) for of_rates in by_draw])

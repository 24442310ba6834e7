"""The margins and sentences of ``peftscope compare``. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from peftscope.analysis.compare import Outcome
from peftscope.analysis.paired import FEW, Pairing, check_items, check_side
from peftscope.analysis.scored import FRACTION, NATS, Scored, unit_of
from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError, Problem, shown
from peftscope.report.sentences import spoken_outcome, spoken_side
from peftscope.words import counted, interval, signed


@dataclass(frozen=True)
class Margin:
    """The margin of sameness.

    Attributes:
        value: In the unit of the scores; not a number if none was given.
        text: As it was given.
    """

    value: float = math.nan
    text: str = ""


GAIN_REMEDY = "give --base: the run that has learned nothing, best one on shuffled labels; or name arms as STUDY:ARM"


def number_and_unit(text: str, where: str) -> tuple[float, str]:
    """Returns the number and the unit of an amount.

    Raises:
        InputError: The text is no amount, or a bare per cent.
    """
    match = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)\s*(pp|%gain|nats|%|)", text.strip())
    if not match or not 0 < float(match[1]) < 1e9:
        raise InputError(Problem(where, f"no amount (got {shown(text)})", "as in 2pp, 2.5%gain or 0.02"))
    if match[2] == "%":
        remedy = f"say {match[1]}pp for percentage points of the score, or {match[1]}%gain for a share of the task gain"
        raise InputError(Problem(where, f"a bare per cent does not say of what (got {shown(text)})", remedy))
    return float(match[1]), match[2]


def amount(text: str, where: str, unit: str) -> float:
    """Returns an amount in the unit of the scores."""
    number, given = number_and_unit(text, where)
    fits = given == "pp" if unit == FRACTION else given == "" or (given == "nats" and unit == NATS)
    if not fits:
        remedy = "give percentage points, as in 2pp" if unit == FRACTION else "give a bare number in their own unit"
        said = f"does not fit these scores, which are {'fractions' if unit == FRACTION else unit or 'of no known unit'}"
        raise InputError(Problem(where, f"{said} (got {shown(text)})", remedy))
    return number / 100 if given == "pp" else number


def read_margin(text: str | None, sides: Sequence[Sequence[Scored]], base: Sequence[Scored] | None) -> Margin:
    """Returns the margin in the unit of the scores.

    Args:
        text: As it was given; None for no margin.
        sides: The runs of A and of B.
        base: The runs that have learned nothing, against which the gain of B counts.

    Raises:
        InputError: The text is no margin for these scores, or the task gain is not known.
    """
    if text is None:
        return Margin()
    number, given = number_and_unit(text, "--margin")
    if given != "%gain":
        return Margin(amount(text, "--margin", unit_of(run for side in sides for run in side)), text.strip())
    return Margin(number / 100 * _task_gain(sides, base), f"{number:g} % of the task gain")


def _task_gain(sides: Sequence[Sequence[Scored]], base: Sequence[Scored] | None) -> float:
    b = sides[1]
    if base is not None:
        check_side(base)
        check_items(b[0], base[0])
        if not (gain := abs(_mean(b) - _mean(base))):
            raise InputError(Problem("--base", "scores as B does, so that there is no gain", GAIN_REMEDY))
        return gain
    studies = {side[0].study[0] if side[0].study else None for side in sides}
    study = studies.pop() if len(studies) == 1 else None
    if study is None or b[0].unit != NATS:
        raise InputError(Problem("--margin", "the task gain of these scores is not known", GAIN_REMEDY))
    return StudyResults(study).task_gain


def _mean(side: Sequence[Scored]) -> float:
    return float(np.mean([run.score for run in side]))


def spoken(value: float, unit: str, points: str = "pp") -> str:
    """Returns a score or a difference of scores with its unit; fractions in hundredths, which are called ``points``.

    >>> spoken(0.0123, "fraction"), spoken(0.75, "fraction", "%"), spoken(0.25, "nats per token")
    ('1.23 pp', '75.00 %', '0.2500 nats per token')
    """
    return f"{_scale(unit) * value:{_form(unit)}} {points if unit == FRACTION else unit}".replace("-", "−").rstrip()


def _scale(unit: str) -> int:
    return 100 if unit == FRACTION else 1


def _form(unit: str) -> str:
    return ".2f" if unit == FRACTION else ".4f" if unit else ".4g"


def describe(a: Sequence[Scored], b: Sequence[Scored], pairing: Pairing, margin: Margin) -> Iterator[str]:
    """Yields what a comparison says, one sentence or two at a time."""
    unit = unit_of([*a, *b])
    for letter, side in (("A", a), ("B", b)):
        yield f"{letter}: {side[0].system}, {_runs(side)}. {side[0].metric}: {spoken(_mean(side), unit, '%')}."
    difference, seen = pairing.difference(margin.value), _seen(pairing)
    name = " pp" if unit == FRACTION else f" {unit}".rstrip()
    ahead = interval(pairing.mean, *difference.interval(), lambda v: signed(_scale(unit) * v, _form(unit)), name)
    yield f"A against B: {ahead} ({100 * CONFIDENCE:g} % interval), from {seen}. Above zero, A is better."
    if pairing.is_over_rates:
        yield _judged(a, b, unit)
    differs = pairing.p < 1 - CONFIDENCE
    is_exact = pairing.seeds == 1 and int((pairing.by_item != 0).sum()) <= FEW
    exact = f" by exact sign flips, because {FEW} items or fewer differ" if is_exact else ""
    yield (
        f"Chance: A is {spoken_side(pairing.mean)}, and this can be told from chance (p = {pairing.p:.2g}{exact})."
        if differs
        else f"Chance: the difference cannot be told from chance (p = {pairing.p:.2g}{exact})."
    )
    outcome = pairing.outcome(margin.value)
    if not math.isnan(margin.value):
        value = "" if margin.text.endswith("pp") else f" ({spoken(margin.value, unit)})"
        said = f"{spoken_outcome(outcome, pairing.mean, margin.text)}, within {spoken(difference.bound, unit)}"
        yield f"Margin ±{margin.text}{value}: {said}."
    if outcome == Outcome.OPEN or (outcome == Outcome.DIFFERS and not math.isnan(margin.value)):
        has_margin = not math.isnan(margin.value)
        what = f"whether they differ by more than {margin.text} or are the same" if has_margin else "which is ahead"
        yield f"To decide {what}, if the difference stayed as it is: {_needed(pairing, margin.value)}."
    yield from _sources(pairing, unit, differs=differs)


def _judged(a: Sequence[Scored], b: Sequence[Scored], unit: str) -> str:
    """Returns how a study at several rates judges two of its arms, with the losses that it subtracts."""
    (name, arm), (_, against) = (side[0].study or ("", "") for side in (a, b))
    study = StudyResults(name)
    sides = [fmean(study.loss(entry) for entry in entries) for entries in study.entries(arm, against)]
    tuned = [" and its A/A" * (len(entries) > 1) for entries in study.entries(arm, against)]
    losses = "; ".join(f"{of}{more} {spoken(loss, unit)}" for of, more, loss in zip("AB", tuned, sides, strict=True))
    return f"As its study judges it, without the best and the worst seed: {losses}. Rates are chosen anew without each."


def comparison_json(a: Sequence[Scored], b: Sequence[Scored], pairing: Pairing, margin: Margin) -> dict[str, Any]:
    """Returns what a comparison says, for programs: scores, differences and errors in the unit of the scores."""
    difference = pairing.difference(margin.value)
    has_margin = not math.isnan(margin.value)
    return {
        "metric": a[0].metric,
        "unit": unit_of([*a, *b]),
        "a": {"system": a[0].system, "runs": len(a), "score": _mean(a)},
        "b": {"system": b[0].system, "runs": len(b), "score": _mean(b)},
        "ahead_by": pairing.mean,
        "interval_95": list(difference.interval()),
        "standard_error": difference.error,
        "p": pairing.p,
        "is_paired": len(pairing.sides) == 1,
        "runs_each": pairing.seeds,
        "items": pairing.items if pairing.items > 1 else None,
        "margin": margin.value if has_margin else None,
        "outcome": str(pairing.outcome(margin.value)) if has_margin else None,
        "runs_to_decide": pairing.seeds_to_decide(margin.value),
        "items_to_decide": pairing.items_to_decide(margin.value),
    }


def _runs(side: Sequence[Scored]) -> str:
    runs = counted(len(side), "run")
    return f"{runs} × {len(side[0].items):,} items" if side[0].has_items else runs


def _seen(pairing: Pairing) -> str:
    """Returns what was compared, in words."""
    if len(pairing.sides) > 1:
        runs = f"{len(pairing.sides[0])} and {len(pairing.sides[1])} runs that are not paired"
    else:
        runs = counted(pairing.seeds, "pair of runs", "pairs of runs")
    return f"{runs} and {pairing.items:,} items" if pairing.items > 1 else runs


def _needed(pairing: Pairing, margin: float) -> str:
    """Returns how many seeds or items would decide."""
    parts = []
    if pairing.seeds > 1:
        seeds = pairing.seeds_to_decide(margin)
        parts.append(f"{seeds:,} seeds of each" if seeds else "no number of seeds alone")
    if pairing.items > 1:
        items = pairing.items_to_decide(margin)
        parts.append(f"{items:,} items" if items else "no number of items alone")
    return ", or ".join(parts)


def _sources(pairing: Pairing, unit: str, *, differs: bool) -> Iterator[str]:
    """Yields where the chance comes from, and what the runs cannot show."""
    if pairing.seeds == 1:
        yield (
            "One run of each shows the chance of the items and nothing of the seeds: how far another seed would move "
            "the scores cannot be seen, nor how many seeds would decide."
        )
        if differs:
            yield (
                f"If single runs spread between seeds by more than {spoken(pairing.hidden_spread, unit)} (standard "
                "deviation), this difference could be chance. Two more seeds of each would begin to show it."
            )
        return
    difference = pairing.difference(math.nan)
    of_items = difference.others[-1][0] if pairing.items > 1 else 0.0
    of_runs = math.sqrt(max(0.0, difference.error**2 - of_items**2 - pairing.tuning_error**2))
    parts = [f"seeds {spoken(of_runs, unit)}"]
    parts += [f"items {spoken(of_items, unit)}"] if pairing.items > 1 else []
    parts += [f"the choice of learning rates {spoken(pairing.tuning_error, unit)}"] if pairing.tuning_error else []
    yield f"Standard error from each source: {', '.join(parts)}."

"""The cells of an experiment, each of which becomes a run: listed runs, grids, ladders and studies. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftscope.hardware.device import Device
from peftscope.planning.experiment import A_A_SHIFT, Entrant, Experiment, Study


@dataclass(frozen=True)
class Cell:
    """One place of a sweep, which becomes a run.

    Attributes:
        group: The comparison that it belongs to.
        varies: Fields in which runs of that comparison may differ.
        values: Flat fields of the run.
        origins: The place in the file of each value that a message may name.
    """

    group: str
    varies: set[str]
    values: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)


def plain_cells(experiment: Experiment, device: Device) -> Iterator[Cell]:
    """Yields the cells of an experiment on a device, but for those of a study."""
    yield from listed_cells(experiment.runs, "runs", experiment.seeds[0])
    if experiment.axes or experiment.linked or not (experiment.runs or experiment.ladders or experiment.study):
        yield from grid_cells(experiment)
    yield from ladder_cells(experiment)
    if device == "cuda":
        yield from listed_cells(experiment.card_runs, "card_runs", experiment.seeds[0])


def count_cells(experiment: Experiment) -> int:
    """Returns how many cells an experiment has, without making them: exclusions and a study's controls apart.

    >>> count_cells(Experiment(axes={"rank": [2, 4, 8]}, linked=[[{"alpha": 1}, {"alpha": 2}]], seeds=[0, 1]))
    12
    """
    count = len(experiment.runs) + len(experiment.card_runs)
    if experiment.axes or experiment.linked:
        grid = math.prod(len(factor) for factor in [*experiment.axes.values(), *experiment.linked])
        seeded = "seed" in experiment.axes or any("seed" in row for rows in experiment.linked for row in rows)
        count += grid * (1 if seeded else len(experiment.seeds))
    for ladder in experiment.ladders:
        count += sum(map(len, ladder.axes.values())) * len(ladder.seeds or experiment.seeds)
    if study := experiment.study:
        tuned = [study.learning_rates[entrant.arm] for entrant in study.entrants if entrant.arm in study.learning_rates]
        count += sum(map(len, tuned)) * len(study.tuning_seeds)
        count += sum((3 if e.arm in study.learning_rates else 1) * len(study.seeds_of(e.name)) for e in study.entrants)
    return count


def listed_cells(runs: Sequence[dict[str, Any]], key: str, seed: int) -> Iterator[Cell]:
    """Yields the cells of runs that an experiment lists under a key: each one as it stands."""
    for index, values in enumerate(runs):
        origins = {name: f"{key}[{index}].{name}" for name in values}
        yield Cell(key, set(values), {"seed": seed, **values}, origins)


def grid_cells(experiment: Experiment) -> Iterator[Cell]:
    """Yields the cross product of ``axes``, ``linked`` and ``seeds``."""
    factors: list[list[tuple[dict[str, Any], dict[str, str]]]] = [
        [({key: value}, {key: f"axes.{key}[{i}]"}) for i, value in enumerate(values)]
        for key, values in experiment.axes.items()
    ]
    factors += [
        [(dict(row), {key: f"linked[{n}][{i}].{key}" for key in row}) for i, row in enumerate(rows)]
        for n, rows in enumerate(experiment.linked)
    ]
    if not any("seed" in values for factor in factors for values, _ in factor):
        factors.append([({"seed": seed}, {"seed": f"seeds[{i}]"}) for i, seed in enumerate(experiment.seeds)])
    varies = {key for factor in factors for values, _ in factor for key in values}
    if "method" in varies:
        varies.update(*experiment.methods.values())
    for parts in itertools.product(*factors):
        values, origins = {}, {}
        for part, places in parts:
            values.update(part)
            origins.update(places)
        yield Cell("grid", varies, values, origins)


def ladder_cells(experiment: Experiment) -> Iterator[Cell]:
    """Yields the cells of ``ladders``: one field at a time around the centre."""
    for n, ladder in enumerate(experiment.ladders):
        centre = {key: f"ladders[{n}].centre.{key}" for key in ladder.centre}
        for key, steps in ladder.axes.items():
            for i, step in enumerate(steps):
                origins = {**centre, key: f"ladders[{n}].axes.{key}[{i}]"}
                for seed in ladder.seeds or experiment.seeds:
                    yield Cell(f"ladder-{n}-{key}", {key}, {"seed": seed, **ladder.centre, key: step}, origins)


TUNING = "tune-"
"""Begins the names of a study's comparisons that try learning rates; the arm's name follows."""

FINE = "fine-"
"""Begins the names of comparisons in results of older versions, which tried three rates on one seed."""

RATES = "rates-"
"""Begins the names of the comparisons that hold one arm's runs at three rates or more; the arm's name follows."""

ARM = "arm-"
"""Begins the names of the comparisons that hold one arm's runs at its best rate; the arm's name follows."""

CONTROL = "control-"
"""Begins the names of an arm beside one of its controls; the control and the arm follow."""


def tuning_cells(study: Study) -> Iterator[Cell]:
    """Yields the cells that try each arm's listed rates."""
    for entrant in study.entrants:
        origins = {key: f"study.arms.{entrant.arm}.{key}" for key in entrant.fields}
        for i, rate in enumerate(study.learning_rates.get(entrant.arm, ())):
            place = {"learning_rate": f"study.learning_rates.{entrant.arm}[{i}]"}
            for seed in study.tuning_seeds:
                values = {**entrant.fields, **study.tuning, "learning_rate": rate, "seed": seed + entrant.shift}
                yield Cell(f"{TUNING}{entrant.name}", {"learning_rate"}, values, origins | place)


def rate_cells(study: Study, rates: dict[str, list[float]]) -> Iterator[Cell]:
    """Yields the cells of each arm at all of its rates, where these are known, on all seeds."""
    for entrant in study.entrants:
        for rate in rates.get(entrant.name, ()):
            for values in _pair_values(study, entrant, rate):
                yield Cell(f"{RATES}{entrant.name}", {"learning_rate", *_seeded(entrant)}, values)


def _pair_values(study: Study, entrant: Entrant, rate: float) -> Iterator[dict[str, Any]]:
    for seed in study.seeds_of(entrant.name):
        values = {**entrant.fields, "learning_rate": rate, "seed": seed}
        yield values | ({"init_seed": seed + entrant.shift} if entrant.shift else {})


def _seeded(entrant: Entrant) -> set[str]:
    return {"seed", "init_seed"} if entrant.shift else {"seed"}


def arm_cells(experiment: Experiment, study: Study, rates: dict[str, float | None]) -> Iterator[Cell]:
    """Yields what a study compares: each arm whose rate was chosen, and beside it its controls."""
    varies = {"learning_rate", *(key for fields in study.arms.values() for key in fields)}
    varies.update(*experiment.methods.values(), ["init_seed"] if study.a_a else [])
    for entrant in study.entrants:
        rate = rates[entrant.name]
        for values in _pair_values(study, entrant, rate) if rate is not None else ():
            yield Cell("grid", varies, values)
            yield Cell(f"{ARM}{entrant.name}", _seeded(entrant), values)
            if entrant.name in study.controls and values["seed"] in (study.control_seeds or study.seeds):
                for control in study.controls[entrant.name]:
                    yield from _control_cells(control, entrant.name, values)


def _control_cells(control: str, arm: str, values: dict[str, Any]) -> Iterator[Cell]:
    """Yields a run of an arm, and the same run with the one change that makes it a control."""
    changes: dict[str, dict[str, Any]] = {
        "a-a": {"init_seed": values["seed"] + A_A_SHIFT},
        "zero-lr": {"learning_rate": 0},
        "shuffled-labels": {"shuffled_targets": True},
    }
    change, group = changes[control], f"{CONTROL}{control}-{arm}"
    yield Cell(group, set(change), values)
    yield Cell(group, set(change), {**values, **change})

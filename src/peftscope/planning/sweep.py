"""Experiments to runs and comparisons. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem, close_match, raise_any, shown
from peftscope.hardware.device import Device
from peftscope.layout import rates_path, tuned_path
from peftscope.methods import METHODS
from peftscope.planning.cells import RATES, TUNING, Cell, arm_cells, count_cells, plain_cells, rate_cells, tuning_cells
from peftscope.planning.experiment import Entrant, Experiment, Study, around, experiment_path, read_experiment
from peftscope.planning.resolve import RUN_FIELDS, Resolver, flat_fields
from peftscope.spec import RunSpec, run_id

ROUNDS = 3
"""How often the rates of arms are decided on: three around the centre, then up to twice one more beyond an end."""
LARGEST_SWEEP = 100_000
"""The most runs of an experiment. The workflow was tried with a twentieth of them."""


@dataclass(frozen=True)
class Comparison:
    """Runs that are set side by side, and the only fields in which they may differ.

    Attributes:
        name: ``runs``, ``grid``, ``ladder-N-FIELD``, or a stage of a study and what is compared in it.
        varies: Fields in which its runs may differ, the seed apart.
        runs: The runs' ids, in the order of the file.
    """

    name: str
    varies: frozenset[str]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """An experiment, expanded: its runs by id, and which of them are compared."""

    name: str
    experiment: Experiment
    runs: dict[str, RunSpec]
    comparisons: tuple[Comparison, ...]


class _Expansion:
    """Makes runs and comparisons of cells, and collects all problems on the way."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver, self._experiment, self._path = resolver, resolver.experiment, resolver.path
        self._problems = _misplaced(resolver.experiment, resolver.path)
        self._runs: dict[str, RunSpec] = {}
        self._groups: dict[str, tuple[set[str], dict[str, None]]] = {}
        self._excluded = [0] * len(resolver.experiment.exclude)
        self._unused_axes = dict.fromkeys(resolver.experiment.axes)

    def add(self, cells: Iterable[Cell]) -> None:
        """Adds the runs of cells that no rule excludes."""
        for cell in cells:
            exact = {key: f"{self._path}: {place}" for key, place in cell.origins.items()}
            try:
                values = _without_absent(cell.values, cell.origins, self._resolver, self._path)
                for key in values:
                    self._unused_axes.pop(key, None)
                spec = self._resolver.spec(values, f"{self._path}: {cell.group}", exact)
            except InputError as error:
                self._problems += error.problems
                continue
            if not self._excludes(spec):
                identity = run_id(spec)
                self._add_start(spec)
                self._runs[identity] = spec
                varies, members = self._groups.setdefault(cell.group, (set(), {}))
                varies |= cell.varies
                members[identity] = None

    def _add_start(self, spec: RunSpec) -> None:
        """Adds the run that another one starts from, before it and in no comparison, and so on."""
        if start := self._resolver.starts.get(spec.start_from or ""):
            self._add_start(start)
            self._runs.setdefault(run_id(start), start)

    def _excludes(self, spec: RunSpec) -> bool:
        fields = flat_fields(spec) if self._excluded else {}
        matches = [all(fields.get(k) == v for k, v in rule.match.items()) for rule in self._experiment.exclude]
        self._excluded = [count + match for count, match in zip(self._excluded, matches, strict=True)]
        return any(matches)

    def check_study(self, study: Study) -> None:
        """Adds what keeps a study from an answer: no loss that chooses rates, or a base on another task."""
        tuned = [self._runs[run] for entrant in study.entrants for run in self.members(TUNING + entrant.name)]
        if any(not spec.validation_items for spec in tuned):
            message = "a study chooses its rates by validation loss (got 0)"
            self._problems.append(Problem(f"{self._path}: fixed.validation_items", message, "give it a number above 0"))
        bases = {(spec.model, spec.task) for spec in self._runs.values() if spec.method.name == "none"}
        for model, task in sorted({(spec.model, spec.task) for spec in tuned} - bases):
            message = f"no run of the untouched base has model {model} and task {task}, as the study's arms have"
            self._problems.append(Problem(f"{self._path}: runs", message, "gains are counted from it"))

    def members(self, group: str) -> list[str]:
        """Returns the ids of a comparison's runs so far."""
        return list(self._groups[group][1]) if group in self._groups else []

    def sweep(self, name: str) -> Sweep:
        """Returns the sweep of everything that was added.

        Raises:
            InputError: All problems at once.
        """
        problems = self._problems or self._unused_rules()
        if not problems and not self._runs:
            problems = [Problem(str(self._path), "describes no run", "give it axes, ladders or runs")]
        raise_any(problems)
        comparisons = [Comparison(group, frozenset(v), tuple(runs)) for group, (v, runs) in self._groups.items()]
        return Sweep(name, self._experiment, self._runs, tuple(comparisons))

    def _unused_rules(self) -> list[Problem]:
        path, rules = self._path, zip(self._experiment.exclude, self._excluded, strict=True)
        unused = [
            Problem(f"{path}: exclude[{index}].match", f"matches no run (got {shown(rule.match)})", "mend or remove it")
            for index, (rule, count) in enumerate(rules)
            if not count
        ]
        axes = [Problem(f"{path}: axes.{axis}", "no run's method has this field", "") for axis in self._unused_axes]
        return unused + axes


def expand(name: str, device: Device = "cpu", *, assume_rates: bool = False) -> Sweep:
    """Returns an experiment's runs and comparisons.

    ``assume_rates`` adds the runs of a study whose learning rates are yet to be chosen, at the middle ones.

    Raises:
        InputError: All problems of the file at once.
    """
    path = experiment_path(name)
    experiment = read_experiment(path)
    _check_size(experiment, path)
    expansion = _Expansion(Resolver(experiment, path, device))
    expansion.add(plain_cells(experiment, device))
    if study := experiment.study:
        _add_study(expansion, name, experiment, study, assume_rates)
    return expansion.sweep(name)


def _add_study(expansion: _Expansion, name: str, experiment: Experiment, study: Study, assume_rates: bool) -> None:
    """Adds what of a study is known: the listed rates, those at which arms run, and the runs at the best of them."""

    def chosen(path: Path, stage: str, fits: Callable[[set[str], set[str]], bool] = set.__eq__) -> dict[str, Any]:
        """Returns what a file says of each arm, if the runs that it says so from fit those that the stage has now."""
        arms = json.loads(path.read_text())["arms"] if path.is_file() else {}
        return {
            arm: said
            for arm, said in arms.items()
            if fits({*said.get("chosen_from", ())}, {*expansion.members(stage + arm)})
        }

    tuned = [entrant for entrant in study.entrants if entrant.arm in study.learning_rates]
    expansion.add(tuning_cells(study))
    expansion.check_study(study)
    for number in range(ROUNDS):
        # Further seeds leave the rates that were added as they are.
        stage, fits = (RATES, set.issubset) if number else (TUNING, set.__eq__)
        found = chosen(rates_path(name, number), stage, fits)
        rates = {arm: said["rates"] for arm, said in found.items()}
        if assume_rates and not number:
            rates = {entrant.name: _middle_rates(study, entrant) for entrant in tuned} | rates
        expansion.add(rate_cells(study, rates))
    best: dict[str, float | None] = dict.fromkeys((entrant.name for entrant in tuned), None)
    if assume_rates:
        best |= {entrant.name: _middle_rates(study, entrant)[1] for entrant in tuned}
    best |= {arm: said["learning_rate"] for arm, said in chosen(tuned_path(name), RATES).items() if arm in best}
    expansion.add(arm_cells(experiment, study, study.rates_beside(best) | best))


def runs_to_choose_from(sweep: Sweep, number: int) -> dict[str, tuple[str, ...]]:
    """Returns for each tuned arm the runs that a round of rates is chosen from: those of the round before.

    Before the first round, they are those at the listed rates: none if an arm lists none. Runs at rates that were added
    since are left out.
    """
    stage, study = RATES if number else TUNING, sweep.experiment.study
    runs = {c.name.removeprefix(stage): c.runs for c in sweep.comparisons if c.name.startswith(stage)}
    if not number:
        unlisted = [e.name for e in study.entrants if not study.learning_rates.get(e.arm, True)] if study else []
        return runs | dict.fromkeys(unlisted, ())
    before = json.loads(rates_path(sweep.name, number - 1).read_text())["arms"]
    return {
        arm: tuple(run for run in runs.get(arm, ()) if sweep.runs[run].learning_rate in said["rates"])
        for arm, said in before.items()
    }


def _middle_rates(study: Study, entrant: Entrant) -> list[float]:
    """Returns the rates of an arm around its centre or, as long as that is not known, around the middle listed one."""
    listed = study.learning_rates[entrant.arm]
    return around(study.centres.get(entrant.name) or listed[len(listed) // 2])


def _check_size(experiment: Experiment, path: Path) -> None:
    cells = count_cells(experiment)
    if cells > LARGEST_SWEEP:
        said = f"{cells:,}" if cells < 10**15 else f"10^{math.log10(cells):.0f}"
        remedy = "shorten axes, linked values, ladders or seeds"
        raise InputError(Problem(str(path), f"describes {said} runs, more than {LARGEST_SWEEP:,}", remedy))


def _misplaced(experiment: Experiment, path: Path) -> list[Problem]:
    """Returns fields that stand where they could not take effect."""
    problems = []
    if "seed" in experiment.fixed:
        problems.append(Problem(f"{path}: fixed.seed", "seeds are not fixed here", "write `seeds: [...]`"))
    varied = {*experiment.axes, *(key for rows in experiment.linked for row in rows for key in row)}
    if "seed" in varied and "seeds" in experiment.model_fields_set and not (experiment.ladders or experiment.extends):
        problems.append(Problem(f"{path}: seeds", "has no effect beside the seeds of axes or linked", "leave it out"))
    for method, settings in experiment.methods.items():
        if method not in METHODS:
            problems.append(Problem(f"{path}: methods.{method}", "unknown method", close_match(method, METHODS)))
        problems += [
            Problem(f"{path}: methods.{method}.{field}", "cannot be set for a method", "write it under axes or seeds")
            for field in ("seed", "method")
            if field in settings
        ]
    return problems


def _without_absent(values: dict[str, Any], origins: dict[str, str], resolver: Resolver, path: Path) -> dict[str, Any]:
    """Drops the grid axes that the cell's method does not have: full fine-tuning stands once in a sweep over rank."""
    own = METHODS[resolver.method_name(values, f"{path}: {origins.get('method', 'fixed.method')}")].model_fields
    return {
        key: value
        for key, value in values.items()
        if key in own
        or key in ("method", "seed", *RUN_FIELDS)
        or not origins.get(key, "").startswith("axes.")
        or not any(key in cls.model_fields for cls in METHODS.values())
    }

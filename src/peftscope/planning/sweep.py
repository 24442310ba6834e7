"""Experiments to runs: merging with the defaults, axes, ladders, seeds. No torch.

Values are merged in this order, the later one wins field by field:
``defaults.yaml`` fixed < the method's ``run_defaults`` < defaults' ``methods.<name>`` < the experiment's ``fixed`` <
its ``methods.<name>`` < the axis, ladder or run value.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.files.problems import dotted, problems_of
from peftscope.hardware.device import Device
from peftscope.layout import DEFAULTS, shipped, tuned_path
from peftscope.methods import METHODS
from peftscope.planning.experiment import Experiment, Study, experiment_path, read_experiment
from peftscope.spec import RunSpec, run_id

LARGEST_SWEEP = 100_000
"""Runs of an experiment: twenty times what the workflow was tried with."""

RUN_FIELDS = tuple(name for name in RunSpec.model_fields if name not in ("method", "seed", "device"))


@dataclass(frozen=True)
class Comparison:
    """Runs that are set side by side, and the only fields in which they may differ.

    Attributes:
        name: ``methods``, or the field that a ladder varies.
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


def _field_at(location: tuple[str | int, ...]) -> str:
    """Returns the flat field behind pydantic's location; empty for a rule over several fields.

    >>> _field_at(("method", "lora", "rank")), _field_at(("steps",)), _field_at(("method", "adalora"))
    ('rank', 'steps', '')
    """
    path = location[2:] if location[:1] == ("method",) else location
    return str(path[0]) if path else ""


@dataclass
class _Layers:
    """Values on their way to a spec; each remembers the place in the file that it came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def lay(self, values: Mapping[str, Any], origin: str) -> None:
        """Lays values over the earlier ones; ``origin`` is the mapping's own place."""
        for key, value in values.items():
            self.values[key] = value
            self.origins[key] = f"{origin}.{key}"


class Resolver:
    """Turns flat values into specs, with the defaults and one experiment's settings under them."""

    def __init__(self, experiment: Experiment, path: Path, device: Device = "cpu") -> None:
        self.experiment, self.path, self.device = experiment, path, device
        self.defaults_path = shipped(DEFAULTS)
        self.defaults = read_experiment(self.defaults_path)

    def method_name(self, values: dict[str, Any], where: str) -> str:
        """Returns the method that a run with these values uses.

        Raises:
            InputError: There is no such method.
        """
        name = values.get("method", self.experiment.fixed.get("method", self.defaults.fixed.get("method")))
        if not isinstance(name, str) or name not in METHODS:
            raise InputError(Problem(where, f"unknown method (got {shown(name)})", close_match(str(name), METHODS)))
        return name

    def spec(self, values: dict[str, Any], origin: str, origins: dict[str, str] | None = None) -> RunSpec:
        """Returns the spec of one run.

        Args:
            values: Flat fields of the run, ``method`` being a name; they win over everything else.
            origin: The place that ``values`` come from, for messages.
            origins: A more exact place for some of them.

        Raises:
            InputError: Every problem of the run, each with its place.
        """
        name = self.method_name(values, (origins or {}).get("method", f"{origin}.method"))
        layers = _Layers()
        layers.lay(self.defaults.fixed, f"{self.defaults_path}: fixed")
        layers.lay(METHODS[name].run_defaults, f"run_defaults of {name}")
        layers.lay(self.defaults.methods.get(name, {}), f"{self.defaults_path}: methods.{name}")
        layers.lay(self.experiment.fixed, f"{self.path}: fixed")
        layers.lay(self.experiment.methods.get(name, {}), f"{self.path}: methods.{name}")
        layers.lay(values, origin)
        layers.origins.update(origins or {})
        layers.values.pop("method", None)

        method_fields = set(METHODS[name].model_fields) - {"name"}
        top: dict[str, Any] = {"device": self.device}
        method: dict[str, Any] = {"name": name}
        problems = []
        for key, value in layers.values.items():
            if key in method_fields:
                method[key] = value
            elif key in RUN_FIELDS or key == "seed":
                top[key] = value
            else:
                problems.append(Problem(layers.origins[key], *self._unknown_field(key, value, name)))
        try:
            spec = RunSpec.model_validate({**top, "method": method})
        except ValidationError as error:

            def place(location: tuple[str | int, ...]) -> str:
                field = _field_at(location)
                return layers.origins.get(field, f"{origin}.{field}") if field else origin

            def place_of_rule(problem: Problem) -> Problem:
                """A rule over several fields stands where the first field that it names was set."""
                if problem.where != origin:
                    return problem
                named = [f for f in re.findall(r"\w+", problem.message) if f in layers.origins]
                return replace(problem, where=layers.origins[named[0]]) if named else problem

            descriptions = {
                n: f.description or "" for n, f in (RunSpec.model_fields | METHODS[name].model_fields).items()
            }
            problems += [
                replace(
                    problem,
                    remedy=problem.remedy or descriptions.get(problem.where.rpartition(".")[2].split("[")[0], ""),
                )
                for problem in map(place_of_rule, problems_of(error, place, method_fields | set(RUN_FIELDS)))
            ]
        if problems:
            raise InputError(problems)
        return spec

    @staticmethod
    def _unknown_field(key: str, value: Any, method: str) -> tuple[str, str]:
        owners = [name for name, cls in METHODS.items() if key in cls.model_fields and key != "name"]
        if key == "device":
            return f"not a field of experiments (got {shown(value)})", "the machine decides it"
        if not owners:
            known = {*RUN_FIELDS, *(set(METHODS[method].model_fields) - {"name"})}
            return f"unknown key (got {shown(value)})", close_match(key, known)
        if METHODS[method].trains_base and key in ("quant_type", "double_quant", "compute_dtype"):
            return (
                f"method `{method}` cannot train 4-bit weights, they get no gradient (got {shown(value)})",
                "choose method `qlora`, or leave the quantisation out",
            )
        return (
            f"method `{method}` has no such field (got {shown(value)})",
            f"write it under methods.<name> for: {', '.join(owners)}",
        )


@dataclass(frozen=True)
class _Cell:
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


class _Expansion:
    """Makes runs and comparisons of cells, and collects all problems on the way."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver, self._experiment, self._path = resolver, resolver.experiment, resolver.path
        self._problems = _misplaced(resolver.experiment, resolver.path)
        self._runs: dict[str, RunSpec] = {}
        self._groups: dict[str, tuple[set[str], dict[str, None]]] = {}
        self._excluded = [0] * len(resolver.experiment.exclude)

    def add(self, cells: Iterable[_Cell]) -> None:
        """Adds the runs of cells that no rule excludes."""
        for cell in cells:
            exact = {key: f"{self._path}: {place}" for key, place in cell.origins.items()}
            try:
                values = _without_absent(cell.values, cell.origins, self._resolver, self._path)
                spec = self._resolver.spec(values, f"{self._path}: {cell.group}", exact)
            except InputError as error:
                self._problems += error.problems
                continue
            if not self._excludes(spec):
                identity = run_id(spec)
                self._runs[identity] = spec
                varies, members = self._groups.setdefault(cell.group, (set(), {}))
                varies |= cell.varies
                members[identity] = None

    def _excludes(self, spec: RunSpec) -> bool:
        fields = flat_fields(spec) if self._excluded else {}
        matches = [all(fields.get(k) == v for k, v in rule.match.items()) for rule in self._experiment.exclude]
        self._excluded = [count + match for count, match in zip(self._excluded, matches, strict=True)]
        return any(matches)

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
        if problems:
            raise InputError(problems)
        comparisons = [Comparison(group, frozenset(v), tuple(runs)) for group, (v, runs) in self._groups.items()]
        return Sweep(name, self._experiment, self._runs, tuple(comparisons))

    def _unused_rules(self) -> list[Problem]:
        path, rules = self._path, zip(self._experiment.exclude, self._excluded, strict=True)
        return [
            Problem(f"{path}: exclude[{index}].match", f"matches no run (got {shown(rule.match)})", "mend or remove it")
            for index, (rule, count) in enumerate(rules)
            if not count
        ]


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
    expansion.add(_listed_cells(experiment))
    if experiment.axes or experiment.linked or not (experiment.runs or experiment.ladders or experiment.study):
        expansion.add(_grid_cells(experiment))
    expansion.add(_ladder_cells(experiment))
    if study := experiment.study:
        expansion.add(_tuning_cells(study))
        tuned = _tuned(name)
        rates = {arm: _chosen_rate(study, arm, tuned, expansion, assume_rates) for arm in study.arms}
        expansion.add(_arm_cells(experiment, study, rates))
    return expansion.sweep(name)


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
    for method, settings in experiment.methods.items():
        if method not in METHODS:
            problems.append(Problem(f"{path}: methods.{method}", "unknown method", close_match(method, METHODS)))
        problems += [
            Problem(f"{path}: methods.{method}.{field}", "cannot be set for a method", "write it under axes or seeds")
            for field in ("seed", "method")
            if field in settings
        ]
    return problems


def flat_fields(spec: RunSpec) -> dict[str, Any]:
    """Returns a spec's fields side by side, ``method`` being the name."""
    fields = spec.model_dump(mode="json")
    method = fields.pop("method")
    return {**fields, **method, "method": method["name"]}


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


def count_cells(experiment: Experiment) -> int:
    """Returns how many cells an experiment has, without making them: exclusions and a study's controls apart.

    >>> count_cells(Experiment(axes={"rank": [2, 4, 8]}, linked=[[{"alpha": 1}, {"alpha": 2}]], seeds=[0, 1]))
    12
    """
    count = len(experiment.runs)
    if experiment.axes or experiment.linked:
        grid = math.prod(len(factor) for factor in [*experiment.axes.values(), *experiment.linked])
        seeded = "seed" in experiment.axes or any("seed" in row for rows in experiment.linked for row in rows)
        count += grid * (1 if seeded else len(experiment.seeds))
    for ladder in experiment.ladders:
        count += sum(map(len, ladder.axes.values())) * len(ladder.seeds or experiment.seeds)
    if experiment.study:
        rates = sum(map(len, experiment.study.learning_rates.values()))
        count += rates * len(experiment.study.tuning_seeds) + len(experiment.study.arms) * len(experiment.study.seeds)
    return count


def _listed_cells(experiment: Experiment) -> Iterator[_Cell]:
    """Yields the cells of ``runs``: each one as it stands."""
    for index, values in enumerate(experiment.runs):
        origins = {key: f"runs[{index}].{key}" for key in values}
        yield _Cell("runs", set(values), {"seed": experiment.seeds[0], **values}, origins)


def _grid_cells(experiment: Experiment) -> Iterator[_Cell]:
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
        varies |= _method_settings(experiment)
    for parts in itertools.product(*factors):
        values, origins = {}, {}
        for part, places in parts:
            values.update(part)
            origins.update(places)
        yield _Cell("grid", varies, values, origins)


def _ladder_cells(experiment: Experiment) -> Iterator[_Cell]:
    """Yields the cells of ``ladders``: one field at a time around the centre."""
    for n, ladder in enumerate(experiment.ladders):
        centre = {key: f"ladders[{n}].centre.{key}" for key in ladder.centre}
        for key, steps in ladder.axes.items():
            for i, step in enumerate(steps):
                origins = {**centre, key: f"ladders[{n}].axes.{key}[{i}]"}
                for seed in ladder.seeds or experiment.seeds:
                    yield _Cell(f"ladder-{n}-{key}", {key}, {"seed": seed, **ladder.centre, key: step}, origins)


def _method_settings(experiment: Experiment) -> set[str]:
    return {key for settings in experiment.methods.values() for key in settings}


TUNING = "tune-"
"""Begins the names of a study's comparisons that choose learning rates; the arm's name follows."""

ARM = "arm-"
"""Begins the names of the comparisons that hold one arm's runs at its chosen rate; the arm's name follows."""

CONTROL = "control-"
"""Begins the names of an arm beside one of its controls; the control and the arm follow."""

OTHER_INITIALISATION = 1000
"""Added to a run's seed for the initialisation of the control that is the same arm again."""


def _tuning_cells(study: Study) -> Iterator[_Cell]:
    """Yields the cells that choose each arm's learning rate."""
    for arm, fields in study.arms.items():
        origins = {key: f"study.arms.{arm}.{key}" for key in fields}
        for i, rate in enumerate(study.learning_rates[arm]):
            places = origins | {"learning_rate": f"study.learning_rates.{arm}[{i}]"}
            for seed in study.tuning_seeds:
                values = {**fields, **study.tuning, "learning_rate": rate, "seed": seed}
                yield _Cell(f"{TUNING}{arm}", {"learning_rate"}, values, places)


def _tuned(experiment: str) -> dict[str, Any]:
    """Returns what was chosen for each arm of a study; empty before the tuning is done."""
    path = tuned_path(experiment)
    return json.loads(path.read_text())["arms"] if path.is_file() else {}


def _chosen_rate(
    study: Study, arm: str, tuned: dict[str, Any], expansion: _Expansion, assume_rates: bool
) -> float | None:
    """Returns an arm's rate, None unless it was chosen from the runs that tune the arm now, or is to be assumed."""
    members = expansion.members(f"{TUNING}{arm}")
    if not members:
        return None
    if arm in tuned and [run for rate in tuned[arm]["tried"] for run in rate["run_ids"]] == members:
        return tuned[arm]["learning_rate"]
    rates = study.learning_rates[arm]
    return rates[len(rates) // 2] if assume_rates else None


def _arm_cells(experiment: Experiment, study: Study, rates: dict[str, float | None]) -> Iterator[_Cell]:
    """Yields what a study compares: each arm whose rate was chosen, and beside it its controls."""
    varies = {"learning_rate", *(key for fields in study.arms.values() for key in fields)}
    varies |= _method_settings(experiment)
    for arm, fields in study.arms.items():
        if rates[arm] is None:
            continue
        for seed in study.seeds:
            values = {**fields, "learning_rate": rates[arm], "seed": seed}
            yield _Cell("grid", varies, values)
            yield _Cell(f"{ARM}{arm}", {"seed"}, values)
            for control in study.controls.get(arm, []):
                yield from _control_cells(control, arm, values)


def _control_cells(control: str, arm: str, values: dict[str, Any]) -> Iterator[_Cell]:
    """Yields a run of an arm, and the same run with the one change that makes it a control."""
    changes: dict[str, dict[str, Any]] = {
        "again": {"init_seed": values["seed"] + OTHER_INITIALISATION},
        "still": {"learning_rate": 0},
        "shuffled": {"shuffled_targets": True},
    }
    change, group = changes[control], f"{CONTROL}{control}-{arm}"
    yield _Cell(group, set(change), values)
    yield _Cell(group, set(change), {**values, **change})


def spec_from(values: Any, path: Path, device: Device) -> RunSpec:
    """Returns the spec of one run from a file's content.

    Where ``method`` is a name, the fields are flat and what is left out comes from ``defaults.yaml``, as in experiment
    files. Where it is a mapping, the content is a spec as records hold it, complete but for the fields at the code's
    own defaults, and is taken as it is.

    Raises:
        InputError: Every problem of the spec.
    """
    if not isinstance(values, dict):
        raise InputError(Problem(str(path), "must be a mapping of fields to values"))
    if not isinstance(values.get("method"), dict):
        return Resolver(Experiment(), path, device).spec(values, str(path))
    try:
        return RunSpec.model_validate(values)
    except ValidationError as error:
        raise InputError(problems_of(error, lambda loc: f"{path}: {dotted(loc)}", set(RunSpec.model_fields))) from None

"""Experiment files to runs: defaults, deep merge, axes, ladders, seeds. No torch.

Values are merged in this order, the later one wins field by field:
``defaults.yaml`` fixed < defaults' ``methods.<name>`` < the experiment's ``fixed`` < its ``methods.<name>`` < the axis,
ladder or run value.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from peftscope.errors import InputError, Problem, close_match
from peftscope.methods import METHODS
from peftscope.spec import Device, RunSpec, run_id

EXPERIMENTS = Path("experiments")
DEFAULTS = EXPERIMENTS / "defaults.yaml"
RESERVED_NAMES = ("published", "gpu", "single")
NAME_PATTERN = r"[a-z0-9][a-z0-9-]*"
NOT_EXPERIMENTS = ("defaults", "models", "tasks", "claims")
RUN_FIELDS = tuple(name for name in RunSpec.model_fields if name not in ("method", "seed", "device"))

Values = Annotated[list[Any], Field(min_length=1)]


class Ladder(BaseModel):
    """One factor at a time around a centre: every axis is varied alone."""

    model_config = ConfigDict(extra="forbid")

    centre: dict[str, Any] = {}
    axes: Annotated[dict[str, Values], Field(min_length=1)]
    seeds: list[NonNegativeInt] | None = None


class Exclusion(BaseModel):
    """Combinations to leave out, and why."""

    model_config = ConfigDict(extra="forbid")

    match: Annotated[dict[str, Any], Field(min_length=1)]
    reason: Annotated[str, Field(min_length=1)]


class Experiment(BaseModel):
    """What an experiment file may say."""

    model_config = ConfigDict(extra="forbid")

    title: str = ""
    description: str = ""
    extends: str | None = None
    fixed: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}
    axes: dict[str, Values] = {}
    linked: list[Annotated[list[dict[str, Any]], Field(min_length=1)]] = []
    ladders: list[Ladder] = []
    runs: list[dict[str, Any]] = []
    exclude: list[Exclusion] = []
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]


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


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns a YAML file's mapping.

    Raises:
        InputError: The file is missing, is not YAML, repeats a key, or is no mapping.
    """
    try:
        content = yaml.load(path.read_text(), Loader=_StrictLoader)
    except FileNotFoundError:
        raise InputError(Problem(str(path)[:200], "no such file")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem(str(path)[:200], f"cannot be read: {error}"[:200])) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}: line {mark.line + 1}" if mark else str(path)
        raise InputError(Problem(place, f"not valid YAML: {getattr(error, 'problem', error)}")) from None
    if not isinstance(content, dict):
        raise InputError(Problem(str(path), "must be a mapping of fields to values"))
    return content


class _StrictLoader(yaml.SafeLoader):
    """YAML without silent surprises: a repeated key is an error, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping; raises on a key that stands twice."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                message = f"a field's name must be text (got {key!r})"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns ``base`` with ``over`` laid on it; nested mappings are merged, lists are replaced.

    >>> deep_merge({"a": {"x": 1, "y": 2}}, {"a": {"x": 3}})
    {'a': {'x': 3, 'y': 2}}
    """
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = deep_merge(merged[key], value) if both else value
    return merged


def experiment_path(name: str) -> Path:
    """Returns the file of an experiment.

    Raises:
        InputError: The name is reserved or unknown.
    """
    if name in RESERVED_NAMES:
        raise InputError(Problem(f"experiment={name}", "a reserved name", "rename the experiment file"))
    if not re.fullmatch(NAME_PATTERN, name):
        raise InputError(Problem(f"experiment={name}", "not a name for an experiment", f"use {NAME_PATTERN}"))
    path = EXPERIMENTS / f"{name}.yaml"
    if not path.is_file() or name in NOT_EXPERIMENTS:
        if not EXPERIMENTS.is_dir():
            raise InputError(
                Problem(f"experiment={name}", "there is no experiments/ folder here", "run from the repository's root")
            )
        raise InputError(Problem(f"experiment={name}", f"no file {path}", close_match(name, experiment_names())))
    return path


def experiment_names() -> list[str]:
    """Returns the names of all experiment files."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.stem not in NOT_EXPERIMENTS)


def read_experiment(path: Path, _children: tuple[Path, ...] = ()) -> Experiment:
    """Returns a file's experiment, merged onto what it extends.

    Raises:
        InputError: Every problem of the file's structure.
    """
    content = read_yaml(path)
    parent = content.get("extends")
    if isinstance(parent, str):
        try:
            parent_path = experiment_path(parent)
        except InputError as error:
            raise InputError(replace(problem, where=f"{path}: extends") for problem in error.problems) from None
        if parent_path in (path, *_children):
            raise InputError(Problem(f"{path}: extends", f"`{parent}` extends itself"))
        base = read_experiment(parent_path, (path, *_children)).model_dump(exclude_unset=True)
        content = deep_merge(base, content)
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise InputError(
            problems_of(error, lambda loc: f"{path}: {dotted(loc)}", set(Experiment.model_fields))
        ) from None


def dotted(location: tuple[str | int, ...]) -> str:
    """Returns a place in a file as a path.

    >>> dotted(("axes", "rank", 1))
    'axes.rank[1]'
    """
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def problems_of(
    error: ValidationError, place: Callable[[tuple[str | int, ...]], str], known: set[str]
) -> list[Problem]:
    """Returns a validation error as problems; ``place`` names the spot in the file, ``known`` the fields to suggest."""
    found = []
    for item in error.errors():
        where, value = place(item["loc"]), item["input"]
        if item["type"] == "extra_forbidden":
            found.append(Problem(where, "unknown key", close_match(str(item["loc"][-1]), known)))
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(value, dict | BaseModel) else f" (got {value!r})"
            found.append(Problem(where, f"{message}{shown}"))
    return found


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

    def lay(self, values: dict[str, Any], origin: str) -> None:
        """Lays values over the earlier ones; ``origin`` is the mapping's own place."""
        for key, value in values.items():
            self.values[key] = value
            self.origins[key] = f"{origin}.{key}"


class Resolver:
    """Turns flat values into specs, with the defaults and one experiment's settings under them."""

    def __init__(self, experiment: Experiment, path: Path, device: Device = "cpu") -> None:
        self.experiment, self.path, self.device = experiment, path, device
        self.defaults = read_experiment(DEFAULTS)

    def method_name(self, values: dict[str, Any], where: str) -> str:
        """Returns the method that a run with these values uses.

        Raises:
            InputError: There is no such method.
        """
        name = values.get("method", self.experiment.fixed.get("method", self.defaults.fixed.get("method")))
        if not isinstance(name, str) or name not in METHODS:
            raise InputError(Problem(where, f"unknown method (got {name!r})", close_match(str(name), METHODS)))
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
        layers.lay(self.defaults.fixed, f"{DEFAULTS}: fixed")
        layers.lay(self.defaults.methods.get(name, {}), f"{DEFAULTS}: methods.{name}")
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
            return f"not a field of experiments (got {value!r})", "the machine decides it"
        if not owners:
            known = {*RUN_FIELDS, *(set(METHODS[method].model_fields) - {"name"})}
            return f"unknown key (got {value!r})", close_match(key, known)
        if method == "full" and key in ("quant_type", "double_quant", "compute_dtype"):
            return (
                f"method `full` cannot train 4-bit weights, they get no gradient (got {value!r})",
                "choose method `qlora`, or leave the quantisation out",
            )
        return (
            f"method `{method}` has no such field (got {value!r})",
            f"write it under methods.<name> for: {', '.join(owners)}",
        )


def expand(name: str, device: Device = "cpu") -> Sweep:
    """Returns an experiment's runs and comparisons.

    Raises:
        InputError: All problems of the file at once.
    """
    path = experiment_path(name)
    experiment = read_experiment(path)
    resolver = Resolver(experiment, path, device)
    problems = _misplaced(experiment, path)
    runs: dict[str, RunSpec] = {}
    groups: dict[str, tuple[set[str], dict[str, None]]] = {}
    excluded = [0] * len(experiment.exclude)
    for group, varies, values, origins in _cells(experiment):
        exact = {key: f"{path}: {place}" for key, place in origins.items()}
        try:
            spec = resolver.spec(_without_absent(values, origins, resolver, path), f"{path}: {group}", exact)
        except InputError as error:
            problems += error.problems
            continue
        matches = [all(flat_fields(spec).get(k) == v for k, v in rule.match.items()) for rule in experiment.exclude]
        if any(matches):
            excluded = [count + match for count, match in zip(excluded, matches, strict=True)]
            continue
        identity = run_id(spec)
        runs[identity] = spec
        fields, members = groups.setdefault(group, (set(), {}))
        fields |= varies
        members[identity] = None
    if not problems:
        problems += [
            Problem(f"{path}: exclude[{index}].match", f"matches no run (got {rule.match})", "mend or remove it")
            for index, (rule, count) in enumerate(zip(experiment.exclude, excluded, strict=True))
            if not count
        ]
    if not problems and not runs:
        problems.append(Problem(str(path), "describes no run", "give it axes, ladders or runs"))
    if problems:
        raise InputError(problems)
    return Sweep(
        name,
        experiment,
        runs,
        tuple(Comparison(group, frozenset(fields), tuple(members)) for group, (fields, members) in groups.items()),
    )


def _misplaced(experiment: Experiment, path: Path) -> list[Problem]:
    """Returns fields that stand where they could not take effect."""
    problems = [Problem(f"{path}: fixed.seed", "seeds are not fixed here", "write `seeds: [...]`")] * (
        "seed" in experiment.fixed
    )
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


def _cells(experiment: Experiment) -> Iterator[tuple[str, set[str], dict[str, Any], dict[str, str]]]:
    """Yields (comparison, fields it varies, flat values, place of each value) for every cell of the sweep."""
    for index, values in enumerate(experiment.runs):
        yield "runs", set(values), {"seed": experiment.seeds[0], **values}, {k: f"runs[{index}].{k}" for k in values}

    if experiment.axes or experiment.linked or not (experiment.runs or experiment.ladders):
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
            varies |= {key for settings in experiment.methods.values() for key in settings}
        for cell in itertools.product(*factors):
            values, origins = {}, {}
            for part, places in cell:
                values.update(part)
                origins.update(places)
            yield "grid", varies, values, origins

    for n, ladder in enumerate(experiment.ladders):
        for key, steps in ladder.axes.items():
            for i, step in enumerate(steps):
                for seed in ladder.seeds or experiment.seeds:
                    origins = {k: f"ladders[{n}].centre.{k}" for k in ladder.centre}
                    origins[key] = f"ladders[{n}].axes.{key}[{i}]"
                    yield f"ladder-{n}-{key}", {key}, {"seed": seed, **ladder.centre, key: step}, origins


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

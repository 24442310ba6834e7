"""Flat values of an experiment to the spec of a run, merged with the defaults. No torch.

Values are merged in this order, the later one wins field by field:
``defaults.yaml`` fixed < the method's ``run_defaults`` < defaults' ``methods.<name>`` < the experiment's ``fixed`` <
its ``methods.<name>`` < the axis, ladder or run value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftscope.errors import InputError, Problem, close_match, raise_any, shown
from peftscope.files.problems import problems_of, validated
from peftscope.hardware.device import Device
from peftscope.layout import DEFAULTS, shipped
from peftscope.methods import METHODS
from peftscope.planning.experiment import Experiment, read_experiment
from peftscope.spec import RunSpec, run_id

RUN_FIELDS = tuple(name for name in RunSpec.model_fields if name not in ("method", "seed", "device"))


def _field_at(location: tuple[str | int, ...]) -> str:
    """Returns the flat field behind pydantic's location; empty for a rule over several fields.

    >>> _field_at(("method", "lora", "rank")), _field_at(("steps",)), _field_at(("method", "adalora"))
    ('rank', 'steps', '')
    """
    path = location[2:] if location[:1] == ("method",) else location
    return str(path[0]) if path else ""


class Resolver:
    """Turns flat values into specs, with the defaults and one experiment's settings under them."""

    def __init__(self, experiment: Experiment, path: Path, device: Device = "cpu") -> None:
        self.experiment, self.path, self.device = experiment, path, device
        self.defaults_path = shipped(DEFAULTS)
        self.defaults = read_experiment(self.defaults_path)
        self.starts: dict[str, RunSpec] = {}
        """The runs that others start from, by their ids."""

    def method_name(self, values: dict[str, Any], where: str) -> str:
        """Returns the method that a run with these values uses.

        Raises:
            InputError: There is no such method.
        """
        name = values.get("method", self.experiment.fixed.get("method", self.defaults.fixed.get("method")))
        if isinstance(name, dict):
            name, where = name.get("name"), f"{where}.name"
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
        found: dict[str, Any] = {}
        places: dict[str, str] = {}

        def lay(values: Mapping[str, Any], origin: str) -> None:
            """Lays values over the earlier ones; a method may be a mapping of its name and fields, as in records."""
            if isinstance(method := values.get("method"), dict):
                lay({key: value for key, value in method.items() if key != "name"}, f"{origin}.method")
            for key, value in values.items():
                found[key] = value
                places[key] = f"{origin}.{key}"

        lay(self.defaults.fixed, f"{self.defaults_path}: fixed")
        lay(METHODS[name].run_defaults, f"run_defaults of {name}")
        lay(self.defaults.methods.get(name, {}), f"{self.defaults_path}: methods.{name}")
        lay(self.experiment.fixed, f"{self.path}: fixed")
        lay(self.experiment.methods.get(name, {}), f"{self.path}: methods.{name}")
        lay(values, origin)
        places.update(origins or {})
        found.pop("method", None)
        if isinstance(start := found.get("start_from"), dict):
            found["start_from"] = self._start(values, start, places["start_from"])

        method_fields = set(METHODS[name].model_fields) - {"name"}
        if shared := sorted(method_fields & set(RunSpec.model_fields)):
            message = f"its fields {', '.join(shared)} have the names of a run's own"
            raise InputError(Problem(f"method `{name}`", message, "give them other names"))
        top: dict[str, Any] = {"device": self.device}
        method: dict[str, Any] = {"name": name}
        problems = []
        for key, value in found.items():
            if key in method_fields:
                method[key] = value
            elif key in RUN_FIELDS or key == "seed":
                top[key] = value
            else:
                problems.append(Problem(places[key], *self._unknown_field(key, value, name)))
        try:
            spec = RunSpec.model_validate({**top, "method": method})
        except ValidationError as error:

            def place(location: tuple[str | int, ...]) -> str:
                field = _field_at(location)
                return places.get(field, f"{origin}.{field}") if field else origin

            def explained(problem: Problem) -> Problem:
                """A rule over several fields stands where the first field that it names was set."""
                named = [word for word in re.findall(r"\w+", problem.message) if word in places]
                if problem.where == origin and named:
                    problem = replace(problem, where=places[named[0]])
                field = fields.get(problem.where.rpartition(".")[2].split("[")[0])
                return replace(problem, remedy=problem.remedy or (field and field.description) or "")

            fields = RunSpec.model_fields | METHODS[name].model_fields
            problems += map(explained, problems_of(error, place, method_fields | set(RUN_FIELDS)))
        raise_any(problems)
        return spec

    def _start(self, values: dict[str, Any], differs: dict[str, Any], origin: str) -> str:
        """Returns the id of the run that another one starts from, which has that one's fields but for some.

        If it has another method, fields that this method does not have are left out. A control on shuffled answers
        starts where its arm does.
        """
        inherited = {key: value for key, value in values.items() if key != "shuffled_targets"}
        start = {**inherited, "start_from": None, "start_as": "adapter", **differs}
        has = {*differs, *METHODS[self.method_name(start, f"{origin}.method")].model_fields, *RUN_FIELDS}
        spec = self.spec({k: v for k, v in start.items() if k in has or k in ("method", "seed")}, origin)
        self.starts[run_id(spec)] = spec
        return run_id(spec)

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


def flat_fields(spec: RunSpec) -> dict[str, Any]:
    """Returns a spec's fields side by side, ``method`` being the name."""
    fields = spec.model_dump(mode="json")
    method = fields.pop("method")
    return {**fields, **method, "method": method["name"]}


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
    return validated(RunSpec, values, path, RunSpec.model_fields)

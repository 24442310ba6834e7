"""The tuners of PEFT, their options, and what they cannot do here, as ``make tuners`` found it.

It reads the options from PEFT's classes, whose import loads torch, and tries each tuner on the toy model.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, ForwardRef, Literal, NamedTuple, cast  # noqa: F401 - types in the file name Literal

from pydantic import TypeAdapter, ValidationError

from peftscope.errors import Problem, close_match, shown

OPTIONS_FILE = Path(__file__).with_name("tuner_options.json")
LIMITS_FILE = Path(__file__).with_name("tuner_limits.json")


class Option(NamedTuple):
    """An option of PEFT's, with the annotation of its values as far as they can be written in a file."""

    name: str
    type: str
    default: Any


@cache
def tuners() -> dict[str, dict[str, Option] | None]:
    """Returns the options of each tuner by their names; None for a tuner that trains virtual tokens, not layers."""
    content: dict[str, list[dict[str, Any]] | None] = json.loads(OPTIONS_FILE.read_text(encoding="utf-8"))
    return {
        tuner: None if listed is None else {option["name"]: Option(**option) for option in listed}
        for tuner, listed in content.items()
    }


@cache
def limits() -> dict[str, dict[str, str]]:
    """Returns, for each tuner that has limits, what it cannot do and the reason."""
    return json.loads(LIMITS_FILE.read_text(encoding="utf-8"))["tuners"]


def limit_of(tuner: str, what: str) -> str:
    """Returns why a tuner cannot do something; empty if it can, or was never tried."""
    return limits().get(tuner, {}).get(what, "")


def options_of(tuner: str) -> dict[str, Option]:
    """Returns the options of a tuner. Those that only an object of PEFT's can fill are left out."""
    return tuners()[tuner] or {}


def problems_of_options(tuner: str, given: dict[str, Any], reserved: dict[str, str]) -> list[Problem]:
    """Returns what is wrong with options; ``reserved`` says where else an option of PEFT's is written."""
    known = options_of(tuner)
    problems = []
    for name, value in given.items():
        where = f"options.{name}"
        if name in reserved:
            problems.append(Problem(where, "not an option here", reserved[name]))
        elif name not in known:
            remedy = close_match(name, known.keys() - reserved.keys())
            problems.append(Problem(where, f"{tuner} has no such option (got {shown(value)})", remedy))
        else:
            try:
                with_json_types(known[name], value)
            except (ValidationError, ValueError, TypeError):
                problems.append(Problem(where, f"must be {known[name].type} (got {shown(value)})"))
    return problems


def with_json_types(option: Option, value: Any) -> Any:
    """Returns a value as the option's type holds it in JSON: an integer for a float becomes a float.

    Raises:
        ValidationError: The value has another type.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(cast("Any", ForwardRef(option.type)))
    return adapter.dump_python(adapter.validate_json(json.dumps(value, allow_nan=False), strict=True), mode="json")

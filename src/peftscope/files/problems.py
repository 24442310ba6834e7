"""Pydantic's validation errors, translated into problems for people."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ValidationError

from peftscope.errors import Problem, close_match, shown


def dotted(location: tuple[str | int, ...]) -> str:
    """Returns a location in a file as a dotted path.

    >>> dotted(("axes", "rank", 1))
    'axes.rank[1]'
    """
    text = ""
    for part in (part for part in location if part != "[key]"):
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def problems_of(
    error: ValidationError, place: Callable[[tuple[str | int, ...]], str], known: set[str]
) -> list[Problem]:
    """Returns a validation error as problems; ``place`` describes a location, ``known`` has the names to suggest."""
    found = []
    for item in error.errors():
        where, value = place(item["loc"]), item["input"]
        if item["type"] == "extra_forbidden":
            found.append(Problem(where, "unknown key", close_match(str(item["loc"][-1]), known)))
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = "" if isinstance(value, dict | BaseModel) else f" (got {shown(value)})"
            found.append(Problem(where, f"{message}{got}"))
    return found

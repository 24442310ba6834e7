"""Pydantic's validation errors, translated into problems for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from peftscope.errors import InputError, Problem, close_match, closest, shown

T = TypeVar("T")


def validated(kind: type[T], content: Any, where: object, known: Iterable[str]) -> T:
    """Returns a file's content as a type that pydantic knows; ``known`` has the names to suggest for a misspelled key.

    Raises:
        InputError: Everything that is wrong with the content.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise InputError(problems_of(error, lambda location: f"{where}: {dotted(location)}", set(known))) from None


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
    """Returns a validation error as problems; ``place`` describes a location, ``known`` has the names to suggest.

    A mistake is told once: a misspelled key is not missing as well, and a list of wrong items is not too short.
    """
    found, items = [], error.errors()
    places = [item["loc"] for item in items]
    misspelled = [item["loc"] for item in items if item["type"] == "extra_forbidden"]
    meant = {(*loc[:-1], closest(str(loc[-1]), known)) for loc in misspelled}
    for item in items:
        kind, loc, value = item["type"], item["loc"], item["input"]
        below = any(loc == other[: len(loc)] for other in places if other != loc)
        if (kind == "missing" and loc in meant) or (kind == "too_short" and below):
            continue
        if kind == "extra_forbidden":
            found.append(Problem(place(loc), "unknown key", close_match(str(loc[-1]), known)))
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = "" if isinstance(value, dict | BaseModel) else f" (got {shown(value)})"
            found.append(Problem(place(loc), f"{message}{got}"))
    return found

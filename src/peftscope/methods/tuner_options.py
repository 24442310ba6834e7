"""The tuners that the installed PEFT ships, and their options: read from its sources, because its import loads torch.

Each tuner's folder registers its name with a configuration class. The class's fields are the options.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Never, Union

from pydantic import TypeAdapter, ValidationError

from peftscope.errors import Problem, close_match, shown

ROOTS = {"PeftConfig": False, "PromptLearningConfig": True}
"""The classes that every configuration inherits from, and whether they mean virtual tokens."""

PLAIN: dict[str, Any] = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple, set)} | {"Any": Any}


@dataclass(frozen=True)
class Option:
    """An option of a tuner.

    Attributes:
        kind: The type that PEFT's annotation names, as far as it can be written in a file.
        spelled: The annotation itself.
        default: PEFT's default.
    """

    kind: Any
    spelled: str
    default: Any


@cache
def tuner_folders() -> dict[str, tuple[str, Path]]:
    """Returns the configuration class of every tuner that PEFT registers, with the file that defines it."""
    found = {}
    for path in sorted(_peft("tuners").glob("*/__init__.py")):
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "register_peft_method":
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                found[ast.literal_eval(keywords["name"])] = (
                    ast.unparse(keywords["config_cls"]),
                    path.parent / "config.py",
                )
    return found


@cache
def has_virtual_tokens(tuner: str) -> bool:
    """Returns whether a tuner trains virtual tokens instead of layers."""
    return any(ROOTS.get(ast.unparse(base)) for cls in _ancestry(*tuner_folders()[tuner]) for base in cls.bases)


@cache
def options_of(tuner: str) -> dict[str, Option]:
    """Returns the options of a tuner. Those that only an object of PEFT's can fill are left out."""
    options = {}
    for cls in reversed(list(_ancestry(*tuner_folders()[tuner]))):
        for line in cls.body:
            if not isinstance(line, ast.AnnAssign):
                continue
            kind = _kind(line.annotation)
            try:
                default = _default(line.value)
            except ValueError:  # an object of PEFT's own
                continue
            if kind is not Never:
                options[ast.unparse(line.target)] = Option(kind, ast.unparse(line.annotation), default)
    return options


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
                problems.append(Problem(where, f"must be {known[name].spelled} (got {shown(value)})"))
    return problems


def with_json_types(option: Option, value: Any) -> Any:
    """Returns a value as the option's type holds it in JSON: an integer for a float becomes a float.

    Raises:
        ValidationError: The value has another type.
    """
    adapter = TypeAdapter(option.kind)
    return adapter.dump_python(adapter.validate_json(json.dumps(value, allow_nan=False), strict=True), mode="json")


def _peft(*parts: str) -> Path:
    spec = find_spec("peft")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent.joinpath(*parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _ancestry(name: str, path: Path) -> Iterator[ast.ClassDef]:
    """Yields a configuration class and those that it inherits from, without the common ones."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield node
            for base in map(ast.unparse, node.bases):
                if base not in ROOTS:
                    yield from _ancestry(base, _origin(base, path))


def _origin(name: str, path: Path) -> Path:
    """Returns the file that defines a class which another file names."""
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            module = _peft(*node.module.split(".")[1:])
            return module / "config.py" if module.is_dir() else module.with_suffix(".py")
    return path


def _default(value: ast.expr | None) -> Any:
    """Returns the default that a field's definition states.

    Raises:
        ValueError: It is not a plain value.
    """
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        if factory := keywords.get("default_factory"):
            empty: dict[str, Any] = {"dict": {}, "list": []}
            if (name := ast.unparse(factory)) not in empty:
                raise ValueError(name)
            return empty[name]
        value = keywords.get("default")
    return None if value is None else ast.literal_eval(value)


def _kind(node: ast.expr) -> Any:
    """Returns the type behind an annotation; a class of PEFT's own is a type without values."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str(text)):
            return _kind(ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return PLAIN.get(name, Never)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([left, right])
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if name == "Literal":
                return Literal[tuple(ast.literal_eval(part) for part in parts)]
            if name in ("Optional", "Union"):
                return _union([*parts, ast.Constant(None)] if name == "Optional" else parts)
            return PLAIN[name][tuple(_kind(part) for part in parts)]
    return Never


def _union(parts: list[ast.expr]) -> Any:
    kinds = [kind for kind in map(_kind, parts) if kind is not Never]
    return Union[tuple(kinds)] if kinds else Never  # noqa: UP007 - of a list

"""Strict reading of the YAML and JSON that people write: every file gives plain values or an error. No torch.

Plain values are text, whole numbers of 64 bits, floats, booleans, null, lists, and mappings with text as keys.
"""

from __future__ import annotations

import json
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NoReturn

import yaml
from pydantic import AfterValidator, Field

from peftscope.errors import InputError, Problem, shown

LARGEST_COUNT = 2**31 - 1
"""The largest count or seed of a run: beyond it torch, NumPy or a file format overflows."""
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]

LONGEST_NAME = 96

LARGEST_BYTES = 1_000_000
"""The largest file that is read: six times the ledger of claims, and up to twenty seconds of PyYAML."""
LARGEST_SIZE = 500_000
"""The most values and keys of a file with its aliases expanded: a few lines can expand to a billion values."""
DEEPEST = 20
"""The deepest nesting of a file; no file of the suite has more than seven levels."""
LARGEST_INTEGER = 2**63 - 1
_LONGEST_NUMBER = 100

_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping that a YAML file holds.

    Raises:
        InputError: The file cannot be read, is not YAML, repeats a key, is not a mapping, or has values that are not
            plain.
    """
    text = read_text(path)
    try:
        loader = _StrictLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        raise InputError(Problem(f"{path}: line {line}", message)) from None
    try:
        content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}: line {mark.line + 1}" if mark else str(path)
        raise InputError(Problem(place, f"not valid YAML: {error.problem or error.context}")) from None
    except RecursionError:
        raise InputError(Problem(str(path), f"nested deeper than {DEEPEST} levels")) from None
    except (ValueError, OverflowError) as error:  # PyYAML's scanner raises them for escapes beyond Unicode
        raise InputError(Problem(f"{path}: line {loader.line + 1}", f"not valid YAML: {error}")) from None
    if not isinstance(content, dict):
        raise InputError(Problem(str(path), "must be a mapping of fields to values"))
    return content


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file.

    Raises:
        InputError: The file does not exist, is not a regular file, is too large, or is not UTF-8.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(Problem(str(path), "not a file"))
        if found.st_size > LARGEST_BYTES:
            raise InputError(Problem(str(path), f"{found.st_size:,} bytes are more than the {LARGEST_BYTES:,} allowed"))
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(Problem(str(path), "no such file")) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise InputError(Problem(str(path), f"cannot be read: {error}")) from None


def parse_json(text: str, where: str) -> Any:
    """Returns the plain values that a JSON text holds.

    Raises:
        InputError: The text is not JSON, repeats a key, or has values that are not plain.
    """
    try:
        content = json.loads(text, parse_int=_whole_number, object_pairs_hook=_unrepeated)
        _check_depth(content)
    except RecursionError:
        raise InputError(Problem(where, f"nested deeper than {DEEPEST} levels")) from None
    except ValueError as error:
        raise InputError(Problem(where, f"not valid JSON: {error}")) from None
    return content


def check_characters(text: str) -> None:
    """Raises ValueError for half a surrogate pair, which UTF-8 cannot encode and tokenizers refuse."""
    found = re.search("[\ud800-\udfff]", text)
    if found:
        raise ValueError(f"the character U+{ord(found[0]):04X} is half a surrogate pair")


def check_name(name: str) -> str:
    """Returns the name of a model or a task unchanged if it is safe in paths and on command lines.

    >>> check_name("my-task_2.1")
    'my-task_2.1'

    Raises:
        ValueError: The name has other characters, or is too long.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > LONGEST_NAME:
        said = "letters, digits, `.`, `_` and `-`, begins with a letter or a digit"
        raise ValueError(f"a name has {said}, and is no longer than {LONGEST_NAME}")
    return name


Name = Annotated[str, AfterValidator(check_name)]


def check_hub_id(name: str) -> str:
    """Returns a hub's id of a model or a data set unchanged: ``name`` or ``org/name``.

    Raises:
        ValueError: The id has another form.
    """
    for part in name.split("/", 1):
        check_name(part)
    return name


HubId = Annotated[str, AfterValidator(check_hub_id)]


def check_inner_path(path: str) -> str:
    """Returns a relative path unchanged if it stays inside its folder.

    Raises:
        ValueError: The path is absolute, leaves the folder, or has unusual characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9._/-]+", path) or path.startswith("/") or ".." in path.split("/"):
        raise ValueError("must be a path inside the archive, without `..`")
    return path


InnerPath = Annotated[str, AfterValidator(check_inner_path)]


def _whole_number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER or abs(int(digits)) > LARGEST_INTEGER:
        raise ValueError(f"a whole number of more than 64 bits ({shown(digits)})")
    return int(digits)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key `{twice}` appears twice")
    return found


def _check_depth(content: Any, level: int = 0) -> None:
    """Raises an error for content that is nested too deeply, or that has invalid characters."""
    if level > DEEPEST:
        raise RecursionError
    if isinstance(content, str):
        check_characters(content)
    parts = [*content, *content.values()] if isinstance(content, dict) else content
    for part in parts if isinstance(parts, list) else []:
        _check_depth(part, level + 1)


class _StrictLoader(yaml.SafeLoader):
    """Loads YAML of plain values. It refuses repeated keys and other tags, reads 1e-3 as a number and dates as text."""

    def get_single_node(self) -> yaml.Node | None:
        """Returns the document's root; raises an error if it is too deep, or too large with its aliases expanded."""
        root = super().get_single_node()
        if root is not None and _measure(root, {}, 0)[0] > LARGEST_SIZE:
            _refuse(f"more than {LARGEST_SIZE:,} values with its aliases expanded", root)
        return root

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Returns a node's value; raises an error if its text does not fit its tag."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:
            said = error if isinstance(error, ValueError) else f"{shown(node.value)} does not fit its tag"
            _refuse(str(said), node)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """Returns a whole number; raises an error if it has more than 64 bits."""
        if len(node.value) <= _LONGEST_NUMBER:
            value = self.construct_yaml_int(node)
            if abs(value) <= LARGEST_INTEGER:
                return value
        raise ValueError(f"a whole number of more than 64 bits ({shown(node.value)})")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns a mapping; raises an error if a key appears twice."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                _refuse(f"a field's name must be text (got {shown(key)})", key_node)
            if key in seen:
                _refuse(f"key `{key}` appears twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse(message: str, node: yaml.Node) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], level: int) -> tuple[int, int]:
    """Returns how many values a node has with its aliases expanded, and its depth; refuses one that is too deep."""
    if id(node) not in known:
        if level > DEEPEST:
            _refuse(f"nested deeper than {DEEPEST} levels", node)
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        if isinstance(node, yaml.ScalarNode):
            try:
                check_characters(node.value)
            except ValueError as error:
                _refuse(str(error), node)
        found = [_measure(part, known, level + 1) for part in parts]
        known[id(node)] = 1 + sum(size for size, _ in found), 1 + max((levels for _, levels in found), default=0)
    if level + known[id(node)][1] > DEEPEST + 1:
        _refuse(f"nested deeper than {DEEPEST} levels", node)
    return known[id(node)]


_StrictLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN
}
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_whole_number)
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

BENCHMARK_PATTERN = r"[A-Za-z0-9_-]+"
REVISION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}$"
"""A revision becomes part of a folder's name and of a command line."""

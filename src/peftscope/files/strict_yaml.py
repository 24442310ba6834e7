"""Strict YAML: a text gives plain values, as ``content`` defines them, or an error. No torch."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml

from peftscope.errors import InputError, Problem, shown
from peftscope.files.limits import DEEPEST, LARGEST_INTEGER, LONGEST_NUMBER, check_plain

_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Returns the mapping that a YAML text holds.

    Raises:
        InputError: The text is not YAML, repeats a key, is not a mapping, or has values that are not plain.
    """
    try:
        yaml.reader.Reader(text)  # checks the characters; libyaml tells less of them
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        raise InputError(Problem(f"{where}: line {line}", message)) from None
    try:
        content = _StrictLoader(text).get_single_data()
        check_plain(content)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}: line {mark.line + 1}" if mark else where
        raise InputError(Problem(place, f"not valid YAML: {error.problem or error.context}")) from None
    except RecursionError:
        raise InputError(Problem(where, f"nested deeper than {DEEPEST} levels")) from None
    except (ValueError, OverflowError) as error:  # PyYAML's own scanner raises them for escapes beyond Unicode
        raise InputError(Problem(where, f"not valid YAML: {error}")) from None
    if not isinstance(content, dict):
        raise InputError(Problem(where, "must be a mapping of fields to values"))
    return content


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml is ten times as fast
    """Loads YAML of plain values. It refuses repeated keys and other tags, reads 1e-3 as a number and dates as text."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Returns a node's value; raises an error if its text does not fit its tag."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:
            said = error if isinstance(error, ValueError) else f"{shown(node.value)} does not fit its tag"
            _refuse(str(said), node)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """Returns a whole number; raises an error if it has more than 64 bits."""
        if len(node.value) <= LONGEST_NUMBER:
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
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

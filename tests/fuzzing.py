"""What fuzzing draws from: files with anything in them."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from peftscope.errors import InputError

MORE = int(os.environ.get("PEFTSCOPE_FUZZ", "1"))
"""How many times as many cases as usual; above one they are other ones each time. CI takes the usual number."""
LONGEST_SECONDS = 30
"""Of one case on a busy machine; most take milliseconds."""


def cases(count: int) -> settings:
    """How often a test runs: fixed cases, so that a failure here is a failure there."""
    return settings(
        max_examples=count * MORE,
        deadline=None,
        derandomize=MORE == 1,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def loads_or_refuses(load: Callable[[], Any]) -> Any:
    """Returns what loads, or the InputError; any other exception is the test's failure."""
    began = time.process_time()
    try:
        return load()
    except InputError as error:
        message = str(error)
        message.encode()
        assert all(problem.where and problem.message for problem in error.problems)
        assert all(c.isprintable() or c == "\n" for c in message)
        assert len(message) < 4000 * len(error.problems)
        return error
    finally:
        assert time.process_time() - began < LONGEST_SECONDS


# Broken files.

TEXT = st.text(st.characters(), max_size=20)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from([1e308, -0.0, 5e-324, float("nan"), float("inf")]),
    TEXT,
    st.sampled_from(
        ["", " ", "\x00", "\x1b[2J", "\u2028", "../../x", "/etc/passwd", "-x", "a" * 300, "$(touch x)", "'"]
    ),
    st.sampled_from(["\ud800", "\U0001f600", "é", "\u202e", "toy", "lora", "none", "quick", "mine", "defaults"]),
    st.dates(date(1, 1, 1), date(9999, 12, 31)),
    st.binary(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT | st.integers() | st.booleans() | st.none(), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a tree but its root."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in parts:
        yield (*here, key)
        yield from places(part, (*here, key))


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of which one to three nodes were replaced, removed, inserted, repeated or put elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        parent = tree
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "insert", "move", "rename"]))
        if action == "replace":
            parent[last] = draw(VALUES)
        elif action == "remove":
            del parent[last]
        elif action == "insert" and isinstance(parent, list):
            parent.insert(last, draw(VALUES))
        elif action == "insert":
            parent[draw(TEXT)] = draw(VALUES)
        elif action == "rename" and isinstance(parent, dict):
            parent[draw(TEXT | st.sampled_from(["name", "method", "seed", "<<", "with", "model", "__class__"]))] = (
                parent.pop(last)
            )
        else:
            other = tree
            for key in draw(st.sampled_from(found))[:-1]:
                other = other[key] if isinstance(other, dict) and key in other else other
            parent[last] = copy.deepcopy(other)
    return tree


YAML = (
    "&a [*a]  &a {b: *a}  *a  <<: *a  !!python/object/apply:os.system ['false']  !!python/name:os.system  "
    "!function os.system  !!binary aGVsbG8=  !!binary x  !!timestamp x  !!set {a, b}  !!omap [a: 1]  !!int ''  "
    "!!int abc  !!float abc  !!bool maybe  !!map x  !!str [a]  2024-13-45  2024-01-01  yes: 1  [a]: 1  .nan  -.inf  "
    "1e999  #  %YAML 9.9\n  ---\n  ...\n  | \n"
)
LONG = ["9" * 5000, "0x" + "f" * 5000, "1" + ":1" * 2000, "[" * 400, "{a: " * 400, "- " * 400, "? ", ": "]
ODD = ['"\\ud800"', '"\\UFFFFFFFF"', "\x00", "\x1b", "\ufeff", "\u2028", "\t"]
SPLICES = st.sampled_from([*YAML.split("  "), *LONG, *ODD])


@st.composite
def spliced(draw: st.DrawFn, text: str) -> bytes:
    """A file's text with pieces cut out, put in and repeated, or with bytes that are noise."""
    content = text
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 30)))
        piece = draw(SPLICES | TEXT | st.just(content[start:end] * 2))
        content = content[:start] + piece + content[end:]
    encoded = content.encode(errors="surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(encoded)))
        encoded = encoded[:at] + draw(st.binary(min_size=1, max_size=3)) + encoded[at + 1 :]
    return encoded


def dumped(tree: Any) -> bytes:
    """A tree as YAML, with halves of surrogate pairs as escapes, dates as dates and bytes as ``!!binary``."""
    return yaml.dump(tree, Dumper=yaml.SafeDumper).encode(errors="surrogatepass")

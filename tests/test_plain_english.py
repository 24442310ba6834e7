"""Docstrings, names and phrases that a reader would have to decode."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

DANGLING = ("Of", "That", "Whether")
"""First words that leave out their subject. An attribute or a property may begin with "Whether"."""
VAGUE_NAMES = {"found", "said", "again", "taken"}
BANNED = re.compile(r"comes? to be\b|had again|who doubts", re.IGNORECASE)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def sources(root: Path) -> list[Path]:
    package = root / "src" / "peftscope"
    return sorted([*package.rglob("*.py"), *(root / "benchmarks").glob("*.py"), *(root / "calculator").glob("*.py")])


def docstrings(tree: ast.Module) -> Iterator[tuple[int, bool, str]]:
    """Yields the line of each docstring, whether it describes a value rather than code, and its text."""
    for node in ast.walk(tree):
        if not isinstance(node, Definition | ast.Module):
            continue
        if text := ast.get_docstring(node):
            decorators = [ast.unparse(item) for item in getattr(node, "decorator_list", [])]
            yield node.body[0].lineno, any(item.endswith("property") for item in decorators), text
        for previous, statement in pairwise(node.body):
            match previous, statement:
                case ast.Assign() | ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, True, text


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the line and the name of every function, class, parameter and constant of a module."""
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        yield from ((target.lineno, target.id) for target in targets if isinstance(target, ast.Name))


def complaints(text: str) -> list[str]:
    """Returns what a reader would stumble over in a module, each with its line."""
    tree = ast.parse(text)
    dangling = [
        f"{line}: begins with {word}: {docstring.splitlines()[0]}"
        for line, is_value, docstring in docstrings(tree)
        if (word := re.split(r"\W", docstring.strip())[0]) in DANGLING and not (is_value and word == "Whether")
    ]
    vague = [f"{line}: the name {name}" for line, name in names(tree) if name in VAGUE_NAMES]
    phrases = [f"{number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if BANNED.search(line)]
    return dangling + vague + phrases


def test_code_is_described_in_plain_english(repository: Path) -> None:
    files = sources(repository)
    assert len(files) > 80
    stumbles = [f"{path.relative_to(repository)}:{each}" for path in files for each in complaints(path.read_text())]
    assert not stumbles, "\n".join(stumbles)


def test_pages_have_no_banned_phrase(repository: Path) -> None:
    pages = [*repository.glob("*.md"), *repository.glob("docs/*.md"), repository / "experiments" / "README.md"]
    assert len(pages) > 7
    for page in pages:
        if page.name != "CHANGELOG.md":
            assert not BANNED.search(page.read_text()), page


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('def f() -> int:\n    """Of a run."""', 1),
        ('def f() -> bool:\n    """Whether it is there."""', 1),
        ('class C:\n    @property\n    def f(self) -> bool:\n        """Whether it is there."""', 0),
        ('LIMIT = 3\n"""That fit on a page."""', 1),
        ('IS_OLD = True\n"""Whether it is old."""', 0),
        ("def found(said: int) -> int: ...", 2),
        ("taken = again = 1", 2),
        ("def f() -> None:\n    found = 1", 0),
        ("# a file that has to come to be", 1),
        ('def f() -> int:\n    """Returns the number of runs."""', 0),
    ],
)
def test_what_is_complained_about(text: str, count: int) -> None:
    assert len(complaints(text)) == count

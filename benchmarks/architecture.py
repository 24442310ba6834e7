"""Writes the picture and the list of rooms into ``docs/architecture.md``: ``python -m benchmarks.architecture``.

The picture follows the import contract in ``pyproject.toml``; the list quotes the first line of each room's docstring.
"""

from __future__ import annotations

import ast
import tomllib
from itertools import pairwise
from pathlib import Path

from benchmarks.page import write_blocks

PAGE = Path("docs/architecture.md")
CONTRACT = "imports run in one direction"
PACKAGE = "peftscope"


def read_layers(project: Path = Path("pyproject.toml")) -> list[list[str]]:
    """Returns the rooms of each layer of the import contract, from the top down, without the package's name."""
    contracts = tomllib.loads(project.read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["name"] == CONTRACT)
    return [[room.strip().removeprefix(f"{PACKAGE}.") for room in layer.split("|")] for layer in layers]


def draw_layers(layers: list[list[str]]) -> str:
    """Returns a Mermaid flowchart with an arrow from every room of a layer to every room of the next one.

    >>> print(draw_layers([["cli"], ["data", "models"]]))
    flowchart TD
        cli --> data & models
    """
    arrows = [f"    {' & '.join(upper)} --> {' & '.join(lower)}" for upper, lower in pairwise(layers)]
    return "\n".join(["flowchart TD", *arrows])


def describe_room(room: str, source: Path = Path("src")) -> str:
    """Returns the first line of the docstring of a room, which is a package or a module."""
    path = source / PACKAGE / room / "__init__.py"
    text = (path if path.is_file() else path.parent.with_suffix(".py")).read_text()
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def render(root: Path = Path()) -> dict[str, str]:
    """Returns the content of each marked block of the page by the block's name."""
    layers = read_layers(root / "pyproject.toml")
    rooms = [room for layer in layers for room in layer]
    lines = [f"| `{room}` | {describe_room(room, root / 'src').replace('``', '`')} |" for room in rooms]
    return {
        "layers": f"```mermaid\n{draw_layers(layers)}\n```",
        "rooms": "\n".join(["| room | what it is for |", "|---|---|", *lines]),
    }


if __name__ == "__main__":
    write_blocks(render(), PAGE)

"""Writes what the commands of its three doors print into README.md: ``python -m benchmarks.shown``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from benchmarks.page import write_blocks

PAGE = Path("README.md")
SHOWN: dict[str, tuple[str, list[int]]] = {
    "shown:true": ("peftscope claims --published --id P45", [*range(4)]),
    "shown:fits": (
        "peftscope memory llama-3-8b --method qlora --checkpointing --seq-len 1024 --gpu rtx4090",
        [5, -3, -2],
    ),
    "shown:better": ("peftscope table variants --markdown", [*range(6)]),
}
"""The command of each block, and which lines of its output the page shows. Dots stand for the others."""


def show(command: str, wanted: list[int]) -> str:
    """Returns a block with a command and some lines of what it prints."""
    program = [sys.executable, "-m", *shlex.split(command)]
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    return block(command, done.stdout.splitlines(), wanted)


def block(command: str, lines: list[str], wanted: list[int]) -> str:
    """Returns a command and these lines of its output, with dots for those that are left out.

    >>> print(block("x", ["a ", "b", "c", "d"], [0, -1]))
    ```console
    $ x
    a
    ...
    d
    ```
    """
    places = [number % len(lines) for number in wanted]
    shown = ["..."] * (places[0] > 0) + [lines[places[0]]]
    for before, place in pairwise(places):
        shown += ["..."] * (place > before + 1) + [lines[place]]
    shown += ["..."] * (places[-1] < len(lines) - 1)
    return "\n".join(["```console", f"$ {command}", *(line.rstrip() for line in shown), "```"])


if __name__ == "__main__":
    write_blocks({name: show(*asked) for name, asked in SHOWN.items()}, PAGE)

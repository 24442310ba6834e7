"""Answers what people asked in public threads beside what they reported: ``python -m benchmarks.threads``."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.page import write_blocks
from peftscope.cli.main import app
from peftscope.words import GIB

THREADS, PAGE = Path(__file__).with_name("threads.csv"), Path("docs/threads.md")
SIMULATED = ("qwen3-next-80b-a3b", "gemma-4-26b-a4b", "glm-4.5-air", "gpt-oss-20b")
"""Models of the table that are simulated, which takes a minute or more."""
FITS = {"yes": "fits", "tight": "tight", "no": "does not fit", None: ""}


def read_threads() -> list[dict[str, str]]:
    """Returns the rows: thread, command without ``peftscope``, what was reported, and what a reader must know."""
    with THREADS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def answered(command: str) -> str:
    """Returns an answer in a few words: the device's peak with its largest part, or else the first line.

    Raises:
        ValueError: The command ends with an error.
    """
    words = shlex.split(command)
    words += ["--json"] * (words[0] == "memory" and "--json" not in words)
    done = CliRunner().invoke(app, words)
    if done.exit_code not in (0, 1) or not done.stdout:
        raise ValueError(f"{command}: {done.output or done.exception}")
    if words[0] != "memory":
        return done.stdout.splitlines()[0].rstrip()
    found = json.loads(done.stdout)
    largest, size = max(found["components"].items(), key=lambda part: part[1])
    said = [f"{found['peak_device_bytes'] / GIB:.1f} GiB", FITS[found.get("fits")]]
    said.append(f"{size / found['peak_allocated_bytes']:.0%} {largest}")
    return ", ".join(filter(None, said))


def line(row: dict[str, str]) -> str:
    """Returns a row of the page's table."""
    repository, _, number = row["thread"].partition("#")
    command = row["command"].replace("|", r"\|")
    cells = [
        f"[{repository.split('/')[1]}#{number}](https://github.com/{repository}/issues/{number})",
        f"`{command}`" if command else "",
        answered(row["command"]) if command else "not answered",
        row["reported"],
        row["beside"],
    ]
    return f"| {' | '.join(cells)} |"


def render() -> str:
    """Returns the count of threads that are answered, and the table."""
    rows = read_threads()
    threads, done = ({row["thread"] for row in rows if row["command"] or every} for every in (True, False))
    head = "| thread | command | answer | reported | |\n|---|---|---|---|---|"
    return "\n".join([f"{len(done)} of {len(threads)} threads are answered.", "", head, *map(line, rows)])


if __name__ == "__main__":
    write_blocks({"threads": render()}, PAGE)

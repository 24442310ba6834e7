"""Where commands print: tables to standard output, progress to standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console

from peftscope.words import spoken_time

T = TypeVar("T")
SECONDS_A_LINE = 30

TRUE, FITS, OWN = "Is it true?", "What fits, and what to take?", "Your method, your card"
EXPERIMENT, PUBLISHED = "Experiments", "Published runs"
"""The headings of commands in the help."""


def wide_console(width: int = 160) -> Console:
    """Returns a console that is so many characters wide where a program reads it, so that tables are not folded."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False, emoji=False)


def print_json(content: Any) -> None:
    """Prints content for programs, on one line."""
    print(json.dumps(content, ensure_ascii=False))


def with_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yields the items, with a bar and the time that is left; without a terminal, with a line every half minute."""
    from rich.progress import track

    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        yield from track(items, description=what, total=total, console=console, transient=True)
        return

    began = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_A_LINE and done < total:
            console.print(f"{what}: {done} of {total}, about {spoken_time((now - began) / done * (total - done))} left")
            last = now

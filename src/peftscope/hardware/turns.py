"""Turns of runs that share this machine: most of their work goes on side by side, and one at a time is timed alone."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from pathlib import Path


class Turns:
    """This process's place among those of its user that take turns on this machine.

    Running processes share the lock of the room; a timed process holds it alone. One that waits to be timed also locks
    the door, so that none can start. Both are locks of files, which the system releases with their process. A timed run
    has ``threads`` processor threads.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        folder = Path(tempfile.gettempdir()) / f"peftscope-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self._room, self._door = (os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("room", "door"))

    def enter(self) -> None:
        """Waits until nobody is timed or waits for that, and works beside the others from then on."""
        _lock(self._door, fcntl.LOCK_SH)
        _lock(self._room, fcntl.LOCK_SH)
        fcntl.flock(self._door, fcntl.LOCK_UN)

    def begin(self) -> None:
        """Waits until all others are at a place where they can wait, and has the machine alone from then on."""
        fcntl.flock(self._room, fcntl.LOCK_UN)
        _lock(self._door, fcntl.LOCK_EX)
        _lock(self._room, fcntl.LOCK_EX)
        fcntl.flock(self._door, fcntl.LOCK_UN)

    def end(self) -> None:
        """Lets the others work again, and works beside them, after one that waits to be timed already."""
        fcntl.flock(self._room, fcntl.LOCK_UN)
        self.enter()


def _lock(file: int, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print(
            "waits for its turn: another run on this machine is timed, or is about to be", file=sys.stderr, flush=True
        )
        fcntl.flock(file, kind)

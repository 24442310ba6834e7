"""File locks, which the system releases when their process ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftscope.errors import InputError, Problem

LOCK_SECONDS = 30
"""The seconds that a job waits for another one that is about to end."""


@contextmanager
def locked(file: Path, does: str = "is working on this run", seconds: int | None = None) -> Iterator[None]:
    """Holds the lock of a file inside this context. The system releases it if the process dies.

    Args:
        file: The lock file. It is created, with its folder, if needed.
        does: What the message says of a process that still holds the lock after ``seconds``.
        seconds: How long to wait; None means LOCK_SECONDS.

    Raises:
        InputError: Another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as handle:
        for _ in range(LOCK_SECONDS if seconds is None else seconds):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(1)
        else:
            handle.seek(0)
            message = f"process {handle.read().strip() or '?'} {does}"
            raise InputError(Problem(str(file), message, "wait for it, or stop it"))
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield

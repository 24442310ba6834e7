"""Locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftscope.errors import InputError, Problem

LOCK_SECONDS = 30
"""How long a job waits for one that is just ending."""


@contextmanager
def locked(file: Path, does: str = "makes this run at the moment", seconds: int | None = None) -> Iterator[None]:
    """Holds a file's lock, which ends with the process however that ends.

    Args:
        file: Comes to be, in a folder that may have to come to be.
        does: What to say of a process that holds it, if it still does after ``seconds`` (default: LOCK_SECONDS).
        seconds: How long to wait.

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

"""File locks, which the system releases when their process ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftscope.errors import InputError, Problem

LOCK_SECONDS = 30
"""The seconds that a job waits for another one that is about to end."""


@contextmanager
def locked(file: Path, does: str = "is working on this run", seconds: int | None = None) -> Iterator[None]:
    """Holds the lock of a file inside this context. The system releases it if the process and its forks die.

    Args:
        file: The lock file. It is created, with its folder, if needed.
        does: What the message says of a process that still holds the lock after ``seconds``.
        seconds: How long to wait; None means LOCK_SECONDS.

    Raises:
        InputError: Another process holds it.
    """
    from filelock import FileLock, Timeout  # not needed by the many commands that only read

    file.parent.mkdir(parents=True, exist_ok=True)
    # filelock closes its descriptor in a forked process. A copy stays open there: the lock outlives a killed parent.
    copies: list[int] = []
    wait = LOCK_SECONDS if seconds is None else seconds
    lock = FileLock(file, timeout=wait, poll_interval=0.5, on_acquired=lambda held: copies.append(os.dup(held)))
    try:
        lock.acquire()
    except Timeout:
        holder = file.read_text().strip() if file.is_file() else ""
        message = f"process {holder or '?'} {does}"
        raise InputError(Problem(str(file), message, "wait for it, or stop it")) from None
    try:
        file.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()
        os.close(copies[0])

"""The process of a run: when it began, and a parent that survives it. No torch."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from peftscope.errors import InputError, Problem

_PR_SET_PDEATHSIG = 1
LOCK_SECONDS = 30
"""How long a job waits for one that is just ending."""

_FREE = "free some space and start again: what is finished stays, and a stopped run goes on"
_ALLOW = "make this folder writable for you, or work in another one"
STORAGE_CODE = 2
"""With which a process ends that could not write its own record."""
STORAGE_REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: _FREE,
    errno.EROFS: _ALLOW,
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EIO: "the disk reports errors: look after it before you start again",
}


class Interrupted(BaseException):
    """The process was told to stop (SIGINT or SIGTERM)."""


def storage_problem(error: BaseException) -> str:
    """Returns what to say if an error is the disk's, and nothing if it is not.

    safetensors wraps the system's error in one of its own, which only its text gives away.
    """
    wrapped = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(wrapped[1]) if wrapped else None
    if number not in STORAGE_REMEDIES:
        return ""
    file = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return f"{os.strerror(number)}{file} -> {STORAGE_REMEDIES[number]}"


def raise_on_signals() -> None:
    """Makes SIGINT and SIGTERM raise ``Interrupted``."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


@contextmanager
def stops_between_steps() -> Iterator[Callable[[], str]]:
    """Within, a first SIGINT or SIGTERM waits for the next question about it; a second one raises ``Interrupted``.

    Yields:
        A function that returns what to say about the signal that came, or nothing.
    """
    came: list[str] = []

    def note(number: int, frame: Any) -> None:
        said = f"stopped by {signal.Signals(number).name}"
        if came:
            raise Interrupted(said)
        came.append(said)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came[0] if came else ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds_since_process_start() -> float:
    """Returns the age of this process.

    On Linux by the clock that the kernel stamped it with: psutil's ``create_time`` adds a boot time in whole seconds
    and is off by up to one, which is a fifth of a short run.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time() - psutil.Process().create_time()


def die_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel for a signal when the parent dies; only Linux can.

    Without it, the jobs of a workflow that was killed go on, beside those of the next one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)


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


def host_kills() -> int | None:
    """Returns how many processes the kernel has killed for want of memory, None where it does not count them."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def survive_child() -> signal.Signals | None:
    """Forks; returns None in the child, and in the parent the signal that killed the child.

    The parent hands on SIGTERM and SIGINT, and exits with the child's code where no signal killed it. It is there
    because a host that runs out of memory kills without a chance to write a record.
    """
    child = os.fork()
    if child == 0:
        die_with_parent()
        return None

    def hand_on(number: int, frame: Any) -> None:
        os.kill(child, number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, hand_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        os._exit(code)
    return signal.Signals(-code)

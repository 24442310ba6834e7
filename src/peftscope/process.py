"""The process of a run: when it began, and a parent that survives it. No torch."""

from __future__ import annotations

import ctypes
import fcntl
import os
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


class Interrupted(BaseException):
    """The process was told to stop (SIGINT or SIGTERM)."""


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
def locked(file: Path) -> Iterator[None]:
    """Holds a file's lock, which ends with the process however that ends.

    Raises:
        InputError: Another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as handle:
        for _ in range(LOCK_SECONDS):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(1)
        else:
            handle.seek(0)
            message = f"process {handle.read().strip() or '?'} makes this run at the moment"
            raise InputError(Problem(str(file.parent.parent), message, "wait for it, or stop it"))
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


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

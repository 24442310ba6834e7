"""The process of a run: when it began, and a parent that survives it. No torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil


class Interrupted(BaseException):
    """The process was told to stop (SIGINT or SIGTERM)."""


def raise_on_signals() -> None:
    """Makes SIGINT and SIGTERM raise ``Interrupted``."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


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


def survive_child() -> signal.Signals | None:
    """Forks; returns None in the child, and in the parent the signal that killed the child.

    The parent hands on SIGTERM and SIGINT, and exits with the child's code where no signal killed it. It is there
    because a host that runs out of memory kills without a chance to write a record.
    """
    child = os.fork()
    if child == 0:
        return None

    def hand_on(number: int, frame: Any) -> None:
        os.kill(child, number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, hand_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        os._exit(code)
    return signal.Signals(-code)

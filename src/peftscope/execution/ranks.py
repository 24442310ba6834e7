"""The processes of a sharded run: forked, watched, and ended together. No torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from peftscope.execution.process import die_with_parent
from peftscope.record import state_folder

SETTLE_SECONDS = 2
"""After one process failed, others follow that only miss it: how long all of them are waited for."""

_some_failed = threading.Event()


def rank_folder(run: Path, rank: int) -> Path:
    """Returns where a process of a run keeps its files: the first one in the run's own folder."""
    return run if rank == 0 else state_folder(run) / f"rank-{rank}"


def meeting_file(run: Path) -> Path:
    """Returns the file by which the processes of a run find each other."""
    return state_folder(run) / "meeting"


def fork_ranks(run: Path, count: int, when_some_fail: Callable[[dict[int, int]], None]) -> int:
    """Forks ``count - 1`` processes beside this one; they die with it, and leave signals that ask to stop to it.

    Args:
        run: The run's folder; what processes of an earlier attempt left there is removed, but for their checkpoints.
        count: How many there are then.
        when_some_fail: Called once, from a thread, with the exit codes (negative: a signal) by rank of those that
            failed, in the order in which they ended.

    Returns:
        This process's rank, 0 in the first, where threads watch the others.
    """
    meeting_file(run).unlink(missing_ok=True)
    for path in state_folder(run).glob("rank-*/*"):
        if path.is_file():
            path.unlink()
    ranks: dict[int, int] = {}
    # Blocked in the others for good, not ignored, for training puts handlers of its own in place.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    for rank in range(1, count):
        child = os.fork()
        if child == 0:
            die_with_parent(signal.SIGKILL)
            _write_output_to(rank_folder(run, rank) / "log")
            return rank
        ranks[child] = rank
    signal.pthread_sigmask(signal.SIG_SETMASK, before)

    failed: dict[int, int] = {}
    told = threading.Lock()

    def watch(child: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            failed[ranks[child]] = code
            _some_failed.set()
            if told.acquire(blocking=False):
                time.sleep(SETTLE_SECONDS)
                when_some_fail(dict(failed))

    for child in ranks:
        threading.Thread(target=watch, args=(child,), daemon=True).start()
    return 0


def let_others_end_it() -> None:
    """Called by the first process when it fails: returns if no other one failed before, which would be the reason.

    Else it waits to be ended by what ``fork_ranks`` calls then.
    """
    if _some_failed.wait(SETTLE_SECONDS):
        while True:
            signal.pause()


def _write_output_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

"""Forks, watches and ends the processes of a sharded run. No torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from peftscope.execution.process import die_with_parent
from peftscope.record import state_folder

# torch.distributed.run cannot replace this. It ends all workers when one fails, before another can say that memory ran
# out; it signals each, not the first, so that they stop after different steps; and workers of a killed agent live on.
SETTLE_SECONDS = 2
"""When one process fails, others fail because they miss it. All of them get this long before they are judged."""

_some_failed = threading.Event()


def rank_folder(run: Path, rank: int) -> Path:
    """Returns the folder for the files of one process of a run. For the first process, it is the run's own folder."""
    return run if rank == 0 else state_folder(run) / f"rank-{rank}"


def meeting_file(run: Path) -> Path:
    """Returns the file through which the processes of a run find each other."""
    return state_folder(run) / "meeting"


def fork_ranks(run: Path, count: int, when_some_fail: Callable[[dict[int, int]], None]) -> int:
    """Forks ``count - 1`` processes. They die with this one, and only this one handles SIGTERM and SIGINT.

    Args:
        run: The run's folder. Files of an earlier attempt's processes are removed there, except checkpoints.
        count: The number of processes, including this one.
        when_some_fail: Called once, from a thread, if processes fail. It gets their exit codes (negative for a signal)
            by rank, in the order in which they ended.

    Returns:
        The rank of this process: 0 in the first one, where threads watch the others.
    """
    meeting_file(run).unlink(missing_ok=True)
    for path in state_folder(run).glob("rank-*/*"):
        if path.is_file():
            path.unlink()
    ranks: dict[int, int] = {}
    # The forked processes keep these signals blocked. To ignore them is not enough: training installs its own handlers.
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
    """Returns if no other process has failed. The first process calls this when it fails itself.

    If another one failed before, that is the reason, and this call waits until ``when_some_fail`` ends the process.
    """
    if _some_failed.wait(SETTLE_SECONDS):
        while True:
            signal.pause()


def _write_output_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

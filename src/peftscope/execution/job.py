"""A run as a job: its processes are forked, watched and ended, and however they end, a record is written."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from peftscope.errors import InputError, Problem
from peftscope.execution.inputs import verify_inputs
from peftscope.execution.process import host_kills, seconds_since_process_start, survive_child
from peftscope.execution.ranks import fork_ranks, rank_folder
from peftscope.files.atomic import write_json
from peftscope.files.lock import locked
from peftscope.files.storage import STORAGE_CODE
from peftscope.hardware.bf16 import chosen_way
from peftscope.hardware.device import cards_claimed
from peftscope.record import (
    RunRecord,
    Status,
    clear_checkpoints,
    finished_record,
    read_record,
    state_folder,
    write_record,
)
from peftscope.spec import RunSpec, run_id
from peftscope.training.signals import Interrupted, raise_on_signals

INTERRUPTED_CODE, KILLED_CODE = 130, 137
KILLED = "killed by SIGKILL, most likely because the host ran out of memory"
errors = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Job:
    """One attempt at a run.

    Attributes:
        spec: What to run.
        folder: The run's own.
        threads: Of the processor; 0 leaves the choice to torch.
        checkpoint_seconds: Between two checkpoints.
        attempts_left: How often the caller tries again, with more host memory each time.
    """

    spec: RunSpec
    folder: Path
    threads: int
    checkpoint_seconds: float
    attempts_left: int

    def start(self) -> None:
        """Makes the run, or republishes the record of an attempt that finished it; ends the process if it ran.

        Raises:
            InputError: Another job makes it, or its model and data are damaged for good.
        """
        began = time.perf_counter() - seconds_since_process_start()
        chosen_way()  # raises for a wrong wish
        identity = run_id(self.spec)
        with locked(state_folder(self.folder) / "lock"):
            write_json(self.folder / "spec.json", self.spec.model_dump(mode="json"))
            record = finished_record(self.folder, identity)
            if record is not None:
                write_record(self.folder / "record.json", record)
                (self.folder / "interrupted.json").unlink(missing_ok=True)
                said = f"{identity}: {record.status}, as an earlier job found; remove {self.folder} to run it again"
                errors.print(said, soft_wrap=True)
                return
            verifying = time.perf_counter()
            verify_inputs(self.spec)
            verified_seconds = time.perf_counter() - verifying
            with cards_claimed(self.spec.shards if self.spec.device == "cuda" else 0):
                self._survive()
                self._run(began, verified_seconds)

    def _survive(self) -> None:
        """Forks; returns in the child, whose end the parent sees, and puts on record if it was killed."""
        before = host_kills()
        killed = survive_child()
        if killed is None:
            return
        if killed in (signal.SIGTERM, signal.SIGINT):  # before the child could listen to them
            self._end_early("interrupted", f"stopped by {killed.name}")
            sys.exit(INTERRUPTED_CODE)
        if killed != signal.SIGKILL:
            self._end_early("failed", f"crashed with {killed.name}")
            sys.exit(0)
        sys.exit(self._end_killed(before))

    def _end_killed(self, kills_before: int | None, whom: str = "") -> int:
        """Puts on record that a process got SIGKILL, and returns the code to exit with: a result, or to try again.

        Args:
            kills_before: The kernel's count of those for want of memory, when the process began.
            whom: What to say of it, if it is not the only one.
        """
        kills = host_kills()
        for_memory = kills_before is None or kills is None or kills > kills_before
        if for_memory and not self.attempts_left:
            self._end_early("oom", f"{whom}{KILLED}")
            return 0
        outside = "killed by SIGKILL, and not by the kernel for want of memory"
        self._end_early("interrupted", f"{whom}{KILLED if for_memory else outside}")
        return KILLED_CODE

    def _end_early(self, status: Status, reason: str) -> None:
        """Writes the record of a run that cannot write its own."""
        record = RunRecord(run_id=run_id(self.spec), status=status, reason=reason, spec=self.spec)
        write_record(self.folder / ("interrupted.json" if status == "interrupted" else "record.json"), record)
        errors.print(f"{record.run_id}: {status}, {reason}", soft_wrap=True)

    def _end_for_all(self, kills_before: int | None, codes: dict[int, int]) -> None:
        """Ends a sharded run some of whose other processes failed, with these codes by rank."""
        code = INTERRUPTED_CODE
        try:
            code = self._judge(kills_before, codes)
        except BaseException:  # a full disk, for one: this process must not wait for those that are gone
            traceback.print_exc()
        finally:
            os._exit(code)

    def _judge(self, kills_before: int | None, codes: dict[int, int]) -> int:
        """Puts on record why the others failed, and returns the code to exit with.

        A process that only missed another one says that it failed: what says more comes first.
        """
        which = {rank: f"process {rank} of {self.spec.shards}" for rank in codes}
        for rank, code in codes.items():
            if code == -signal.SIGKILL:
                return self._end_killed(kills_before, f"{which[rank]} was ")
        again = {rank for rank, code in codes.items() if code in (INTERRUPTED_CODE, STORAGE_CODE)}
        records = {}
        for rank in codes:
            with suppress(InputError, OSError):
                file = "interrupted.json" if rank in again else "record.json"
                records[rank] = read_record(rank_folder(self.folder, rank) / file)
        if again:
            rank = next((rank for rank in codes if rank in again and rank in records), min(again))
            reason = records[rank].reason if rank in records else "could not say why it ended"
            if not (self.folder / "interrupted.json").is_file():  # the first one's, if all stopped after the same step
                self._end_early("interrupted", f"{reason} ({which[rank]})")
            return INTERRUPTED_CODE
        first = next((rank for rank, record in records.items() if record.status == "oom"), next(iter(codes)))
        record = records.get(first)
        if record is None or record.status not in ("oom", "failed"):
            self._end_early("failed", f"{which[first]} ended with code {codes[first]}")
            return 0
        self._end_early(record.status, f"{record.reason} ({which[first]})")
        clear_checkpoints(self.folder)
        return 0

    def _run(self, began: float, verified_seconds: float) -> None:
        """Runs in this process, and in those beside it if the model is sharded; ends them all."""
        rank = 0
        try:
            raise_on_signals()
            rank = fork_ranks(self.folder, self.spec.shards, partial(self._end_for_all, host_kills()))
            record = self._execute(began, verified_seconds, rank)
        except Interrupted as error:
            if rank > 0:
                os._exit(INTERRUPTED_CODE)  # its own record says why
            if (self.folder / "interrupted.json").is_file():
                errors.print(f"{run_id(self.spec)}: interrupted, {error}", soft_wrap=True)
            else:
                self._end_early("interrupted", str(error))
            if self.spec.shards > 1:
                os._exit(INTERRUPTED_CODE)  # tearing down torch would wait for processes that are gone
            sys.exit(INTERRUPTED_CODE)
        reason = f", {record.reason}" if record.reason else ""
        errors.print(f"{record.run_id}: {record.status}{reason}", soft_wrap=True)
        # Everything is written. Tearing down torch and its threads would add half a second that no phase accounts for.
        sys.stdout.flush()
        sys.stderr.flush()
        # All processes diverge in the same step; the first one's record says so.
        os._exit(int(rank > 0 and record.status in ("oom", "failed")))

    def _execute(self, began: float, verified_seconds: float, rank: int) -> RunRecord:
        """Imports what the run needs, runs it and returns its record."""
        spec = self.spec
        # Nothing that a run reads comes from a hub: fetching is another command. Without this, libraries ask and wait.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch

        if spec.device == "cuda" and rank == 0:
            check_cards(spec.shards)
        from peftscope.execution.phases import Phases
        from peftscope.execution.run import execute

        if spec.generation_items:
            import peftscope.evaluation.answers  # noqa: F401  (its import is slow, and belongs to that phase)
        if spec.method.quantization():
            import bitsandbytes  # noqa: F401
        if self.threads or spec.shards > 1:
            torch.set_num_threads(max(1, (self.threads or torch.get_num_threads()) // spec.shards))
        phases = Phases(spec.device, began)
        phases.mark_imported(verified_seconds)
        return execute(spec, self.folder, phases, self.checkpoint_seconds, rank)


def check_cards(count: int) -> None:
    """Raises InputError if torch cannot use so many cards."""
    import torch

    if not torch.cuda.is_available():
        remedy = "see `peftscope doctor`; PEFTSCOPE_DEVICE=cpu uses the processor"
        raise InputError(Problem("device", "there is a card, but this torch cannot use it", remedy))
    if torch.cuda.device_count() < count:
        message = f"needs as many cards, {torch.cuda.device_count()} are here (got {count})"
        raise InputError(Problem("shards", message, "use fewer, or a machine with more"))

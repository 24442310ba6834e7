"""Runs one spec as a job: forks, watches and ends its processes, and writes a record however they end."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from peftscope.errors import InputError, Problem, raise_any
from peftscope.execution.process import host_kills, keep_freed_memory, seconds_since_process_start, survive_child
from peftscope.execution.ranks import fork_ranks, rank_folder
from peftscope.files.atomic import write_json
from peftscope.files.lock import locked
from peftscope.files.storage import STORAGE_CODE
from peftscope.hardware.bf16 import chosen_way
from peftscope.hardware.cards import OLDER_BUILD, has_kernels
from peftscope.hardware.device import cards_claimed
from peftscope.hardware.turns import Turns
from peftscope.methods import OwnMethod
from peftscope.planning.checks import inputs
from peftscope.record import (
    KeepWeights,
    RunRecord,
    Seconds,
    Status,
    check_place,
    clear_checkpoints,
    finished_record,
    is_restored,
    kept_path,
    measured_path,
    read_record,
    state_folder,
    steps_at,
    write_record,
)
from peftscope.spec import RunSpec, run_id
from peftscope.training.signals import Interrupted, raise_on_signals

INTERRUPTED_CODE, KILLED_CODE = 130, 137
KILLED = "killed by SIGKILL, most likely because the host ran out of memory"
errors = Console(stderr=True, highlight=False)
Start = tuple[float, Seconds, Turns | None]
"""When a process began, what it spent before its imports, and the turns that it takes."""


@dataclass(frozen=True)
class Job:
    """One attempt at a run.

    Attributes:
        spec: What to run.
        folder: The folder of the run.
        threads: The number of processor threads; 0 leaves the choice to torch.
        checkpoint_seconds: The seconds between two checkpoints.
        attempts_left: How many more times the caller will retry, with more host memory each time.
        keep_weights: The trained weights that stay when the run has ended.
        alone: Whether no other run shares the machine; only then are speed and the device's rates measured.
        keep_at: The shares of the training after which the trained weights are written.
        timed_threads: The number of processor threads from its start values to the prose after training, while others
            on this machine wait; 0: none do.
    """

    spec: RunSpec
    folder: Path
    threads: int
    checkpoint_seconds: float
    attempts_left: int
    keep_weights: KeepWeights = "adapters"
    alone: bool = True
    keep_at: Sequence[float] = ()
    timed_threads: int = 0

    def start(self) -> None:
        """Runs the spec and ends this process, or restores the record if an earlier job finished the run.

        Raises:
            InputError: Another job is working on the run, another run has ended in its folder, or its model or data are
                damaged and cannot be restored.
        """
        began = time.perf_counter() - seconds_since_process_start()
        chosen_way()  # raises an error if PEFTSCOPE_BF16 is wrong
        identity = run_id(self.spec)
        check_place(self.folder, identity)
        with locked(state_folder(self.folder) / "lock"):
            write_json(self.folder / "spec.json", self.spec.model_dump(mode="json"))
            record = finished_record(self.folder, identity)
            if record is not None and not lacks_kept(self.folder, record, self.keep_at):
                write_record(self.folder / "record.json", record)
                (self.folder / "interrupted.json").unlink(missing_ok=True)
                message = f"{identity}: {record.status}, finished by an earlier job; to repeat it, remove {self.folder}"
                errors.print(message, soft_wrap=True)
                return
            turns, waiting = Turns(self.timed_threads) if self.timed_threads else None, time.perf_counter()
            if turns:
                turns.enter()
            verifying = time.perf_counter()
            for resource in inputs(self.spec):
                resource.verify()
            spent = Seconds(verify=time.perf_counter() - verifying, wait=verifying - waiting)
            with cards_claimed(self.spec.shards if self.spec.device == "cuda" else 0):
                self._fork_and_watch()
                self._run((began, spent, turns))

    def _fork_and_watch(self) -> None:
        """Forks and returns in the child. The parent waits, and writes a record if a signal killed the child."""
        before = host_kills()
        killed = survive_child()
        if killed is None:
            return
        if killed in (signal.SIGTERM, signal.SIGINT):  # they came before the child had installed its handlers
            self._end_early("interrupted", f"stopped by {killed.name}")
            sys.exit(INTERRUPTED_CODE)
        if killed != signal.SIGKILL:
            self._end_early("failed", f"crashed with {killed.name}")
            sys.exit(0)
        sys.exit(self._end_killed(before))

    def _end_killed(self, kills_before: int | None, whom: str = "") -> int:
        """Records that SIGKILL ended a process. Returns the exit code, which says whether to retry.

        Args:
            kills_before: The kernel's count of processes killed because memory ran out, before the process began.
            whom: The beginning of the reason, which names the process if there are several.
        """
        kills = host_kills()
        for_memory = kills_before is None or kills is None or kills > kills_before
        if for_memory and not self.attempts_left:
            self._end_early("oom", f"{whom}{KILLED}")
            return 0
        outside = "killed by SIGKILL, but not by the kernel for lack of memory"
        self._end_early("interrupted", f"{whom}{KILLED if for_memory else outside}")
        return KILLED_CODE

    def _end_early(self, status: Status, reason: str) -> None:
        """Writes the record of a run whose process cannot write it."""
        record = RunRecord(run_id=run_id(self.spec), status=status, reason=reason, spec=self.spec)
        write_record(self.folder / ("interrupted.json" if status == "interrupted" else "record.json"), record)
        errors.print(f"{record.run_id}: {status}, {reason}", soft_wrap=True)

    def _end_for_all(self, kills_before: int | None, codes: dict[int, int]) -> None:
        """Ends a sharded run after some of its processes failed with these exit codes by rank."""
        code = INTERRUPTED_CODE
        try:
            code = self._judge(kills_before, codes)
        except BaseException:  # such as a full disk: this process must not wait for processes that are gone
            traceback.print_exc()
        finally:
            os._exit(code)

    def _judge(self, kills_before: int | None, codes: dict[int, int]) -> int:
        """Records why other processes failed, and returns the exit code.

        A process that only lost its partners also fails, so signals, interruptions and memory errors count first.
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
            reason = records[rank].reason if rank in records else "left no reason"
            if not (
                self.folder / "interrupted.json"
            ).is_file():  # the first process wrote it if all stopped after the same step
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

    def _run(self, start: Start) -> None:
        """Runs the spec in this process, and in forked ones if the model is sharded, and ends them all."""
        rank = 0
        try:
            raise_on_signals()
            rank = fork_ranks(self.folder, self.spec.shards, partial(self._end_for_all, host_kills()))
            record = self._execute(start, rank)
        except Interrupted as error:
            if rank > 0:
                os._exit(INTERRUPTED_CODE)  # this process's own record says why
            if (self.folder / "interrupted.json").is_file():
                errors.print(f"{run_id(self.spec)}: interrupted, {error}", soft_wrap=True)
            else:
                self._end_early("interrupted", str(error))
            if self.spec.shards > 1:
                os._exit(INTERRUPTED_CODE)  # the teardown of torch would wait for processes that are gone
            sys.exit(INTERRUPTED_CODE)
        reason = f", {record.reason}" if record.reason else ""
        errors.print(f"{record.run_id}: {record.status}{reason}", soft_wrap=True)
        # Everything is written. The teardown of torch and its threads would add half a second that belongs to no phase.
        sys.stdout.flush()
        sys.stderr.flush()
        # All processes diverge in the same step, and the record of the first one says so.
        os._exit(int(rank > 0 and record.status in ("oom", "failed")))

    def _execute(self, start: Start, rank: int) -> RunRecord:
        """Imports the libraries that the run needs, runs it and returns its record."""
        spec = self.spec
        # A run reads nothing from a hub: fetching is another command. Without this, libraries ask the hub and wait.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch

        if spec.device == "cpu":
            keep_freed_memory()
        elif rank == 0:
            check_cards(spec.shards)
        if spec.method.quantization():
            with suppress(ModuleNotFoundError):  # the run fails by itself then, and a sweep goes on with the others
                import bitsandbytes  # noqa: F401
        elif isinstance(spec.method, OwnMethod) and spec.optimizer in ("adamw", "sgd"):
            # PEFT would import it for nothing, and it torch's compiler, which is a fifth of all imports.
            sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
        from peftscope.execution.phases import Phases
        from peftscope.execution.run import execute

        if spec.generation_items:
            import peftscope.evaluation.answers  # noqa: F401  (a slow import that belongs to the import phase)
        if self.threads or spec.shards > 1:
            torch.set_num_threads(max(1, (self.threads or torch.get_num_threads()) // spec.shards))
        phases, seconds = Phases(spec.device, *start), self.checkpoint_seconds
        return execute(spec, self.folder, phases, seconds, rank, self.keep_weights, self.alone, self.keep_at)


def check_cards(count: int) -> None:
    """Raises InputError if torch cannot use so many cards."""
    raise_any(card_problems(count))


def card_problems(count: int) -> list[Problem]:
    """Returns why torch cannot use so many cards. Asking is harmless only where CUDA is not forked afterwards."""
    import torch

    if not torch.cuda.is_available():
        remedy = "see `peftscope doctor`; PEFTSCOPE_DEVICE=cpu (for make gpu-check DEVICE=cpu) uses the processor"
        return [Problem("device", "the installed torch finds no CUDA card that it can use", remedy)]
    if torch.cuda.device_count() < count:
        message = f"{count} shards need {count} cards, and this machine has {torch.cuda.device_count()}"
        return [Problem("shards", message, "use fewer shards, or a machine with more cards")]
    built, problems = torch.cuda.get_arch_list(), []
    for card in map(torch.cuda.get_device_properties, range(count)):
        if not has_kernels(card.major + card.minor / 10, built):
            message = f"torch {torch.__version__} has no kernels for {card.name}, of compute capability "
            message += f"{card.major}.{card.minor}: it was built for {', '.join(built)}"
            problems.append(Problem("device", message, OLDER_BUILD))
    return problems


def lacks_kept(run: Path, record: RunRecord, shares: Sequence[float]) -> bool:
    """Returns whether a run that ended well has to be repeated, for the weights at shares of its training.

    It has not if its weights were measured, or if it was restored from published results.
    """
    if record.status != "ok" or is_restored(run) or measured_path(run).is_file():
        return False
    return not all(kept_path(run, step).is_file() for step in steps_at(shares, record.spec.steps))

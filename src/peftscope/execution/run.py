"""Executes one run, from its spec to its record.

A run writes a record however it ends, because a failure is a result too.
"""

from __future__ import annotations

import math
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from peftscope.errors import InputError
from peftscope.execution.phases import Phases
from peftscope.execution.provenance import provenance
from peftscope.execution.ranks import let_others_end_it, meeting_file, rank_folder
from peftscope.execution.start import start_provenance
from peftscope.execution.way import run_phases
from peftscope.files.storage import storage_problem
from peftscope.hardware.bf16 import bf16_products
from peftscope.hardware.meter import is_out_of_memory, limited_memory
from peftscope.record import FINAL, RESTORED, KeepWeights, RunRecord, clear_checkpoints, state_folder, write_record
from peftscope.spec import RunSpec, run_id
from peftscope.training.checkpoint import Checkpoints
from peftscope.training.log import TrainingLog
from peftscope.training.loop import Diverged
from peftscope.training.shard import join
from peftscope.training.signals import Interrupted


def execute(
    spec: RunSpec,
    folder: Path,
    phases: Phases,
    checkpoint_seconds: float = math.inf,
    rank: int = 0,
    keep_weights: KeepWeights = "adapters",
    alone: bool = True,
    keep_at: Sequence[float] = (),
) -> RunRecord:
    """Runs a spec and writes ``record.json``, ``items.jsonl`` and ``adapter/`` into ``folder``.

    Args:
        spec: The run.
        folder: The run's own folder. Outputs of an earlier attempt are removed.
        phases: The meter of the phases, started with the process, with imports already marked.
        checkpoint_seconds: The seconds between two checkpoints. An interrupted run resumes from the last one.
        rank: The rank of this process in a sharded run. All but the first write into a folder below.
        keep_weights: The trained weights to keep. Dropping them changes no measurement.
        alone: Whether no other run shares the machine. Only then are speed and the device's rates measured.
        keep_at: The shares of the training after which the trained weights are written. It changes no measurement.

    Returns:
        The record, with any status except ``interrupted``.

    Raises:
        Interrupted: A signal or a full disk stopped the run. ``interrupted.json`` is then written, and the job counts
            as not done.
        KeyboardInterrupt: The same, in a process that has Python's own handler of SIGINT.
    """
    meeting, folder = meeting_file(folder), rank_folder(folder, rank)
    for name in ("record.json", "interrupted.json", "items.jsonl"):
        (folder / name).unlink(missing_ok=True)
    (state_folder(folder) / RESTORED).unlink(missing_ok=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(run_id=run_id(spec), status="ok", spec=spec)
    checkpoints = Checkpoints(state_folder(folder), spec, checkpoint_seconds)
    log = TrainingLog()
    try:
        record.provenance = provenance(spec, rank) | {
            "alone": alone,
            # Those of the training; beside others, a run that takes turns has fewer.
            "threads": phases.turns.threads if phases.turns else torch.get_num_threads(),
            "threads_beside": torch.get_num_threads() if phases.turns else None,
            "start": start_provenance(spec),
        }
        if spec.shards > 1:
            join(spec, rank, meeting)
        with bf16_products(), _limited_memory(record):
            run_phases(record, folder, phases, log, checkpoints, keep_weights, keep_at)
    except (Interrupted, KeyboardInterrupt) as error:
        record.status, record.reason = "interrupted", str(error) or "stopped by SIGINT"
        raise
    except Diverged as error:
        record.status, record.reason = "diverged", str(error)
    except InputError as error:
        record.status, record.reason = "failed", str(error.problems[0])
        print(error, file=sys.stderr)
    except Exception as error:
        if reason := storage_problem(error):
            # The disk failed, not the run: once there is room, the run resumes from its last checkpoint.
            record.status, record.reason = "interrupted", reason
            raise Interrupted(reason) from error
        traceback.print_exc()
        if spec.shards > 1 and rank == 0:
            record.status, record.reason = "interrupted", "stopped after a failure"
            let_others_end_it()
        record.status = "oom" if is_out_of_memory(error) else "failed"
        record.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        record.train_nll, record.train_loss = log.nll, log.loss
        record.quality.validation_curve = log.validation_nll
        record.quality.retention_curve = log.retention
        record.quality.shift_curve = log.shift
        if alone:
            log.write_speed(record.speed, spec)
        useful, rate = record.speed.useful_flops_per_second, record.ceilings.matmul_flops_per_second
        record.speed.matmul_share = useful / (rate * spec.shards) if useful is not None and rate else None
        phases.finish()
        record.seconds, record.memory = phases.seconds, phases.memory
        record.memory.paged_state_bytes = log.paged_state_bytes
        file = "interrupted.json" if record.status == "interrupted" else "record.json"
        if record.status in FINAL:
            # First into a folder that no rule declares: if the job is killed now, its retry only copies the record.
            write_record(state_folder(folder) / file, record)
        write_record(folder / file, record)
    if rank == 0:
        clear_checkpoints(folder)
    return record


@contextmanager
def _limited_memory(record: RunRecord) -> Iterator[None]:
    """Limits the run to the memory that its spec asks for, and says in the record what is left to tensors."""
    limit = record.spec.memory_limit_gib
    if limit is not None and record.spec.device == "cuda":
        with limited_memory(int(limit * 2**30)) as left:
            record.provenance["card"]["limited_to_bytes"] = left
            yield
        return
    if limit is not None:
        print(f"memory_limit_gib={limit:g}: not enforced, only the allocator of a CUDA card can be", file=sys.stderr)
    yield

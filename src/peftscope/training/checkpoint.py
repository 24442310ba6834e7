"""Saves and restores the state of training, so that a restarted job gives the same result as an uninterrupted one.

Also writes trained weights as they were at one step, into a file of their own.

State that follows from the spec is not saved: the base, its initialisation, and the order of the batches. Each process
of a sharded run saves its own share, all after the same step. (``torch.distributed.checkpoint`` would do that too, but
it unpickles its metadata.)
"""

from __future__ import annotations

import math
import os
import pickle
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peftscope.files.manifest import file_sha256
from peftscope.spec import RunSpec, run_id
from peftscope.training.log import TrainingLog
from peftscope.training.shard import anywhere, as_shares, from_all, own_share

KEPT = 2
"""The number of checkpoints that are kept: the newest, and the one before in case the newest is damaged."""
DIGEST_DIGITS = 16


@dataclass(frozen=True)
class TrainingState:
    """The state that changes from step to step: a checkpoint is made from it, and put back into it."""

    model: Any
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    log: TrainingLog


class Checkpoints:
    """Saves and restores the training of one process in ``folder``. A file's name holds its step and its checksum.

    Args:
        folder: A folder in which no rule of the workflow declares files: Snakemake removes declared files before a
            retry.
        spec: The spec of the run. Checkpoints of other runs are refused.
    """

    def __init__(self, folder: Path, spec: RunSpec, seconds: float = math.inf) -> None:
        self._folder = folder
        self._spec = spec
        self._seconds = seconds
        self._saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is older than the interval."""
        return time.monotonic() - self._saved_at >= self._seconds

    def save(self, now: TrainingState) -> None:
        """Writes the state after the steps that are in the log. On a full disk, prints a note and training continues.

        The processes of a sharded run must call this together: a step can be restored only if all have saved it.
        """
        state = {
            "run_id": run_id(self._spec),
            "parameters": {name: own_share(p.data) for name, p in now.model.named_parameters() if p.requires_grad},
            "method": self._spec.method.training_state(now.model),
            "optimizer": own_share(now.optimizer.state_dict()),
            "schedule": now.schedule.state_dict(),
            "log": asdict(now.log),
            "random": _random_states(self._spec.device),
        }
        saved = self._write(state, len(now.log.nll))
        self._saved_at = time.monotonic()
        if anywhere(saved is None, self._spec):
            if saved:
                saved.unlink()
            return
        for old in self._files()[KEPT:]:
            old.unlink()

    def _write(self, state: dict[str, Any], step: int) -> Path | None:
        """Returns the new file, or None if it could not be written."""
        unfinished = self._folder / "checkpoint.unfinished"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            return unfinished.replace(self._folder / f"checkpoint-{step:08d}-{_digest(unfinished)}.pt")
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            unfinished.unlink(missing_ok=True)
            print(f"no checkpoint at step {step}, training continues: {error}", file=sys.stderr)
            return None

    def restore(self, now: TrainingState) -> int:
        """Restores the newest sound state and returns its number of steps, or 0 if there is none.

        A damaged file is renamed to ``*.damaged``, with a note. The processes of a sharded run must call this together;
        they restore the newest state that all of them have.
        """
        done = 0
        while path := self._newest_of_all():
            state = self._read(path)
            if state is None:
                print(f"{path}: damaged or of another run, renamed to *.damaged", file=sys.stderr)
                path.rename(path.with_suffix(".damaged"))
            if anywhere(state is None, self._spec):
                continue
            assert state is not None
            self._put_in_place(state, now)
            done = len(now.log.nll)
            print(f"resumed after step {done}, from {path.name}", file=sys.stderr)
            break
        for path in self._files():
            if _step(path) > done:  # another process lacks this step
                path.unlink()
        return done

    def _newest_of_all(self) -> Path | None:
        """Returns this process's file of the last step that all processes have saved, or None."""
        files = {_step(path): path for path in self._files()}
        shared = set.intersection(*map(set, from_all(list(files), self._spec)))
        return files[max(shared)] if shared else None

    def _read(self, path: Path) -> dict[str, Any] | None:
        """Returns the state in a file, or None if the file is damaged or belongs to another run."""
        if _digest(path) != path.stem.rpartition("-")[2]:
            return None
        try:
            # This loads tensors and plain values only: no code in the file is run.
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return None
        return state if state.get("run_id") == run_id(self._spec) else None

    def _put_in_place(self, state: dict[str, Any], now: TrainingState) -> None:
        with torch.no_grad():
            for name, parameter in now.model.named_parameters():
                if parameter.requires_grad:
                    own_share(parameter.data).copy_(state["parameters"][name])
        self._spec.method.load_training_state(now.model, state["method"])
        now.optimizer.load_state_dict(as_shares(state["optimizer"], now.optimizer))
        page_states(now.optimizer)
        now.schedule.load_state_dict(state["schedule"])
        for name, value in state["log"].items():
            setattr(now.log, name, value)
        _set_random_states(state["random"])

    def _files(self) -> list[Path]:
        """Returns all checkpoints, the newest first."""
        return sorted(self._folder.glob("checkpoint-*.pt"), reverse=True)


def page_states(optimizer: Any) -> None:
    """Puts states back into managed memory: bitsandbytes 0.50.2 restores paged ones as tensors on the card."""
    for parameter, states in optimizer.state.items() if getattr(optimizer, "is_paged", False) else ():
        for name in ("state1", "state2"):
            if name in states:
                buffer = optimizer.get_state_buffer(parameter, dtype=states[name].dtype)
                states[name] = buffer.copy_(states[name])


def write_kept(path: Path, model: Any) -> None:
    """Writes the trained parameters of a model by their names, in the precision in which they are trained."""
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(trained, unfinished)
    unfinished.replace(path)


def _step(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _digest(path: Path) -> str:
    return file_sha256(path)[:DIGEST_DIGITS]


def _random_states(device: str) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    cuda = [torch.cuda.get_rng_state()] if device == "cuda" else []  # the state of this process's card
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": [version, list(words), gauss]}


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    for state in states["cuda"]:
        torch.cuda.set_rng_state(state)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))

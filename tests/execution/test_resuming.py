"""Runs that are stopped and go on: the same end, to the byte, and nothing done twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import command, run_here, wait_for

from peftscope.errors import InputError
from peftscope.files.lock import locked
from peftscope.methods import METHODS
from peftscope.record import RunRecord, read_record, state_folder
from peftscope.spec import RunSpec
from peftscope.training import loop
from peftscope.training.checkpoint import Checkpoints, TrainingState
from peftscope.training.signals import Interrupted

STEPS, STOP = 10, 4
UNLIKE = ("full", "adalora")
"""Methods whose states differ most."""
OTHERS = ("qlora", "lora-plus", "loftq", "prefix-tuning", "rounded")
"""Other states: groups of the optimizer, a base that is changed at the start, no LoRA. The rest has LoRA's."""


@pytest.fixture
def short(make_spec) -> Callable[..., RunSpec]:
    """Specs of ten steps in which AdaLoRA allocates before the stop and after it."""

    def make(**values: Any) -> RunSpec:
        sizes = {"steps": STEPS, "generation_items": 0, "retention_tokens": 0, "probe_steps": 0}
        return make_spec(**{**sizes, **values})

    return make


def run(spec: RunSpec, folder: Path) -> RunRecord:
    """Makes a run, or goes on with it, with a checkpoint after each step."""
    return run_here(spec, folder, checkpoint_seconds=0, keep_weights="all")


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process a SIGTERM in that step."""
    original = loop.check_loss

    def check_and_stop(nll: float, vocab_size: int, spec: RunSpec, where: str) -> None:
        original(nll, vocab_size, spec, where)
        if where == f"at step {step}":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "check_loss", check_and_stop)


def stopped_at(step: int, spec: RunSpec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Interrupted):
            run(spec, folder)


def same_for_a_reader(record: RunRecord) -> dict[str, Any]:
    """What a run gives; times, memory and files are apart."""
    apart = {"seconds", "memory", "speed", "ceilings", "provenance", "unavailable", "files"}
    fields = record.model_dump(mode="json", exclude=apart)
    return fields | {"items": record.quality.heldout_tokens}


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir())}


def test_a_signal_during_a_save_stops_the_run_then(toy, short, tmp_path, monkeypatch) -> None:
    original = Checkpoints.save

    def save_and_stop(self: Checkpoints, *arguments: Any) -> None:
        original(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        run(short(method="lora"), tmp_path)
    assert len(read_record(tmp_path / "interrupted.json").train_nll) == 1


@pytest.mark.parametrize("method", [*UNLIKE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_stopped_run_ends_as_one_that_was_not(method: str, toy, short, tmp_path, monkeypatch) -> None:
    options = {"dropout": 0.1} if "dropout" in METHODS[method].model_fields else {}
    spec = short(method=method, **options)
    undisturbed = run(spec, tmp_path / "undisturbed")
    assert undisturbed.status == "ok", undisturbed.reason
    folder = tmp_path / "stopped"
    stopped_at(STOP, spec, folder, monkeypatch)
    assert read_record(folder / "interrupted.json").train_nll == undisturbed.train_nll[:STOP]
    resumed = run(spec, folder)
    assert same_for_a_reader(resumed) == same_for_a_reader(undisturbed)
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "undisturbed")
    assert (folder / "items.jsonl").read_bytes() == (tmp_path / "undisturbed" / "items.jsonl").read_bytes()
    assert not list(state_folder(folder).glob("checkpoint*"))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw_8bit"},
        {"optimizer": "sgd", "gradient_accumulation": 2, "retention_tokens": 64, "retention_every": 2},
        {"packing": True, "precision": "amp", "schedule": "cosine", "warmup_steps": 3},
    ],
    ids=["8-bit", "sgd", "packing"],
)
@pytest.mark.slow
def test_so_does_one_with_other_settings(options: dict[str, Any], toy, short, tmp_path, monkeypatch) -> None:
    test_a_stopped_run_ends_as_one_that_was_not("lora", toy, lambda **kw: short(**kw, **options), tmp_path, monkeypatch)


@pytest.mark.slow
def test_each_part_of_the_state_is_needed(toy: Path, short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = short(method="adalora", dropout=0.1, schedule="linear")
    undisturbed = run(spec, tmp_path / "undisturbed")
    stopped_at(STOP, spec, tmp_path / "stopped", monkeypatch)
    original = Checkpoints._put_in_place
    left_out = ""

    def without(self: Checkpoints, state: dict[str, Any], now: TrainingState) -> None:
        fresh = {
            "method": {"ipt": {}, "exp_avg_ipt": {}, "exp_avg_unc": {}, "rank_pattern": None},
            "random": state["random"] | {"torch": torch.Generator().manual_seed(99).get_state()},
            "optimizer": now.optimizer.state_dict(),
            "schedule": now.schedule.state_dict(),
        }
        original(self, {**state, left_out: fresh[left_out]}, now)

    monkeypatch.setattr(Checkpoints, "_put_in_place", without)
    for left_out in ("method", "random", "optimizer", "schedule"):
        shutil.copytree(tmp_path / "stopped", tmp_path / left_out)
        resumed = run(spec, tmp_path / left_out)
        assert resumed.train_nll[:STOP] == undisturbed.train_nll[:STOP]
        assert adapter_bytes(tmp_path / left_out) != adapter_bytes(tmp_path / "undisturbed"), left_out


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_and_another_runs_is_not_taken(
    toy: Path, short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = short(method="lora")
    undisturbed = run(spec, tmp_path / "undisturbed")
    stopped = tmp_path / "stopped"
    stopped_at(STOP, spec, stopped, monkeypatch)
    folder = tmp_path / "changed"
    shutil.copytree(stopped, folder)
    older, newest = sorted(state_folder(folder).glob("checkpoint-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-200] + bytes(200))
    assert same_for_a_reader(run(spec, folder)) == same_for_a_reader(undisturbed)
    errors = capfd.readouterr().err
    assert f"{newest}: damaged or of another run, renamed to *.damaged" in errors
    assert f"resumed after step {STOP - 1}, from {older.name}" in errors
    assert newest.with_suffix(".damaged").is_file()
    other = short(method="lora", seed=1)
    assert same_for_a_reader(run(other, stopped)) == same_for_a_reader(run(other, tmp_path / "other"))


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(toy, short, tmp_path, monkeypatch, capfd) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert run(short(method="lora"), tmp_path / "run").status == "ok"
    assert "no checkpoint at step 1, training continues: [Errno 28] No space left on device" in capfd.readouterr().err
    assert not list(state_folder(tmp_path / "run").glob("checkpoint*"))


# Jobs: processes that are killed, and their locks.


@pytest.mark.slow
def test_a_killed_job_goes_on_and_a_finished_one_is_only_copied(toy: Path, short, tmp_path: Path) -> None:
    spec = short(method="lora", steps=60)
    undisturbed = run(spec, tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    job = subprocess.Popen(command(spec, folder, "--checkpoint-seconds", "0"), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(state_folder(folder).glob("checkpoint-*.pt")))
    for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
        process.kill()
    job.communicate()
    (folder / "record.json").unlink(missing_ok=True)  # of a child that was killed before its parent
    done = subprocess.run(command(spec, folder), capture_output=True, text=True, check=True)
    assert re.search(r"resumed after step \d+", done.stderr)
    assert same_for_a_reader(read_record(folder / "record.json")) == same_for_a_reader(undisturbed)
    before = (folder / "record.json").read_bytes()
    (folder / "record.json").unlink()
    again = subprocess.run(command(spec, folder), capture_output=True, text=True, check=True)
    assert "finished by an earlier job" in again.stderr
    assert (folder / "record.json").read_bytes() == before


@pytest.mark.slow
def test_a_job_dies_with_its_parent_and_leaves_a_checkpoint(toy: Path, short, tmp_path: Path) -> None:
    spec = short(method="lora", steps=100_000)
    folder = tmp_path / "run"
    code = f"import subprocess; subprocess.run({command(spec, folder)!r})"
    environment = os.environ | {"PEFTSCOPE_DIES_WITH_PARENT": "1"}
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=environment)
    job = wait_for(lambda: psutil.Process(parent.pid).children())[0]
    child = wait_for(job.children)[0]
    wait_for(lambda: child.cpu_times().user > 4 or not child.is_running())
    parent.kill()
    parent.wait()
    psutil.wait_procs([job, child], timeout=30)
    assert not job.is_running() and not child.is_running()
    assert read_record(folder / "interrupted.json").reason == "stopped by SIGTERM"


def test_a_lock_is_held_until_the_last_fork_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftscope.files.lock.LOCK_SECONDS", 1)
    file = tmp_path / "lock"
    code = f"""
import os, sys
from pathlib import Path
from peftscope.files.lock import locked
with locked(Path({str(file)!r})):
    if os.fork():
        os._exit(0)  # as if it were killed
    print("forked", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "forked\n"
    process.wait()
    with pytest.raises(InputError, match=f"process {process.pid} is working on this run"), locked(file):
        pass
    process.communicate("")
    monkeypatch.setattr("peftscope.files.lock.LOCK_SECONDS", 30)
    with locked(file):
        pass

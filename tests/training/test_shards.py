"""Runs that are spread over processes: what one process computes, with a share of its tensors in each."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import command, python, run_here, wait_for
from safetensors.torch import load_file

from peftscope.errors import InputError
from peftscope.execution.job import Job
from peftscope.execution.process import host_kills
from peftscope.execution.ranks import rank_folder
from peftscope.planning.plan import Workflow, plan_experiment
from peftscope.record import RunRecord, Status, read_record, state_folder, write_record
from peftscope.spec import RunSpec, run_id

SHARDS = 2
NOT_OF_SHARDS = {"validation_curve", "retention_curve", "shift", "shift_curve"}
"""Scores along the training, and those that a run measures in one process alone."""


@pytest.fixture
def exact(make_spec) -> Callable[..., RunSpec]:
    """Specs in fp32, in which sharding changes no more than the order of sums."""
    return lambda **values: make_spec(**{"precision": "fp32", **values})


def run_apart(spec: RunSpec, folder: Path) -> RunRecord:
    done = python(*command(spec, folder)[1:])
    assert done.returncode == 0, done.stderr
    return read_record(folder / "record.json")


def saved(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


def assert_same_run(spec: RunSpec, folder: Path) -> None:
    """Runs a spec in one process and in two, and compares losses, scores, answers and files."""
    one = run_here(spec, folder / "one", keep_weights="all")
    two = run_apart(spec.model_copy(update={"shards": SHARDS}), folder / "two")
    assert (one.status, two.status) == ("ok", "ok"), (one.reason, two.reason)
    assert two.train_nll == pytest.approx(one.train_nll, abs=1e-5)
    assert two.train_loss == pytest.approx(one.train_loss, abs=1e-5)
    assert two.train_batches_sha256 == one.train_batches_sha256
    assert two.size == one.size
    scores = [record.quality.model_dump(exclude=NOT_OF_SHARDS) for record in (two, one)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert two.speed.timed_steps == one.speed.timed_steps
    lines = [(folder / name / "items.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len({str([json.loads(line).get("answer") for line in each]) for each in lines}) == 1
    held = [rank.parameter_bytes for rank in two.memory.ranks]
    assert len(held) == SHARDS
    assert sum(held) >= 4 * one.size.total_parameters
    assert max(held) <= 0.6 * 4 * one.size.total_parameters
    assert two.memory.train.peak_resident_bytes == max(rank.train.peak_resident_bytes for rank in two.memory.ranks)
    assert two.memory.predicted.train_peak_tensor_bytes is None
    assert two.memory.train.peak_tensor_bytes is None
    names = {path.name for path in (folder / "one" / "adapter").iterdir()}
    assert {path.name for path in (folder / "two" / "adapter").iterdir()} == names
    for name in names - {"README.md", "model.safetensors", "adapter_model.safetensors"}:
        settings = [json.loads((folder / where / "adapter" / name).read_text()) for where in ("one", "two")]
        assert settings[1] == settings[0]
    tensors, expected = saved(folder / "two"), saved(folder / "one")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, atol=2e-4, rtol=0)


TWICE = {"generation_items": 0, "gradient_accumulation": 2, "optimizer": "sgd"}
"""SGD, for AdamW forgives gradients of a wrong scale: unclipped it shows the scale, clipped the norm."""
OTHERWISE = {"loss_path": "hf", "attention": "eager", "max_grad_norm": None, "checkpointing": True}
SPREAD: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora"},  # which has layers of its own
    "full, clipped": {"method": "full", "learning_rate": 0.3, "max_grad_norm": 0.1, **TWICE},
    # An evaluation comes before the training here, after which nothing may stay gathered.
    "lora, unclipped": {"method": "lora", "max_grad_norm": None, "learning_rate": 1.0, "validation_items": 4, **TWICE},
    "full, otherwise": {"method": "full", "generation_items": 0, **OTHERWISE},
    "lora, packed": {"method": "lora", "packing": True, "optimizer_implementation": "fused", "schedule": "cosine"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", SPREAD.values(), ids=SPREAD)
def test_two_processes_do_what_one_does(options: dict[str, Any], toy: Path, exact, tmp_path: Path) -> None:
    assert_same_run(exact(**options), tmp_path)


@pytest.mark.slow
def test_sixteen_bit_runs_are_close(toy: Path, make_spec, tmp_path: Path) -> None:
    spec = make_spec(method="lora", generation_items=0)
    one, two = run_here(spec, tmp_path / "one"), run_apart(spec.model_copy(update={"shards": 2}), tmp_path / "two")
    assert two.train_nll == pytest.approx(one.train_nll, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qlora"}, "does not work with qlora"),
        ({"method": "loftq"}, "does not work with loftq"),
        ({"method": "none", "base_weights": "nf4"}, "does not work with none"),
        ({"method": "adalora"}, "does not work with adalora"),
        ({"method": "prompt-tuning"}, "does not work with prompt-tuning"),
        ({"method": "prefix-tuning"}, "does not work with prefix-tuning"),
        ({"method": "lora", "optimizer": "adamw_8bit"}, "needs an optimizer of torch (got adamw_8bit)"),
        ({"method": "lora", "batch_size": 7}, "must divide batch_size=7"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_cannot_be_sharded_is_refused(options: dict[str, Any], message: str, make_spec) -> None:
    make_spec(**options)
    with pytest.raises(InputError, match=re.escape(message)):
        make_spec(**options, shards=SHARDS)


def test_a_job_asks_for_as_many_cards(write_experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "fixed: {model: toy}\nseeds: [0]\nruns: [{method: lora, shards: 4}, {method: lora}]\n"
    write_experiment("cards", text)
    for device, cards in (("cpu", {1: 0, 4: 0}), ("cuda", {1: 1, 4: 4})):
        monkeypatch.setenv("PEFTSCOPE_DEVICE", device)
        plan = plan_experiment("cards")
        workflow = Workflow([plan])
        found = {spec.shards: workflow.gpus(SimpleNamespace(run_id=run)) for run, spec in plan.sweep.runs.items()}
        assert found == cards


# Processes that fail, are killed, or are told to stop.


def start(spec: RunSpec, folder: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """Starts a run and returns it with its processes, the watching parent and rank 0 first, once it trains."""
    job = subprocess.Popen(command(spec, folder), stderr=subprocess.DEVNULL)

    def busy() -> list[psutil.Process]:
        processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        working = [process.cpu_times().user > 4 for process in processes[1:]]
        return processes if len(working) == spec.shards and all(working) else []

    return job, wait_for(busy)


@pytest.mark.slow
def test_a_stopped_run_says_so_and_leaves_no_process(toy: Path, exact, tmp_path: Path) -> None:
    job, processes = start(exact(method="lora", steps=100_000, shards=SHARDS), tmp_path)
    processes[2].terminate()  # left to the first one
    time.sleep(0.5)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 130
    assert not psutil.wait_procs(processes, timeout=10)[1]
    assert not (tmp_path / "record.json").exists()
    assert read_record(tmp_path / "interrupted.json").reason == "stopped by SIGTERM"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "killed"), [("full", False), ("lora", True)], ids=["stopped", "killed"])
def test_a_run_goes_on_from_what_all_have(method: str, killed: bool, toy: Path, exact, tmp_path: Path) -> None:
    options = {} if method == "full" else {"dropout": 0.1}
    spec = exact(method=method, steps=80, schedule="cosine", generation_items=0, shards=SHARDS, **options)
    expected, folder = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed = run_apart(spec, expected)
    states = (state_folder(folder), state_folder(rank_folder(folder, 1)))
    job = subprocess.Popen([*command(spec, folder), "--checkpoint-seconds", "0"], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(states[1].glob("checkpoint-*.pt"))) > 1 or job.poll() is not None)
    assert job.poll() is None
    if killed:
        psutil.Process(job.pid).children(recursive=True)[1].kill()
        assert job.wait(timeout=30) == 137
        assert not (folder / "record.json").exists()
        reason = read_record(folder / "interrupted.json").reason
        assert reason == "process 1 of 2 was killed by SIGKILL, but not by the kernel for lack of memory"
        newest = max(states[1].glob("checkpoint-*.pt"))
        newest.write_bytes(b"damaged")  # so that this process has only the one before
    else:
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 130
        seen = read_record(folder / "interrupted.json").train_nll
        assert undisturbed.train_nll[: len(seen)] == seen and 0 < len(seen) < spec.steps
        assert {steps_of(max(state.glob("checkpoint-*.pt"))) for state in states} == {len(seen)}
    resumed = subprocess.run(command(spec, folder), capture_output=True, text=True, check=True)
    (done,) = map(int, re.findall(r"resumed after step (\d+)", resumed.stderr))
    assert done == (steps_of(newest) - 1 if killed else len(seen))
    record = read_record(folder / "record.json")
    assert record.train_nll == undisturbed.train_nll and record.quality == undisturbed.quality
    for path in [*(expected / "adapter").iterdir(), expected / "items.jsonl"]:
        assert (folder / path.relative_to(expected)).read_bytes() == path.read_bytes(), path.name
    assert not list(state_folder(folder).rglob("checkpoint-*.pt"))


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.split("-")[1])


@pytest.mark.slow
def test_the_process_that_failed_first_gives_the_reason(toy: Path, exact, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from peftscope.cli.main import main\n"
        "from peftscope.training import loop\n"
        "from torch import distributed\n"
        "original = loop.train_step\n"
        "def step(*arguments, **options):\n"
        "    if distributed.get_rank() == 1:\n"
        "        raise torch.OutOfMemoryError('card 1 is full')\n"
        "    return original(*arguments, **options)\n"
        "loop.train_step = step\n"
        "main()\n"
    )
    arguments = command(exact(method="lora", generation_items=0, shards=SHARDS), tmp_path)[3:]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    record = read_record(tmp_path / "record.json")
    assert (record.status, record.reason) == ("oom", "OutOfMemoryError: card 1 is full (process 1 of 2)")


@pytest.mark.parametrize(
    ("ended", "code", "said", "kept"),
    [
        ({2: (1, "failed"), 1: (130, "interrupted")}, 130, "interrupted: reason of 1 (process 1 of 4)", True),
        ({2: (1, "failed"), 1: (1, "oom")}, 0, "oom: reason of 1 (process 1 of 4)", False),
        ({2: (1, "failed"), 1: (1, "failed")}, 0, "failed: reason of 2 (process 2 of 4)", False),
        ({2: (-9, "ok"), 1: (1, "failed")}, 137, "interrupted: process 2 of 4 was killed by SIGKILL, but not by", True),
        ({2: (-11, None), 1: (1, "failed")}, 0, "failed: process 2 of 4 ended with code -11", True),
        ({2: (2, None), 1: (1, "failed")}, 130, "interrupted: left no reason (process 2 of 4)", True),
    ],
    ids=["stopped", "oom", "failed", "killed", "crashed", "full disk"],
)
def test_of_processes_that_ended_the_one_that_says_most_is_believed(
    ended: dict[int, tuple[int, Status | None]], code: int, said: str, kept: bool, exact, tmp_path: Path
) -> None:
    job = Job(exact(method="lora", shards=4), tmp_path, threads=1, checkpoint_seconds=1, attempts_left=0)
    for rank, (_, status) in ended.items():
        record = RunRecord(run_id=run_id(job.spec), status=status or "ok", reason=f"reason of {rank}", spec=job.spec)
        file = "interrupted.json" if status == "interrupted" else "record.json"
        if status:
            write_record(rank_folder(tmp_path, rank) / file, record)
    checkpoint = state_folder(rank_folder(tmp_path, 3)) / "checkpoint-00000001-0.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert job._judge(host_kills(), {rank: code for rank, (code, _) in ended.items()}) == code
    found = read_record(tmp_path / ("interrupted.json" if code else "record.json"))
    assert f"{found.status}: {found.reason}".startswith(said)
    assert checkpoint.exists() == kept


def test_processes_are_forked_watched_and_die_with_the_first(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from peftscope.execution.ranks import fork_ranks\n"
        "told = threading.Event()\n"
        "def tell(codes):\n"
        "    print(codes, flush=True)\n"
        "    told.set()\n"
        "rank = fork_ranks(Path(sys.argv[1]), 5, tell)\n"
        "if rank == 1: os._exit(0)\n"
        "if rank == 2: os._exit(3)\n"
        "if rank == 3: print(os.getpid(), flush=True); time.sleep(60)\n"
        "if rank == 4: os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)\n"
        "told.wait()\n"
        "log = Path(sys.argv[1]) / 'state/rank-3/log'\n"
        "while not log.exists() or not log.read_text(): time.sleep(0.01)\n"
        "print(log.read_text())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    told, third = done.stdout.split("\n", 1)
    assert told == "{2: 3, 4: -9}"
    wait_for(lambda: not psutil.pid_exists(int(third)), seconds=10)

"""The check of predictions on a card, as far as a processor can go: the same code, with the byte tracker's peaks."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftscope.memory import gpu_check, gpu_measure
from peftscope.memory.gpu_check import (
    Job,
    card_jobs,
    check_all,
    check_apart,
    compared,
    found_card,
    make_job,
    summary,
)
from peftscope.memory.gpu_measure import CudaPeaks, measure, predict, random_base, random_batch
from peftscope.memory.hardware import CUBLAS_HOPPER_BYTES, GPUS, Gpu
from peftscope.memory.question import Model
from peftscope.memory.shapes import ModelShape
from peftscope.memory.trace import PHASES
from peftscope.methods import METHODS
from peftscope.training.build import apply_method
from peftscope.training.probe import track_steps
from peftscope.training.step import make_optimizer

SHAPE = ModelShape(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tied_embeddings=True,
)
MODEL = Model("toy", SHAPE.to_config(), SHAPE)
CPU = Gpu("cpu", 2**40, cublas_bytes=0)
TRAINED = [name for name, cls in METHODS.items() if cls.trains]
NOT_THERE = ("pandas", "snakemake", "lm_eval", "seaborn", "great_tables", "matplotlib", "datasets", "reasoning_gym")


def job_of(method: str, **options: Any) -> Job:
    return make_job(MODEL, CPU, {"method": method, "batch_size": 2, "seq_len": 32, **options})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take fifty times the time of these small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "method", [name if name in ("full", "qlora") else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED]
)
def test_the_processor_takes_what_is_predicted(method: str, one_thread: None) -> None:
    question = job_of(method).question
    predicted, measured = predict(question), measure(question, "cpu")
    assert measured["phases"] == predicted["phases"]
    assert min(measured["phases"][phase] for phase in PHASES) > 0


@pytest.mark.parametrize(
    "options",
    [{"checkpointing": True}, {"loss_path": "response_only"}, {"optimizer": "sgd", "attention": "eager"}],
    ids=str,
)
def test_variants(options: dict[str, Any], one_thread: None) -> None:
    question = job_of("qlora", **options).question
    assert measure(question, "cpu")["phases"] == predict(question)["phases"]


def test_a_random_base_is_stored_as_a_loaded_one() -> None:
    base = random_base(job_of("qlora").question, "cpu")
    layer = base.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16
    assert type(base.lm_head) is torch.nn.Linear and base.lm_head.weight is base.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    logits = base(input_ids=torch.arange(8)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0


def test_the_list_for_a_card() -> None:
    jobs = list(card_jobs(GPUS["h100"]))
    specs = [job.question.spec for job in jobs]
    assert len({job.label for job in jobs}) == len(jobs) >= 20
    assert {spec.method.name for spec in specs} == set(TRAINED)
    assert {spec.checkpointing for spec in specs} == {False, True}
    assert len({spec.seq_len for spec in specs}) >= 2


def test_results_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    jobs, seen = [job_of("lora"), job_of("full"), job_of("ia3")], []

    def check(job: Job) -> dict[str, Any]:
        seen.append(job.label)
        failed = len(seen) == 2
        return {"spec": job.label, "status": "failed: once"} if failed else {"spec": job.label, "status": "ok", "n": 1}

    assert check_all(jobs, tmp_path, 0, check) == 3 and not seen
    assert check_all(jobs[:2], tmp_path, 1, check) == 0
    assert check_all(jobs, tmp_path, 1, check) == 0
    assert seen == ["toy-lora-2x32", "toy-full-2x32", "toy-full-2x32", "toy-ia3-2x32"]
    assert check_all(jobs, tmp_path, 0, check) == 0
    with (tmp_path / "memory.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["spec"], row["status"], row["n"]) for row in rows] == [(job.label, "ok", "1") for job in jobs]


def test_results_of_other_code_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, seen = [job_of("lora")], []

    def check(job: Job) -> dict[str, Any]:
        seen.append(job.label)
        return {"spec": job.label, "status": "ok"}

    for code in ("before", "before", "after"):
        monkeypatch.setattr(gpu_check, "code_id", lambda code=code: code)
        assert check_all(jobs, tmp_path, 1, check) == 0
    assert len(seen) == 2


def test_time_runs_out_before_a_job_that_may_take_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 50))  # every look at the clock takes 50 seconds
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))
    jobs = [job_of(method) for method in ("lora", "full", "ia3", "dora")]
    assert check_all(jobs, tmp_path, 4, lambda job: {"spec": job.label, "status": "ok"}) == 2


def test_what_does_not_fit_is_said_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was tried"))
    job = make_job(MODEL, Gpu("small", 2**20), {"method": "lora"})
    row = check_apart(job, ["unused"], "cuda")
    assert row["status"] == "too large" and row["predicted_device_bytes"] > 2**20


def test_a_process_that_fails_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    row = check_apart(
        job_of("lora"), [sys.executable, "-c", "raise SystemExit('torch.OutOfMemoryError: too much')"], "cpu"
    )
    assert row["status"] == "failed: torch.OutOfMemoryError: too much"
    assert "too much" in capfd.readouterr().err


def test_errors_and_their_summary() -> None:
    predicted = {"phases": dict(zip(PHASES, (10, 110, 30, 40), strict=True)), "reserved": 150, "device": 195}
    measured = {"phases": dict(zip(PHASES, (10, 100, 30, 40), strict=True)), "reserved": 200, "device": 1300}
    row = compared(predicted, measured, used_before=1000)
    assert row["measured_device_bytes"] == 300 and row["context_bytes"] == 100
    errors = [row[f"{name}_error_percent"] for name in ("allocated", "reserved", "device")]
    assert errors == [10.0, -25.0, -35.0]
    assert row["predicted_backward_bytes"] == 110 and row["measured_backward_bytes"] == 100
    other = compared(predicted, {"phases": predicted["phases"]}, used_before=None)
    assert other["allocated_error_percent"] == 0 and other["device_error_percent"] is None
    rows = [row | {"status": "ok"}, other | {"status": "ok"}, {"status": "too large"}]
    assert summary(rows) == (
        "2 of 3 measured; mean / worst error: "
        "allocated 5.00 / 10.00 %, reserved 25.00 / 25.00 %, device 35.00 / 35.00 %"
    )
    assert summary([]) == "0 of 0 measured; mean / worst error: none"


@pytest.mark.parametrize(
    ("name", "major", "cublas"),
    [
        ("NVIDIA H100 80GB HBM3", 9, CUBLAS_HOPPER_BYTES),
        ("NVIDIA GeForce RTX 4090", 8, GPUS["rtx4090"].cublas_bytes),
        ("NVIDIA L4", 8, GPUS["l4"].cublas_bytes),
        ("Something New", 9, CUBLAS_HOPPER_BYTES),
    ],
)
def test_the_card_is_known_or_described(name: str, major: int, cublas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name=name, major=major, total_memory=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    card = found_card()
    assert (card.name, card.memory_bytes, card.cublas_bytes) == (name, 7, cublas)
    assert card.context_bytes == (GPUS["l4"].context_bytes if name == "NVIDIA L4" else None)


def test_peaks_of_the_allocator_stand_in_for_the_tracker(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    sizes = iter([5, 9, 7, 6, 8, 4])  # forward, backward, optimizer, twice

    def statistics() -> dict[str, int]:
        size = next(sizes)
        return {
            f"{kind}_bytes.all.peak": size + plus
            for kind, plus in (("allocated", 0), ("reserved", 10), ("requested", -1))
        }

    monkeypatch.setattr(torch.cuda, "memory_stats", statistics)
    used = iter([100, 120])
    monkeypatch.setattr(gpu_measure, "used_bytes", lambda: next(used))
    question = job_of("lora").question
    spec = question.spec.model_copy(update={"device": "cpu"})
    model, loss_function = apply_method(random_base(question, "cpu"), spec, spec.method.build_empty)
    batch = random_batch(question, 2)
    peaks = CudaPeaks()
    assert "empty_cache" in calls
    track_steps(peaks, model, [batch, batch], make_optimizer(model, spec), spec, loss_function)
    assert {phase: peak.size for phase, peak in peaks.peaks().items()} == {"forward": 6, "backward": 9, "optimizer": 7}
    assert (peaks.reserved, peaks.requested, peaks.used) == (19, 8, 120)
    assert calls.count("reset_peak_memory_stats") == 8


@pytest.mark.slow
def test_one_process_with_few_packages(tmp_path: Path) -> None:
    """A machine with a card may have torch, transformers and PEFT, and little else."""
    config = tmp_path / "toy.json"
    config.write_text(json.dumps(MODEL.config))
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({NOT_THERE!r}))\n"
        f"sys.argv = ['gpu_check', '--device', 'cpu', '--model', {str(config)!r}, '--one', 'toy-qlora-2x32']\n"
        "runpy.run_module('peftscope.memory.gpu_check', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["status"] == "ok" and row["allocated_error_percent"] == 0
    assert row["measured_reserved_bytes"] is None and row["torch_version"]

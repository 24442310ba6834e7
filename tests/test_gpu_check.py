"""The check of predictions on a card, as far as a processor can go: the same code, with the byte tracker's peaks."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from peftscope.analysis.cards import KINDS
from peftscope.claims.ledger import read_ledger
from peftscope.errors import MIB
from peftscope.gpu import check as gpu_check
from peftscope.gpu import fits as gpu_fits
from peftscope.gpu import latency, state
from peftscope.gpu import memory as gpu_memory
from peftscope.gpu.check import (
    card_facts,
    check_all,
    check_apart,
    check_job,
    compared,
    found_card,
    run_apart,
    summary,
)
from peftscope.gpu.fits import hold
from peftscope.gpu.jobs import CardJob, card_jobs, make_job, small_jobs, why_not_tried
from peftscope.gpu.memory import CudaPeaks, measure, predict
from peftscope.gpu.model import random_base, random_batch
from peftscope.gpu.page import write_page
from peftscope.gpu.state import measure_state
from peftscope.gpu.steps import speed_of
from peftscope.hardware.cards import CONTEXT_BYTES, CUBLAS_HOPPER_BYTES, GPUS, Gpu
from peftscope.memory.probe import track_steps
from peftscope.memory.question import Model, describe_model
from peftscope.memory.trace import PHASES
from peftscope.methods import METHODS
from peftscope.models.shapes import ModelShape
from peftscope.training.build import apply_method
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


def job_of(method: str, **options: Any) -> CardJob:
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
    assert len({(job.kind, job.label) for job in jobs}) == len(jobs)
    specs = {kind: [job.question.spec for job in jobs if job.kind == kind] for kind in KINDS}
    assert {spec.method.name for spec in specs["memory"]} == set(TRAINED)
    assert {spec.checkpointing for spec in specs["memory"]} == {False, True}
    assert {spec.batch_size for spec in specs["latency"]} == {1, 16}
    assert {spec.method.name for spec in specs["steps"]} == {"full", "lora", "dora", "adalora", "qlora"}


@pytest.mark.slow
def test_on_80_gb_everything_is_tried_and_on_24_gb_what_fits() -> None:
    jobs = [job for job in card_jobs(GPUS["h100"]) if job.kind != "memory"]
    assert not [job.label for job in jobs if why_not_tried(job, "cuda")]
    small = {(job.kind, why_not_tried(job, "cuda")) for job in card_jobs(GPUS["rtx4090"])}
    assert {kind for kind, why in small if not why} == set(KINDS)
    assert {("fits", "card too small"), ("steps", "too large"), ("memory", "too large")} <= small
    assert "card too small" not in {why for kind, why in small if kind != "fits"}


def test_what_is_held_to_a_smaller_card_is_tried_whatever_is_predicted() -> None:
    job = make_job(describe_model("llama-2-7b"), GPUS["rtx4090"], {"method": "full"}, "fits", "rtx4060")
    assert why_not_tried(job, "cuda") == ""
    job = make_job(MODEL, GPUS["rtx4090"], {"method": "lora"}, "fits", "a100")
    assert why_not_tried(job, "cuda") == "card too small" and why_not_tried(job, "cpu") == ""


def test_small_jobs_are_of_every_kind() -> None:
    jobs = list(small_jobs(MODEL, CPU))
    assert {job.kind for job in jobs} == set(KINDS)
    assert len({(job.kind, job.label) for job in jobs}) == len(jobs)


def test_out_of_memory_is_a_result_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(gpu_check, "check_fit", run_out)
    job = make_job(MODEL, CPU, {"method": "lora"}, "fits", "rtx4060")
    rows = []
    for _ in range(2):
        check_all([job], tmp_path, 1, lambda job: rows.append(check_job(job, "cpu", None)) or rows[-1])
    assert len(rows) == 1
    assert (rows[0]["status"], rows[0]["fits"]) == ("out of memory", False)
    assert rows[0]["reason"] == "CUDA out of memory. Tried to allocate 2.00 GiB."
    monkeypatch.setattr(gpu_check, "check_fit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check_job(job, "cpu", None)


def test_a_job_is_held_to_its_card_less_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    job = make_job(MODEL, CPU, {"method": "lora"}, "fits", "rtx3090", 0.5)
    for used, context in ((700 * MIB, 598 * MIB), (300 * MIB, CONTEXT_BYTES), (None, CONTEXT_BYTES)):
        monkeypatch.setattr(gpu_fits, "used_bytes", lambda used=used: used)
        assert hold(job, 100 * MIB) == {"assumed_context_bytes": context}
        assert shares[-1] * 80 * 2**30 == pytest.approx(GPUS["rtx3090"].memory_bytes / 2 - context)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"status": "ok", "measured_device_bytes": 9, "measured_allocated_bytes": 5}, False),
        ({"status": "ok", "measured_device_bytes": 8, "measured_allocated_bytes": 5}, True),
        ({"status": "ok", "measured_device_bytes": None, "measured_reserved_bytes": 9}, False),
        ({"status": "out of memory"}, False),
    ],
)
def test_what_the_whole_card_showed_decides_whether_it_fits(row: dict[str, Any], expected: bool) -> None:
    job = SimpleNamespace(capacity_bytes=8)
    assert gpu_fits.fits(job, row) == expected


@pytest.mark.parametrize("method", ["qlora", pytest.param("adalora", marks=pytest.mark.slow)])
def test_steps_are_timed_and_their_peak_is_what_is_predicted(method: str, one_thread: None) -> None:
    job = make_job(MODEL, CPU, {"method": method, "batch_size": 2, "seq_len": 32}, "steps")
    row = check_job(job, "cpu", None, matmul_rate=1e12)
    assert row["status"] == "ok" and row["allocated_error_percent"] == 0
    assert row["timed_steps"] == len(row["samples"]["step"]) >= 3
    assert row["step_seconds_lower_quartile"] <= row["step_seconds"] <= row["step_seconds_upper_quartile"]
    # One position is padding.
    assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(2 * 32 - 1)
    assert 0 < row["matmul_share"] < 1


def test_speed_is_arithmetic_on_the_median() -> None:
    found = {"seconds": [4.0, 1.0, 2.0], "tokens": 100, "useful_flops": 6e9, "state": {"power_watts": 7}}
    row = speed_of(found, 1e10)
    assert (row["step_seconds"], row["tokens_per_second"], row["matmul_share"]) == (2, 50, 0.3)
    assert row["power_watts"] == 7 and row["samples"] == {"step": [4, 1, 2]}
    assert speed_of(found, None)["matmul_share"] is None


def test_latency_is_that_of_the_base_the_adapter_and_what_was_merged(
    one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []

    def timed(model: Any, *rest: Any) -> dict[str, list[float]]:
        layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())

        def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
            cache = options.get("past_key_values")
            seen.append((layers, options["input_ids"].shape[1], cache.get_seq_length() if cache else 0))

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        times = time_passes(model, *rest)
        hook.remove()
        return times

    time_passes = latency._time_passes
    monkeypatch.setattr(latency, "_time_passes", timed)
    job = make_job(MODEL, CPU, {"method": "dora", "batch_size": 2, "seq_len": 8}, "latency")
    row = check_job(job, "cpu", None)
    # Around each of the seven linear layers of both blocks, and around nothing after merging; tokens see the prompt.
    assert set(seen) == {(n, *shape) for n in (0, 14) for shape in ((8, 0), (1, 8))}
    assert [key for key, _ in groupby(n for n, *_ in seen)] == [0, 14, 0]
    assert row["status"] == "ok" and row["repeats"] >= 5
    times = row["samples"]
    assert row["token_apart_over_merged"] == pytest.approx(
        median(times["apart"]["token"]) / median(times["merged"]["token"])
    )
    assert row["prompt_merged_over_base"] == row["merged_prompt_seconds"] / row["base_prompt_seconds"]


def test_a_job_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "JOB_SECONDS", 0.2)
    assert run_apart([sys.executable, "-c", "import time; time.sleep(60)"]) == (None, "it took longer than 0 s")


def test_a_folder_is_one_devices_and_others_on_the_card_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(state, "pci_address", lambda: "unknown")
    monkeypatch.setattr(state.nvml, "other_processes", lambda card: [{"pid": 7, "used_bytes": 3 * 2**30}])
    measured: list[int] = []
    for _ in range(2):
        facts = card_facts(tmp_path, lambda: measured.append(1) or {"device": "cuda", "name": "a card"}, "cuda")
    assert len(measured) == 1 and [other["pid"] for other in facts["other_processes"]] == [7]
    assert "process 7 uses the card as well (3.0 GiB)" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="has results of device cuda"):
        card_facts(tmp_path, lambda: None, "cpu")


def test_the_report_of_a_processor_says_that_it_decides_nothing(tmp_path: Path, one_thread: None) -> None:
    lora = [job for job in small_jobs(MODEL, CPU) if job.question.spec.method.name == "lora"]
    jobs = [next(job for job in lora if job.kind == kind) for kind in KINDS]
    card_facts(tmp_path, lambda: measure_state(CPU, "cpu"), "cpu")
    names = [(job.kind, job.label) for job in jobs]
    text = write_page(tmp_path, names).read_text()
    assert all(label in text for _, label in names) and "Not measured yet" in text
    assert check_all(jobs, tmp_path, 5, lambda job: check_job(job, "cpu", None, 1e12)) == 0
    text = write_page(tmp_path, names).read_text()
    assert "shows the instrument, decides no claim" in text and "Not measured yet" not in text
    parts = [(claim.id, part) for claim in read_ledger() for part in claim.parts if part.kind == "gpu"]
    assert text.count("not run") == len(parts) and all(f"<strong>{claim}</strong>" in text for claim, _ in parts)
    assert "http" not in text and "nan" not in text
    for kind in KINDS:
        rows = json.loads((tmp_path / f"{kind}.json").read_text())
        assert rows and {row["device"] for row in rows.values()} == {"cpu"}
        assert "samples" not in (tmp_path / f"{kind}.csv").read_text().splitlines()[0]


def test_no_number_is_typed_into_the_report() -> None:
    text = Path(gpu_check.__file__).with_name("report.html.j2").read_text()
    prose = re.sub(r"<style>.*?</style>|\{\{.*?\}\}|\{%.*?%\}|<[^>]*>", "", text, flags=re.DOTALL)
    assert not re.search(r"\d", prose)


def test_results_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    jobs, seen = [job_of("lora"), job_of("full"), job_of("ia3")], []

    def check(job: CardJob) -> dict[str, Any]:
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

    def check(job: CardJob) -> dict[str, Any]:
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
    monkeypatch.setattr(gpu_memory, "used_bytes", lambda: next(used))
    question = job_of("lora").question
    spec = question.spec.model_copy(update={"device": "cpu"})
    trained = apply_method(random_base(question, "cpu"), spec, spec.method.build_empty)
    batch = random_batch(question, 2)
    peaks = CudaPeaks()
    assert "empty_cache" in calls
    track_steps(peaks, trained, [batch, batch], make_optimizer(trained.model, spec), spec)
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
        f"sys.argv = ['gpu_check', '--device', 'cpu', '--model', {str(config)!r}, '--one', 'memory/toy-qlora-2x32']\n"
        "runpy.run_module('peftscope.gpu.check', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["status"] == "ok" and row["allocated_error_percent"] == 0
    assert row["measured_reserved_bytes"] is None and row["torch_version"]


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_and_ends_with_a_report(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "peftscope.gpu.check",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
    ]
    first, second = (
        subprocess.run([*command, "--kinds", "fits,latency"], capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr
    assert "0 of 7 done before" in first.stderr and "7 of 7 done before" in second.stderr
    text = (tmp_path / "report.html").read_text()
    assert "decides no claim" in text and "Not measured yet: " in text
    done = subprocess.run([*command, "--kinds", "speed"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("--kinds: no such kind (got 'speed')")

"""Runs on the pretended card. It shows where tensors lie and what code asks of a card; it is no test on a card."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import command, fast_if, pretending, wait_for

from peftscope.hardware.cards import PRETENDED
from peftscope.record import RunRecord, read_record, state_folder

OnCard = Callable[..., RunRecord]
FP32 = {"method": "lora", "precision": "fp32", "attention": "eager", "gradient_accumulation": 2}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {**FP32, "latency_tokens": 8},
    "full": {"method": "full", "precision": "amp", "loss_path": "hf"},
    "dora": {"method": "dora", "validation_items": 8, "validation_every": 3, "memory_limit_gib": 2},
    "qlora": {"method": "qlora", "kbit_preparation": True},
    "adalora": {"method": "adalora", "dropout": 0.1},
    "loftq": {"method": "loftq", "iterations": 1, "latency_tokens": 8},
    "pissa, checkpointed": {"method": "pissa", "checkpointing": True},
    "packed, 8-bit states": {"method": "lora", "packing": True, "optimizer": "adamw_8bit"},
    "sgd": {"method": "lora", "optimizer": "sgd"},
    "fused": {"method": "lora", "optimizer_implementation": "fused"},
    "paged": {"method": "lora", "optimizer": "paged_adamw_8bit"},
    "prompt tuning": {"method": "prompt-tuning"},
    "base in 4 bits": {"method": "none", "base_weights": "nf4"},
}
PASSES = ("prompt", "token")
A100, CONTEXT, RESERVED, NEIGHBOUR = 81_154 * 2**20, 490 * 2**20, 766 * 2**20, 2048 * 2**20


@pytest.fixture
def on_card(make_spec: Any, toy: Path, tmp_path: Path) -> OnCard:
    """Runs a spec in a process of its own, on a card with these properties, and returns its record."""

    def run(folder: str = "run", card: dict[str, Any] | None = None, device: str = "cuda", **values: Any) -> RunRecord:
        environment = pretending(**card or {}) if device == "cuda" else {**os.environ, "OMP_NUM_THREADS": "1"}
        words = command(make_spec(device=device, **values), tmp_path / folder)
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        print(done.stderr)
        assert (tmp_path / folder / "record.json").is_file()
        return read_record(tmp_path / folder / "record.json")

    return run


@pytest.mark.parametrize("kind", [fast_if(kind == "lora", kind) for kind in KINDS])
def test_a_run_ends_well_and_its_record_has_what_a_card_measures(on_card: OnCard, kind: str) -> None:
    values = KINDS[kind]
    record = on_card(**values)
    assert record.status == "ok", record.reason
    memory, hardware, trains = record.memory, record.provenance["hardware"], record.spec.method.trains
    assert hardware["gpu"] == f"{PRETENDED} NVIDIA A100-SXM4-80GB" and hardware["compute_capability"] == "8.0"
    assert hardware["gpu_memory_bytes"] == A100 and hardware["driver"] == hardware["cuda"] == PRETENDED
    card = record.provenance["card"]
    assert card["at_start"]["sm_clock_mhz"] == 1410 and card["driver_reserve_bytes"] == RESERVED
    assert card["used_bytes"] == 0 and card["other_processes"] == []
    for phase in (memory.load, memory.evaluate, *([memory.train] if trains else [])):
        assert phase.peak_tensor_bytes and phase.peak_reserved_bytes and phase.peak_device_bytes
        assert phase.peak_device_bytes > CONTEXT
    assert memory.predicted.evaluate_peak_tensor_bytes
    if trains:
        peaks = memory.forward_peak_tensor_bytes, memory.backward_peak_tensor_bytes, memory.optimizer_peak_tensor_bytes
        assert all(peaks) and memory.resident_tensor_bytes
        assert memory.predicted.train_peak_device_bytes
        assert record.speed.step_seconds_median > 0 and record.speed.timed_steps == 5
        assert card["after_training"]["temperature_celsius"] == 55
    if "latency_tokens" in values:
        assert set(record.latency) == {f"{state}_{what}" for state in ("base", "apart", "merged") for what in PASSES}
    if kind == "lora":  # in fp32 and with the same attention, the digits are those of the processor
        same = on_card("same", device="cpu", **values)
        assert record.train_nll == same.train_nll and record.quality.heldout_nll == same.quality.heldout_nll


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "status"),
    [(name, "oom") for name in ("load_base", "train", "_score_heldout")]
    + [(name, "ok") for name in ("probe_training", "time_passes")],
)
def test_a_card_that_is_full_ends_a_run_as_out_of_memory_and_spares_one_that_is_done(
    on_card: OnCard, function: str, status: str
) -> None:
    record = on_card(card={"full_in": function}, **FP32, latency_tokens=8)
    assert record.status == status, record.reason
    if function == "probe_training":
        assert record.quality.heldout_nll and record.memory.backward_peak_tensor_bytes is None


@pytest.mark.slow
def test_a_limit_of_memory_is_that_of_the_allocator(on_card: OnCard) -> None:
    # 501 MiB of it count as the CUDA context, and the toy takes more than the rest.
    record = on_card(**FP32, memory_limit_gib=0.4899)
    assert record.status == "oom" and "CUDA out of memory" in str(record.reason)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_a_run_that_was_killed_goes_on_with_the_same_digits(
    on_card: OnCard, make_spec: Any, toy: Path, tmp_path: Path, capsys: Any, optimizer: str
) -> None:
    values = {**FP32, "optimizer": optimizer, "steps": 30, "dropout": 0.1}
    whole = on_card("whole", **values)
    words = [*command(make_spec(device="cuda", **values), tmp_path / "cut"), "--checkpoint-seconds", "0"]
    process = subprocess.Popen(words, env=pretending(), start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(state_folder(tmp_path / "cut").glob("checkpoint-*")), "a checkpoint")
    os.killpg(process.pid, 9)
    process.wait()
    cut = on_card("cut", **values)
    assert cut.status == "ok" and "resumed after step" in capsys.readouterr().out
    assert cut.train_nll == whole.train_nll and cut.quality.heldout_nll == whole.quality.heldout_nll
    assert cut.memory.paged_state_bytes == whole.memory.paged_state_bytes


@pytest.mark.slow
@pytest.mark.parametrize("nvml", ["v1", "broken", "missing", "slice"])
def test_a_run_ends_well_whatever_nvml_says(on_card: OnCard, monkeypatch: pytest.MonkeyPatch, nvml: str) -> None:
    if nvml in ("broken", "missing"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as a container's runtime sets it
    record = on_card(card={"nvml": nvml}, **FP32)
    assert record.status == "ok", record.reason
    device = record.memory.train.peak_device_bytes
    if nvml == "v1":  # it counts the driver's reserve as used, and so the record names no reserve
        assert device > RESERVED + CONTEXT and record.provenance["card"]["driver_reserve_bytes"] is None
    elif nvml == "slice":  # its neighbour's bytes are not its own
        assert CONTEXT < device < CONTEXT + NEIGHBOUR
    else:
        assert device is None


@pytest.mark.slow
def test_two_jobs_take_two_cards(make_spec: Any, toy: Path, tmp_path: Path) -> None:
    environment = pretending(count=2) | {"TMPDIR": str(tmp_path)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    specs = [make_spec(device="cuda", **FP32, steps=40, seed=seed) for seed in (0, 1)]
    words = [command(spec, tmp_path / str(spec.seed)) for spec in specs]
    both = [subprocess.Popen(one, env=environment, stderr=subprocess.DEVNULL) for one in words]
    assert [process.wait() for process in both] == [0, 0]
    records = [read_record(tmp_path / str(seed) / "record.json") for seed in (0, 1)]
    assert [record.status for record in records] == ["ok", "ok"]
    assert {record.provenance["environment"]["CUDA_VISIBLE_DEVICES"] for record in records} == {"0", "1"}

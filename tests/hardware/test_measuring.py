"""How runs are measured: meters, what NVML says, the device's rates, and a rehearsal that changes nothing."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_here

from peftscope.data.batching import tokenise, training_batches
from peftscope.data.tasks import read_split
from peftscope.execution import way
from peftscope.execution.provenance import _card
from peftscope.hardware import meter as meters
from peftscope.hardware.cards import CONTEXT_BYTES, GIB
from peftscope.hardware.meter import CudaMeter, Meter, PeakSampler, is_out_of_memory, limited_memory, paged_bytes
from peftscope.hardware.nvml import find_card, other_processes, reading, used_bytes
from peftscope.record import Memory
from peftscope.spec import RunSpec
from peftscope.training.build import build_model, seed_everything
from peftscope.training.ceilings import count_work, measure_ceilings
from peftscope.training.checkpoint import Checkpoints, page_states
from peftscope.training.load import load_base, load_tokenizer
from peftscope.training.log import TrainingLog
from peftscope.training.loop import train
from peftscope.training.step import TrainedModel

MIB = 2**20


def test_a_library_without_memory_is_out_of_memory() -> None:
    """oneDNN and others throw C++'s own error, which torch hands on as a RuntimeError."""
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert is_out_of_memory(RuntimeError("[enforce fail a"))
    assert not is_out_of_memory(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"))
    assert not is_out_of_memory(RuntimeError(""))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_library_that_cannot_begin_on_a_full_card_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    begins = [RuntimeError(f"{name}_STATUS_NOT_INITIALIZED when calling it") for name in ("CUBLAS", "CUDNN")]
    for free, said in ((100 * MIB, True), (8 * GIB, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 16 * GIB))
        assert [is_out_of_memory(error) for error in begins] == [said, said]


def test_a_good_run_stays_good_where_a_full_card_has_no_room_to_measure(
    toy: Path, make_spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(way, "probe_training", full)
    on_card = make_spec(method="lora").model_copy(update={"device": "cuda"})
    phases: Any = SimpleNamespace(memory=Memory(), phase=lambda name: contextlib.nullcontext())
    batch: Any = SimpleNamespace(to=lambda device: None)
    way._probe(on_card, phases, SimpleNamespace(model=None), SimpleNamespace(training=batch, heldout=None))
    assert phases.memory.forward_peak_tensor_bytes is None

    times = way.time_passes
    monkeypatch.setattr(way, "time_passes", lambda model, spec: times(model, spec) if is_adapted(model) else full())
    monkeypatch.setattr(way, "measure_ceilings", full)
    is_base = iter([True])
    is_adapted = lambda model: next(is_base, False) or hasattr(model, "peft_config")  # noqa: E731
    spec = make_spec(method="lora", latency_tokens=2, generation_items=0, retention_tokens=0, probe_steps=0, steps=2)
    record = run_here(spec, tmp_path)
    assert record.status == "ok" and record.latency and record.ceilings.dtype is None
    assert {name.partition("_")[0] for name in record.latency} == {"base", "apart"}


class Nvml:
    """Stands where the driver's library does: one card, which does not tell its power."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    others = (SimpleNamespace(pid=1, usedGpuMemory=3 * 2**30), SimpleNamespace(pid=2, usedGpuMemory=None))

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByPciBusId(self, address: bytes) -> str:
        if address != b"00000000:3B:00.0":
            raise RuntimeError("not found")
        return "the card"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=7 * MIB)

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise RuntimeError("not supported")

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 41

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        import os

        return [*self.others, SimpleNamespace(pid=os.getpid(), usedGpuMemory=1)]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a card at 3b:00, as far as NVML and torch's description of it go."""
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def test_what_a_card_says_is_read_and_what_it_does_not_say_is_none(nvml: None) -> None:
    found = find_card(meters.pci_address())
    assert used_bytes(found) == 7 * MIB
    clocks = {"sm_clock_mhz": 1980, "memory_clock_mhz": 2619}
    assert reading(found) == clocks | {"power_watts": None, "power_limit_watts": 700, "temperature_celsius": 41}
    assert other_processes(found) == [{"pid": 1, "used_bytes": 3 * 2**30}, {"pid": 2, "used_bytes": None}]


def test_without_nvml_every_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = find_card("00000000:3B:00.0")
    assert found is None and used_bytes(found) is None and other_processes(found) is None
    assert set(reading(found).values()) == {None}


def test_a_card_that_others_use_is_recorded_and_said(nvml: None, capfd: pytest.CaptureFixture[str]) -> None:
    facts = _card(0)
    assert [other["pid"] for other in facts["other_processes"]] == [1, 2]
    assert facts["at_start"]["temperature_celsius"] == 41
    errors = capfd.readouterr().err
    assert "process 1 uses the card as well (3.0 GiB)" in errors
    assert "process 2 uses the card as well (unknown memory)" in errors


def test_the_sampler_keeps_the_largest_value_and_the_last() -> None:
    values, asked = iter([5, 9, 7]), []

    def ask() -> int | None:
        value = next(values, 8)
        asked.append(value)
        return value

    sampler = PeakSampler(ask)
    while len(asked) < 4:
        time.sleep(0.001)
    assert sampler.stop() == 9
    rising = itertools.count()
    assert PeakSampler(lambda: next(rising)).stop() == next(rising) - 1
    assert PeakSampler(lambda: None).stop() is None


def test_peaks_of_a_card_are_those_since_the_reset(nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 128)
    meter = CudaMeter()
    meter.reset()
    assert calls == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    peaks = meter.peaks()
    assert peaks.pop("peak_resident_bytes") > 0
    assert peaks == {"peak_device_bytes": 7 * MIB, "peak_tensor_bytes": 100, "peak_reserved_bytes": 128}


def test_the_hosts_peak_starts_anew() -> None:
    meter = Meter()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    del block
    before = meter.peaks()["peak_resident_bytes"]
    meter.reset()
    assert before is not None and meter.peaks()["peak_resident_bytes"] < before - 32 * MIB
    stop = meter.clock()
    time.sleep(0.01)
    assert stop() >= 0.01


def test_paged_states_are_counted_and_others_are_not() -> None:
    paged, plain = torch.zeros(100), torch.zeros(50, dtype=torch.uint8)
    paged.is_paged = True
    optimizer: Any = SimpleNamespace(state={"a": {"state1": paged, "state2": plain, "step": 3}, "b": {"state1": paged}})
    assert paged_bytes(optimizer) == 800


def test_paged_states_are_paged_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def paged(self: Any, parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        state = torch.zeros_like(parameter, dtype=dtype)
        state.is_paged = self.is_paged  # managed memory stays on the host's side, for torch
        return state

    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer", paged)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda *_, **__: None)
    optimizers = []
    for _ in range(2):
        weights = torch.nn.Parameter(torch.ones(400, 400))
        weights.grad = torch.full_like(weights, 0.1)
        optimizers.append(bitsandbytes.optim.PagedAdamW8bit([weights]))
    before, after = optimizers
    before.step()
    after.load_state_dict(before.state_dict())
    page_states(after)
    (old,), (new,) = before.state.values(), after.state.values()
    assert paged_bytes(after) == paged_bytes(before) > 0
    assert torch.equal(old["state1"], new["state1"]) and new["state1"].any()
    after.step()


def model_of(spec: RunSpec) -> TrainedModel:
    return build_model(load_base(spec), spec)


def test_useful_work_counts_weights_by_what_is_done_with_them(toy: Path, make_spec) -> None:
    base = load_base(make_spec(method="none"))
    head = base.lm_head.weight.numel()
    body = sum(p.numel() for name, p in base.named_parameters() if "layers." in name and p.dim() == 2)
    assert count_work(model_of(make_spec(method="full")).model) == (6 * body, 6 * head)
    lora = model_of(make_spec(method="lora")).model
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert count_work(lora) == (4 * body + 6 * trained, 4 * head)
    assert count_work(model_of(make_spec(method="qlora")).model) == count_work(lora)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_devices_rates_are_measured_once(precision: str, dtype: str, make_spec) -> None:
    spec = make_spec(method="lora", precision=precision)
    found = measure_ceilings(spec)
    assert found.dtype == dtype
    assert found.matmul_flops_per_second > 1e8 and found.copy_bytes_per_second > 1e7
    assert measure_ceilings(spec.model_copy(update={"seed": 3})) is found


def test_a_record_says_how_much_of_the_device_was_used(toy: Path, make_spec, tmp_path: Path) -> None:
    spec = make_spec(method="lora", generation_items=0, retention_tokens=0, probe_steps=0)
    record = run_here(spec, tmp_path)
    speed, (for_token, for_response) = record.speed, count_work(model_of(spec).model)
    assert speed.useful_flops_per_second > 0
    # Every token is at least in the body; the head adds its part for some.
    per_token = speed.useful_flops_per_second / speed.tokens_per_second
    assert for_token < per_token < for_token + for_response
    assert speed.matmul_share == speed.useful_flops_per_second / record.ceilings.matmul_flops_per_second
    assert record.seconds.ceilings > 0


@pytest.mark.parametrize("method", ["full", "adalora"])
def test_a_rehearsal_changes_nothing(method: str, toy: Path, make_spec, tmp_path: Path) -> None:
    options = {} if method == "full" else {"dropout": 0.3}
    spec = make_spec(method=method, gradient_accumulation=2, **options)
    tokenizer = load_tokenizer(spec)
    examples = tokenise(read_split(spec.task, "train"), tokenizer, spec.seq_len)
    losses = []
    for rehearsal in (False, True):
        batches = training_batches(examples, seed=0, batch_size=spec.batch_size, pad_token_id=tokenizer.pad_token_id)
        batch = next(training_batches(examples, seed=9, batch_size=32, pad_token_id=tokenizer.pad_token_id))
        trained = model_of(spec)
        model = trained.model
        seen: list[int] = []
        model.register_forward_pre_hook(
            lambda _, args, inputs, seen=seen: seen.append(len(inputs["input_ids"])), with_kwargs=True
        )
        log = TrainingLog()
        seed_everything(0)
        checkpoints = Checkpoints(tmp_path, spec)
        train(trained, batches, spec, log, checkpoints, batch if rehearsal else None)
        # After the first step, whose gradients are gone: its two passes, as in an accumulation.
        assert seen[2:4] == ([32, 32] if rehearsal else [8, 8])
        losses.append((log.nll, torch.cat([p.detach().float().flatten() for p in model.parameters()])))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize(
    ("limit", "used", "usable"),
    [
        (12 * GIB, (100 * MIB, 800 * MIB), 12 * GIB - 698 * MIB),
        (12 * GIB, (100 * MIB, 300 * MIB), 12 * GIB - CONTEXT_BYTES),
        (12 * GIB, (None, None), 12 * GIB - CONTEXT_BYTES),
        (200 * GIB, (None, None), 80 * GIB),
        (MIB, (None, None), 0),
    ],
)
def test_a_run_is_limited_to_a_smaller_card_less_the_context(
    limit: int, used: tuple[int | None, int | None], usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    answers = iter(used)
    monkeypatch.setattr(meters, "pci_address", lambda: "unknown")
    monkeypatch.setattr(meters, "used_bytes", lambda card: next(answers))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(torch.OutOfMemoryError), limited_memory(limit):
        assert [share * 80 * GIB for share in shares] == [pytest.approx(usable)]
        raise torch.OutOfMemoryError
    assert shares[1:] == [1.0]  # what the process does next has the whole card

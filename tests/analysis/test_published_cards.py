"""Published runs of cards name no machine, person or folder, and are plausible."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import quartiles
from ledger_parts import claims

from peftscope.analysis.cards import find_run
from peftscope.analysis.collect import row_of
from peftscope.claims.evaluate import evaluate_part
from peftscope.claims.verdict import Verdict
from peftscope.layout import record_path
from peftscope.memory.base import describe_model
from peftscope.memory.question import ask
from peftscope.planning.published import all_published_records, write_runs
from peftscope.planning.sweep import expand
from peftscope.record import Memory, PhaseMemory, PredictedMemory, RunRecord, Speed, Timing, parse_record, write_record
from peftscope.report.publish import publish_experiment
from peftscope.spec import RunSpec, run_id
from peftscope.words import spoken_bytes

TENSOR_FACTOR, DEVICE_FACTOR = 1.5, 2.0
"""How far a measured peak may lie from its prediction, up or down: of tensors, and of reserved and device memory.

A smaller distance is an error of the calculator, which is a finding. A larger one was no peak of this run so far.
"""
FIRST_LOSS_SHARE = 0.02
"""How far the first losses of two cards may differ: they come from the same weights and batch, rounded differently."""
LARGEST_NLL = 100.0
"""Nats per token. Random weights give about the logarithm of the vocabulary, which is below 13."""
LARGEST_SHARE = 1.2
"""The largest share of the card's own rate at a matrix product that a step may have reached."""
CARD_SLACK = 1.05
"""NVML counts the driver's part of a card's memory, which torch's total lacks."""

FACTS = {
    "": "alone benchmarks bf16_products card code environment hardware model packages prose_sha256 python start "
    "started_at task threads threads_beside",
    "code": "commit dirty",
    "hardware": "compute_capability cores cpu cuda driver gpu gpu_memory_bytes memory_bytes system",
    "environment": "CUDA_DEVICE_ORDER CUDA_VISIBLE_DEVICES MKL_NUM_THREADS OMP_NUM_THREADS PYTORCH_ALLOC_CONF "
    "PYTORCH_CUDA_ALLOC_CONF SLURM_JOB_ID",
    "card": "after_training allocator_settings at_start driver_reserve_bytes limited_to_bytes other_processes "
    "used_bytes",
}
"""The facts of a record's provenance, by section. A further one could name a machine or a person."""
PLACE = re.compile(r"""(?:^|[\s"'=:(,;])(?:~?/[\w.~-]|[A-Za-z]:[\\/]|\\\\\w)|://|\w@\w|\b(?:GPU|MIG)-[0-9a-f]{8}""")
"""A path, an address of the web, one of mail, or the number of a single card."""


def problems(record: RunRecord) -> list[str]:
    """Returns whatever in a card's record names a machine, a person or a folder, or is not plausible."""
    rules = (named, not_repeatable, wrong_peaks, wrong_times)
    return [problem for rule in rules for problem in rule(record)]


def named(record: RunRecord) -> Iterator[str]:
    for section, known in FACTS.items():
        facts = record.provenance.get(section) if section else record.provenance
        yield from (f"provenance has {section}.{fact}" for fact in (facts or {}).keys() - known.split())
    yield from (
        f"{field} has a path or an address: {text}" for field, text in texts(record.model_dump()) if PLACE.search(text)
    )


def texts(content: Any, field: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from ((field, name), *texts(value, f"{field}.{name}".lstrip(".")))
    elif isinstance(content, list):
        for value in content:
            yield from texts(value, field)
    elif isinstance(content, str):
        yield field, content


def not_repeatable(record: RunRecord) -> Iterator[str]:
    if record.run_id != run_id(record.spec):
        yield f"its spec is another run's, {run_id(record.spec)}"
    code = record.provenance.get("code", {})
    if code.get("dirty") is not False or not re.fullmatch("[0-9a-f]{40}", code.get("commit") or ""):
        yield f"no clean commit: {code}"
    if not record.provenance.get("hardware", {}).get("gpu"):
        yield "its card has no name"
    steps = record.spec.steps if record.spec.method.trains else 0
    losses = record.train_nll
    if len(losses) > steps or (record.status == "ok" and len(losses) < steps):
        yield f"{len(losses)} losses for {steps} steps"
    if record.status == "ok" and not all(value is not None and 0 <= value <= LARGEST_NLL for value in losses):
        yield f"a loss is missing, negative or over {LARGEST_NLL:g} nats a token"
    if record.status == "ok" and steps and not re.fullmatch("[0-9a-f]{64}", record.train_batches_sha256 or ""):
        yield "the hash of its batches is missing"


def wrong_peaks(record: RunRecord) -> Iterator[str]:
    memory, total = record.memory, record.provenance.get("hardware", {}).get("gpu_memory_bytes") or 0
    for phase in ("load", "train", "evaluate"):
        peaks: PhaseMemory = getattr(memory, phase)
        tensors, reserved = peaks.peak_tensor_bytes, peaks.peak_reserved_bytes
        known = [value for value in (tensors, reserved, peaks.peak_device_bytes) if value is not None]
        if tensors is not None and reserved is not None and tensors > reserved:
            yield f"the tensors of {phase} took {spoken_bytes(tensors)}, of {spoken_bytes(reserved)} reserved"
        if known and not 0 < max(known) <= CARD_SLACK * total:
            yield f"a peak of {phase} is {spoken_bytes(max(known))}, on a card of {spoken_bytes(total)}"
    if record.status == "ok" and record.spec.method.trains and memory.train.peak_tensor_bytes is None:
        yield "the peak of its training is missing"
    before = (record.provenance.get("card") or {}).get("used_bytes") or 0
    for kind, factor in (("tensor", TENSOR_FACTOR), ("reserved", DEVICE_FACTOR), ("device", DEVICE_FACTOR)):
        measured = getattr(memory.train, f"peak_{kind}_bytes")
        predicted = getattr(memory.predicted, f"train_peak_{kind}_bytes")
        if record.status == "ok" and measured is not None and predicted is not None:
            measured -= before if kind == "device" else 0
            if not predicted / factor <= measured <= predicted * factor:
                yield f"the {kind} peak of its training is over {factor:g} times off the prediction"


def wrong_times(record: RunRecord) -> Iterator[str]:
    speed, which = record.speed, ("lower_quartile", "median", "upper_quartile")
    timed = {"step": [getattr(speed, f"step_seconds_{each}") for each in which]}
    timed |= {
        name: [getattr(time, f"seconds_{each}") for each in which] for name, time in (record.latency or {}).items()
    }
    for name, times in timed.items():
        known = [value for value in times if value is not None]
        if known != sorted(known) or any(value <= 0 for value in known):
            yield f"the quartiles of {name} are not in order, or not above 0"
    if speed.matmul_share is not None and not 0 < speed.matmul_share <= LARGEST_SHARE:
        yield f"its steps reached {speed.matmul_share:.0%} of the card's rate at a matrix product"


def disagreements(records: list[RunRecord]) -> Iterator[str]:
    """Yields the runs whose batches or first loss differ from those of the same run on another card."""
    first: dict[str, RunRecord] = {}
    for record in records:
        if not record.train_nll:
            continue
        other = first.setdefault(record.run_id, record)
        one, its = record.train_nll[0] or 0.0, other.train_nll[0] or 0.0
        if record.train_batches_sha256 != other.train_batches_sha256:
            yield f"{record.run_id}: saw other batches"
        elif abs(one - its) > FIRST_LOSS_SHARE * max(one, its):
            yield f"{record.run_id}: a first loss of {one:.4f} and of {its:.4f}"


def test_what_cards_measured_names_nobody_and_is_plausible(in_repository: None) -> None:
    published = [(name, run, text) for name, run, text in all_published_records() if '"device": "cuda"' in text]
    records = {f"{name}: {run}": parse_record(text, run) for name, run, text in published}
    assert {where: found for where, record in records.items() if (found := problems(record))} == {}
    assert list(disagreements(list(records.values()))) == []


GB, GIB = 10**9, 2**30
PEAK = 15 * GB


@cache
def served() -> RunSpec:
    """Returns the run of gpu-check that decides S71 on a card."""
    for name, spec in expand("gpu-check", "cuda").runs.items():
        if name.startswith("lora-r8-a16-all-linear") and (spec.batch_size, spec.latency_tokens) == (1, 128):
            return spec
    raise AssertionError("gpu-check has no such run")


@pytest.fixture
def sound() -> dict[str, Any]:
    """What that run leaves on a made-up card, as its record's JSON."""
    spec = served()
    peaks = PhaseMemory(peak_tensor_bytes=PEAK, peak_reserved_bytes=PEAK + GB, peak_device_bytes=PEAK + 3 * GB)
    sizes = {"tensor": PEAK + GB // 10, "reserved": PEAK + GB, "device": PEAK + 2 * GB}
    predicted = PredictedMemory(**{f"train_peak_{kind}_bytes": size for kind, size in sizes.items()})
    latency = {"apart_token": 0.021, "merged_token": 0.02}
    return RunRecord(
        run_id=run_id(spec),
        spec=spec,
        status="ok",
        memory=Memory(train=peaks, predicted=predicted, resident_tensor_bytes=13 * GB),
        speed=Speed(timed_steps=20, matmul_share=0.5, **quartiles(0.19, 0.2, 0.21, of="step_")),
        latency={name: Timing(repeats=9, **quartiles(seconds)) for name, seconds in latency.items()},
        train_nll=[10.5] * spec.steps,
        train_batches_sha256="ab" * 32,
        provenance={
            "started_at": "2026-11-26T20:00:00+00:00",
            "code": {"commit": "c" * 40, "dirty": False},
            "python": "3.12.1",
            "packages": {"torch": "2.13.0+cu128"},
            "hardware": {"cpu": "A CPU @ 2.20GHz", "gpu": "NVIDIA GeForce RTX 4090", "gpu_memory_bytes": 24 * GIB},
            "environment": {"CUDA_VISIBLE_DEVICES": "0", "PYTORCH_ALLOC_CONF": None},
            "card": {"used_bytes": GB, "other_processes": []},
            "model": {"name": "random-llama-2-7b", "source": {"kind": "random"}},
        },
    ).model_dump(mode="json")


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: r["spec"].update(steps=23), "its spec is another run's"),
        (lambda r: r["provenance"].update(host="node7"), "provenance has .host"),
        (lambda r: r["provenance"]["hardware"].update(node="node7"), "provenance has hardware.node"),
        (lambda r: r["provenance"].update(python="/home/bob/bin"), "provenance.python has a path"),
        (lambda r: r["provenance"]["model"]["source"].update(mirror="C:\\models"), "provenance.model.source.mirror"),
        (
            lambda r: r["provenance"]["environment"].update(CUDA_VISIBLE_DEVICES="GPU-8a3b1c5e-1"),
            "CUDA_VISIBLE_DEVICES",
        ),
        (lambda r: r["method_metrics"].update({"~/x": 1.0}), "method_metrics has a path"),
        (lambda r: r.update(reason="ask bob@example.org"), "reason has a path or an address"),
        (lambda r: r["provenance"]["code"].update(dirty=True), "no clean commit"),
        (lambda r: r["provenance"]["code"].update(commit=None), "no clean commit"),
        (lambda r: r["provenance"]["hardware"].update(gpu=None), "its card has no name"),
        (lambda r: r["train_nll"].pop(), "23 losses for 24 steps"),
        (lambda r: r["train_nll"].__setitem__(3, None), "a loss is missing"),
        (lambda r: r["train_nll"].__setitem__(3, 200.0), "over 100 nats"),
        (lambda r: r.update(train_batches_sha256=None), "hash of its batches"),
        (lambda r: r["memory"]["train"].update(peak_tensor_bytes=5 * GB), "tensor peak of its training is over 1.5"),
        (lambda r: r["memory"]["train"].update(peak_reserved_bytes=GB), "of 0.93 GiB reserved"),
        (lambda r: r["memory"]["train"].update(peak_tensor_bytes=None), "the peak of its training is missing"),
        (lambda r: r["memory"]["load"].update(peak_device_bytes=30 * GIB), "on a card of 24.00 GiB"),
        (lambda r: r["speed"].update(matmul_share=3.0), "300%"),
        (lambda r: r["speed"].update(step_seconds_median=0.5), "quartiles of step"),
        (lambda r: r["latency"]["apart_token"].update(seconds_lower_quartile=-1.0), "quartiles of apart_token"),
    ],
)
def test_a_record_that_is_not_sound_is_found(edit: Edit, said: str, sound: dict[str, Any]) -> None:
    assert problems(RunRecord(**sound)) == []
    edit(sound)
    found = problems(RunRecord(**sound))
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_nll": [10.6] * 24}, ""),
        ({"train_nll": [11.5] * 24}, "a first loss of"),
        ({"train_batches_sha256": "cd" * 32}, "saw other batches"),
    ],
)
def test_two_cards_must_agree_on_the_first_loss_and_on_the_batches(
    changes: dict[str, Any], said: str, sound: dict[str, Any]
) -> None:
    found = list(disagreements([RunRecord(**sound), RunRecord(**sound | changes)]))
    assert bool(found) == bool(said) and all(said in problem for problem in found)


def test_a_published_folder_of_a_card_decides_claims(
    sound: dict[str, Any], workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiments").symlink_to(workspace / "experiments")
    monkeypatch.chdir(tmp_path)
    record, folder = RunRecord(**sound), Path("results/published/gpu-check")
    write_record(Path("sent") / record.run_id / "record.json", record)
    write_runs(folder, [Path("sent") / record.run_id])
    row = {"run_id": record.run_id, "comparisons": "grid", **row_of(record.spec, record)}
    pd.DataFrame([row]).to_csv(folder / "runs.csv", index=False)
    ((_, run, text),) = all_published_records()
    assert '"device": "cuda"' in text and problems(parse_record(text, run)) == []
    found = {
        claim: [part for part in claims()[claim].parts if part.check.startswith("gpu.")][-1] for claim in ("S71", "P12")
    }
    verdicts = {claim: evaluate_part(part) for claim, part in found.items()}
    assert verdicts["S71"].verdict == Verdict.HOLDS and verdicts["S71"].known == "on a card"
    assert verdicts["P12"].verdict == Verdict.NOT_RUN


def test_whatever_ended_on_a_card_is_published_under_its_name_and_the_page_says_what_agreed(
    sound: dict[str, Any], workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("experiments", "src"):
        (tmp_path / name).symlink_to(workspace / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTSCOPE_DEVICE", "cuda")
    made = {"made_at": "2026-11-26", "licence": "none", "sha256": {}}
    sound["provenance"] |= {"model": sound["provenance"]["model"] | made, "task": {"name": "filler", **made}}
    record = RunRecord(**sound)
    write_record(record_path(record.run_id), record)
    (record_path(record.run_id).parent / "items.jsonl").touch()
    results, report = publish_experiment("gpu-check")
    assert results == Path("results/published/gpu-check-nvidia-geforce-rtx-4090") and (results / "runs.csv").is_file()
    page = (report / "report.html").read_text()
    assert "What agreed" in page and "Tensors: 1 of 1 peaks lie within 2 % of the predicted." in page


def test_a_run_is_found_by_the_options_of_its_tuner() -> None:
    asked: dict[str, Any] = {"method": "peft", "tuner": "lora", "options": {"r": 4}}
    spec = ask(describe_model("llama-2-7b"), asked).spec
    fields = spec.model_dump(mode="json", exclude={"method"}) | {"model": "random-llama-2-7b"}
    row = {"status": "ok", "method": "peft", **fields, **spec.method.columns()}
    assert find_run([row], "llama-2-7b", asked) == row
    assert find_run([row], "llama-2-7b", asked | {"options": {"r": 8}}) is None

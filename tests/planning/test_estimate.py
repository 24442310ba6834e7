"""Which records an estimate of a run's time rests on, and what jobs ask a scheduler for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from peftscope.execution import pace
from peftscope.hardware.cards import Rates, find_gpu
from peftscope.hardware.device import Card
from peftscope.layout import record_path
from peftscope.methods import METHODS
from peftscope.planning import estimate
from peftscope.planning.demands import JobDemands, host_bytes
from peftscope.planning.forecast import Forecaster
from peftscope.planning.plan import Workflow, plan_experiment
from peftscope.planning.published import published_records
from peftscope.record import RESTORED, RunRecord, Seconds, parse_record, state_folder, write_record
from peftscope.spec import RunSpec, run_id
from peftscope.words import GIB

SPEC = RunSpec.model_validate(
    {"model": "toy", "task": "two-digit-sums", "method": {"name": "lora"}, "steps": 100, "learning_rate": 1e-3}
)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    estimate._measured.cache_clear()
    yield
    estimate._measured.cache_clear()


def finished(train: float, seed: int, *, restored: bool = False, **fields: object) -> None:
    """Writes a record of a run that trained for so long, in ten seconds more."""
    spec = SPEC.model_copy(update={"seed": seed, **fields})
    path = record_path(run_id(spec))
    record = RunRecord(run_id=run_id(spec), status="ok", spec=spec, seconds=Seconds(train=train, wall=train + 10))
    write_record(path, record.model_copy(update={"provenance": {"threads": 1}}))
    if restored:
        state_folder(path.parent).mkdir(parents=True)
        (state_folder(path.parent) / RESTORED).write_text("{}")


def test_runs_that_waited_and_one_that_was_resumed_do_not_decide(own_folder: Path) -> None:
    for seed, train in enumerate((2, 50, 60, 400, 500)):
        finished(train, seed)
    assert estimate.estimate_seconds(SPEC, one_thread=True) == pytest.approx(60)


def test_it_grows_with_the_steps(own_folder: Path) -> None:
    finished(50, 0)
    twice = SPEC.model_copy(update={"steps": 200})
    assert estimate.estimate_seconds(twice, one_thread=True) == pytest.approx(110)


def test_what_differs_from_the_record_is_scaled_by_the_time_model(own_folder: Path) -> None:
    """A step of few tokens costs more for each, and DoRA more than LoRA, of which the only record is."""
    finished(12, 0)

    def training(**fields: object) -> float:
        return estimate.estimate_seconds(SPEC.model_copy(update=fields), one_thread=True) - 10

    assert training() == pytest.approx(12)
    assert 12 < training(batch_size=64) < 48 and 12 < training(task="family-relationships") < 54
    assert 12 < training(method=METHODS["dora"]()) < 30
    estimate._measured.cache_clear()
    finished(999, 1, task="one-that-is-gone")
    assert training() == pytest.approx(12)


def test_a_record_with_an_outdated_spec_is_none(own_folder: Path) -> None:
    finished(5000, 0)
    path = record_path(run_id(SPEC.model_copy(update={"seed": 0})))
    path.write_text(path.read_text().replace('"packing":', '"of_old": 1, "packing":', 1))
    assert estimate.estimate_seconds(SPEC, one_thread=True) < 1000 and estimate.measured_runs() == []


def test_without_a_record_a_card_is_taken_to_be_faster_than_a_processor(own_folder: Path) -> None:
    card = SPEC.model_copy(update={"model": "llama-2-7b", "device": "cuda"})
    processor = card.model_copy(update={"device": "cpu"})
    assert estimate.estimate_seconds(card) < estimate.estimate_seconds(processor) / 2


def test_this_machines_runs_come_before_restored_ones(own_folder: Path) -> None:
    for seed in range(3):
        finished(5, seed, restored=True)
    finished(80, 9)
    assert estimate.estimate_seconds(SPEC, one_thread=True) == pytest.approx(90)


def test_a_published_run_that_shared_its_machine_is_scaled_by_the_rate_of_its_kind(
    in_repository: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "record_paths", lambda: [])
    spec = SPEC.model_copy(update={"model": "smollm2-135m", "steps": 160})
    fast = estimate.estimate_seconds(spec, lambda spec: Rates(9e11, 5e10, casts=False), one_thread=True)
    slow = estimate.estimate_seconds(spec, lambda spec: Rates(1.5e11, 2.5e10, casts=True), one_thread=True)
    assert 2 * fast < slow < 6 * fast


def test_a_method_that_never_ran_rests_on_lora(own_folder: Path) -> None:
    other = SPEC.model_copy(update={"method": METHODS["dora"]()})
    before = estimate.estimate_seconds(other, one_thread=True)
    estimate._measured.cache_clear()
    finished(4000, 0)
    assert before < 100 and 4000 < estimate.estimate_seconds(other, one_thread=True) < 10_000
    base = SPEC.model_copy(update={"method": METHODS["none"]()})
    assert estimate.estimate_seconds(base, one_thread=True) < 100


# What jobs ask a scheduler for: enough for every run that was published, and more at each attempt.


def held(record: RunRecord) -> int:
    """The process's largest resident size, in bytes."""
    memory = record.memory
    return max(phase.peak_resident_bytes or 0 for phase in (memory.load, memory.train, memory.evaluate))


@pytest.mark.parametrize("experiment", ["quick", "all-methods"])
def test_published_runs_would_have_had_enough(experiment: str, in_repository: None) -> None:
    texts = published_records(experiment)
    records = [record for run, text in texts.items() if (record := parse_record(text, run)).status == "ok"]
    assert len(records) > 5
    for record in records:
        assert held(record) < host_bytes(record.spec) < 8 * held(record), record.run_id


def test_each_attempt_asks_for_more() -> None:
    plan = plan_experiment("smoke")
    demands, run = JobDemands(Workflow([plan])), SimpleNamespace(run_id=plan.run_ids[0])
    memory = [demands.memory_mb(run, attempt) for attempt in (1, 2, 3)]
    assert memory == pytest.approx([memory[0], 2 * memory[0], 3 * memory[0]], abs=2)
    minutes = [demands.minutes(run, attempt) for attempt in (1, 2, 3)]
    assert minutes == [minutes[0], 2 * minutes[0], 3 * minutes[0]]


def test_every_process_of_a_sharded_run_needs_its_own(make_spec) -> None:
    whole = make_spec(method="lora")
    assert host_bytes(whole.model_copy(update={"shards": 2})) == 2 * host_bytes(whole)


def test_a_run_on_this_machines_card_takes_what_the_time_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA A100-SXM4-80GB": 80 * GIB, "NVIDIA GeForce RTX 4090": 24 * GIB}
    monkeypatch.setattr(pace, "cards", lambda: [Card("", *both) for both in names.items()])
    pace._forecaster.cache_clear()
    spec = SPEC.model_copy(update={"model": "llama-3.2-1b", "device": "cuda"})
    assert pace.run_seconds(spec) == Forecaster(find_gpu("rtx4090")).seconds(spec)
    pace._forecaster.cache_clear()


def test_the_processors_forecast_has_the_memory_that_a_job_asks_for(own_folder: Path) -> None:
    finished(50, 0)
    told = pace.forecast_here("run", SPEC, chosen=True, one_thread=True)
    assert (told.seconds, told.peak_device_bytes) == (pytest.approx(60), host_bytes(SPEC))
    other = SPEC.model_copy(update={"model": "org/unknown"})
    unknown = pace.forecast_here("run", other, chosen=True, one_thread=True)
    assert unknown.peak_device_bytes is None and "org/unknown is not known" in unknown.unknown

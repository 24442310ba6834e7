"""What jobs ask a scheduler for: enough for every run that was published, and more at each attempt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from peftscope.planning.demands import JobDemands, host_bytes
from peftscope.planning.plan import Workflow, plan_experiment
from peftscope.planning.published import published_records
from peftscope.record import RunRecord, parse_record


def held(record: RunRecord) -> int:
    """The process's largest resident size, in bytes."""
    memory = record.memory
    return max(phase.peak_resident_bytes or 0 for phase in (memory.load, memory.train, memory.evaluate))


@pytest.mark.parametrize("experiment", ["quick", "all-methods"])
def test_published_runs_would_have_had_enough(
    experiment: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
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

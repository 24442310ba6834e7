"""The time that `make report` says is left, from made events in a made order."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console
from snakemake.settings.types import OutputSettings
from snakemake_interface_logger_plugins.common import LogEvent

import snakemake_logger_plugin_peftscope as plugin
from peftscope.execution.pace import run_seconds
from peftscope.planning.plan import Workflow, load_workflow

SHORT = 30


class Clock:
    """Shows what it was told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def workflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Workflow:
    """The quick experiment, of which nothing was run."""
    monkeypatch.setattr(plugin, "record_path", lambda _: tmp_path / "no record")
    return load_workflow({"experiment": "quick"})


@pytest.fixture
def estimates(workflow: Workflow) -> dict[str, float]:
    return {run: run_seconds(spec) for run, spec in workflow.runs.items()}


def begun(workflow: Workflow, clock: Clock, unknown: int = 0) -> plugin.TimeLeft:
    """Returns what is left of a workflow, some runs of which only its tuning will make known."""
    left = plugin.TimeLeft(workflow, clock)
    left.begin({"tables": SHORT, "train": len(workflow.runs) - unknown})
    return left


def end(left: plugin.TimeLeft, clock: Clock, job: int, rule: str, seconds: float, run: str | None = None) -> None:
    left.start(job, rule, run)
    clock.now += seconds
    left.finish(job)


def test_after_all_short_jobs_the_trainings_are_left(workflow: Workflow, estimates: dict[str, float]) -> None:
    clock = Clock()
    left = begun(workflow, clock)
    for job in range(SHORT):
        end(left, clock, job, "tables", 1.0)
    assert left.seconds() == pytest.approx(sum(estimates.values()), rel=0.3)
    assert left.seconds() > 10 * SHORT


@pytest.mark.parametrize("times", [0.5, 4.0])
def test_what_takes_longer_than_estimated_is_expected_to_go_on_so(
    workflow: Workflow, estimates: dict[str, float], times: float
) -> None:
    clock = Clock()
    left = begun(workflow, clock)
    for job in range(SHORT):
        end(left, clock, job, "tables", times * plugin.SHORT_SECONDS)
    runs = list(workflow.runs)
    half = runs[: len(runs) // 2]
    for job, run in enumerate(half):
        end(left, clock, job, "train", times * estimates[run], run)
    to_come = times * sum(seconds for run, seconds in estimates.items() if run not in half)
    assert left.seconds() == pytest.approx(to_come, rel=0.2)
    before = left.seconds()
    clock.now += to_come / 10
    assert left.seconds() == pytest.approx(before - to_come / 10)
    for job, run in enumerate(runs[len(half) :]):
        end(left, clock, job, "train", times * estimates[run], run)
    assert left.seconds() == 0


def test_runs_whose_rates_are_not_chosen_yet_are_left_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(plugin, "record_path", lambda _: tmp_path / "no record")
    monkeypatch.setattr("peftscope.planning.plan.record_path", lambda _: tmp_path / "no record")
    monkeypatch.setattr("peftscope.layout.results_folder", lambda _: tmp_path)  # where no rate was chosen
    workflow = load_workflow({"experiment": "sums"})
    left = plugin.TimeLeft(workflow, Clock())
    left.begin({"train": len(workflow.runs)})
    later, measured = workflow.later_runs()
    assert len(later) > len(workflow.runs) and measured == 0
    every = workflow.runs | later
    estimated = [run_seconds(spec, one_thread=True) for spec in every.values()]
    assert left.seconds() == pytest.approx(sum(estimated))


def record(event: LogEvent, **fields: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"levelno": logging.INFO, "event": event, **fields})


@pytest.mark.parametrize("terminal", [False, True])
def test_the_line_and_the_bar_show_this_number(workflow: Workflow, monkeypatch, terminal: bool) -> None:
    clock = Clock()
    monkeypatch.setattr(plugin, "loaded_workflow", lambda: workflow)
    monkeypatch.setattr(plugin.TimeLeft.__init__, "__defaults__", (None, clock))
    handler = plugin.LogHandler(OutputSettings(), None)
    handler.console = console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    total = 2 + len(workflow.runs)
    handler.emit(record(LogEvent.RUN_INFO, stats={"tables": 2, "train": len(workflow.runs), "total": total}))
    handler.emit(record(LogEvent.JOB_INFO, jobid=7, rule_name="tables", wildcards={}))
    clock.now += 3
    handler.emit(record(LogEvent.JOB_FINISHED, job_id=7))
    handler.emit(record(LogEvent.PROGRESS, done=1, total=total))
    seconds = handler.left.seconds()
    assert seconds > 60
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert (f"1 of {total} jobs, about {plugin.spoken_time(seconds)} left" in said) is not terminal
    bar = next(task for task in handler.progress.tasks if task.description == "Total Progress")
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    assert handler.progress.columns[-1].render(bar).plain == f"{hours}:{minutes:02}:{rest:02} left"  # type: ignore[union-attr]
    handler.event_handler.progress_display.live_display.stop()

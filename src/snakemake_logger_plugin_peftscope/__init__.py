"""Snakemake's rich progress bars with the time that is left, and a line after each job where there is no terminal.

snakemake-logger-plugin-rich shows elapsed time only, and nothing outside a terminal. Chosen by ``logger: peftscope`` in
the profile; Snakemake finds it by the name of this package.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from rich.progress import Task, TimeRemainingColumn
from rich.text import Text
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_logger_plugin_rich import LogHandler as RichLogHandler

from peftscope.errors import InputError
from peftscope.execution.pace import run_seconds
from peftscope.layout import record_path
from peftscope.planning.plan import Workflow, loaded_workflow
from peftscope.spec import RunSpec
from peftscope.words import spoken_time

SHORT_SECONDS = 2.5
"""Of a job that trains nothing: 0.7 to 3.1 in the quick experiment's benchmarks on two cores, mostly to start."""
RULE_SECONDS = {"measure": 100.0}
"""Of rules that measure: the processor's seconds on two cores. LoRA's updates of SmolLM2-135M take 67 to
measure, and those of full fine-tuning 160."""
TRUST = 0.1
"""The plan's estimate counts as much as this share of it that was done in just as many seconds."""
TOTAL = "Total Progress"


class TimeLeft:
    """The time of the jobs that are left: as estimated, times what those that ended took of their estimate.

    Args:
        workflow: What is run; None: nobody knows, and every training counts as a short job.
        clock: Returns seconds.
    """

    def __init__(self, workflow: Workflow | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._workflow = workflow
        self._runs: Mapping[str, RunSpec] = workflow.runs if workflow else {}
        self._clock = clock
        self._began = self._last = clock()
        self._left: Counter[str] = Counter()
        self._rules: dict[int, tuple[str, str | None]] = {}
        self._ended: set[str] = set()
        self._estimates: dict[str, float] = {}
        self._done = 0.0

    def begin(self, jobs: Mapping[str, int]) -> None:
        """Takes the number of jobs of each rule."""
        self._left = Counter(jobs)
        self._ended |= {run for run in self._runs if record_path(run).is_file()}

    def start(self, job: int, rule: str, run_id: str | None) -> None:
        """Notes the rule and the run of a job that starts, or is retried."""
        self._rules[job] = rule, run_id

    def finish(self, job: int) -> None:
        """Takes the end of a job."""
        rule, run_id = self._rules.pop(job, ("", None))
        self._done += self._seconds(rule, run_id)
        self._left[rule] = max(0, self._left[rule] - 1)
        if run_id:
            self._ended.add(run_id)
        self._last = self._clock()

    def progress(self, left: int) -> None:
        """Takes the number of jobs that are left.

        Jobs that nobody counted come from a study's tuning: one trains each run that it adds, and the rest measure
        the weights of these runs.
        """
        added = max(0, left - self._left.total())
        known = len(self._runs.keys() - self._ended) - self._left["train"] if self._runs else added
        trainings = min(added, max(0, known))
        self._left.update(train=trainings, measure=added - trainings)

    def seconds(self) -> float:
        """Returns the seconds until the end, with the runs whose learning rates are not chosen yet."""
        later, measured = self._later()
        left = sum(number * self._seconds(rule) for rule, number in self._left.items())
        left += sum(self._training_seconds(run, spec) for run, spec in later.items())
        left += measured * self._seconds("measure")
        trusted = TRUST * (self._done + left)
        slower = (self._last - self._began + trusted) / (self._done + trusted) if trusted else 1.0
        return max(0.0, slower * left - (self._clock() - self._last))

    def _later(self) -> tuple[dict[str, RunSpec], int]:
        try:
            return self._workflow.later_runs() if self._workflow else ({}, 0)
        except InputError:  # the file was changed in the meantime; the workflow itself will say so
            return {}, 0

    def _seconds(self, rule: str, run_id: str | None = None) -> float:
        """Returns the estimate of a job; for an unidentified training, the mean of the remaining ones."""
        if not self._runs or rule != "train":
            return RULE_SECONDS.get(rule, SHORT_SECONDS)
        if run_id is None:
            every = list(self._runs)  # a study's runs become known while another thread draws the bar
            runs = [run for run in every if run not in self._ended] or every
            return fmean(self._seconds(rule, run) for run in runs)
        return self._training_seconds(run_id, self._runs[run_id])

    def _training_seconds(self, run_id: str, spec: RunSpec) -> float:
        if run_id not in self._estimates:
            shares = self._workflow is not None and self._workflow.shares_machine(run_id)
            one_thread = shares and spec.device == "cpu"
            self._estimates[run_id] = run_seconds(spec, one_thread=one_thread)
        return self._estimates[run_id]


class TimeLeftColumn(TimeRemainingColumn):
    """The time that is left of the whole workflow; nothing beside the bars of single rules."""

    def __init__(self, left: Callable[[], float]) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        """Returns the time of rich's own column, by our estimate."""
        if task.description != TOTAL:
            return Text("")
        shown: Any = SimpleNamespace(finished=task.finished, total=task.total, time_remaining=self._left())
        return super().render(shown).append(" left")


class LogHandler(RichLogHandler):
    """The rich handler with a column for the time left."""

    def __post_init__(self) -> None:
        """Adds the time left to the bars."""
        super().__post_init__()
        self.left = TimeLeft()
        self.progress.columns = (*self.progress.columns, TimeLeftColumn(lambda: self.left.seconds()))

    def emit(self, record: logging.LogRecord) -> None:
        """Hands the record on; after each job, says how far the workflow is where no bar can be drawn."""
        if not self.common_settings.dryrun:
            self._follow(record)
        super().emit(record)
        if getattr(record, "event", None) == LogEvent.PROGRESS and not self.console.is_terminal:
            done, total = record.done, record.total  # type: ignore[attr-defined]
            about = f", about {spoken_time(self.left.seconds())} left" if done < total else ""
            self.console.print(f"{done} of {total} jobs{about}", highlight=False)

    def _follow(self, record: Any) -> None:
        match getattr(record, "event", None):
            case LogEvent.RUN_INFO:
                self.left = TimeLeft(loaded_workflow())
                self.left.begin({rule: number for rule, number in record.stats.items() if rule != "total"})
            case LogEvent.JOB_INFO:
                self.left.start(record.jobid, record.rule_name, (record.wildcards or {}).get("run_id"))
            case LogEvent.JOB_FINISHED:
                self.left.finish(record.job_id)
            case LogEvent.PROGRESS:
                self.left.progress(record.total - record.done)

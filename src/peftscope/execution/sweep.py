"""Works off an experiment's runs one after the other, each in a process of its own, without Snakemake."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from peftscope.errors import InputError, Problem, raise_any
from peftscope.execution.job import lacks_kept
from peftscope.execution.pace import run_seconds
from peftscope.files.storage import STORAGE_CODE
from peftscope.layout import run_folder
from peftscope.planning.checks import inputs
from peftscope.planning.disk import check_disk
from peftscope.planning.plan import Plan, plan_experiment
from peftscope.planning.sweep import Sweep
from peftscope.record import finished_record, read_record, state_folder
from peftscope.spec import RunSpec, run_id
from peftscope.words import spoken_time

STOP_SECONDS = 50.0
"""The seconds that a run gets for its checkpoint once its time is up."""


@dataclass
class Outcome:
    """How a sweep ended.

    Attributes:
        left: The number of runs that another call goes on with.
        failed: The ids of the runs that failed in this call.
    """

    left: int = 0
    failed: list[str] = field(default_factory=list)


def run_sweep(name: str, choose: Callable[[Sweep], Path], minutes: float | None = None) -> Outcome:
    """Runs what is left of an experiment: finished runs are skipped, and interrupted ones continue.

    When the minutes are over, the run under way stops after a checkpoint. No run is started that would last longer,
    unless it is the first of this call.

    Args:
        name: The experiment.
        choose: Chooses what a study's further runs follow from, and returns the file that says so. It is called when
            all runs that are known have ended, until it writes the same file again and no run follows.
        minutes: The minutes of this call; None: until nothing is left.

    Raises:
        InputError: Something is wrong with the experiment, with what it needs, or with the runs to choose from.
    """
    deadline = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    plan, outcome = plan_experiment(name), Outcome()
    estimated = taken = 0.0  # of the runs of this call, which correct the estimates of the others
    ended, expected, chosen = _finished(plan), _expected(plan), None
    _say(f"{name}: {len(ended)} of {len(expected)} runs done before")
    while True:
        for identity in [identity for identity in plan.run_ids if identity not in ended]:
            spec = plan.sweep.runs[identity]
            if package := missing_package(spec):
                _say(f"{identity}: skipped, it needs the package {package}")
                ended.add(identity)
                continue
            left = [expected[run] for run in expected if run not in ended]
            room = deadline - time.monotonic()
            if room <= 0 or (taken and run_seconds(spec) * taken / estimated > room):
                outcome.left += len(left)
                return outcome
            to_go = spoken_time(sum(map(run_seconds, left)) * (taken / estimated if estimated else 1.0))
            _say(f"{len(ended) + 1}/{len(ended) + len(left)} {identity} (about {to_go} to go)")
            fetch_inputs(spec)
            began = time.monotonic()  # fetching a model says nothing of the pace
            shares = ",".join(map(str, plan.keep_at(identity)))
            options = ["--keep-at", shares] if shares else []
            options += ["--keep-weights", "all"] if plan.keeps_all_weights(identity) else []
            status = run_apart(spec, run_folder(identity), *options, deadline=deadline)
            estimated, taken = estimated + run_seconds(spec), taken + time.monotonic() - began
            ended.add(identity)
            _say(f"  {status} after {spoken_time(time.monotonic() - began)}")
            if status == "interrupted" and not any(state_folder(run_folder(identity)).rglob("checkpoint-*.pt")):
                _say("  it wrote no checkpoint in time, and starts again: give it more --minutes")
            outcome.failed += [identity] if status == "failed" else []
            outcome.left += status == "interrupted"
        if not plan.is_study or outcome.left:
            return outcome
        before, chosen = chosen, choose(plan.sweep)
        plan.expand_again()
        ended, expected = ended | _finished(plan), _expected(plan)
        if chosen == before and ended.issuperset(plan.run_ids):
            return outcome


def missing_package(spec: RunSpec) -> str:
    """Returns the package that a run needs and that is not installed; empty if none is."""
    needed = {
        "flash_attn": spec.attention == "flash_attention_2",
        "bitsandbytes": bool(spec.method.quantization()) or spec.optimizer not in ("adamw", "sgd"),
    }
    return next((name for name, needs in needed.items() if needs and find_spec(name) is None), "")


def _finished(plan: Plan) -> set[str]:
    records = {run: finished_record(run_folder(run), run) for run in plan.run_ids}
    return {run for run, r in records.items() if r and not lacks_kept(run_folder(run), r, plan.keep_at(run))}


def _expected(plan: Plan) -> dict[str, RunSpec]:
    """Returns the runs of an experiment, with assumed rates for those that a study has not chosen yet."""
    return plan.sweep.runs | plan.assumed().sweep.runs


def fetch_inputs(spec: RunSpec) -> None:
    """Fetches and makes what a run needs, if it is not there.

    Raises:
        InputError: The disk has no room for what comes, or something cannot be fetched.
    """
    raise_any(check_disk({run_id(spec): spec}))
    for resource in inputs(spec):
        resource.fetch()


def run_apart(spec: RunSpec, folder: Path, *options: str, deadline: float = math.inf) -> str:
    """Executes a run in a process of its own, and returns its status.

    ``options`` are further ones of ``peftscope run``; at the ``deadline``, on the monotonic clock, the run has to stop.

    Raises:
        InputError: The run was refused, or the disk is full.
    """
    fetch_inputs(spec)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["run", json.dumps(spec.canonical(), sort_keys=True), "--output", str(folder), *options]
    with (folder / "train.log").open("wb") as log:
        # In a session of its own: Ctrl-C reaches the run once, from here. It dies with this process all the same.
        process = subprocess.Popen(
            [sys.executable, "-m", "peftscope", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PEFTSCOPE_DIES_WITH_PARENT": "1"},
            start_new_session=True,
        )
        try:
            process.wait(None if math.isinf(deadline) else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _stop(process)
        except BaseException:
            _stop(process)
            raise
    return _status(folder, process.returncode)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Lets a run write its checkpoint, and kills it if that takes too long."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _status(folder: Path, code: int) -> str:
    """Returns the status that a process wrote into its record; without a record, it shows the end of its log.

    Raises:
        InputError: The run was refused, or the disk is full: the other runs would end in the same way.
    """
    record, log = folder / "record.json", folder / "train.log"
    if code == 0 and record.is_file():
        found = read_record(record)
        if found.reason:
            _say(f"  {found.reason}")
        return found.status
    last = next(reversed(log.read_text(errors="replace").split("\n")[:-1]), f"exit code {code}")
    if code == STORAGE_CODE:  # that of refused input as well
        raise InputError(Problem(str(folder), last, f"see {log}"))
    _say(f"  {last}")
    return "interrupted"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

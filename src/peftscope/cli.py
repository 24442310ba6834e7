"""The ``peftscope`` command. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from peftscope import cli_claims, cli_memory, cli_rules
from peftscope.errors import InputError, Problem

if TYPE_CHECKING:
    from peftscope.record import RunRecord
    from peftscope.spec import RunSpec

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure what LoRA and its relatives do to memory, speed and quality.",
)
app.add_typer(cli_memory.app)
app.add_typer(cli_claims.app)
app.add_typer(cli_rules.app)
errors = Console(stderr=True, highlight=False)

Spec = Annotated[str, typer.Argument(help="A YAML or JSON file with the fields of a run, or the JSON itself.")]


def main() -> None:
    """Runs the command line; input errors become messages and exit code 2, never tracebacks."""
    try:
        app()
    except InputError as error:
        if len(error.problems) > 1:
            errors.print(f"[bold red]{len(error.problems)} problems[/]")
        for problem in error.problems:
            errors.print(str(problem), markup=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def run(
    spec: Spec,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default results/single/runs/RUN_ID.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")] = 0,
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0, help="Between two checkpoints; a stopped run goes on from the last one.")
    ] = 300,
) -> None:
    """Train and measure one run; writes its record whatever happens."""
    from peftscope.device import detect_device
    from peftscope.plan import check_disk, check_fetched, check_runs
    from peftscope.process import die_with_parent, locked, seconds_since_process_start
    from peftscope.record import finished_record, state_folder, write_json, write_record
    from peftscope.spec import run_id
    from peftscope.sweep import spec_from

    began = time.perf_counter() - seconds_since_process_start()
    die_with_parent()
    values, path = _read_spec(spec)
    resolved = spec_from(values, path, detect_device())
    identity = run_id(resolved)
    runs = {identity: resolved}
    problems = check_runs(runs, str(path)) + check_disk(runs) + check_fetched(resolved)
    if problems:
        raise InputError(problems)
    folder = output or Path("results/single/runs") / identity
    with locked(state_folder(folder) / "lock"):
        write_json(folder / "spec.json", resolved.model_dump(mode="json"))
        record = finished_record(folder, identity)
        if record is not None:
            write_record(folder / "record.json", record)
            errors.print(f"{identity}: {record.status}, as an earlier job found; remove {folder} to run it again")
            return
        _run_in_child(resolved, folder, began, threads, checkpoint_seconds)


def _run_in_child(spec: RunSpec, folder: Path, began: float, threads: int, checkpoint_seconds: float) -> None:
    from peftscope.process import Interrupted, raise_on_signals, survive_child
    from peftscope.record import RunRecord, Status, write_record
    from peftscope.spec import run_id

    def end_early(status: Status, reason: str, name: str) -> None:
        record = RunRecord(run_id=run_id(spec), status=status, reason=reason, spec=spec)
        write_record(folder / name, record)
        errors.print(f"{record.run_id}: {status}, {reason}", soft_wrap=True)

    killed = survive_child()
    if killed == signal.SIGKILL:
        end_early("oom", "killed by SIGKILL, most likely because the host ran out of memory", "record.json")
        return
    if killed:
        end_early("failed", f"crashed with {killed.name}", "record.json")
        return
    raise_on_signals()
    try:
        record = _execute(spec, folder, began, threads, checkpoint_seconds)
    except Interrupted as error:
        if not (folder / "interrupted.json").is_file():
            end_early("interrupted", str(error), "interrupted.json")
        sys.exit(130)
    errors.print(f"{record.run_id}: {record.status}{f', {record.reason}' if record.reason else ''}", soft_wrap=True)
    # Everything is written. Tearing down torch and its threads would add half a second that no phase accounts for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _execute(spec: RunSpec, folder: Path, began: float, threads: int, checkpoint_seconds: float) -> RunRecord:
    """Imports what the run needs, runs it and returns its record."""
    # Nothing that a run reads comes from a hub: fetching is another command. Without this, libraries ask one and wait.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    if spec.device == "cuda" and not torch.cuda.is_available():
        remedy = "see `peftscope doctor`; PEFTSCOPE_DEVICE=cpu uses the processor"
        raise InputError(Problem("device", "there is a card, but this torch cannot use it", remedy))
    from peftscope.training.phases import Phases
    from peftscope.training.run import execute

    if spec.generation_items:
        import peftscope.evaluation.answers  # noqa: F401  (its import is slow, and belongs to that phase)
    if spec.method.quantization():
        import bitsandbytes  # noqa: F401
    if threads:
        torch.set_num_threads(threads)
    phases = Phases(spec.device, began)
    phases.mark_imported()
    return execute(spec, folder, phases, checkpoint_seconds)


def _read_spec(text: str) -> tuple[dict[str, Any], Path]:
    from peftscope.experiment import read_yaml

    if text.lstrip().startswith("{"):
        try:
            return json.loads(text), Path("spec")
        except ValueError as error:
            raise InputError(Problem("spec", f"not valid JSON: {error}")) from None
    return read_yaml(Path(text)), Path(text)


@app.command("expand")
def expand_experiment(
    experiment: cli_rules.ExperimentName,
    brief: Annotated[bool, typer.Option("--brief", help="Only the totals.")] = False,
    gpu: Annotated[str | None, typer.Option(help="On this card: rtx4090, a100, ..., or its memory: 24GB.")] = None,
) -> None:
    """Show an experiment's runs, with an estimate of the time and, for a card, of the memory that they will take."""
    from peftscope.cli_forecast import card_of, show_forecast

    card = card_of(experiment, gpu)
    if card is not None:
        show_forecast(experiment, card, brief=brief)
        return
    from peftscope.estimate import estimate_seconds, spoken
    from peftscope.models.catalog import find_model
    from peftscope.plan import plan_experiment

    plan = plan_experiment(experiment)
    table = Table("run", "method", "trained parameters", "precision", "learning rate", "steps", "estimate", box=None)
    total, finished = 0.0, 0
    for identity, spec in plan.sweep.runs.items():
        done = Path(f"results/{experiment}/runs/{identity}/record.json").is_file()
        seconds = 0.0 if done else estimate_seconds(spec)
        total, finished = total + seconds, finished + done
        shape = find_model(spec.model).shape
        parameters = f"{spec.method.trainable_parameters(shape):,}" if shape else "?"
        when = "done" if done else spoken(seconds)
        rate = f"{spec.learning_rate:g}" if spec.method.trains else "-"
        table.add_row(identity, spec.method.label, parameters, spec.precision, rate, str(spec.steps), when)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not brief:
        console.print(table)
    console.print(
        f"{experiment}: {len(plan.run_ids)} runs, {finished} done, about {spoken(total)} to go "
        f"on one {next(iter(plan.sweep.runs.values())).device} worker"
    )


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    output: Annotated[Path | None, typer.Option(help="Where the merged model goes; default RUN/merged.")] = None,
) -> None:
    """Fold a run's adapter into its base: a plain model, without PEFT."""
    from peftscope.training.merge import find_run, merge_run

    folder = find_run(run)
    target = output or folder / "merged"
    merge_run(folder, target)
    print(target)


@app.command()
def report(experiment: cli_rules.ExperimentName) -> None:
    """Make the tables, figures and report from the records that are there, finished sweep or not."""
    from peftscope.collect import collect_experiment
    from peftscope.plan import plan_experiment
    from peftscope.report.benchmarks import write_benchmarks
    from peftscope.report.page import write_report
    from peftscope.report.plots import write_figures, write_ladder
    from peftscope.report.study import write_study
    from peftscope.report.tables import write_tables

    plan = plan_experiment(experiment)
    collect_experiment(plan.sweep)
    write_tables(experiment)
    write_benchmarks(experiment)
    write_figures(experiment)
    for field in plan.ladders:
        write_ladder(experiment, field)
    if plan.is_study:
        with suppress(InputError):  # not finished: the report says so
            write_study(experiment)
    print(write_report(experiment, plan.ladders))


@app.command()
def doctor() -> None:
    """Say what this machine can do, and what to do about what is missing."""
    from peftscope.doctor import examine

    table = Table("what", "", "found", "remedy", box=None)
    for finding in examine():
        table.add_row(finding.what, "[green]ok[/]" if finding.fine else "[yellow]--[/]", finding.found, finding.remedy)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="A name in models.yaml, or a hub id.")],
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
) -> None:
    """Fetch a base model, with its checksums and licence."""
    from peftscope.models.fetch import fetch_model

    print(fetch_model(model, revision))


@app.command("make-task")
def make_task_command(task: Annotated[str, typer.Argument(help="A name in tasks.yaml.")]) -> None:
    """Make a task's train, validation and test items."""
    from peftscope.data.tasks import make_task

    print(make_task(task))


@app.command("make-benchmark")
def make_benchmark_command(
    name: Annotated[str, typer.Argument(help="Of lm-eval: gsm8k, hellaswag, ...")],
) -> None:
    """Fetch the rows of one of lm-eval's own benchmarks."""
    from peftscope.data.benchmarks import make_benchmark

    print(make_benchmark(name))

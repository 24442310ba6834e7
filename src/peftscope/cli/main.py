"""The ``peftscope`` command. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from copy import copy
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftscope import __version__
from peftscope.cli import advise, claims, compare, memory, new_study, rules, verify, why
from peftscope.cli.console import EXPERIMENT, wide_console
from peftscope.errors import InputError, Problem, needs, printable, raise_any
from peftscope.execution.libraries import offline, quiet_libraries
from peftscope.files.hub import without_hub_kernels
from peftscope.layout import how_to_run, record_path, run_folder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure what LoRA and its relatives do to memory, speed and quality.",
)
for group in (memory, why, claims, compare, advise, rules, verify, new_study):
    app.add_typer(group.app)
errors = Console(stderr=True, highlight=False)


NO_BARS = ("memory", "fit", "models", "why", "oom", "claims", "expand", "records")
"""The commands that answer at once, and draw no bars until they say so."""

Spec = Annotated[str, typer.Argument(help="A YAML or JSON file with the fields of a run, or the JSON itself.")]


def main() -> None:
    """Runs the command line; what is wrong with the input or the disk becomes a message and exit code 2."""
    try:
        with without_hub_kernels(), needs("all"):
            _asked()()
    except InputError as error:
        if len(error.problems) > 1:
            errors.print(f"[bold red]{len(error.problems)} problems[/]")
        for problem in error.problems:
            errors.print(str(problem), markup=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        from peftscope.files.storage import STORAGE_CODE, storage_problem

        if not (said := storage_problem(error)):
            raise
        with suppress(OSError):  # it may be the log that cannot be written
            errors.print(said, markup=False, soft_wrap=True)
        os._exit(STORAGE_CODE)


def _asked() -> typer.Typer:
    """Returns the app, with the command alone that comes first, because the options of all take a tenth of a start."""
    parts: list[Any] = [app, *(group.typer_instance for group in app.registered_groups)]
    every = [one for part in parts for one in part.registered_commands]
    chosen = [one for one in every if (one.name or one.callback.__name__) in sys.argv[1:2]]
    asked = copy(app)
    asked.registered_commands, asked.registered_groups = chosen or every, []
    return asked


def _print_version(asked: bool) -> None:
    if asked:
        print(f"peftscope {__version__}")
        raise typer.Exit


@app.callback()
def listen(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Hides what libraries say, but for a run that nobody watches: there it is part of the run's log."""
    if context.invoked_subcommand != "run" or sys.stderr.isatty():
        context.with_resource(quiet_libraries(bars=context.invoked_subcommand not in NO_BARS))


@app.command(rich_help_panel=EXPERIMENT)
@needs("train")
def run(
    spec: Spec,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default results/runs/RUN_ID.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")] = 0,
    timed_threads: Annotated[int, typer.Option(help="Threads of the timed phases, while others wait.")] = 0,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="Seconds between two checkpoints.")] = 300,
    attempts_left: Annotated[int, typer.Option(help="How often the caller tries again, with more memory.")] = 0,
    keep_weights: Annotated[str, typer.Option(help="Trained weights that stay: all, adapters, or none.")] = "adapters",
    keep_at: Annotated[str, typer.Option(help="Shares of the training after which to keep them, as in 0.5,1.")] = "",
    shared: Annotated[bool, typer.Option(help="Other runs share the machine: speed is not measured.")] = False,
) -> None:
    """Train and measure one run; writes its record whatever happens."""
    from peftscope.execution.job import Job
    from peftscope.hardware.device import detect_device
    from peftscope.planning.checks import check_run
    from peftscope.planning.resolve import spec_from
    from peftscope.record import KeepWeights
    from peftscope.spec import run_id

    values, path = _read_spec(spec)
    resolved = spec_from(values, path, detect_device())
    check_run(resolved, str(path), fetched=True)
    folder = output or run_folder(run_id(resolved))
    kept = next((choice for choice in get_args(KeepWeights) if choice == keep_weights), None)
    if kept is None:
        raise InputError(Problem("--keep-weights", f"unknown (got {keep_weights!r})", "use all, adapters or none"))
    shares = _read_shares(keep_at)
    if shares and resolved.shards > 1:
        raise InputError(Problem("--keep-at", f"does not work with shards={resolved.shards}", "leave it out"))
    Job(resolved, folder, threads, checkpoint_seconds, attempts_left, kept, not shared, shares, timed_threads).start()


def _read_shares(text: str) -> list[float]:
    shares = []
    for part in filter(None, text.split(",")):
        try:
            shares.append(float(part))
        except ValueError:
            shares.append(math.nan)
        if not 0 < shares[-1] <= 1:
            raise InputError(Problem("--keep-at", f"not a share of the training (got {part!r})", "as in 0.25,0.5,1"))
    return shares


def _read_spec(text: str) -> tuple[dict[str, Any], Path]:
    from peftscope.files.content import parse_json, read_yaml

    if text.lstrip().startswith("{"):
        return parse_json(text, "spec"), Path("spec")
    return read_yaml(Path(text)), Path(text)


@app.command("expand", rich_help_panel=EXPERIMENT)
@needs("train")
def expand_experiment(
    experiment: rules.ExperimentName,
    brief: Annotated[bool, typer.Option("--brief", help="By method.")] = False,
    gpu: Annotated[str | None, typer.Option(help="On this card: rtx4090, a100, ..., or its memory: 24GB.")] = None,
) -> None:
    """Show an experiment's runs, with an estimate of the time and the memory that they will take."""
    from peftscope.cli.forecast import card_of, show_forecast

    show_forecast(experiment, card_of(experiment, gpu), brief=brief)


@app.command(rich_help_panel=EXPERIMENT)
@needs("train")
def sweep(
    experiment: rules.ExperimentName,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after so long; the same command goes on.")] = None,
) -> None:
    """Run what is left of an experiment, one run after the other: no Snakemake, and lm-eval only for runs that ask."""
    from peftscope.analysis.tuning import choose_next
    from peftscope.execution.job import card_problems
    from peftscope.execution.sweep import run_sweep
    from peftscope.hardware.device import detect_device

    if detect_device() == "cuda":
        # In a process of its own: this one stays for hours, and keeps nothing on the card.
        with ProcessPoolExecutor(1, get_context("fork")) as apart:
            raise_any(apart.submit(card_problems, 1).result())
    outcome = run_sweep(experiment, choose_next, minutes)
    if outcome.left:
        print(f"{outcome.left} runs left: repeat the command to go on")
    if outcome.failed:
        print(f"{len(outcome.failed)} failed, see train.log in {', '.join(str(run_folder(r)) for r in outcome.failed)}")
        sys.exit(1)


@app.command(rich_help_panel=EXPERIMENT)
@needs("train")
def merge(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    output: Annotated[Path | None, typer.Option(help="Where the merged model goes; default RUN/merged.")] = None,
) -> None:
    """Fold a run's adapter into its base: a plain model, without PEFT."""
    from peftscope.execution.merge import find_run, merge_run

    folder = find_run(run)
    target = output or folder / "merged"
    with offline():
        merge_run(folder, target)
    print(target)


@app.command(rich_help_panel=EXPERIMENT)
@needs("report")
def report(experiment: rules.ExperimentName) -> None:
    """Make the tables, figures and report from the records that are there, finished sweep or not."""
    from peftscope.analysis.collect import collect_experiment
    from peftscope.planning.plan import plan_experiment
    from peftscope.report.page import write_all

    plan = plan_experiment(experiment)
    if plan.sweep.runs and not any(record_path(run).is_file() for run in plan.sweep.runs):
        remedy = f"{how_to_run(experiment)} runs them, or peftscope restore {experiment} brings published ones"
        raise InputError(Problem(experiment, "none of its runs has ended", remedy))
    collect_experiment(plan.sweep)
    _measure(plan.measured_runs)
    print(write_all(plan))


def _measure(runs: list[str]) -> None:
    """Measures the finished ones of runs that keep weights, as far as they were not yet.

    Restored runs have no weights: what was measured on them came along, or is lost.
    """
    from peftscope.record import is_restored, measured_path

    finished = [run_folder(run) for run in runs if record_path(run).is_file()]
    to_measure = [folder for folder in finished if not (measured_path(folder).is_file() or is_restored(folder))]
    if to_measure:
        from peftscope.execution.weights import measure_weights

        with offline():
            for folder in to_measure:
                measure_weights(folder)


@app.command(rich_help_panel=EXPERIMENT)
@needs("train")
def doctor() -> None:
    """Say what this machine can do, and what to do about what is missing."""
    from peftscope.cli.doctor import examine

    table = Table("what", "", "found", "remedy", box=None)
    with errors.status("looking at this machine, and measuring how fast it multiplies"):
        findings = examine()
    for finding in findings:
        table.add_row(finding.what, "[green]ok[/]" if finding.fine else "[yellow]--[/]", finding.found, finding.remedy)
    wide_console().print(table)


def _print_made(what: str, make: Callable[[], Path]) -> None:
    """Prints the folder that is made; meanwhile a terminal says what is done."""
    with errors.status(escape(printable(what))):
        folder = make()
    print(folder)


@app.command(rich_help_panel=EXPERIMENT)
@needs("train")
def fetch(
    model: Annotated[str, typer.Argument(help="A name in models.yaml, or a hub id.")],
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
) -> None:
    """Fetch a base model, with its checksums and licence."""
    from peftscope.models.fetch import fetch_model

    _print_made(f"fetching {model}", lambda: fetch_model(model, revision))


@app.command("make-task", rich_help_panel=EXPERIMENT)
@needs("train")
def make_task_command(task: Annotated[str, typer.Argument(help="A name in tasks.yaml.")]) -> None:
    """Make a task's train, validation and test items."""
    from peftscope.data.tasks import make_task

    _print_made(f"making {task}", lambda: make_task(task))


@app.command("make-benchmark", rich_help_panel=EXPERIMENT)
@needs("train")
def make_benchmark_command(name: Annotated[str, typer.Argument(help="Of lm-eval: gsm8k, hellaswag, ...")]) -> None:
    """Fetch the rows of one of lm-eval's own benchmarks."""
    from peftscope.data.benchmarks import benchmark_resource

    _print_made(f"fetching {name}", benchmark_resource(name).fetch)

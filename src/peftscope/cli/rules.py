"""The commands that the Snakefile's rules run, hidden because they make sense in that order only, and their like."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from peftscope.cli.console import PUBLISHED
from peftscope.errors import InputError, Problem, needs
from peftscope.execution.libraries import offline
from peftscope.layout import EXPERIMENTS, MEMORY_FOLDER, STUDIES, run_folder

app = typer.Typer()


def experiment_name(text: str) -> str:
    """Returns an experiment's name, for the name itself or the path of its file in experiments/."""
    path = Path(text)
    is_here = path.parent.resolve() in (EXPERIMENTS.resolve(), STUDIES.resolve())
    return path.stem if path.suffix == ".yaml" and is_here else text


ExperimentName = Annotated[str, typer.Argument(help="A file in experiments/.", callback=experiment_name)]


@app.command(hidden=True)
@needs("report")
def collect(experiment: ExperimentName) -> None:
    """Write runs.csv and losses.csv from the records."""
    from peftscope.analysis.collect import collect_experiment
    from peftscope.planning.plan import plan_experiment

    collect_experiment(plan_experiment(experiment).sweep)


@app.command(hidden=True)
@needs("report")
def tune(
    experiment: ExperimentName,
    number: Annotated[int, typer.Argument(metavar="ROUND", help="0: three around the best listed one.", min=0)] = 0,
) -> None:
    """Choose the learning rates at which a study's arms run, or the best of them, from the records of its runs."""
    from peftscope.analysis.tuning import choose_rates
    from peftscope.planning.plan import plan_experiment

    print(choose_rates(plan_experiment(experiment).sweep, number))


@app.command(hidden=True)
@needs("train")
def measure(run: Annotated[str, typer.Argument(help="The run's id.")]) -> None:
    """Measure the weights that a run keeps along its training."""
    from peftscope.execution.weights import measure_weights

    with offline():
        measure_weights(run_folder(run))


@app.command(hidden=True)
@needs("report")
def page(experiment: ExperimentName) -> None:
    """Write tables, figures and report.html from what was collected."""
    from peftscope.planning.plan import plan_experiment
    from peftscope.report.page import write_all

    print(write_all(plan_experiment(experiment)))


@app.command(hidden=True)
@needs("report")
def check(experiment: ExperimentName) -> None:
    """Fail if a run failed: the last rule, after the report."""
    from peftscope.analysis.collect import failures, read_runs

    runs = read_runs(experiment)
    failed = runs[runs["status"].isin(["failed", "interrupted", "missing"])]
    if len(failed):
        raise failures(failed)


@app.command("publish", hidden=True)
@needs("report")
def publish_command(
    name: Annotated[str, typer.Argument(help="An experiment, claims, or memory.")],
) -> None:
    """Copy the small files of what has run to results/published and reports/published."""
    from peftscope.report.publish import publish

    for path in publish(name):
        print(path)


@app.command("restore", rich_help_panel=PUBLISHED)
@needs("report")
def restore_command(experiment: ExperimentName) -> None:
    """Copy an experiment's published runs into the store, where they count as done; they have no weights."""
    from peftscope.report.publish import restore

    print(f"{restore(experiment)} published runs are in the store")


@app.command("records", rich_help_panel=PUBLISHED)
@needs("report")
def records_command(experiment: ExperimentName) -> None:
    """Print an experiment's published records, one JSON object a line."""
    from peftscope.planning.experiment import experiment_path
    from peftscope.planning.published import published_records

    experiment_path(experiment)
    for text in published_records(experiment).values():
        print(json.dumps(json.loads(text), ensure_ascii=False, sort_keys=True))


@app.command("table", rich_help_panel=PUBLISHED)
@needs("report")
def table_command(
    study: ExperimentName,
    latex: Annotated[bool, typer.Option("--latex", help="For a paper; needs the package booktabs.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="For a page; the default.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="For a program: all digits, no caption.")] = False,
) -> None:
    """Print a study's comparisons as a table, with a caption; below your own study, the published arms of its world."""
    from peftscope.report.export import exported

    forms = [name for name, asked in (("latex", latex), ("markdown", markdown), ("csv", csv)) if asked]
    if len(forms) > 1:
        raise InputError(Problem(f"--{forms[0]}", f"does not go with --{forms[1]}", "leave one of them out"))
    print(exported(study, *forms or ["markdown"]).rstrip())


@app.command(hidden=True)
@needs("workflow")
def unlock() -> None:
    """Remove the lock that a killed Snakemake left in this folder; none that is held."""
    import psutil

    def is_here(process: psutil.Process) -> bool:
        try:
            return any("snakemake" in part for part in process.cmdline()[:4]) and process.cwd() == str(Path.cwd())
        except psutil.Error:
            return False

    locks = list(Path(".snakemake/locks").glob("*.lock"))
    if locks and not any(map(is_here, psutil.process_iter())):
        for lock in locks:
            lock.unlink()
        print("the lock of a Snakemake that was killed: removed", file=sys.stderr)


@app.command(hidden=True)
def schema() -> None:
    """Print the JSON schema of a run's spec."""
    from peftscope.spec import RunSpec

    print(json.dumps(RunSpec.model_json_schema(), indent=2, ensure_ascii=False))


@app.command("memory-curve", hidden=True)
@needs("report")
def memory_curve(method: str, axis: str) -> None:
    """Print a method's memory along one axis of the grid, as CSV."""
    from peftscope.sizing.grid import curve

    curve(method, axis).to_csv(sys.stdout, index=False)


@app.command("memory-figures", hidden=True)
@needs("report")
def memory_figures(curves: list[Path]) -> None:
    """Draw the grid's curves, and the bars of large models."""
    from peftscope.report.memory import draw_bars, draw_grid
    from peftscope.sizing.grid import bars

    draw_grid(curves, MEMORY_FOLDER / "grid.svg")
    draw_bars(bars(), MEMORY_FOLDER / "bars.svg")

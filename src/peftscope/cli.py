"""The ``peftscope`` command. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from peftscope.errors import InputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from peftscope.memory.answer import Answer
    from peftscope.memory.question import Question
    from peftscope.record import RunRecord
    from peftscope.spec import RunSpec

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure what LoRA and its relatives do to memory, speed and quality.",
)
errors = Console(stderr=True, highlight=False)

T = TypeVar("T")

MemoryModel = Annotated[
    str, typer.Argument(help="A preset (llama-2-7b, qwen2.5-0.5b, ...), a config.json, or a hub id.")
]
Rank = Annotated[int | None, typer.Option(help="Of the adapter.")]
Targets = Annotated[str | None, typer.Option(help="minimal, attention, mlp, all-linear, or modules with commas.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences a forward pass; default 1.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens of the longest batch's sequences; default 512.")]
Precision = Annotated[str | None, typer.Option(help="bf16 (default), fp32, or amp: fp32 weights under autocast.")]
Optimizer = Annotated[str | None, typer.Option(help="adamw (default), sgd, adamw_8bit, paged_adamw, paged_adamw_8bit.")]
LossPath = Annotated[str | None, typer.Option(help="hf (default): logits everywhere; response_only.")]
Attention = Annotated[str | None, typer.Option(help="sdpa (default), eager, flash_attention_2.")]
Checkpointing = Annotated[
    bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations.")
]
Packing = Annotated[bool | None, typer.Option("--packed/--padded", help="Several examples a sequence, or one.")]
Gpus = Annotated[int, typer.Option(help="Shard weights, gradients and states over so many cards.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs; the keys are stable.")]
Spec = Annotated[str, typer.Argument(help="A YAML or JSON file with the fields of a run, or the JSON itself.")]
ExperimentName = Annotated[str, typer.Argument(help="The name of a file in experiments/, without .yaml.")]


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
) -> None:
    """Train and measure one run; writes its record whatever happens."""
    from peftscope.device import detect_device
    from peftscope.plan import check_disk, check_fetched, check_runs
    from peftscope.process import Interrupted, raise_on_signals, seconds_since_process_start, survive_child
    from peftscope.record import RunRecord, Status, write_json, write_record
    from peftscope.spec import run_id
    from peftscope.sweep import spec_from

    began = time.perf_counter() - seconds_since_process_start()
    values, path = _read_spec(spec)
    resolved = spec_from(values, path, detect_device())
    runs = {run_id(resolved): resolved}
    problems = check_runs(runs, str(path)) + check_disk(runs) + check_fetched(resolved)
    if problems:
        raise InputError(problems)
    folder = output or Path("results/single/runs") / run_id(resolved)
    write_json(folder / "spec.json", resolved.model_dump(mode="json"))

    def end_early(status: Status, reason: str, name: str) -> None:
        record = RunRecord(run_id=run_id(resolved), status=status, reason=reason, spec=resolved)
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
        record = _execute(resolved, folder, began, threads)
    except Interrupted as error:
        if not (folder / "interrupted.json").is_file():
            end_early("interrupted", str(error), "interrupted.json")
        sys.exit(130)
    errors.print(f"{record.run_id}: {record.status}{f', {record.reason}' if record.reason else ''}", soft_wrap=True)
    # Everything is written. Tearing down torch and its threads would add half a second that no phase accounts for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _execute(spec: RunSpec, folder: Path, began: float, threads: int) -> RunRecord:
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
    return execute(spec, folder, phases)


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
    experiment: ExperimentName,
    brief: Annotated[bool, typer.Option("--brief", help="Only the totals.")] = False,
) -> None:
    """Show an experiment's runs, with an estimate of the time they will take."""
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
def report(experiment: ExperimentName) -> None:
    """Make the tables, figures and report from the records that are there, finished sweep or not."""
    from peftscope.collect import collect_experiment
    from peftscope.plan import plan_experiment
    from peftscope.report.page import write_report
    from peftscope.report.plots import write_figures, write_ladder
    from peftscope.report.tables import write_tables

    plan = plan_experiment(experiment)
    collect_experiment(plan.sweep)
    write_tables(experiment)
    write_figures(experiment)
    for field in plan.ladders:
        write_ladder(experiment, field)
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


@app.command("memory")
def memory_command(
    context: typer.Context,
    model: MemoryModel,
    method: Annotated[str, typer.Option(help="full, lora, qlora, dora, adalora, loftq, ...")] = "lora",
    rank: Rank = None,
    alpha: Annotated[float | None, typer.Option(help="Changes nothing in memory.")] = None,
    init_r: Annotated[int | None, typer.Option(help="AdaLoRA's initial rank.")] = None,
    target_r: Annotated[int | None, typer.Option(help="AdaLoRA's final mean rank.")] = None,
    targets: Targets = None,
    virtual_tokens: Annotated[int | None, typer.Option(help="Of prompt and prefix tuning.")] = None,
    dropout: Annotated[float | None, typer.Option(help="On the input of A.")] = None,
    adapter_dtype: Annotated[str | None, typer.Option(help="fp32 (PEFT's default) or base.")] = None,
    batch_size: BatchSize = None,
    seq_len: SequenceLength = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="Forward passes a step.")] = None,
    precision: Precision = None,
    optimizer: Optimizer = None,
    optimizer_implementation: Annotated[str | None, typer.Option(help="foreach, fused or single.")] = None,
    loss_path: LossPath = None,
    response_len: Annotated[
        int | None, typer.Option(help="Positions with a loss, for response_only; default half of --seq-len.")
    ] = None,
    attention: Attention = None,
    checkpointing: Checkpointing = None,
    packing: Packing = None,
    eval_batch_size: Annotated[int | None, typer.Option(help="Default --batch-size.")] = None,
    gpu: Annotated[str | None, typer.Option(help="For its CUDA context: rtx4090, a100, ..., or 24GiB.")] = None,
    gpus: Gpus = 1,
    simulate: Annotated[bool, typer.Option("--simulate", help="Run the step itself on tensors without data.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Every term with its formula and source.")] = False,
    depth: Annotated[int, typer.Option(help="Levels of the tree of modules.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Say what a training run takes on a card, without one: allocated, reserved and device memory."""
    from peftscope.memory.answer import answer_by_formula
    from peftscope.memory.hardware import find_gpu
    from peftscope.memory.question import ask, find_model

    question = ask(
        find_model(model),
        _run_options(context),
        responses=response_len,
        gpu=find_gpu(gpu) if gpu else None,
        gpus=gpus,
    )
    answer = _simulated(question) if simulate else answer_by_formula(question)
    if as_json:
        print(json.dumps(answer.to_json(), indent=2, ensure_ascii=False))
        return
    from peftscope.memory.show import show_answer

    show_answer(answer, _wide_console(), explain=explain, depth=depth)


@app.command()
def fit(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A preset, a config.json, or a hub id.")] = None,
    gpu: Annotated[str, typer.Option(help="rtx4090, a100, ..., or its memory, as in 24GiB.")] = ...,  # type: ignore[assignment]
    models: Annotated[str | None, typer.Option(help="Several models, separated by commas.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods, separated by commas.")] = None,
    rank: Rank = None,
    targets: Targets = None,
    batch_size: BatchSize = None,
    seq_len: SequenceLength = None,
    precision: Precision = None,
    optimizer: Optimizer = None,
    loss_path: LossPath = None,
    attention: Attention = None,
    checkpointing: Checkpointing = None,
    packing: Packing = None,
    gpus: Gpus = 1,
    as_json: AsJson = False,
) -> None:
    """Say which methods fit on a card, with what is left, the largest sizes, and what to do where nothing fits."""
    from peftscope.memory.fit import fit_methods, known_methods
    from peftscope.memory.hardware import find_gpu
    from peftscope.memory.question import find_model

    names = [name.strip() for name in (models or model or "").split(",") if name.strip()]
    if not names:
        raise InputError(Problem("model", "none given", "peftscope fit --gpu 24GiB llama-2-7b"))
    card, chosen = find_gpu(gpu), known_methods(methods)
    found = [find_model(name) for name in names]
    fits = []
    for one in _with_progress(
        fit_methods(found, chosen, _run_options(context), card, gpus), len(found) * len(chosen), "fitting"
    ):
        fits.append(one)
    if as_json:
        print(json.dumps([one.to_json() for one in fits], indent=2, ensure_ascii=False))
        return
    from peftscope.memory.show import show_fits

    show_fits(fits, card, _wide_console())


def _run_options(context: typer.Context) -> dict[str, Any]:
    """Returns the options of a command that are fields of a run or of its method."""
    from peftscope.memory.question import METHOD_OPTIONS
    from peftscope.spec import RunSpec

    known = {*METHOD_OPTIONS, *RunSpec.model_fields} - {"model"}
    options = {name: value for name, value in context.params.items() if name in known}
    targets = options.get("targets")
    if targets:
        names = [name.strip() for name in targets.split(",") if name.strip()]
        options["targets"] = names[0] if len(names) == 1 and "_" not in names[0] else names
    return options


def _simulated(question: Question) -> Answer:
    import logging
    import warnings

    # What libraries say about their own next versions is nothing to the person who asks.
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with Console(stderr=True).status("simulating two training steps, some seconds"):
        from peftscope.memory.simulate import answer_by_simulation

        return answer_by_simulation(question)


def _with_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    from rich.progress import track

    yield from track(items, description=what, total=total, console=Console(stderr=True), transient=True)


def _wide_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


@app.command(hidden=True)
def collect(experiment: ExperimentName) -> None:
    """Write runs.csv and losses.csv from the records."""
    from peftscope.collect import collect_experiment
    from peftscope.plan import plan_experiment

    collect_experiment(plan_experiment(experiment).sweep)


@app.command(hidden=True)
def tables(experiment: ExperimentName) -> None:
    """Write the tables from runs.csv."""
    from peftscope.report.tables import write_tables

    write_tables(experiment)


@app.command(hidden=True)
def figures(experiment: ExperimentName) -> None:
    """Draw the figures from runs.csv, the ladders apart."""
    from peftscope.report.plots import write_figures

    write_figures(experiment)


@app.command(hidden=True)
def ladder(experiment: ExperimentName, field: Annotated[str, typer.Argument(help="The field that varies.")]) -> None:
    """Draw one ladder from runs.csv."""
    from peftscope.report.plots import write_ladder

    write_ladder(experiment, field)


@app.command(hidden=True)
def page(experiment: ExperimentName) -> None:
    """Write report.html from tables and figures."""
    from peftscope.plan import plan_experiment
    from peftscope.report.page import write_report

    print(write_report(experiment, plan_experiment(experiment).ladders))


@app.command(hidden=True)
def check(experiment: ExperimentName) -> None:
    """Fail if a run failed: the last rule, after the report."""
    from peftscope.collect import read_runs

    runs = read_runs(experiment)
    failed = runs[runs["status"].isin(["failed", "interrupted", "missing"])]
    if len(failed):
        raise InputError(
            Problem(
                f"results/{experiment}/runs/{row.run_id}",
                f"{row.status}: {row.reason}",
                "see its train.log; remove its record.json to try again",
            )
            for row in failed.itertuples()
        )


@app.command(hidden=True)
def publish(experiment: ExperimentName) -> None:
    """Copy the small files of a finished experiment to results/published and reports/published."""
    from peftscope.report.publish import publish_experiment

    for path in publish_experiment(experiment):
        print(path)


@app.command(hidden=True)
def schema() -> None:
    """Print the JSON schema of a run's spec."""
    from peftscope.spec import spec_schema

    print(json.dumps(spec_schema(), indent=2, ensure_ascii=False))

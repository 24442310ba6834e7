"""Checks that need more than an experiment's file: models, tasks, starts, a compiler, what was fetched. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from peftscope.data.benchmarks import benchmark_resource, find_benchmark
from peftscope.data.sources import JsonlSource
from peftscope.data.tasks import find_task, source_change, task_folder, task_resource
from peftscope.errors import InputError, Problem, close_match, raise_any, shown
from peftscope.files.manifest import how_to_change, is_source_of, read_manifest
from peftscope.files.resource import Resource
from peftscope.hardware.device import find_compiler
from peftscope.layout import MODELS_FILE, TASKS_FILE, run_folder
from peftscope.models.catalog import find_model, model_folder
from peftscope.models.fetch import model_resource
from peftscope.planning.disk import check_disk
from peftscope.record import finished_record, is_restored, read_record
from peftscope.spec import RunSpec, run_id


def check_runs(runs: dict[str, RunSpec], where: str) -> list[Problem]:
    """Returns what is wrong between runs and the models and tasks that they name."""
    problems = []
    for spec in runs.values():
        try:
            task = find_task(spec.task, f"{where}: task")
            source = task.source
            if isinstance(source, JsonlSource) and not source.is_there():
                problems.append(Problem(f"{TASKS_FILE}: {spec.task}.source.path", f"no such file: {source.path}"))
            if task.judged_on == "train" and not (spec.train_items or math.inf) <= spec.heldout_items:
                message = f"{spec.task} is judged on all items that a run trains on"
                problems.append(Problem(f"{where}: train_items", message, "give a number, at most heldout_items"))
            shape = find_model(spec.model, f"{where}: model").shape
            for name in spec.benchmarks:
                if not benchmark_resource(name).is_there():
                    find_benchmark(name, f"{where}: benchmarks")
        except InputError as error:
            problems += error.problems
            continue
        known = [layer.name for layer in shape.block] if shape else []
        for module in spec.method.modules_named() if shape else []:
            if shape and not shape.linear_layers([module]):
                message = f"{spec.model} has no module of that name (got {shown(module)})"
                problems.append(Problem(f"{where}: targets", message, close_match(module, known)))
    return list(dict.fromkeys(problems))


def check_starts(runs: Mapping[str, RunSpec], where: str, planned: bool = True) -> list[Problem]:
    """Returns what is wrong with the runs that some of ``runs`` start from.

    Args:
        runs: The specs by run id.
        where: Where the runs come from, for messages.
        planned: Whether these are an experiment's runs. Then one that another starts from may still have to be made.
            One that has ended needs its start's weights no more.
    """
    problems: list[Problem] = []
    for identity, spec in runs.items():
        if spec.start_from is None:
            continue
        has_ended = planned and finished_record(run_folder(identity), identity) is not None
        start = runs.get(spec.start_from) if planned else None
        folder = run_folder(spec.start_from)
        at = f"{where}: start_from"
        if (folder / "record.json").is_file():
            try:
                record = read_record(folder / "record.json")
            except InputError as error:
                problems += error.problems
                continue
            start = record.spec
            lost = is_restored(folder) or record.weights == "dropped" or not (folder / "adapter").is_dir()
            if record.status != "ok":
                problems.append(Problem(at, f"{spec.start_from} has the status {record.status}", "choose another run"))
            elif not has_ended and lost:
                remedy = f"remove {folder}; the run is then made again, and keeps its weights"
                problems.append(Problem(at, f"{spec.start_from} is there without its trained weights", remedy))
        if start is None:
            problems.append(Problem(at, f"there is no run {spec.start_from} in {folder.parent}", "make that run first"))
        else:
            problems += [Problem(at, message) for message in _misfits(spec, start)]
    return list(dict.fromkeys(problems))


def _misfits(spec: RunSpec, start: RunSpec) -> list[str]:
    """Returns why a run cannot start from another one."""
    if (spec.model, spec.revision) != (start.model, start.revision):
        return [f"{spec.start_from} has another base model, {start.model}"]
    if start.method.trains_base:
        problem = f"trained {start.method.label}, which has no adapter to train on; use start_as=merged"
        return [f"{spec.start_from} {problem}"] if spec.start_as == "adapter" else []
    if not start.method.continues or start.start_as == "merged":
        return [f"{spec.start_from} trained {start.method.label}, whose adapter does not fit the base alone"]
    if spec.start_as == "adapter" and spec.method != start.method:
        return [f"{spec.start_from} trained {start.method.label} with other settings; start_as=merged takes any"]
    return []


def check_run(spec: RunSpec, where: str, *, fetched: bool = False) -> None:
    """Raises InputError with what is wrong with a single run here; ``fetched`` asks that what it needs is there."""
    runs = {run_id(spec): spec}
    problems = check_runs(runs, where) + check_starts(runs, where, planned=False)
    if not problems:
        problems = check_disk(runs) + (check_fetched(spec) if fetched else [])
        problems += check_compiler(runs) + check_unchanged(runs)
    raise_any(problems)


def check_compiler(runs: dict[str, RunSpec]) -> list[Problem]:
    """Returns a problem if runs are to be compiled, and this machine has no compiler."""
    devices = {spec.device for spec in runs.values() if spec.compile}
    named = {"cpu": "CXX", "cuda": "CC"}
    return [
        Problem("compile", f"torch.compile finds no compiler for {name}", f"install gcc, or name one in {named[name]}")
        for name in devices
        if find_compiler(name) is None
    ]


def inputs(spec: RunSpec) -> list[Resource]:
    """Returns the folders that a run reads: its base model, its task, its benchmarks."""
    benchmarks = [benchmark_resource(name) for name in spec.benchmarks]
    return [model_resource(spec.model, spec.revision), task_resource(spec.task), *benchmarks]


def check_fetched(spec: RunSpec) -> list[Problem]:
    """Returns what a run needs and was not fetched or made."""
    needed = [("model", spec.model, "fetch"), ("task", spec.task, "make-task")]
    needed += [("benchmarks", name, "make-benchmark") for name in spec.benchmarks]
    return [
        Problem(field, f"{name} is not in {resource.folder}", f"run `peftscope {command} {name}`")
        for (field, name, command), resource in zip(needed, inputs(spec), strict=True)
        if not resource.is_there()
    ]


def check_unchanged(runs: dict[str, RunSpec]) -> list[Problem]:
    """Returns a problem for each model and task whose entry was changed after it was fetched or made.

    Runs carry the name only, so old and new ones would mix.
    """
    problems = []
    for name, folder in {spec.model: model_folder(spec.model) for spec in runs.values()}.items():
        manifest = read_manifest(folder)  # a damaged one is put right by the run that meets it
        if manifest and not is_source_of(manifest, find_model(name).source):
            where = f"{MODELS_FILE}: {name}.source"
            problems.append(Problem(where, "changed since it was fetched", how_to_change(folder)))
    tasks = {spec.task: source_change(spec.task) for spec in runs.values()}
    return problems + [problem for problem in tasks.values() if problem]


def too_few_items(runs: dict[str, RunSpec]) -> list[str]:
    """Returns a sentence for each split of a task that was made and has fewer items than runs ask for."""
    asked: dict[tuple[str, str], tuple[int, str]] = {}
    for spec in runs.values():
        for split, field in (("validation", "validation_items"), ("test", "heldout_items")):
            if split != "test" or find_task(spec.task).judged_on == "test":
                most = asked.get((spec.task, split), (0, field))
                asked[spec.task, split] = max(most, (getattr(spec, field), field))
    sentences = []
    for (task, split), (count, field) in asked.items():
        has = (read_manifest(task_folder(task)) or {}).get("items", {}).get(split, count)
        if has < count:
            there = f"{has:,} {split} items ({field}: {count:,})"
            sentences.append(f"The task {task} has {there}: the runs use all of them.")
    return sentences

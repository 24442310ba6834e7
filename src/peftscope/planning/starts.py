"""The runs that other runs start from: whether they fit, and whether they have their weights. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from peftscope.errors import InputError, Problem
from peftscope.layout import run_folder
from peftscope.record import finished_record, is_restored, read_record
from peftscope.spec import RunSpec


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

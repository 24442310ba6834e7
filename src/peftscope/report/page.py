"""Renders the report, one self-contained HTML file for a reader who has never seen the project."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from peftscope.analysis.collect import read_runs
from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import StudyResults
from peftscope.analysis.weights import collect_weights, weights_path
from peftscope.errors import InputError
from peftscope.hardware.cards import without_bf16
from peftscope.layout import MEMORY_FOLDER, record_path, report_path, results_folder, run_folder
from peftscope.planning.experiment import Study, experiment_path, read_experiment
from peftscope.planning.plan import Plan
from peftscope.record import measured_path
from peftscope.report.capacity import SENTENCE as CAPACITY
from peftscope.report.capacity import capacity_answer
from peftscope.report.card import card_runs, card_summary, readable_card
from peftscope.report.memory import CARDS
from peftscope.report.parts import PARTS
from peftscope.report.plots import draw_figure
from peftscope.report.rendering import asset, write_page
from peftscope.report.sentences import FIGURES, NOTHING, sentence
from peftscope.report.serving import latencies, limited_runs
from peftscope.report.study import study_facts, study_sentences
from peftscope.report.svg import in_page
from peftscope.report.tables import FEWEST_FOR_MEANS, best_settings, html, ladders, method_summary, notable_runs
from peftscope.report.weights import cuts_table, updates_table
from peftscope.sizing.grid import CENTRE, MODEL
from peftscope.words import listed, spoken_bytes, spoken_time

ANSWERS: dict[str, Callable[[str], str]] = {part.answer: part.sentence for part in PARTS if part.answer}
"""The figures that carry the answer of some studies, each with what says in words what it shows."""


def write_all(plan: Plan) -> Path:
    """Writes the tables, the figures and the page of an experiment from what was collected and measured of its runs.

    Returns:
        The path of the page. A study of which nothing can be compared yet has no part of a study there.
    """
    ended = [run for run in plan.measured_runs if record_path(run).is_file()]
    if measured := [run for run in ended if measured_path(run_folder(run)).is_file()]:
        collect_weights(plan.name, measured)
    finished = not (plan.is_study and _unfinished(StudyResults(plan.name)))
    for part in PARTS:
        if part.belongs(plan) and (finished or not part.of_study):
            if part.answer:
                path = results_folder(plan.name) / "figures" / f"{part.answer}.svg"
                draw_figure(path, partial(part.write, experiment=plan.name))
            else:
                part.write(plan.name)
    return write_report(plan.name)


def _unfinished(study: StudyResults) -> str:
    """Returns what a study lacks; empty if it is finished."""
    try:
        study.require_finished()
    except InputError as error:
        return str(error)
    return ""


def write_report(experiment: str) -> Path:
    """Renders an experiment's report from its tables and figures, and returns its path."""
    runs = read_runs(experiment)
    losses = pd.read_csv(results_folder(experiment) / "losses.csv")
    folder = results_folder(experiment)
    names = [*FIGURES, *(f"ladder-{field}" for field in sorted(ladders(runs)))]
    said = {name: sentence(name, runs, losses) for name in names}
    figures = [_figure(folder / "figures", name, text) for name, text in said.items() if text != NOTHING]
    settings = read_experiment(experiment_path(experiment))
    study = _study_pages(experiment, settings.study) if settings.study else None
    is_finished = study is not None and not study["unfinished"]
    answers = [
        _figure(folder / "figures", name, ANSWERS[name](experiment))
        for name in (ANSWERS if is_finished else ["updates"])
        if (folder / "figures" / f"{name}.svg").is_file()
    ]
    if not is_finished:
        figures, answers = figures + answers, []
    memory = runs["host_memory_bytes"].dropna()
    tables = {path.stem: path.read_text() for path in (folder / "tables").glob("*.html")}
    card = card_runs(runs)
    beside = {"limits": limited_runs(runs), "latency": latencies(runs), "card": readable_card(card)}
    if weights_path(folder).is_file():
        beside |= {"measured": updates_table(experiment), "cuts": cuts_table(experiment)}
    return write_page(
        report_path(experiment),
        "report.html.j2",
        experiment=experiment,
        confidence=f"{100 * CONFIDENCE:g}",
        title=settings.title or experiment,
        description=settings.description,
        style=asset("report.css"),
        script=asset("report.js"),
        figures=figures,
        answers=answers,
        agreed=card_summary(card),
        tables=tables | {name: html(table, name) for name, table in beside.items()},
        left_out=_left_out(runs),
        fewest=FEWEST_FOR_MEANS,
        study=study,
        capacity=_capacity_pages(folder, experiment),
        memory=_memory_pages(),
        endings=", ".join(f"{count} {status}" for status, count in runs["status"].value_counts().items()),
        values=partial(_values, runs),
        host_memory=spoken_bytes(memory.iloc[0], 0) if len(memory) else "-",
        work=spoken_time(float(runs["wall_seconds"].sum())),
        warnings=_warnings(runs),
        materials=_materials(runs),
    )


def _left_out(runs: pd.DataFrame) -> dict[str, tuple[int, int] | None]:
    """Returns for each table how many of its rows the page shows, and how many there are; None if it shows all."""
    methods = method_summary(runs)
    tables = {"methods": (best_settings(methods), methods), "runs": (notable_runs(runs), runs)}
    return {name: (len(s), len(all_)) if len(s) < len(all_) else None for name, (s, all_) in tables.items()}


def _study_pages(experiment: str, settings: Study) -> dict[str, Any]:
    """Returns the content of a study's section. If nothing can be compared yet, that is only the reason."""
    folder, study = results_folder(experiment), StudyResults(experiment)
    if unfinished := _unfinished(study):
        return {"unfinished": unfinished}
    facts = study_facts(study, settings)
    figures = {name: _figure(folder / "figures", name, text) for name, text in study_sentences(facts).items()}
    return {"unfinished": "", **facts, **figures}


def _capacity_pages(folder: Path, experiment: str) -> dict[str, Any] | None:
    """Returns the content of the section on what is stored of random strings, or None for other tasks."""
    if not (folder / "figures" / "capacity.svg").is_file():
        return None
    return {"answer": capacity_answer(experiment), **_figure(folder / "figures", "capacity", CAPACITY)}


def _memory_pages() -> dict[str, Any] | None:
    """Returns the content of the memory section, which needs no run, or None before the workflow has made it."""
    if not all((MEMORY_FOLDER / name).is_file() for name in ("bars.svg", "grid.svg")):
        return None
    centre = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in CENTRE.items())
    said = {
        "bars": f"What is alive at the peak of a training step around {centre}, in closed form, with recomputed "
        "activations. Full fine-tuning is in half precision throughout. A longer bar ends with its size.",
        "grid": f"The memory that a card needs for {MODEL} around {centre}, including allocator and CUDA context. "
        "LoftQ takes the same as QLoRA.",
    }
    return {"figures": [_figure(MEMORY_FOLDER, *each) for each in said.items()], "cards": ", ".join(CARDS)}


def _figure(folder: Path, name: str, sentence: str) -> dict[str, Any]:
    """Returns a figure as the page has it, with what it shows in words."""
    return {"name": name, "sentence": sentence, "image": in_page((folder / f"{name}.svg").read_text(), sentence)}


def _values(runs: pd.DataFrame, column: str) -> str:
    """Returns every value of a column that all runs should share."""
    return listed(sorted(runs[column].dropna().unique()) if column in runs else ()) or "-"


def _warnings(runs: pd.DataFrame) -> list[str]:
    known = runs.reindex(columns=["gpu", "compute_capability", "system"]).dropna(subset="gpu").drop_duplicates()
    cards = listed(sorted({gpu for gpu, version, _ in known.itertuples(index=False) if without_bf16(gpu, version)}))
    lost, waiting = int((~runs["status"].isin(["ok", "missing"])).sum()), int((runs["status"] == "missing").sum())
    said = {
        f"This is not finished: at least {waiting} of {len(runs)} runs are left.": waiting,
        "These runs come from more than one commit of the code. A difference between two of them may come from a "
        "change of the code; the changelog lists such changes as results-affecting.": runs["git_commit"].nunique() > 1,
        "Some runs come from a working tree with uncommitted changes.": runs["git_dirty"].eq(True).any(),
        "These runs come from more than one kind of machine. Their speeds are not comparable.": (
            runs["cpu"].nunique() > 1 or runs["gpu"].nunique() > 1
        ),
        "Some of these runs computed products of bf16 matrices natively, others in fp32. Rounding takes a run "
        "nearly as far as another seed does (docs/processors.md), and their speeds are not comparable.": (
            runs["bf16_products"].nunique() > 1
        ),
        f"{cards} computes no bf16 products itself: compare the memory of these runs, not their times.": cards,
        "Some of these runs were under WSL2, which may move a card's memory to the host instead of running out: what "
        "fitted there, and how long it took, decides no claim.": known["system"].astype(str).str.contains("WSL2").any(),
        f"{lost} of {len(runs)} runs did not end well; see the table of all runs. In a comparison, a run that diverged "
        "counts with the loss of the untouched base.": lost,
    }
    return [warning for warning, holds in said.items() if holds]


def _materials(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the model and the task with licence and note, from the first record."""
    path = next(filter(Path.is_file, map(record_path, runs["run_id"])), None)
    provenance = json.loads(path.read_text())["provenance"] if path else {}
    return [m for m in (provenance.get("model"), provenance.get("task")) if m]

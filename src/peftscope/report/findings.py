"""Renders the page of findings, a question a part, and the page of studies with their costs. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from peftscope.analysis.collect import read_runs
from peftscope.analysis.compare import MARGIN
from peftscope.analysis.stats import CONFIDENCE
from peftscope.claims.ledger import Claim
from peftscope.errors import Problem, close_match, raise_any
from peftscope.layout import ANSWERS_FILE, FINDINGS_PAGE, PUBLISHED_REPORTS, REPORTS, STUDIES_PAGE, folder_with
from peftscope.planning.experiment import experiment_names, experiment_path, read_experiment
from peftscope.record import FINAL
from peftscope.report.answers import Question, Sources, read_answers
from peftscope.report.front import rests_on
from peftscope.report.rendering import write_page
from peftscope.report.spoken import deciding, in_full, short_verdict
from peftscope.report.tables import markdown
from peftscope.words import spoken_time


def write_findings(claims: Sequence[Claim], findings: list[dict[str, Any]], folder: Path = REPORTS) -> Path:
    """Renders ``findings.md`` and ``studies.md`` from the answers and the findings on claims; returns the first's path.

    They stand beside the pages of claims, in this folder. Numbers and pictures are those of published studies.

    Raises:
        InputError: An answer names a claim, a study or a number that does not exist.
    """
    answers, known = read_answers(), [claim.id for claim in claims]
    raise_any(
        Problem(f"{ANSWERS_FILE}: {entry.says}", f"no such claim (got {name})", close_match(name, known))
        for entry in [*answers.first, *answers.questions]
        for name in entry.claims
        if name not in known
    )
    sources, by_id = Sources(findings), {finding["id"]: finding for finding in findings}
    studies = [_study(name, findings, folder) for name in experiment_names() if _is_judged(name, findings)]
    page = folder / STUDIES_PAGE.name
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_studies_page(studies, answers.cut))
    return write_page(
        folder / FINDINGS_PAGE.name,
        "findings.md.j2",
        basis=rests_on(findings),
        confidence=f"{100 * CONFIDENCE:g}",
        margin=f"{100 * MARGIN:g}",
        questions=[_question(question, sources, by_id, folder) for question in answers.questions],
    )


def _studies_page(studies: list[dict[str, Any]], cut: dict[str, str]) -> str:
    about = "Each study asks one question. Work is the time of all its runs on one or two cores, shared runs included."
    cuts = "".join(f"- `{name}`. {why}\n" for name, why in cut.items())
    table = markdown(pd.DataFrame(studies)).replace("---:", "---")
    return f"# Studies\n\n{about}\n\n{table}\n## Planned, and not run for now\n\n{cuts}"


def _question(question: Question, sources: Sources, by_id: dict[str, Any], folder: Path) -> dict[str, Any]:
    claims = [f"[{name}](claims.md#{name}) {short_verdict(by_id[name])}" for name in question.claims if name in by_id]
    reports = {name: PUBLISHED_REPORTS / name / "report.html" for name in question.studies}
    return {
        "title": question.title,
        "answer": sources.fill(question.says),
        "table": Markup(sources.fill(question.table)),  # its lines stay lines
        "rests": sources.fill(question.rests),
        "doubt": sources.fill(question.doubt),
        "claims": ", ".join(claims),
        "studies": ", ".join(
            f"[{name}]({os.path.relpath(page, folder)})" for name, page in reports.items() if page.is_file()
        ),
    }


def _parts_on(experiment: str, finding: dict[str, Any]) -> bool:
    """Returns whether a part that decides a claim rests on the runs of an experiment."""
    parts = [part["with"] for part in deciding(finding)]
    return any(experiment in (given.get("study"), given.get("experiment")) for given in parts)


def _is_judged(experiment: str, findings: list[dict[str, Any]]) -> bool:
    study = read_experiment(experiment_path(experiment)).study
    compares = study is not None and len(study.arms) > 1  # files that studies extend have the reference alone
    return compares or any(_parts_on(experiment, finding) for finding in findings)


def _study(name: str, findings: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Returns one row of the table of studies: its question, what it cost, and the claims that rest on it."""
    results = folder_with(name, "runs.csv")
    runs = read_runs(name, results) if results else pd.DataFrame({"status": []})
    ended = runs[runs["status"].isin(FINAL)]
    world = f"{runs['model'].iloc[0]}, {runs['task'].iloc[0]}" if len(runs) else ""
    said = [
        f"{finding['id']} {finding.get('in_worlds', {}).get(world, finding['verdict'])}{in_full(finding)}"
        for finding in findings
        if _parts_on(name, finding)
    ]
    report = PUBLISHED_REPORTS / name / "report.html"
    return {
        "study": f"[{name}]({os.path.relpath(report, folder)})" if report.is_file() else name,
        "question": read_experiment(experiment_path(name)).title,
        "runs that ended": str(len(ended)),
        "work": spoken_time(float(ended["wall_seconds"].sum())) if len(ended) else "-",
        "claims that rest on it": ", ".join(said) or "-",
    }

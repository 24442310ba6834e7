"""Renders the page of findings: what the studies say by topic, what each study cost, and what it decided. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from peftscope.analysis.collect import read_runs
from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import StudyResults
from peftscope.claims.ledger import Claim
from peftscope.claims.verdict import Verdict
from peftscope.errors import Problem, close_match, raise_any
from peftscope.files.content import Strict, read_yaml
from peftscope.files.problems import validated
from peftscope.layout import FINDINGS_FILE, FINDINGS_PAGE, PUBLISHED_REPORTS, REPORTS, folder_with, published, shipped
from peftscope.planning.experiment import experiment_names, experiment_path, read_experiment
from peftscope.record import FINAL
from peftscope.report.capacity import capacity_answer
from peftscope.report.contrasts import answer as answer_of_study
from peftscope.report.contrasts import at_one_rate, contrasts, of_itself, told_left_out
from peftscope.report.front import Surprise, rests_on, surprising
from peftscope.report.page import ANSWERS
from peftscope.report.rendering import write_page
from peftscope.report.shares import arms_shown
from peftscope.report.spoken import (
    decided,
    deciding,
    disagree,
    in_full,
    own_scope,
    spoken_finding,
    spoken_scope,
    spoken_verdict,
)
from peftscope.report.worlds import WORLDS_FIGURE
from peftscope.words import capitalised, grouped, spoken_time

ORDER = [Verdict.WRONG, Verdict.IN_PART, Verdict.HOLDS, Verdict.OPEN]
"""What surprises comes first."""


class Topic(Strict):
    """One part of the page.

    Attributes:
        title: The question.
        claims: The ids of the claims that answer it.
        studies: The experiments whose answers and pictures belong to it.
        doubt: What may be wrong with these answers, if anything is known.
        larger: What a larger model might change, and why.
        papers: Where the papers say something else, or measure otherwise.
    """

    title: str
    claims: list[str]
    studies: list[str] = []
    doubt: str = ""
    larger: str
    papers: str


class Apart(Strict):
    """Worlds that disagree on a claim.

    Attributes:
        why: The likeliest reason.
        test: What would test it.
    """

    why: str
    test: str


class Content(Strict):
    """What ``experiments/findings.yaml`` says.

    Attributes:
        first: The findings that surprise most, which the README and the page show first.
        apart: What is said of claims on which worlds disagree, by their ids.
        topics: The topics of the page.
        cut: The studies that were planned and are not run for now, each with the reason why others came first.
    """

    first: list[Surprise] = []
    apart: dict[str, Apart] = {}
    topics: list[Topic]
    cut: dict[str, str] = {}


def read_content(claims: Sequence[str]) -> Content:
    """Returns what ``experiments/findings.yaml`` says of the claims with these ids.

    Raises:
        InputError: The file has problems, or names a claim or an experiment that is not known.
    """
    path = shipped(FINDINGS_FILE)
    names = {name for model in (Topic, Surprise, Apart) for name in model.model_fields}
    content = validated(Content, read_yaml(path), path, names)
    named = [("claim", topic.title, name) for topic in content.topics for name in topic.claims]
    named += [("claim", "first", surprise.claim) for surprise in content.first]
    named += [("claim", "apart", name) for name in content.apart]
    named += [("experiment", topic.title, name) for topic in content.topics for name in topic.studies]
    named += [("experiment", "cut", name) for name in content.cut]
    there_are = {"claim": claims, "experiment": experiment_names()}
    raise_any(
        Problem(f"{path}: {where}", f"no such {kind} (got {name})", close_match(name, there_are[kind]))
        for kind, where, name in named
        if name not in there_are[kind]
    )
    return content


def write_findings(claims: Sequence[Claim], findings: list[dict[str, Any]], folder: Path = REPORTS) -> Path:
    """Renders ``findings.md`` from the verdicts on all claims and the results of the studies, and returns its path.

    It stands beside the pages of claims, in this folder. Answers and pictures are those of published studies.
    """
    by_id = {finding["id"]: finding for finding in findings}
    content = read_content([claim.id for claim in claims])
    return write_page(
        folder / FINDINGS_PAGE.name,
        "findings.md.j2",
        basis=rests_on(findings),
        confidence=f"{100 * CONFIDENCE:g}",
        worlds=os.path.relpath(WORLDS_FIGURE, folder) if WORLDS_FIGURE.is_file() else "",
        carried=_carried(findings, content.apart),
        first=surprising(findings, content.first, Path("claims.md")),
        topics=[_topic(topic, by_id, folder) for topic in content.topics],
        studies=[_study(name, findings) for name in experiment_names() if _is_judged(name, findings)],
        cut=content.cut,
        statements={claim.id: claim.statement for claim in claims},
    )


def _carried(findings: list[dict[str, Any]], said: dict[str, Apart]) -> dict[str, Any]:
    """Returns the claims that are decided in two worlds or more: those on which these disagree, then by verdict."""
    several = [finding for finding in findings if len(decided(finding)) > 1]
    apart = [finding for finding in several if disagree(finding)]
    alike = grouped((spoken_verdict(finding), finding["id"]) for finding in several if finding not in apart)
    lines = [_line(finding) | {"remark": said.get(finding["id"])} for finding in apart]
    return {"count": len(several), "apart": lines, "alike": alike}


def _line(finding: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": finding["id"],
        "verdict": capitalised(spoken_verdict(finding)),
        "found": spoken_finding(finding),
        "short": "" if any(own_scope(part, finding) for part in deciding(finding)) else spoken_scope(finding, True),
    }


def _topic(topic: Topic, by_id: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    found = [by_id[name] for name in topic.claims if name in by_id]
    told = [finding for finding in found if finding["verdict"] in ORDER]
    return {
        **topic.model_dump(),
        "answers": [answer for name in topic.studies if (answer := _answer(name, folder))],
        "found": [_line(finding) for finding in sorted(told, key=lambda finding: ORDER.index(finding["verdict"]))],
        "waiting": [finding["id"] for finding in found if finding["verdict"] == Verdict.NOT_RUN],
    }


def _answer(name: str, folder: Path) -> dict[str, str] | None:
    """Returns what a published experiment answers, its picture and its report; None if it is not finished."""
    results = published(name)
    pictures = {figure: results / "figures" / f"{figure}.svg" for figure in PICTURES}
    figure = next((figure for figure, path in pictures.items() if path.is_file()), None)
    if figure is None:
        return None
    return {
        "name": name,
        "title": read_experiment(experiment_path(name)).title,
        "answer": PICTURES[figure](name),
        "figure": os.path.relpath(pictures[figure], folder),
        "report": os.path.relpath(PUBLISHED_REPORTS / name / "report.html", folder),
    }


def _differences(name: str) -> str:
    study = StudyResults(name, is_published=True)
    waiting = (left := told_left_out(study)) and f" Left out: {left}."
    table = contrasts(study)
    said = answer_of_study(table, study.labels, legend="", lead=at_one_rate(study))
    return said + (of_itself(study, table) if said else "") + waiting


def _shares(name: str) -> str:
    """Returns what the figure of shares says, and then what is said of the arms that it does not show."""
    study = StudyResults(name, is_published=True)
    table = contrasts(study)
    is_shown = table["arm"].isin(arms_shown(study)) & (table["against"] == study.reference)
    others = answer_of_study(table[~is_shown], study.labels, legend="")
    return f"{ANSWERS['shares'](name)} {others}".strip()


PICTURES: dict[str, Callable[[str], str]] = {
    **ANSWERS,
    "shares": _shares,
    "capacity": lambda name: capacity_answer(name, published(name)),
    "differences": _differences,
}
"""The figures that carry the answer of an experiment, the first of them that it has, and what each says."""


def _parts_on(experiment: str, finding: dict[str, Any]) -> bool:
    """Returns whether a part that decides a claim rests on the runs of an experiment."""
    parts = [part["with"] for part in deciding(finding)]
    return any(experiment in (given.get("study"), given.get("experiment")) for given in parts)


def _is_judged(experiment: str, findings: list[dict[str, Any]]) -> bool:
    study = read_experiment(experiment_path(experiment)).study
    compares = study is not None and len(study.arms) > 1  # files that studies extend have the reference alone
    return compares or any(_parts_on(experiment, finding) for finding in findings)


def _study(name: str, findings: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one row of the table of studies: its question, what it cost, and the claims that rest on it."""
    folder = folder_with(name, "runs.csv")
    runs = read_runs(name, folder) if folder else pd.DataFrame({"status": []})
    ended = runs[runs["status"].isin(FINAL)]
    world = f"{runs['model'].iloc[0]}, {runs['task'].iloc[0]}" if len(runs) else ""
    said = [
        f"{finding['id']} {finding.get('in_worlds', {}).get(world, finding['verdict'])}{in_full(finding)}"
        for finding in findings
        if _parts_on(name, finding)
    ]
    return {
        "name": name,
        "title": read_experiment(experiment_path(name)).title,
        "runs": len(ended),
        "work": spoken_time(float(ended["wall_seconds"].sum())) if len(ended) else "-",
        "claims": ", ".join(said) or "-",
    }

"""Renders the README's first answers, picture and study, and the numbers of pages and the paper. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftscope.analysis.study import StudyResults
from peftscope.layout import PUBLISHED_REPORTS, PUBLISHED_RESULTS
from peftscope.memory.answer import AGREEMENT_FILE
from peftscope.models.catalog import find_model
from peftscope.planning.experiment import experiment_path, read_experiment
from peftscope.report.answers import Answer, Sources
from peftscope.report.claims import COLOURS, ROWS, row_of
from peftscope.report.spoken import decided, spoken_worlds
from peftscope.report.study import study_facts, study_sentences
from peftscope.report.worlds import WORLDS_FIGURE, show_worlds
from peftscope.words import counted

README = Path("README.md")
PAPER = Path("paper/paper.md")
RESTS_ON = Path("docs/rests-on.md")
BASE = "base"
"""The experiment that the studies extend."""
NUMBER = re.compile(r"<!--([a-z ]+)-->[^<]*<!--/-->")
"""A number of a page or the paper, between comments that name it."""
BEGIN, END = "<!-- published:claims -->\n", "<!-- /published:claims -->"


def show_claims(findings: list[dict[str, Any]], answers: Sequence[Answer]) -> None:
    """Writes the first answers and the picture of worlds into the README, and numbers into pages and the paper.

    Only what stands between the files' markers changes.
    """
    claims, sources = PUBLISHED_REPORTS / "claims.md", Sources(findings)
    shown = [f"- {sources.fill(answer.says)}{_linked(answer.claims, claims)}" for answer in answers]
    picture = f"\n![{said}]({WORLDS_FIGURE})\n" if (said := show_worlds()) else ""
    _show(BEGIN, "\n".join(shown) + "\n" + picture, END)
    counts = {str(verdict): sum(finding["verdict"] == verdict for finding in findings) for verdict in COLOURS}
    numbers = rests_on(findings) | counts
    for page in filter(Path.is_file, (README, RESTS_ON)):
        page.write_text(with_numbers(page.read_text(), numbers))
    if PAPER.is_file():
        agreement = json.loads(AGREEMENT_FILE.read_text())
        numbers |= {
            "questions": agreement["questions"],
            "mean difference": agreement["allocated_percent"]["mean"],
            "worst difference": agreement["allocated_percent"]["worst"],
        }
        PAPER.write_text(with_numbers(PAPER.read_text(), numbers))


def _linked(claims: Sequence[str], page: Path) -> str:
    return f" ({', '.join(f'[{claim}]({page}#{claim})' for claim in claims)})" if claims else ""


def rests_on(findings: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers that say what the claims on training rest on, by their names on pages."""
    settings = read_experiment(experiment_path(BASE))
    shape = find_model(settings.fixed["model"]).shape
    assert shape is not None
    assert settings.study is not None
    worlds = list(dict.fromkeys(world for finding in findings for world in finding["worlds"]))
    trained = [finding for finding in findings if row_of(finding) == next(iter(ROWS))]
    several = sum(len(decided(finding)) > 1 for finding in trained)
    return {
        "claims": len(findings),
        "trained": len(trained),
        "worlds": counted(len(worlds), "world"),
        "where": spoken_worlds(worlds),
        "several": several,
        "millions": round(shape.parameters / 1e6),
        "steps": settings.fixed["steps"],
        "seeds": len(settings.study.seeds),
    }


def show_study(experiment: str) -> None:
    """Writes a study's figure and the link to its report into the README, if that has markers for this experiment."""
    settings = read_experiment(experiment_path(experiment)).study
    drawn = Path("figures", "differences.svg")
    if settings is None or not ((study := StudyResults(experiment)).folder / drawn).is_file():
        return
    said = study_sentences(study_facts(study, settings)).get("differences")
    figure = PUBLISHED_RESULTS / experiment / drawn
    report = PUBLISHED_REPORTS / experiment / "report.html"
    shown = f"![{said}]({figure})\n[The report of this study]({report})\n" if said else ""
    _show(f"<!-- study:{experiment} -->\n", shown, "<!-- /study -->")


def _show(begin: str, shown: str, end: str) -> None:
    """Replaces what stands between two markers of the README. Without a README or markers, does nothing."""
    text = README.read_text() if README.is_file() else ""
    if begin in text:
        before, _, rest = text.partition(begin)
        README.write_text(before + begin + shown + end + rest.partition(end)[2])


def with_numbers(text: str, numbers: Mapping[str, Any]) -> str:
    """Returns a text in which the named numbers between comments are these. Numbers of other names stay.

    >>> with_numbers("<!--claims-->1<!--/--> claims, <!--wrong-->2<!--/--> wrong", {"claims": 151})
    '<!--claims-->151<!--/--> claims, <!--wrong-->2<!--/--> wrong'
    """
    return NUMBER.sub(lambda m: f"<!--{m[1]}-->{numbers[m[1]]}<!--/-->" if m[1] in numbers else m[0], text)

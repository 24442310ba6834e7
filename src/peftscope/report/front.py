"""Renders the README's bar of verdicts, findings that surprise and study, and the paper's numbers. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from peftscope.analysis.study import StudyResults
from peftscope.claims.verdict import Verdict
from peftscope.errors import InputError, Problem
from peftscope.files.content import Strict
from peftscope.layout import FINDINGS_FILE, PUBLISHED_REPORTS, PUBLISHED_RESULTS
from peftscope.memory.answer import AGREEMENT_FILE
from peftscope.models.catalog import find_model
from peftscope.planning.experiment import experiment_path, read_experiment
from peftscope.planning.resolve import flat_fields, spec_from
from peftscope.report.claims import COLOURS, ROWS, row_of
from peftscope.report.spoken import decided, deciding, spoken_scope, spoken_worlds
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
BAR = PUBLISHED_RESULTS / "claims.svg"
READS = "Each row says how far an arm is ahead of LoRA of rank 8, or of the arm named. The band counts as the same."
"""What stands below the figure of worlds."""
MOST_SURPRISES = 3
"""The most findings on the first screen; the page of findings has the others too."""
BEGIN, END = "<!-- published:claims -->\n", "<!-- /published:claims -->"
GREY = "#77808a"
"""A grey that can be read on white and on black."""


class Surprise(Strict):
    """One finding of the README's first screen and of the page of findings.

    Attributes:
        claim: The id of the claim that it tells.
        verdict: The verdict with which the sentence is true. Under any other it is not shown.
        says: The sentence. ``{0}``, ``{1}`` and so on stand for the numbers of the parts that decide, in their order;
            ``{size[0]}`` is one without its sign.
    """

    claim: str
    verdict: Verdict
    says: str


def show_claims(findings: list[dict[str, Any]], surprises: list[Surprise]) -> None:
    """Draws the bar of verdicts; writes it with the findings that surprise into the README, and numbers into the paper.

    Only what stands between the files' markers changes.
    """
    counts = {verdict: sum(finding["verdict"] == verdict for finding in findings) for verdict in COLOURS}
    rows: dict[str, list[Verdict]] = {}
    for row in ROWS:
        of_row = [finding for finding in findings if row_of(finding) == row]
        worlds = len({world for finding in of_row for world in finding["worlds"]})
        several = sum(len(decided(finding)) > 1 for finding in of_row)
        told = row + f" in {counted(worlds, 'world')}" * (worlds > 0)
        told += f" ({several} decided in two or more)" * (worlds > 1)
        rows[told] = [Verdict(finding["verdict"]) for finding in of_row]
    _draw_bar({row: {verdict: verdicts.count(verdict) for verdict in COLOURS} for row, verdicts in rows.items()})
    words = "; ".join(
        f"{row}: " + ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in COLOURS if verdict in verdicts)
        for row, verdicts in rows.items()
        if verdicts
    )
    lines = surprising(findings, surprises, PUBLISHED_REPORTS / "claims.md")[:MOST_SURPRISES]
    figure = f"![{said}]({WORLDS_FIGURE})\n\n{READS}\n\n" if (said := show_worlds()) else ""
    shown = f"{figure}![{len(findings)} claims: {words}]({BAR})\n\n" + "\n".join(lines) + "\n"
    _show(BEGIN, shown, END)
    basis = rests_on(findings)
    for page in filter(Path.is_file, (README, RESTS_ON)):
        page.write_text(with_numbers(page.read_text(), basis))
    if PAPER.is_file():
        agreement = json.loads(AGREEMENT_FILE.read_text())
        numbers = basis | {
            **{str(verdict): count for verdict, count in counts.items()},
            "questions": agreement["questions"],
            "mean difference": agreement["allocated_percent"]["mean"],
            "worst difference": agreement["allocated_percent"]["worst"],
        }
        PAPER.write_text(with_numbers(PAPER.read_text(), numbers))


def rests_on(findings: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers that say what the claims on training rest on, by their names on pages."""
    settings = read_experiment(experiment_path(BASE))
    shape = find_model(settings.fixed["model"]).shape
    assert shape is not None
    assert settings.study is not None
    worlds = list(dict.fromkeys(world for finding in findings for world in finding["worlds"]))
    trained = [finding for finding in findings if row_of(finding) == next(iter(ROWS))]
    several = sum(len(decided(finding)) > 1 for finding in trained)
    told = f" ({several} of {len(trained)} claims decided on {'both' if len(worlds) == 2 else 'two or more'})"
    lora = flat_fields(spec_from({}, experiment_path(BASE), "cpu"))
    return {
        "claims": len(findings),
        "trained": len(trained),
        "worlds": counted(len(worlds), "world"),
        "models": len({world.partition(",")[0] for world in worlds}),
        "where": spoken_worlds(worlds) + told * (len(worlds) > 1),
        "base": spoken_worlds([settings.fixed["model"]]),
        "millions": round(shape.parameters / 1e6),
        "steps": settings.fixed["steps"],
        "seeds": len(settings.study.seeds),
        "rank": lora["rank"],
        "alpha": f"{lora['alpha']:g}",
    }


def surprising(findings: list[dict[str, Any]], surprises: list[Surprise], page: Path) -> list[str]:
    """Returns a line of Markdown for each finding that surprises and whose claim has the verdict that it tells.

    Args:
        findings: What was found of each claim.
        surprises: What to tell, in this order.
        page: The page of claims, from where the lines will stand.
    """
    by_id = {finding["id"]: finding for finding in findings}
    return [
        f"- {_told(surprise, finding)} ([{surprise.claim}]({page}#{surprise.claim}): {spoken_scope(finding, True)})"
        for surprise in surprises
        if (finding := by_id.get(surprise.claim)) and finding["verdict"] == surprise.verdict
    ]


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


def _told(surprise: Surprise, finding: dict[str, Any]) -> str:
    numbers = [part["found"] for part in deciding(finding)]
    sizes = [abs(number) if isinstance(number, int | float) else number for number in numbers]
    try:
        return re.sub(r"(?<=\d)%", " %", surprise.says.format(*numbers, size=sizes))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        message = f"the sentence does not fit the claim's numbers ({error})"
        raise InputError(Problem(f"{FINDINGS_FILE}: {surprise.claim}", message, f"its numbers are {numbers}")) from None


def _draw_bar(counts: dict[str, dict[Verdict, int]]) -> None:
    """Draws how many claims of each row have each verdict, for light and dark pages."""
    with plt.rc_context({"svg.hashsalt": "claims", "svg.fonttype": "none", "font.size": 11}):
        figure, axes = plt.subplots(figsize=(8, 1.7), layout="constrained")
        for y, (row, of_row) in enumerate(counts.items()):
            left = 0
            for verdict, count in of_row.items():
                axes.barh(y, count, left=left, color=COLOURS[verdict], height=0.8)
                if count:
                    axes.text(left + count / 2, y, str(count), ha="center", va="center", color="white", weight="bold")
                left += count
            axes.text(-1, y, row, ha="right", va="center", color=GREY)
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[verdict]) for verdict in COLOURS]
        options: dict[str, Any] = {"loc": "upper right", "frameon": False, "labelcolor": GREY, "handlelength": 1}
        axes.legend(handles, list(COLOURS), ncols=len(COLOURS), bbox_to_anchor=(1, 0), columnspacing=1, **options)
        axes.invert_yaxis()
        axes.axis("off")
        figure.savefig(BAR, transparent=True, metadata={"Date": None})
        plt.close(figure)

"""A study's comparisons as a table in LaTeX, Markdown or CSV, with a sentence for the caption. No torch."""

from __future__ import annotations

from contextlib import suppress

import pandas as pd

from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError
from peftscope.layout import published
from peftscope.planning.experiment import WORLDS
from peftscope.report.contrasts import (
    EXPLAINED,
    at_one_rate,
    contrasts,
    readable_contrasts,
    reference_label,
    told_left_out,
)
from peftscope.report.spoken import spoken_worlds
from peftscope.report.tables import markdown

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "“": "``", "”": "''"}
LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
LATEX |= {"−": "$-$", "±": r"$\pm$", "×": r"$\times$", "√": r"$\surd$", "α": r"$\alpha$", "[": "{[}"}
"""The LaTeX for signs that it reads as its own, or that a font may lack; a bracket may begin no cell."""


def caption(study: StudyResults) -> str:
    """Returns the sentence below a study's table."""
    return (
        f"How far each arm is ahead of {reference_label(study)} in held-out loss "
        f"({spoken_worlds([study.subject])}), in % of the task gain, with {100 * CONFIDENCE:g} % intervals over pairs "
        f"of seeds. {at_one_rate(study)}{EXPLAINED}" + (f" Left out: {said}." if (said := told_left_out(study)) else "")
    )


def _world_of(study: StudyResults) -> StudyResults | None:
    """Returns the published study of a world with which an unpublished study shares runs of its reference, or None."""
    own = set() if published(study.name).is_dir() else set(study.rate_runs(study.reference)["run_id"])
    for name in WORLDS.values() if own else ():
        with suppress(InputError):  # this one is not published
            world = StudyResults(name, is_published=True)
            if own & set(world.rate_runs(world.reference)["run_id"]):
                return world
    return None


def exported(name: str, form: str) -> str:
    """Returns a study's comparisons in one of the forms ``latex``, ``markdown`` and ``csv``.

    The CSV has the numbers with all their digits, under the names that ``results/published/README.md`` explains.

    Raises:
        InputError: The study has not ended, or there is none of this name.
    """
    study = StudyResults(name)
    study.require_finished()
    table, said = contrasts(study), caption(study)
    if "is_whole_split" in table and not table["is_whole_split"].all():
        said += " Points with * are of the generated answers."
    if form == "csv":
        return table.to_csv(index=False)
    readable = readable_contrasts(table, study.labels)
    if world := _world_of(study):
        rows = pd.read_csv(world.folder / "tables" / "contrasts.csv").query("against == @world.reference")
        rows = rows[~rows["arm"].isin(study.arms)]
        others = readable_contrasts(rows, world.labels)
        readable = pd.concat([readable, others.assign(arm=others["arm"] + f" ({world.name})")]).fillna("-")
        said += f" Arms with ({world.name}) are published; their order is no result."
    columns = list(readable)
    shown = [*columns[: columns.index("by (nats/token)")], "what it says"] if len(readable) else columns
    frame = readable[[name for name in dict.fromkeys(shown[::-1]) if not readable[name].eq("-").all()][::-1]]
    if form == "markdown":
        return f"{markdown(frame)}\n{said}"
    told = frame.map(latex).rename(columns=latex)
    return told.to_latex(
        index=False, caption=latex(said), label=f"tab:{name}", column_format="l" + "r" * (len(told.columns) - 2) + "l"
    )


def latex(text: str) -> str:
    r"""Returns a text as LaTeX shows it.

    >>> latex("rank_8: +2.5 % [−1.0, +6.0]")
    'rank\\_8: +2.5 \\% {[}$-$1.0, +6.0]'
    """
    return text.translate({ord(sign): written for sign, written in LATEX.items()})

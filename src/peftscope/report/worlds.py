"""The figure of worlds: what each question found on each model and task, side by side on one scale. No torch."""

from __future__ import annotations

import pandas as pd

from peftscope.analysis.study import MARGIN, StudyResults
from peftscope.errors import InputError
from peftscope.layout import PUBLISHED_RESULTS
from peftscope.planning.experiment import WORLDS
from peftscope.report.plots import new_figure

QUESTIONS = {
    "full": "full fine-tuning",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "r1": "rank 1",
    "r4": "rank 4",
    "r64": "rank 64",
    "attention-r21": "attention alone",
    "mlp-r13": "feed-forward alone",
}
"""The arms of the studies of worlds, as the figure names them, in the order of its rows."""
WORLDS_FIGURE = PUBLISHED_RESULTS / "worlds.svg"


def world_answers() -> pd.DataFrame:
    """Returns a row for each question and world that has a published answer, in % of the task gain ahead of LoRA."""
    rows = []
    for name in WORLDS.values():
        for arm, question in QUESTIONS.items():
            try:
                study = StudyResults(name, is_published=True)
                found, scale = study.difference(arm, study.reference), 100 / study.task_gain
            except InputError:
                continue  # the arm has not run there
            low, high = found.interval()
            row = {"world": study.subject, "question": question, "ahead": scale * found.mean}
            rows.append(row | {"below": scale * (found.mean - low), "above": scale * (high - found.mean)})
    return pd.DataFrame(rows)


def show_worlds() -> str:
    """Draws the figure of worlds, and returns what it shows in words; empty where fewer than two have answers."""
    table = world_answers()
    worlds = list(dict.fromkeys(table["world"])) if len(table) else []
    if len(worlds) < 2:
        return ""
    with new_figure(WORLDS_FIGURE, 2 + 2.6 * len(worlds), 3.4, len(worlds), sharex=True, sharey=True) as columns:
        for axes, world in zip(columns, worlds, strict=True):
            rows = table[table["world"] == world].set_index("question").reindex(list(QUESTIONS.values()))
            axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="0.5", alpha=0.25, linewidth=0)
            axes.axvline(0, color="0.5", linewidth=0.8)
            axes.errorbar(rows["ahead"], range(len(rows)), xerr=rows[["below", "above"]].T, fmt="o", capsize=3)
            axes.set(title=world.replace(", ", "\n"), xlabel="% of the task gain", yticks=range(len(rows)))
            axes.set_yticklabels(rows.index)
        columns[0].invert_yaxis()
    ahead = "How far each arm ends ahead of LoRA of rank 8 at its best rate, with 95 % intervals"
    return f"{ahead}, in {'; in '.join(worlds)}. The band is ±{100 * MARGIN:g} %, which counts as the same."

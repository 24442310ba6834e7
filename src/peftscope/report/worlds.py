"""The figure of worlds: what each question found on each model and task, side by side on one scale. No torch."""

from __future__ import annotations

import pandas as pd

from peftscope.analysis.study import MARGIN, StudyResults
from peftscope.errors import InputError
from peftscope.layout import PUBLISHED_RESULTS
from peftscope.planning.experiment import WORLDS
from peftscope.report.plots import new_figure

QUESTIONS = {
    "full fine-tuning": ("full", "lora"),
    "DoRA": ("dora", "lora"),
    "PiSSA": ("pissa", "lora"),
    "rank 1": ("r1", "lora"),
    "rank 4": ("r4", "lora"),
    "rank 64": ("r64", "lora"),
    "attention alone": ("attention-r21", "lora"),
    "feed-forward alone": ("mlp-r13", "lora"),
    "rank 1, ahead of full": ("r1", "full"),
    "feed-forward, ahead of attention": ("mlp-r13", "attention-r21"),
}
"""The rows of the figure in their order: two arms of the studies of worlds, of which the first may be ahead."""
WORLDS_FIGURE = PUBLISHED_RESULTS / "worlds.svg"


def world_answers() -> pd.DataFrame:
    """Returns a row for each question and world that has a published answer, in % of the task gain ahead of LoRA."""
    rows = []
    for name in WORLDS.values():
        for question, arms in QUESTIONS.items():
            try:
                study = StudyResults(name, is_published=True)
                found, scale = study.difference(*arms), 100 / study.task_gain
            except InputError:
                continue  # an arm has not run there
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
            rows = table[table["world"] == world].set_index("question").reindex(list(QUESTIONS))
            axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="0.5", alpha=0.25, linewidth=0)
            axes.axvline(0, color="0.5", linewidth=0.8)
            axes.errorbar(rows["ahead"], range(len(rows)), xerr=rows[["below", "above"]].T, fmt="o", capsize=3)
            axes.set(title=world.replace(", ", "\n"), xlabel="% of the task gain", yticks=range(len(rows)))
            axes.set_yticklabels(rows.index)
        columns[0].invert_yaxis()
    ahead = "How far each arm ends ahead of LoRA of rank 8, or of the named one, at its best rate, with 95 % intervals"
    return f"{ahead}, in {'; in '.join(worlds)}. The band is ±{100 * MARGIN:g} %, which counts as the same."

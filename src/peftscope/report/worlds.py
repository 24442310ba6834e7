"""The figure of worlds: what each question found on each model and task, side by side on one scale. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from peftscope.analysis.compare import MARGIN
from peftscope.analysis.forgetting import less_at_equal_loss
from peftscope.analysis.stats import mean_interval
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError
from peftscope.layout import PUBLISHED_RESULTS
from peftscope.planning.experiment import WORLDS
from peftscope.report.plots import new_figure
from peftscope.report.spoken import spoken_worlds

QUESTIONS = {
    "full fine-tuning": ("full", "lora"),
    "DoRA": ("dora", "lora"),
    "PiSSA": ("pissa", "lora"),
    "rank 1": ("r1", "lora"),
    "rank 4": ("r4", "lora"),
    "rank 64": ("r64", "lora"),
    "attention alone": ("attention-r21", "lora"),
    "feed-forward alone": ("mlp-r13", "lora"),
    "rank 64 against full": ("r64", "full"),
    "attention against full": ("attention-r21", "full"),
    "feed-forward against attention": ("mlp-r13", "attention-r21"),
}
"""The rows of the figure in their order: two arms of the studies of worlds, of which the first may be ahead."""
FORGETS_LESS = {"forgetting, full against LoRA": ("full", "lora")}
"""The last row, which has a scale of its own: two arms, of which the first may forget less at the same loss."""
WORLDS_FIGURE = PUBLISHED_RESULTS / "worlds.svg"


def world_answers() -> pd.DataFrame:
    """Returns a row for each question and world that has a published answer, in % of the task gain ahead of LoRA.

    What is forgotten less is in bits per byte of English prose.
    """
    rows = []
    for name in WORLDS.values():
        with suppress(InputError):  # it has not run
            study = StudyResults(name, is_published=True)
            rows += [{"world": study.subject, **row} for row in _answers(study)]
    return pd.DataFrame(rows)


def _answers(study: StudyResults) -> Iterator[dict[str, Any]]:
    scale = 100 / study.task_gain
    for question, arms in QUESTIONS.items():
        with suppress(InputError):  # an arm has not run there
            found = study.difference(*arms)
            low, high = (scale * end for end in found.interval())
            yield {"question": question, "ahead": scale * found.mean, "low": low, "high": high}
    for question, arms in FORGETS_LESS.items():
        with suppress(InputError):
            less = mean_interval(less_at_equal_loss(study, *arms))
            if less and less.low is not None:
                yield {"question": question, "ahead": less.mean, "low": less.low, "high": less.high}


def show_worlds() -> str:
    """Draws the figure of worlds, and returns what it shows in words; empty where fewer than two have answers."""
    table = world_answers()
    worlds = list(dict.fromkeys(table["world"])) if len(table) else []
    if len(worlds) < 2:
        return ""
    grid: dict[str, Any] = {"nrows": 2, "height_ratios": [len(QUESTIONS), 1.2], "sharex": "row", "sharey": "row"}
    with new_figure(WORLDS_FIGURE, 2 + 2.6 * len(worlds), 4.2, len(worlds), **grid) as panels:
        for row, questions in zip(panels, (QUESTIONS, FORGETS_LESS), strict=True):
            for axes, world in zip(row, worlds, strict=True):
                _draw(axes, table[table["world"] == world].set_index("question").reindex(list(questions)))
        for axes, below, world in zip(*panels, worlds, strict=True):
            axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="0.5", alpha=0.25, linewidth=0)
            axes.set(title=spoken_worlds([world]).replace(" on ", "\n"), xlabel="ahead by (% of the task gain)")
            below.set(xlabel="forgets less by (bits per byte)")
        panels[0][0].set_ylim(len(QUESTIONS) - 0.5, -0.5)
    ahead = "How far each arm ends ahead of LoRA of rank 8, or of the named one, at its best rate, with 95 % intervals"
    last = "The last row says how much less full fine-tuning forgets of English prose than LoRA at the same loss on "
    last += "the task, each at its best rate; other rates say otherwise"
    band = f"The band is ±{100 * MARGIN:g} %, which counts as the same. Where a row is empty, an arm has not finished"
    return f"{ahead}, for {spoken_worlds(worlds)}. {band}. {last}."


def _draw(axes: Axes, rows: pd.DataFrame) -> None:
    axes.axvline(0, color="0.5", linewidth=0.8)
    ends = [rows["ahead"] - rows["low"], rows["high"] - rows["ahead"]]
    axes.errorbar(rows["ahead"], range(len(rows)), xerr=ends, fmt="o", capsize=3)
    axes.set_yticks(range(len(rows)), rows.index)

"""The figure of worlds: how far each arm ends ahead of LoRA on each model and task, on one scale. No torch."""

from __future__ import annotations

from contextlib import suppress

import pandas as pd

from peftscope.analysis.compare import MARGIN
from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError
from peftscope.layout import PUBLISHED_RESULTS
from peftscope.planning.experiment import WORLDS
from peftscope.report.answers import Sources, read_answers
from peftscope.report.looks import GREY, MARKERS, SAFE_COLOURS
from peftscope.report.plots import new_figure
from peftscope.report.spoken import spoken_worlds

ROWS = {
    "all weights": "full",
    "feed-forward alone": "mlp-r13",
    "rank 64": "r64",
    "DoRA": "dora",
    "rank 4": "r4",
    "PiSSA": "pissa",
    "rank 1": "r1",
    "attention alone": "attention-r21",
}
"""The rows of the figure, each with the arm of the studies of worlds that is compared with LoRA."""
WORLDS_FIGURE = PUBLISHED_RESULTS / "worlds.svg"
APART = 0.22
"""How far the points of one row stand from each other, in rows."""


def world_answers() -> pd.DataFrame:
    """Returns a row for each arm and world that has a published answer, in % of the task gain ahead of LoRA."""
    rows = []
    for name in WORLDS.values():
        with suppress(InputError):  # it has not run
            study = StudyResults(name, is_published=True)
            for row, arm in ROWS.items():
                with suppress(InputError):  # the arm has not run there
                    found, scale = study.difference(arm, study.reference), 100 / study.yardstick
                    low, high = (scale * end for end in found.interval())
                    of = {"row": row, "ahead": scale * found.mean, "low": low, "high": high}
                    rows.append({"world": study.subject, **of})
    return pd.DataFrame(rows)


def show_worlds() -> str:
    """Draws the figure of worlds, and returns what it shows in words; empty where fewer than two have answers.

    Rows are sorted by their means over worlds. The title is typed in ``experiments/answers.yaml``.
    """
    table = world_answers()
    worlds = list(dict.fromkeys(table["world"])) if len(table) else []
    if len(worlds) < 2:
        return ""
    title = Sources().fill(read_answers().picture.says)
    order = list(table.groupby("row")["ahead"].mean().sort_values(ascending=False).index)
    with new_figure(WORLDS_FIGURE, 6.4, 5.0) as axes:
        axes.axvspan(-100 * MARGIN, 100 * MARGIN, color=GREY, alpha=0.22, linewidth=0)
        axes.axvline(0, color=GREY, linewidth=1)
        for place, (world, colour, marker) in enumerate(zip(worlds, SAFE_COLOURS, MARKERS, strict=False)):
            here = table[table["world"] == world]
            y = [order.index(row) + APART * (place - (len(worlds) - 1) / 2) for row in here["row"]]
            ends = [here["ahead"] - here["low"], here["high"] - here["ahead"]]
            axes.errorbar(here["ahead"], y, xerr=ends, fmt=marker, color=colour, ms=6, label=spoken_worlds([world]))
        axes.text(0, len(order) - 0.45, "the same as LoRA", ha="center", va="bottom", fontsize="small", color=GREY)
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlabel("ahead of LoRA of rank 8, in % of the task gain")
        axes.legend(loc="upper left", fontsize="small", frameon=False)
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    said = f"Each row says how far an arm ends ahead of LoRA at its best rate, for {spoken_worlds(worlds)}"
    return f"{title} {said}. Bars are {100 * CONFIDENCE:g} % intervals; the band is ±{100 * MARGIN:g} %."

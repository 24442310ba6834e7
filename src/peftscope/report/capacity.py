"""The table, figure and sentence of an experiment on what is stored of random strings. No torch."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from peftscope.analysis.capacity import ARM, breaks, stored_bits
from peftscope.analysis.collect import read_runs
from peftscope.analysis.stats import CONFIDENCE
from peftscope.layout import results_folder
from peftscope.report.looks import DASHES, arm_looks
from peftscope.report.plots import beside, draw_figure
from peftscope.report.tables import write_table
from peftscope.words import formatted, interval

OUTSIDE = "outside the sizes that were tried"
SENTENCE = (
    "Points are runs, lines their means. On the grey line everything is stored. Diamonds are the breaks with their "
    f"{100 * CONFIDENCE:g} % intervals, where the sizes enclose them: beyond a break more is given and no "
    "more is stored."
)
"""The caption of the figure."""


def draw_capacity(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Draws the bits stored over the bits given, with a line per arm and its break, beside storing everything."""
    if table.empty:
        return
    found = breaks(table).set_index(ARM)
    groups = list(table.groupby(ARM, sort=False))
    styles = dict(zip(table["model"].unique(), DASHES, strict=False))
    drawn = arm_looks({f"{model}: {arm}": arm for (model, arm), _ in groups})
    for (model, arm), own in groups:
        colour, marker, _ = drawn[f"{model}: {arm}"]
        mean = own.groupby("given")["stored"].mean()
        axes.plot(mean.index, mean, styles.get(model, "-"), color=colour, label=f"{model}: {arm}")
        axes.plot(own["given"], own["stored"], marker, ms=4, color=colour, alpha=0.6)
        if (model, arm) in found.index and found.loc[(model, arm), "is_bounded"]:
            row = found.loc[(model, arm)]
            reach = [[row["break_bits"] - row["break_low"]], [row["break_high"] - row["break_bits"]]]
            axes.errorbar(row["break_bits"], row["plateau_bits"], xerr=reach, fmt="D", ms=7, capsize=4, color=colour)
    ends = [table["given"].min(), table["given"].max()]
    axes.plot(ends, ends, color="0.4", linewidth=0.9, zorder=0)
    axes.set(xscale="log", xlabel="bits given", ylabel="bits stored", title="What is stored")
    axes.set_yscale("symlog", linthresh=ends[0] / 10)
    axes.set_ylim(bottom=0)
    beside(axes)


def readable_breaks(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the breaks as text for people."""
    rows = [
        {
            "arm": f"{row['model']}: {row['arm']}",
            "trained parameters": formatted(row["parameters"], ",.0f"),
            "runs": str(row["runs"]),
            "break (bits given)": (
                interval(row["break_bits"], row["break_low"], row["break_high"], "{:,.0f}".format)
                if row["is_bounded"]
                else OUTSIDE
            ),
            "for each parameter": formatted(row["break_per_parameter"], ".2f") if row["is_bounded"] else "-",
            "stored of what is given, up to there": formatted(row["followed_share"], ".0%"),
            "most bits stored": formatted(row["most_stored"], ",.0f"),
            "for each parameter, at most": formatted(row["most_stored"] / row["parameters"], ".2f"),
            "times that each string was seen at the break": formatted(row["exposures_at_break"], ",.0f"),
            # In this order, a share that was not measured stays none.
            "stored of strings not trained on": formatted(max(row["largest_fresh_share"], 0.0), ".0%"),
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=None if rows else ["arm"])


def capacity_answer(experiment: str) -> str:
    """Returns what an experiment's results say of the breaks; empty without any."""
    table = breaks(stored_bits(read_runs(experiment)))
    bounded = table[table["is_bounded"].astype(bool)]
    if bounded.empty:
        return ""
    each = bounded["break_per_parameter"]
    span = f"{each.min():.2f}" if len(bounded) == 1 else f"{each.min():.2f} to {each.max():.2f}"
    stored = bounded["followed_share"]
    outside = table.loc[~table["is_bounded"].astype(bool), "arm"]
    return (
        f"Adapters store at least {100 * stored.min():.0f} % of the random strings that they are given, until these "
        f"hold {span} bits for each trained parameter ({'; '.join(bounded['arm'])}), and hardly more beyond that."
        + (f" Outside the sizes that were tried: {'; '.join(outside)}." if len(outside) else "")
    )


def write_capacity(experiment: str) -> None:
    """Writes the stored bits of each run (csv) and the breaks (csv, html), and draws both."""
    table = stored_bits(read_runs(experiment))
    found = breaks(table)
    write_table(experiment, "stored", table)
    write_table(experiment, "capacity", found, readable_breaks(found))
    path = results_folder(experiment) / "figures" / "capacity.svg"
    draw_figure(path, lambda axes: draw_capacity(axes, table))

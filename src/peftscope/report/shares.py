"""The figure of a study of ranks, alphas or dimensions: what each keeps of full fine-tuning's gain, and its best rate.

No torch.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator

from peftscope.analysis.compare import MARGIN
from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import HELDOUT, StudyResults
from peftscope.planning.experiment import A_A, VARIED
from peftscope.report.looks import arm_looks
from peftscope.report.plots import plain_ticks
from peftscope.report.svg import INK
from peftscope.words import listed


def share_table(study: StudyResults, field: str) -> pd.DataFrame:
    """Returns one row for each tuned arm of a method with several values of a field, by method and value.

    ``share`` is what it gains on the task over what full fine-tuning gains, or the reference in a study without it.
    ``low`` and ``high`` bound its interval over pairs of seeds. ``is_same`` says whether the two are the same within
    the margin. ``is_whole`` marks the reference itself. Empty without a task gain.
    """
    if math.isnan(study.yardstick):
        return pd.DataFrame(columns=["method", field])
    whole = study.whole
    gain, rows = _gain(study, whole), []
    # Arms that differ in nothing but the field, or all tuned ones without the study's file.
    groups = study.settings.levels(field) if study.settings else [[arm for arm in study.arms if study.rate(arm).curve]]
    for arm in [arm for group in groups for arm in group if arm in study.arms]:
        runs = study.arm_runs(arm)
        if arm.endswith(A_A) or runs[field].isna().any():
            continue
        difference = study.difference(arm, whole) if arm != whole else None
        ahead = (difference.mean, *difference.interval()) if difference else (0.0, 0.0, 0.0)
        row = {
            "arm": arm,
            "method": str(runs["label"].iloc[0]),
            field: runs[field].iloc[0],
            "rate": study.rate(arm).best,
            "is_same": difference is None or difference.is_same,
            "is_whole": difference is None,
        }
        rows.append(row | {name: 1 + by / gain for name, by in zip(("share", "low", "high"), ahead, strict=True)})
    table = pd.DataFrame(rows, columns=None if rows else ["method", field]).sort_values(["method", field])
    return table[table.groupby("method")[field].transform("nunique") > 1].reset_index(drop=True)


def _varied(study: StudyResults) -> str:
    """Returns the field that a study varies, or the rank."""
    return (study.settings.varied if study.settings else None) or VARIED[0]


def arms_shown(study: StudyResults) -> set[str]:
    """Returns the arms that the figure shows: the points of its lines, and the whole."""
    table = share_table(study, _varied(study))
    return {study.whole, *(table["arm"] if len(table) else ())}


def _named(study: StudyResults, table: pd.DataFrame) -> str:
    """Returns the name of the arm whose gain is the whole: that of its line if it is a point of one, or its label."""
    lines = list(table.loc[table["is_whole"], "method"])
    return lines[0] if lines else study.labels[study.whole]


def _gain(study: StudyResults, arm: str) -> float:
    """Returns what the task teaches an arm, in nats per token: the yardstick is that of the control's own arm."""
    measured = next(arm for control, arm in study.controls if control == "shuffled-labels")
    return study.yardstick + (study.difference(arm, measured).mean if arm != measured else 0.0)


def draw_shares(axes: plt.Axes, experiment: str) -> None:
    """Draws the share of full fine-tuning's gain over a field, with the loss on the right, and beneath the rates."""
    study = StudyResults(experiment)
    field = _varied(study)
    table, whole = share_table(study, field), study.whole
    if table.empty:
        return
    grid = axes.figure.add_gridspec(3, 1)
    axes.set_subplotspec(grid[:2])
    beneath = axes.figure.add_subplot(grid[2], sharex=axes)
    styles = arm_looks({name: name for name in table["method"].unique()})
    for name, rows in table.groupby("method", sort=False):
        line = styles[str(name)].line
        reach = 100 * np.abs(rows[["low", "high"]].to_numpy().T - rows["share"].to_numpy())
        axes.errorbar(rows[field], 100 * rows["share"], yerr=reach, capsize=3, label=str(name), **line)
        beneath.plot(rows[field], rows["rate"], **line)
    label = _named(study, table)
    colour = arm_looks({whole: label})[whole].colour
    gain, loss = _gain(study, whole), float(study.arm_runs(whole)[HELDOUT].mean())
    axes.secondary_yaxis(
        "right", functions=(lambda share: loss + (1 - share / 100) * gain, lambda nll: 100 * (1 - (nll - loss) / gain))
    ).set_ylabel("held-out NLL (nats per token)")
    # The whole may be a point of a line, which then has its name.
    axes.axhline(100, color=colour, linewidth=1.2, label=None if label in styles else label)
    for side in (-1, 1):
        axes.axhline(100 * (1 + side * MARGIN), color=INK, linestyle="--", linewidth=0.9)
    beneath.axhline(study.rate(whole).best, color=colour, linewidth=1.2)
    axes.set_xscale("log")
    values = sorted(set(table[field]))
    beneath.set_xticks(values, [f"{value:,g}" for value in values])
    beneath.minorticks_off()
    beneath.set_yscale("log")
    beneath.margins(y=0.15)  # else marks at the ends are cut
    plain_ticks(beneath.yaxis)
    beneath.yaxis.set_minor_locator(LogLocator(subs=(3,)))  # a low axis has room for no more
    axes.tick_params(labelbottom=False)
    axes.set(ylabel=f"gain (% of {label}'s)", title=f"What each {field} keeps, at its own best learning rate")
    beneath.set(xlabel=field, ylabel="learning rate")
    handles = axes.get_legend_handles_labels()
    beneath.legend(*handles, loc="upper center", bbox_to_anchor=(0.5, -0.4), ncols=4, frameon=False, fontsize=9)


def shares_sentence(experiment: str) -> str:
    """Returns what the figure says: the share at each value, and which values are the same as the whole."""
    study = StudyResults(experiment)
    field = _varied(study)
    table, said = share_table(study, field), []
    if table.empty:
        return "The task gain is not known, so that no share of it can be told."
    at = [f" at {field} {value:,g}" for value in table.loc[table["is_whole"], field]]
    whole = _named(study, table) + "".join(at)
    for name, rows in table.groupby("method", sort=False):
        each = zip(rows[field], rows["share"], strict=True)
        shares = listed([f"{100 * share:.1f} % at {field} {value:,g}".replace("-", "−") for value, share in each])
        same = rows.loc[rows["is_same"] & ~rows["is_whole"], field]
        shown = listed([f"{value:,g}" for value in same])
        same_as = f"the same as {whole} within {100 * MARGIN:g} %"
        same_as = f"At {field} {shown} it is {same_as}" if shown else f"None of these {field}s is shown to be {same_as}"
        spread = f"within a factor of {round(rows['rate'].max() / rows['rate'].min(), 1):,g}"
        gain = f"Of what {whole} gains on the task, {name} reaches {shares}."
        if rows["share"].min() < 0:
            gain += " Below zero it ends worse than training on shuffled answers."
        said.append(f"{gain} {same_as}. The chosen rates of these {field}s lie {spread}.")
    bars = f"Bars are {100 * CONFIDENCE:g} % intervals over pairs of seeds, dashed lines the margin."
    return " ".join([*said, bars])

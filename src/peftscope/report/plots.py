"""Draws figures with seaborn from ``runs.csv`` and ``losses.csv``. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from peftscope.analysis.collect import read_runs
from peftscope.errors import InputError, Problem, shown
from peftscope.layout import results_folder
from peftscope.report import tables
from peftscope.report.looks import BLUE, GREY, SKY, Look, looks
from peftscope.report.svg import INK, OWN_COLOURS, STYLE, svg_of
from peftscope.words import MIB

PHASES = {"load": "load and initialise", "train": "train", "evaluate": "evaluate"}
RANGE = {"color": INK, "linewidth": 1.2}
"""The style of a line from the lowest to the highest of several runs."""
MOST_TICKS = 12
"""The most rungs of a ladder that an axis labels one by one."""
LABEL_WIDTH = 45
"""The most characters in a line of a variant's name."""
INCHES_A_NAME, FITTING_NAMES, FITTING_ROWS = 0.27, 12, 4
"""The height of a line of text, and how many names on the vertical axis and rows of a legend need no more of it."""
LEGEND_INCHES = 0.5
"""From the axes to the legend below them, past the ticks and the label."""
MOST_POINTS = 3000
"""The most points that a figure draws one by one."""
LOSS = "held-out NLL (nats per response token)"


def variant_looks(runs: pd.DataFrame) -> dict[str, Look]:
    """Returns how each variant of ``runs`` is drawn."""
    return looks(dict(zip(runs["variant"], runs["label"].astype(str), strict=True)))


def write_figures(experiment: str) -> None:
    """Draws the figures of an experiment, with one for each field that a ladder varies."""
    runs = read_runs(experiment)
    losses = pd.read_csv(results_folder(experiment) / "losses.csv")
    folder = results_folder(experiment) / "figures"
    draw_figure(folder / "pareto.svg", lambda axes: draw_pareto(axes, runs))
    draw_figure(folder / "memory.svg", lambda axes: draw_memory(axes, runs))
    draw_figure(folder / "throughput.svg", lambda axes: draw_throughput(axes, runs))
    draw_figure(folder / "losses.svg", lambda axes: draw_losses(axes, runs, losses))
    draw_figure(folder / "prediction.svg", lambda axes: draw_prediction(axes, runs))
    for field in tables.ladders(runs):
        draw_figure(folder / f"ladder-{field}.svg", partial(draw_ladder, runs=runs, field=field))


def draw_figure(path: Path, draw: Callable[[plt.Axes], None]) -> None:
    """Draws on new axes, and writes them as SVG."""
    with new_figure(path, 7.0, 4.6) as axes:
        draw(axes)
        axes.figure.set_figheight(axes.figure.get_figheight() + _more_height(axes))
        if not axes.has_data():
            axes.text(0.5, 0.5, "no finished run has measured this", ha="center", va="center", transform=axes.transAxes)


@contextmanager
def new_figure(path: Path, width: float, height: float, columns: int = 1, **grid: Any) -> Iterator[Any]:
    """Yields the axes of a new figure, and then writes it. An SVG follows the colours of its page, a PNG is on white.

    ``columns`` axes stand beside each other, and ``grid`` goes to ``plt.subplots``, ``nrows`` too. Sizes are in inches.

    Raises:
        InputError: The path ends as no picture does.
    """
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)
    with plt.rc_context(STYLE if path.suffix == ".svg" else {}):
        figure, axes = plt.subplots(ncols=columns, figsize=(width, height), layout="constrained", **grid)
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix and path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
            plt.close(figure)
            raise InputError(Problem(str(path), f"no kind of picture (got {shown(path.suffix)})", "use .png or .svg"))
        if path.suffix == ".svg":
            opening, _, rest = svg_of(figure, path.stem).partition(">")
            path.write_text(f"{opening}>{OWN_COLOURS}{rest}")
            return
        # Without a software version in the file, the same data give the same bytes.
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)


def _more_height(axes: plt.Axes) -> float:
    """Returns the inches that a figure lacks for its names: those along the vertical axis, and those of its legend."""
    legend = axes.get_legend()
    rows = math.ceil(len(legend.get_texts()) / legend._ncols) if legend else 0
    return INCHES_A_NAME * (max(0, len(axes.get_yticks()) - FITTING_NAMES) + max(0, rows - FITTING_ROWS))


def _with_names(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows with a column ``variant``, which is only the method if there are too many variants."""
    names = runs["label"] if tables.is_crowded(runs) else tables.variants(runs)
    return runs.assign(variant=names.map(lambda name: fill(name, LABEL_WIDTH)))


def draw_pareto(axes: plt.Axes, runs: pd.DataFrame) -> None:
    """Draws held-out loss against the memory peak of training, with a point per variant and bars over seeds.

    If there are too many variants to label, each point looks as its method does. Hollow points are predicted peaks.
    """
    methods = tables.method_summary(runs)
    if methods.empty:
        return
    crowded = tables.is_crowded(methods)
    trained = tables.with_peaks(_with_names(methods)).dropna(subset=["heldout_nll", "peak"])
    styles = variant_looks(trained)
    for variant, rows in trained.groupby("variant", sort=False):
        colour, marker, _ = styles[str(variant)]
        fill_colour = "none" if rows["is_predicted"].any() else colour
        named = {"label": variant, "color": colour, "mfc": fill_colour}
        if crowded:
            axes.plot(rows["peak"] / MIB, rows["heldout_nll"], marker, ms=5, alpha=0.6, **named)
            continue
        (row,) = rows.to_dict("records")
        if row["n"] != tables.FEWEST_FOR_MEANS - 1:
            reach = None
            if row["n"] >= tables.FEWEST_FOR_MEANS:
                mean, low, high = (row[f"heldout_nll{end}"] for end in ("", "_low", "_high"))
                reach = [[mean - low], [high - mean]]
            axes.errorbar(row["peak"] / MIB, row["heldout_nll"], yerr=reach, fmt=marker, ms=8, capsize=3, **named)
        else:  # two runs are shown as they are
            ends = [row["heldout_nll_least"], row["heldout_nll_most"]]
            axes.plot([row["peak"] / MIB] * 2, ends, marker, ms=7, alpha=0.8, **named)
    axes.set(xscale="log", xlabel="peak of live tensors in training (MiB)", ylabel=LOSS, title="Quality against memory")
    plain_ticks(axes.xaxis)
    # Intervals of few seeds are many times wider than the spread of the means, so they may leave the frame.
    points = trained[["heldout_nll", "heldout_nll_least", "heldout_nll_most"]].stack()
    if len(points) and not crowded:
        spread = float(points.max() - points.min()) or float(points.max()) / 10
        axes.set_ylim(float(points.min()) - spread / 3, float(points.max()) + spread / 3)
    beside(axes)


def draw_memory(axes: plt.Axes, runs: pd.DataFrame) -> None:
    """Draws the peak of live tensors by method and phase. A bar for several variants also shows their range.

    If no run of a variant was probed, the peak of its training is the predicted one, hatched.
    """
    grid = _with_names(tables.grid_runs(runs))
    columns = {f"{phase}_peak_tensor_bytes": label for phase, label in PHASES.items()}
    unprobed = grid.groupby("variant")["train_peak_tensor_bytes"].transform("count") == 0 if len(grid) else None
    if tables.PREDICTED_PEAK in grid and unprobed is not None and unprobed.any():
        grid = grid.assign(**{tables.PREDICTED_PEAK: grid[tables.PREDICTED_PEAK].where(unprobed)})
        columns[tables.PREDICTED_PEAK] = "train, predicted"
    long = grid.melt(id_vars="variant", value_vars=list(columns), var_name="phase", value_name="bytes")
    long = long.dropna(subset=["bytes"])
    if long.empty:
        return
    long = long.assign(phase=long["phase"].map(columns), mebibytes=long["bytes"] / MIB)
    phases = [phase for phase in columns.values() if (long["phase"] == phase).any()]
    sns.barplot(
        long,
        x="mebibytes",
        y="variant",
        hue="phase",
        hue_order=phases,
        errorbar=("pi", 100) if tables.is_crowded(tables.grid_runs(runs)) else None,
        err_kws=RANGE,
        linewidth=0,
        ax=axes,
        palette=dict(zip(columns.values(), (GREY, BLUE, SKY, BLUE), strict=False)),
    )
    for phase, bars in zip(phases, axes.containers, strict=False):
        for bar in bars if phase.endswith("predicted") else ():
            bar.set(facecolor="none", edgecolor=BLUE, linewidth=1, hatch="///")
    axes.set(xlabel="peak of live tensors (MiB)", ylabel="", title="Memory by phase")
    beside(axes)


def draw_throughput(axes: plt.Axes, runs: pd.DataFrame) -> None:
    """Draws tokens per second by method: its runs as points, and their mean as a line from three runs on."""
    grid = _with_names(tables.grid_runs(runs)).dropna(subset=["tokens_per_second"])
    styles = variant_looks(grid) if len(grid) else {}
    for place, (variant, rows) in enumerate(grid.groupby("variant", sort=False)):
        colour, marker, _ = styles[str(variant)]
        speeds = rows["tokens_per_second"]
        axes.plot([0, speeds.max()], [place, place], color=colour, linewidth=1, alpha=0.5)
        axes.plot(speeds, [place] * len(speeds), marker, ms=7, color=colour, alpha=max(0.3, 1 / len(speeds) ** 0.5))
        if len(speeds) >= tables.FEWEST_FOR_MEANS:
            axes.plot([speeds.mean()] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    if len(grid):
        names = grid["variant"].unique()  # in the order of the groups
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
    axes.set(xlabel="tokens per second, without padding", ylabel="", title="Throughput of training")


def draw_losses(axes: plt.Axes, runs: pd.DataFrame, losses: pd.DataFrame) -> None:
    """Draws the training loss by step: the mean of a variant's runs with their range, or two runs as two lines.

    If there are too many variants to label, a line is the median of a method's runs, and the band their middle half.
    """
    grid = _with_names(tables.grid_runs(runs))
    curves = losses.merge(grid[["run_id", "variant"]], on="run_id").dropna(subset=["nll_nats_per_token"])
    if curves.empty:
        return
    crowded, styles = tables.is_crowded(tables.grid_runs(runs)), variant_looks(grid)
    for variant, rows in curves.groupby("variant", sort=False):
        look = styles[str(variant)]
        wide = rows.pivot_table(index="step", columns="run_id", values="nll_nats_per_token")
        line = look.line | {"markersize": 5, "linewidth": 1.3, "markevery": max(1, len(wide) // 6)}
        if wide.shape[1] < tables.FEWEST_FOR_MEANS:
            for column, label in zip(wide, [variant, None], strict=False):
                axes.plot(wide.index, wide[column], label=label, **line)
            continue
        low, high = (wide.quantile(share, axis=1) for share in ((0.25, 0.75) if crowded else (0, 1)))
        axes.fill_between(wide.index, low, high, color=look.colour, alpha=0.15)
        axes.plot(wide.index, wide.median(axis=1) if crowded else wide.mean(axis=1), label=variant, **line)
    axes.set(yscale="log", xlabel="step", ylabel="training NLL (nats per response token)", title="Loss curves")
    plain_ticks(axes.yaxis)
    beside(axes)


def draw_prediction(axes: plt.Axes, runs: pd.DataFrame) -> None:
    """Draws measured against predicted peaks, with a point per run and peak. On the line they are equal."""
    found = tables.predictions(runs)
    # On a CPU, the peak of training equals the peak of one of its phases.
    found = found[(found["device"] != "cpu") | (found["peak"] != "training")]
    if found.empty:
        return
    styles = looks({str(label): str(label) for label in found["label"]})
    # Of very many points, a picture of them is smaller than all of them.
    many = len(found) > MOST_POINTS
    for label, rows in found.groupby("label", sort=False):
        colour, marker, _ = styles[str(label)]
        sizes = (rows["predicted_bytes"] / MIB, rows["measured_bytes"] / MIB)
        axes.plot(*sizes, marker, ms=6, color=colour, alpha=0.7, label=label, rasterized=many)
    ends = [0.8 * found["predicted_bytes"].min() / MIB, 1.25 * found["predicted_bytes"].max() / MIB]
    axes.plot(ends, ends, color=GREY, linewidth=0.9, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="predicted peak (MiB)", ylabel="measured peak (MiB)", title="Predicted and measured memory")
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    beside(axes)


def beside(axes: plt.Axes) -> None:
    """Puts the legend below the axes, where it hides no point and leaves the figure its width on a phone."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    columns = 2 if max(map(len, labels)) > LABEL_WIDTH / 2 else 4
    below = axes.transAxes + mpl.transforms.ScaledTranslation(0, -LEGEND_INCHES, axes.figure.dpi_scale_trans)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    axes.legend(title="", fontsize=9, ncols=columns, frameon=False, **place)


def plain_ticks(axis: mpl.axis.Axis) -> None:
    """Writes the ticks of a logarithmic axis as plain numbers, of the minor ones no more than have room."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(_FewNumbers(minor_thresholds=(2, 0.4)))
    axis.set_tick_params(which="minor", labelsize=7)


class _FewNumbers(mpl.ticker.LogFormatter):
    """Labels the ticks that matplotlib would, with plain numbers."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Returns a tick's label, which may be empty."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def draw_ladder(axes: plt.Axes, runs: pd.DataFrame, field: str) -> None:
    """Draws held-out loss along the ladders over one field, with bars over seeds if there are several."""
    ladder = tables.ladder_summary(runs)
    ladder = ladder[ladder["field"] == field].dropna(subset=["heldout_nll"])
    if ladder.empty:
        return
    loss = LOSS.replace("held-out NLL", "NLL of trained items") if tables.is_judged_on_training(runs) else LOSS
    numeric = pd.to_numeric(ladder["value"], errors="coerce")
    is_number = bool(numeric.notna().all())
    styles = looks(dict(zip(ladder["line"], ladder["label"], strict=True)))
    for line, rungs in ladder.assign(x=numeric if is_number else ladder["value"]).groupby("line", sort=False):
        # Names have no natural order, so they are sorted by size and not joined by a line.
        rungs = rungs.sort_values("x" if is_number else "trained_parameters")
        losses, several = rungs["heldout_nll"].astype(float), rungs["n"] >= tables.FEWEST_FOR_MEANS
        reach = (losses - rungs["heldout_nll_low"], rungs["heldout_nll_high"] - losses)
        colour, marker, dash = styles[str(line)]
        style = {"fmt": marker, "linestyle": dash if is_number else "none", "color": colour, "capsize": 3}
        axes.errorbar(rungs["x"], losses, yerr=[side.where(several).fillna(0) for side in reach], label=line, **style)
        for end in ("heldout_nll_least", "heldout_nll_most"):
            pairs = rungs[rungs["n"] == tables.FEWEST_FOR_MEANS - 1]
            axes.plot(pairs["x"], pairs[end].astype(float), marker, ms=4, color=colour)
    if is_number and (numeric > 0).all():
        axes.set_xscale("log", base=2)
        rungs_at = sorted(set(numeric))
        if len(rungs_at) <= MOST_TICKS:
            axes.set_xticks(rungs_at, [f"{value:g}" for value in rungs_at])
            axes.minorticks_off()
        else:
            axes.set_xscale("log")
            plain_ticks(axes.xaxis)
    axes.set(xlabel=field.replace("_", " "), ylabel=loss, title=f"Ladder over {field.replace('_', ' ')}")
    beside(axes)

"""Draws figures with seaborn from ``runs.csv`` and ``losses.csv``. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import fill

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from peftscope.analysis.collect import read_runs
from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.layout import results_folder
from peftscope.methods import METHODS
from peftscope.report.tables import (
    MIB,
    grid_runs,
    is_crowded,
    ladder_summary,
    method_summary,
    predictions,
    variants,
)

PHASES = {"load": "load and initialise", "train": "train", "evaluate": "evaluate"}
RANGE = {"color": "0.3", "linewidth": 1.2}
"""The style of a line from the lowest to the highest of several runs."""
MOST_TICKS = 12
"""The most rungs of a ladder that an axis labels one by one."""
LABEL_WIDTH = 45
"""The most characters in a line of a variant's name."""
LABELS = {
    "heldout_nll": "held-out NLL (nats per response token)",
    "train_peak": "peak of live tensors in training (MiB)",
    "tokens": "tokens per second, without padding",
}


def method_colours() -> dict[str, tuple[float, float, float]]:
    """Returns the colour of each method by its label."""
    labels = [cls.label for cls in METHODS.values()]
    return dict(zip(labels, [*sns.color_palette("colorblind"), *sns.color_palette("dark")], strict=False))


def palette(runs: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    """Returns the colour of each variant in ``runs``. If every method has one variant, that is the method's colour."""
    own = method_colours()
    names = list(dict.fromkeys(runs["variant"]))
    if len(names) == runs["label"].nunique() and set(runs["label"]) <= own.keys():
        return {name: own[str(label)] for name, label in zip(runs["variant"], runs["label"], strict=True)}
    return dict(zip(names, sns.color_palette("husl", len(names)), strict=True))


def write_figures(experiment: str) -> None:
    """Draws the figures of an experiment, except its ladders."""
    runs = read_runs(experiment)
    losses = pd.read_csv(results_folder(experiment) / "losses.csv")
    folder = results_folder(experiment) / "figures"
    draw_figure(folder / "pareto.png", lambda axes: draw_pareto(axes, runs))
    draw_figure(folder / "memory.png", lambda axes: draw_memory(axes, runs))
    draw_figure(folder / "throughput.png", lambda axes: draw_throughput(axes, runs))
    draw_figure(folder / "losses.png", lambda axes: draw_losses(axes, runs, losses))
    draw_figure(folder / "prediction.png", lambda axes: draw_prediction(axes, runs))


def write_ladder(experiment: str, field: str) -> None:
    """Draws the ladders over one field.

    Raises:
        InputError: Runs have no such field.
    """
    runs = read_runs(experiment)
    if field not in runs:
        raise InputError(Problem("field", f"no such field (got {shown(field)})", close_match(field, runs.columns)))
    draw_figure(
        results_folder(experiment) / "figures" / f"ladder-{field}.png", lambda axes: draw_ladder(axes, runs, field)
    )


def draw_figure(path: Path, draw: Callable[[plt.Axes], None]) -> None:
    """Draws on new axes, and writes them as PNG."""
    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.9)
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    draw(axes)
    if not axes.has_data():
        axes.text(0.5, 0.5, "no finished run has measured this", ha="center", va="center", transform=axes.transAxes)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a software version in the file, the same data give the same bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _with_names(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows with a column ``variant``, which is only the method if there are too many variants."""
    names = runs["label"] if is_crowded(runs) else variants(runs)
    return runs.assign(variant=names.map(lambda name: fill(name, LABEL_WIDTH)))


def draw_pareto(axes: plt.Axes, runs: pd.DataFrame) -> None:
    """Draws held-out loss against the memory peak of training, with a point per variant and bars over seeds.

    If there are too many variants to label, each point has the colour of its method.
    """
    methods = method_summary(runs)
    if methods.empty:
        return
    crowded = is_crowded(methods)
    trained = _with_names(methods).dropna(subset=["heldout_nll", "train_peak_bytes"])
    colours = palette(trained)
    for variant, rows in trained.groupby("variant", sort=False) if crowded else []:
        axes.plot(
            rows["train_peak_bytes"] / MIB,
            rows["heldout_nll"],
            "o",
            ms=4,
            color=colours[variant],
            label=variant,
            alpha=0.5,
        )
    for row in () if crowded else trained.itertuples():
        bars = (
            None
            if pd.isna(row.heldout_nll_low)
            else [[row.heldout_nll - row.heldout_nll_low], [row.heldout_nll_high - row.heldout_nll]]
        )
        axes.errorbar(
            row.train_peak_bytes / MIB,
            row.heldout_nll,
            yerr=bars,
            fmt="o",
            ms=8,
            capsize=3,
            color=colours[row.variant],
            label=row.variant,
        )
    seeds = _with_names(grid_runs(runs)).dropna(subset=["heldout_nll_nats_per_token", "train_peak_tensor_bytes"])
    for row in () if crowded else seeds.itertuples():
        axes.plot(
            row.train_peak_tensor_bytes / MIB,
            row.heldout_nll_nats_per_token,
            ".",
            ms=5,
            color=colours.get(row.variant),
            alpha=0.6,
        )
    axes.set(xscale="log", xlabel=LABELS["train_peak"], ylabel=LABELS["heldout_nll"], title="Quality against memory")
    plain_ticks(axes.xaxis)
    # Intervals of two or three seeds are many times wider than the spread of points, so they may leave the frame.
    points = seeds["heldout_nll_nats_per_token"] if len(seeds) else trained["heldout_nll"]
    if len(points) and not crowded:
        spread = float(points.max() - points.min()) or float(points.max()) / 10
        axes.set_ylim(float(points.min()) - spread, float(points.max()) + spread)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def draw_memory(axes: plt.Axes, runs: pd.DataFrame) -> None:
    """Draws the peak of live tensors by method and phase. A bar for several variants also shows their range."""
    grid = _with_names(grid_runs(runs))
    columns = {f"{phase}_peak_tensor_bytes": label for phase, label in PHASES.items()}
    long = grid.melt(id_vars="variant", value_vars=list(columns), var_name="phase", value_name="bytes").dropna(
        subset=["bytes"]
    )
    if long.empty:
        return
    long = long.assign(phase=long["phase"].map(columns), mebibytes=long["bytes"] / MIB)
    sns.barplot(
        long,
        x="mebibytes",
        y="variant",
        hue="phase",
        hue_order=[phase for phase in PHASES.values() if (long["phase"] == phase).any()],
        errorbar=("pi", 100) if is_crowded(grid_runs(runs)) else None,
        err_kws=RANGE,
        ax=axes,
        palette="crest",
    )
    axes.set(xlabel="peak of live tensors (MiB)", ylabel="", title="Memory by phase")
    axes.legend(title="", fontsize=8)


def draw_throughput(axes: plt.Axes, runs: pd.DataFrame) -> None:
    """Draws tokens per second by method, with a point per run. A bar for several variants shows their range instead."""
    grid = _with_names(grid_runs(runs)).dropna(subset=["tokens_per_second"])
    if grid.empty:
        return
    crowded = is_crowded(grid_runs(runs))
    sns.barplot(
        grid,
        x="tokens_per_second",
        y="variant",
        hue="variant",
        errorbar=("pi", 100) if crowded else None,
        err_kws=RANGE,
        ax=axes,
        palette=palette(grid),
        legend=False,
        alpha=0.6,
    )
    if not crowded:
        sns.stripplot(grid, x="tokens_per_second", y="variant", color="0.2", size=4, jitter=False, ax=axes)
    axes.set(xlabel=LABELS["tokens"], ylabel="", title="Throughput of training")


def draw_losses(axes: plt.Axes, runs: pd.DataFrame, losses: pd.DataFrame) -> None:
    """Draws the training loss by step, with a line per variant and a band over its seeds.

    If there are too many variants to label, a line is the median of a method's runs, and the band their middle half.
    """
    grid = _with_names(grid_runs(runs))
    over = {"estimator": "median", "errorbar": ("pi", 50)} if is_crowded(grid_runs(runs)) else {"errorbar": ("pi", 100)}
    curves = losses.merge(grid[["run_id", "variant"]], on="run_id").dropna(subset=["nll_nats_per_token"])
    if curves.empty:
        return
    sns.lineplot(curves, x="step", y="nll_nats_per_token", hue="variant", palette=palette(grid), ax=axes, **over)
    axes.set(yscale="log", xlabel="step", ylabel="training NLL (nats per response token)", title="Loss curves")
    plain_ticks(axes.yaxis)
    axes.legend(title="", fontsize=8)


def draw_prediction(axes: plt.Axes, runs: pd.DataFrame) -> None:
    """Draws measured against predicted peaks, with a point per run and peak. On the line they are equal."""
    found = predictions(runs)
    # On a CPU, the peak of training equals the peak of one of its phases.
    found = found[(found["device"] != "cpu") | (found["peak"] != "training")]
    if found.empty:
        return
    found = found.assign(
        predicted=found["predicted_bytes"] / MIB, measured=found["measured_bytes"] / MIB, method=found["label"]
    )
    sns.scatterplot(
        found,
        x="predicted",
        y="measured",
        hue="method",
        style="peak",
        palette=method_colours() | {str(n): "0.4" for n in found["method"] if n not in method_colours()},
        s=55,
        alpha=0.7,
        ax=axes,
    )
    ends = [0.8 * found["predicted"].min(), 1.25 * found["predicted"].max()]
    axes.plot(ends, ends, color="0.4", linewidth=0.9, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(
        xlabel="predicted peak (MiB)",
        ylabel="measured peak (MiB)",
        title="Predicted and measured memory",
    )
    for axis in (axes.xaxis, axes.yaxis):
        plain_ticks(axis)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def plain_ticks(axis: mpl.axis.Axis) -> None:
    """Writes the ticks of a logarithmic axis as plain numbers."""
    for setter in (axis.set_major_formatter, axis.set_minor_formatter):
        setter(mpl.ticker.FormatStrFormatter("%g"))
    axis.set_tick_params(which="minor", labelsize=7)


def draw_ladder(axes: plt.Axes, runs: pd.DataFrame, field: str) -> None:
    """Draws held-out loss along one ladder, with bars over seeds if there are several."""
    ladder = ladder_summary(runs)
    ladder = ladder[ladder["field"] == field].dropna(subset=["heldout_nll"])
    if ladder.empty:
        return
    numeric = pd.to_numeric(ladder["value"], errors="coerce")
    is_number = bool(numeric.notna().all())
    for (_, label), rungs in ladder.assign(x=numeric if is_number else ladder["value"]).groupby(
        ["ladder", "label"], sort=False
    ):
        # Names have no natural order, so they are sorted by size and not joined by a line.
        rungs = rungs.sort_values("x" if is_number else "trained_parameters")
        bars = [
            (rungs["heldout_nll"] - rungs["heldout_nll_low"]).fillna(0),
            (rungs["heldout_nll_high"] - rungs["heldout_nll"]).fillna(0),
        ]
        axes.errorbar(
            rungs["x"],
            rungs["heldout_nll"].astype(float),
            yerr=bars,
            fmt="o-" if is_number else "o",
            capsize=3,
            label=label,
        )
    if is_number and (numeric > 0).all():
        axes.set_xscale("log", base=2)
        rungs_at = sorted(set(numeric))
        if len(rungs_at) <= MOST_TICKS:
            axes.set_xticks(rungs_at, [f"{value:g}" for value in rungs_at])
            axes.minorticks_off()
        else:
            axes.set_xscale("log")
            plain_ticks(axes.xaxis)
    axes.set(
        xlabel=field.replace("_", " "), ylabel=LABELS["heldout_nll"], title=f"Ladder over {field.replace('_', ' ')}"
    )
    axes.legend(title="", fontsize=8)

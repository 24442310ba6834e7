"""The figure and tables of what was measured on weights. No torch.

The figure shows how an update's energy is spread over its singular values or, where the method chose the ranks, which
they are against what each update is worth.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd

from peftscope.analysis.collect import read_runs
from peftscope.analysis.study import StudyResults
from peftscope.analysis.weights import after_training, read_weights, weights_folder
from peftscope.planning.cells import ARM
from peftscope.report.looks import GREY, MARKERS, SAFE_COLOURS, looks
from peftscope.report.plots import beside, plain_ticks
from peftscope.words import formatted

CONTROLS = {"gaussian_energy_": ("a Gaussian matrix", ":"), "grid_energy_": ("rounding to a 4-bit grid", "--")}
"""The noise beside the updates, by the beginning of its columns: its name and the style of its line."""

MEASURED = {
    "relative_size": ("size over the weight's", ".3g"),
    "rank_90": ("rank of 90 %", ".3g"),
    "stable_rank": ("stable rank", ".3g"),
    "amplification": ("amplification", ".3g"),
    "magnitude_change": ("change of magnitude", ".3g"),
    "direction_change": ("change of direction", ".3g"),
}
"""The columns of the table of updates, each with what it is called there, and its form."""
INTRUDERS = "intruders_50"
"""The leading singular vectors whose cosine with every pretrained one is below a half."""


def draw_updates(axes: plt.Axes, experiment: str) -> None:
    """Draws the share of an update's energy over its singular values, or the ranks that were kept over their worth."""
    table = _with_labels(experiment)
    (draw_worth if _has_worth(table) else draw_spectrum)(axes, table)


def _has_worth(table: pd.DataFrame) -> bool:
    return "worth" in table and bool(table["worth"].notna().any())


def _with_labels(experiment: str) -> pd.DataFrame:
    """Returns the matrices after the training, each with its method's label, and its variant's.

    In a study that is the arm, and runs of no arm are left out. Otherwise the rank tells variants apart.
    """
    runs = read_runs(experiment, weights_folder(experiment)).set_index("run_id")
    table = after_training(read_weights(experiment))
    arms = runs["comparisons"].str.extract(rf"\b{ARM}(\S+)")[0].dropna()
    if len(arms):
        names = arms.map(StudyResults(experiment).labels)
        table = table[table["run_id"].isin(arms.index)]
    else:
        ranks = "rank " + runs["rank"].map("{:g}".format) if "rank" in runs else runs["label"]
        several = ranks.groupby(runs["label"]).transform("nunique") > 1
        names = runs["label"].where(~several, runs["label"] + ", " + ranks)
    return table.assign(variant=table["run_id"].map(names), label=table["run_id"].map(runs["label"]))


def draw_spectrum(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Draws a line for each variant, the median over matrices and seeds, and dotted lines for noise of these shapes."""
    ranks = sorted(int(name.rpartition("_")[2]) for name in table if name.startswith("energy_"))
    variants = table.groupby("variant", sort=False)
    styles = looks({str(variant): str(rows["label"].iloc[0]) for variant, rows in variants})
    for variant, rows in variants:
        axes.plot(ranks, _shares(rows, "energy_", ranks), label=str(variant), **styles[str(variant)].line)
    for prefix, (name, style) in CONTROLS.items():
        if ranks and f"{prefix}{ranks[0]}" in table:
            axes.plot(ranks, _shares(table, prefix, ranks), linestyle=style, color=GREY, label=name)
    axes.axhline(0.9, color="0.6", linewidth=0.8)
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis)
    axes.set(xlabel="largest singular values of the update", ylabel="share of the update's energy", ylim=(0, 1.02))
    beside(axes)


def draw_worth(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Draws a point for each matrix, the mean over seeds: the rank that it kept over what its update is worth."""
    means = table.groupby(["module", "matrix"], sort=False)[["rank_kept", "worth"]].mean().reset_index()
    styles = zip(SAFE_COLOURS, MARKERS, strict=False)
    for (module, rows), (colour, marker) in zip(means.groupby("module", sort=False), styles, strict=False):
        axes.plot(rows["worth"], rows["rank_kept"], marker, ms=6, alpha=0.7, color=colour, label=str(module))
    # Straight below a power of ten: ticks at smaller ones would stand on each other.
    typical = max(float(means["worth"].abs().quantile(0.5)), 1e-6)
    axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(typical)))
    axes.set_xlabel("rise of the held-out loss without the update (nats per token)")
    axes.set_ylabel("rank kept, mean over seeds")
    beside(axes)


def _shares(rows: pd.DataFrame, prefix: str, ranks: list[int]) -> list[float]:
    """Returns the median share at each rank; a matrix whose smaller side is not larger has all of its energy there."""
    return [float(rows[f"{prefix}{rank}"].fillna(1.0).median()) for rank in ranks]


def updates_sentence(experiment: str) -> str:
    """Returns what the figure says in words: the rank that holds 90 % of the energy, by variant."""
    table = _with_labels(experiment)
    if _has_worth(table):
        runs = table.groupby("run_id")
        each = runs[["rank_kept", "worth"]].apply(lambda both: both.corr("spearman").iloc[0, 1])
        return (
            "A point is a matrix: the rank that it kept, over how much the held-out loss rises if its update alone is "
            f"set to zero; both are means over {len(each)} seeds. In a run, the two have a rank correlation of "
            f"{each.mean():.2f} over all matrices, on average."
        )
    ranks = table.groupby("variant", sort=False)["rank_90"].median()
    said = ", ".join(f"{rank:g} ({variant})" for variant, rank in ranks.items())
    noise = f" A random matrix needs {table['gaussian_rank_90'].median():g}." if len(table) else ""
    return (
        f"So many of an update's singular values hold 90 % of its energy: {said}.{noise} Lines are medians "
        "over matrices and seeds; grey ones are noise of the same shapes."
    )


def updates_table(experiment: str) -> pd.DataFrame:
    """Returns each variant's updates after the training: medians over matrices and seeds, and intruders per matrix."""
    groups = _with_labels(experiment).groupby("variant", sort=False)
    table = pd.DataFrame({"updates of": list(groups.groups), "runs": groups["run_id"].nunique().to_list()})
    for column, (name, form) in MEASURED.items():
        if column in groups.obj:
            table[name] = [formatted(value, form) for value in groups[column].median()]
    if INTRUDERS in groups.obj:
        table["intruders a matrix"] = [formatted(value, ".2f") for value in groups[INTRUDERS].mean()]
    return table


def cuts_table(experiment: str) -> pd.DataFrame:
    """Returns the mean held-out loss of each variant with its updates cut to a rank, in nats per token."""
    table, names = read_weights(experiment), _with_labels(experiment).groupby("run_id")["variant"].first()
    cuts = table[(table["kind"] == "cut") & table["run_id"].isin(names.index)]
    if cuts.empty:
        return pd.DataFrame()
    cuts = cuts.assign(variant=cuts["run_id"].map(names))
    losses = cuts.pivot_table(index="variant", columns="cut_rank", values="heldout_nll", sort=False)
    ranks = sorted(losses.columns)
    called = {rank: f"rank {rank:g}" for rank in ranks[:-1]} | {ranks[-1]: "not cut"}
    shown = pd.DataFrame({called[rank]: [formatted(loss, ".4f") for loss in losses[rank]] for rank in ranks})
    shown.insert(0, "updates of", list(losses.index))
    return shown

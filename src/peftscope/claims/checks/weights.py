"""Reads what was measured on the weights of a study's runs: updates, cut or whole, and their directions.

The weights themselves are not needed: a table of the study's results, or of the published ones, holds the measurements.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from peftscope.analysis.collect import paired
from peftscope.analysis.study import HELDOUT, StudyResults
from peftscope.analysis.weights import after_training, read_weights
from peftscope.claims.measurement import Measurement, NotRunError, Quantity, over_seeds, runs_of

PARTS = {"attention": "[qkvo]_proj", "feed-forward": "(gate|up|down)_proj"}
"""The modules of a block's two parts, as patterns."""


def update_rank(study: str, arm: str, over: float = 1, of_side: bool = False) -> Measurement:
    """Returns how many singular values hold 90 % of the energy of an update, in the median matrix; the mean over seeds.

    Args:
        over: What the number is divided by.
        of_side: Whether it is also divided by the matrix's smaller side.
    """
    results, table = _after(study, arm)
    side = table[["rows", "columns"]].min(axis="columns") if of_side else 1
    names = ("rank_90", "stable_rank", "gaussian_rank_90", "grid_rank_90", "gaussian_stable_rank")
    shown = [*filter(table.columns.__contains__, names), *(name for name in table if name.startswith("energy_"))]
    evidence: dict[str, Quantity] = {f"{name}, median matrix": float(table[name].median()) for name in shown}
    for part, modules in PARTS.items():
        evidence[f"rank_90 in {part}"] = float(table[table["module"].str.fullmatch(modules)]["rank_90"].median())
    evidence |= _along(results, study, arm, "rank_90")
    ranks = (table["rank_90"] / side / over).groupby(table["seed"]).median()
    return over_seeds(results, ranks, evidence, table["run_id"])


def rank_growth(study: str, arm: str) -> Measurement:
    """Returns the rank of an arm's updates after training over that at the first kept step, in the median matrix.

    The rank is the number of singular values that hold 90 % of the energy. The mean is over seeds.
    Source: Biderman et al. 2024, arXiv 2405.09673, section 4.6.
    """
    results, last = _after(study, arm)
    points = _points(study, last)
    first = points[points["step"] == points["step"].min()]
    if first["step"].min() == last["step"].max():
        raise NotRunError(f"the study `{study}` has kept the weights of `{arm}` at one step only")
    ranks = [part.groupby("run_id")["rank_90"].median() for part in (first, last)]
    return over_seeds(results, ranks[1] / ranks[0], _along(results, study, arm, "rank_90"), last["run_id"])


def rank_across_parts(study: str, arm: str, part: str, over: str) -> Measurement:
    """Returns the rank of the updates in one part of the blocks over that in the other; the mean over seeds.

    A part is ``attention`` or ``feed-forward``. The rank is the number of singular values that hold 90 % of the energy,
    over that of a Gaussian matrix of the same shape, mean over matrices.
    Source: Biderman et al. 2024, arXiv 2405.09673, section 4.6, on square matrices.
    """
    results, table = _after(study, arm)
    shares = table["rank_90"] / table["gaussian_rank_90"]
    chosen = [table["module"].str.fullmatch(PARTS[name]) for name in (part, over)]
    means = [shares[rows].groupby(table["seed"][rows]).mean() for rows in chosen]
    modules = shares.groupby(table["module"])
    evidence: dict[str, Quantity] = {f"over a Gaussian's, {name}": float(each.mean()) for name, each in modules}
    of_all = table["rank_90"] / table[["rows", "columns"]].min(axis="columns")
    for name, rows in zip((part, over), chosen, strict=True):
        evidence[f"share of all singular values, {name}"] = float(of_all[rows].mean())
    return over_seeds(results, (means[0] / means[1]).dropna(), evidence, table["run_id"])


def update_size(study: str, arm: str) -> Measurement:
    """Returns the norm of an update over that of the pretrained matrix, in the median matrix; the mean over seeds."""
    results, table = _after(study, arm)
    evidence: dict[str, Quantity] = {
        "smallest matrix": float(table["relative_size"].min()),
        "largest matrix": float(table["relative_size"].max()),
        **_along(results, study, arm, "relative_size"),
    }
    return over_seeds(results, table.groupby("seed")["relative_size"].median(), evidence, table["run_id"])


def share_left_after_cut(study: str, arm: str, rank: int) -> Measurement:
    """Returns the share of an arm's task gain that is left when every update of a matrix is cut to a rank.

    The arm's task gain is the reference's, plus how much lower its own loss is than the reference's mean.
    """
    results = StudyResults(study)
    runs, table = results.arm_runs(arm), read_weights(study)
    cuts = table[table["kind"] == "cut"]
    reference = float(results.arm_runs(results.reference)[HELDOUT].mean())
    own = runs.set_index("run_id")
    losses = cuts.pivot_table(index="run_id", columns="cut_rank", values="heldout_nll")
    losses = losses.loc[losses.index.intersection(own.index)]
    if rank not in losses:
        raise NotRunError(f"the study `{study}` has no update of `{arm}` that was cut to rank {rank}")
    whole = own.loc[losses.index, HELDOUT]
    gain = results.task_gain + reference - whole
    left = losses.rsub(whole, axis="index").div(gain, axis="index") + 1
    evidence: dict[str, Quantity] = {f"cut to rank {cut:g}": float(left[cut].mean()) for cut in left}
    evidence["mean loss, whole"] = float(whole.mean())
    evidence["mean loss, cut"] = float(losses[rank].mean())
    seeds = left[rank].set_axis(own.loc[left.index, "seed"])
    return over_seeds(results, seeds, evidence, runs["run_id"])


def intruders(study: str, arm: str) -> Measurement:
    """Returns the intruders of an arm: leading singular vectors that resemble no pretrained one.

    An intruder is one of the ten leading left singular vectors of the trained matrix whose cosine with every left
    singular vector of the pretrained one stays below 0.5. The number is the mean over matrices.
    Source: Shuttleworth et al. 2024, arXiv 2410.21228.
    """
    results = StudyResults(study)
    runs = results.arm_runs(arm)
    last = after_training(read_weights(study)).groupby("run_id")
    means = {cosine: last[f"intruders_{cosine}"].mean() for cosine in (30, 50, 70)}
    evidence: dict[str, Quantity] = {
        f"{arm}, cosine below 0.{cosine // 10}": float(runs["run_id"].map(values).mean())
        for cosine, values in means.items()
    }
    sizes = last["relative_size"].median()
    evidence[f"size of the update over the weight's, {arm}"] = float(runs["run_id"].map(sizes).mean())
    values = runs.set_index("seed")["run_id"].map(means[50]).dropna()
    return over_seeds(results, values, evidence, runs["run_id"])


def magnitude_with_direction(study: str, arm: str, module: str, within_steps: bool = False) -> Measurement:
    """Returns the correlation of the changes of magnitude and of direction over layers and steps; the mean over seeds.

    Source: Liu et al. 2024, arXiv 2402.09353, section 3.2, which shows it for query matrices at four steps.

    Args:
        module: The matrices, one in each layer.
        within_steps: Whether the mean of the correlations over layers at each step is taken, without what grows along
            the training.
    """
    results = StudyResults(study)
    runs = results.arm_runs(arm)
    points = _points(study, runs)
    if points.empty:
        raise NotRunError(f"the study `{study}` has not measured the weights of `{arm}`")
    seeds = points["run_id"].map(runs.set_index("run_id")["seed"])

    def correlation(rows: pd.DataFrame) -> float:
        return float(np.corrcoef(rows["magnitude_change"], rows["direction_change"])[0, 1])

    def correlations(chosen: pd.Series) -> pd.Series:
        rows = points[chosen]
        groups = [seeds[chosen], rows["step"]] if within_steps else [seeds[chosen]]
        return rows.groupby(groups).apply(correlation).groupby(level=0).mean()

    modules = {name: correlations(points["module"] == name) for name in sorted(points["module"].unique())}
    evidence: dict[str, Quantity] = {f"in {name}": float(each.mean()) for name, each in modules.items()}
    evidence["steps"] = points["step"].nunique()
    last = points[(points["module"] == module) & (points["step"] == points["step"].max())]
    evidence["after the last step only"] = float(last.groupby(seeds[last.index]).apply(correlation).mean())
    return over_seeds(results, modules.get(module, ()), evidence, runs["run_id"])


def rank_with_worth(study: str, arm: str, kept: bool = False, given: str = "") -> Measurement:
    """Returns Spearman's correlation over matrices of the rank that AdaLoRA kept and the worth of the update.

    The worth is the rise of the held-out loss when that update alone is set to zero. The mean is over seeds.

    Args:
        kept: Whether to leave out matrices without any rank, whose worth is zero by definition.
        given: A measured quantity that both may follow, such as the size of the update. It is partialled out.
    """
    results, table = _after(study, arm)
    if "worth" not in table or table["worth"].isna().all():
        raise NotRunError(f"the study `{study}` has not measured the worth of the updates of `{arm}`")
    table = table[table["rank_kept"] > 0] if kept else table
    names = ["rank_kept", "worth", *filter(None, [given])]
    each = {seed: _partial(rows[names].corr(method="spearman")) for seed, rows in table.groupby("seed")}
    by_module = table.groupby("module")[["rank_kept", "worth"]].mean()
    evidence: dict[str, Quantity] = {
        f"{what}, {module}": float(row[name])
        for name, what in (("rank_kept", "mean rank"), ("worth", "mean worth in nats per token"))
        for module, row in by_module.iterrows()
    }
    evidence["matrices without rank, a run"] = float((table["rank_kept"] == 0).groupby(table["seed"]).sum().mean())
    return over_seeds(results, pd.Series(each), evidence, table["run_id"])


def rank_preference(study: str, arm: str) -> Measurement:
    """Returns the mean rank that AdaLoRA kept in one part of the blocks over that in the other; one value a seed.

    Above the line stands the part that kept more rank in the other seeds. A preference that changes from seed to seed
    gives values around 1.
    """
    results, table = _after(study, arm)
    if "rank_kept" not in table or table["rank_kept"].isna().all():
        raise NotRunError(f"the study `{study}` has no ranks that `{arm}` chose")
    parts = {part: table[table["module"].str.fullmatch(modules)] for part, modules in PARTS.items()}
    mean = {part: rows.groupby("seed")["rank_kept"].mean() for part, rows in parts.items()}
    logs = np.log(mean["feed-forward"] / mean["attention"])
    values = np.exp(np.sign(logs.sum() - logs) * logs)
    evidence: dict[str, Quantity] = {f"mean rank in {part}": float(each.mean()) for part, each in mean.items()}
    evidence |= {f"mean rank, {name}": float(each.mean()) for name, each in table.groupby("module")["rank_kept"]}
    return over_seeds(results, values, evidence, table["run_id"])


def entropy_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how much larger the entropy of an update's spectrum is than that of another arm's, in nats, by seed.

    The spectrum is the share of each squared singular value, in the median matrix. The table holds its sums up to the
    singular values 1, 2, 4, 8 and so on. The entropy lies between that of the sums and that with equal shares inside
    each, and the middle counts. If the sign hangs on this, the value says nothing.
    """
    bounds = {name: _entropies(_after(study, name)[1]) for name in (arm, against)}
    results = StudyResults(study)
    both = paired(results.arm_runs(arm), results.arm_runs(against), HELDOUT)  # the seeds that both have
    mine, other = (bounds[name].loc[both.index] for name in (arm, against))
    values = mine.mean(axis="columns") - other.mean(axis="columns")
    least, most = float((mine["least"] - other["most"]).mean()), float((mine["most"] - other["least"]).mean())
    evidence: dict[str, Quantity] = {"least possible difference": least, "largest possible difference": most}
    evidence |= {f"entropy of {name}": float(bounds[name].mean(axis=None)) for name in (arm, against)}
    evidence |= {f"held-out loss of {arm}": float(both["first"].mean())}
    evidence |= {f"held-out loss of {against}": float(both["second"].mean())}
    found = over_seeds(results, values, evidence, runs_of(results, arm, against))
    return found if least * most > 0 else replace(found, spoiled_by="the kept sums of the spectra leave the sign open")


def _partial(correlations: pd.DataFrame) -> float:
    """Returns the correlation of the first two of some quantities, with the others, if any, partialled out."""
    if len(correlations) == 2:
        return float(correlations.iloc[0, 1])
    inverse = np.linalg.inv(correlations.to_numpy())
    return float(-inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1]))


def _after(study: str, arm: str) -> tuple[StudyResults, pd.DataFrame]:
    """Returns a study's results, and the matrices of an arm's runs after the training, each with its seed."""
    results = StudyResults(study)
    runs = results.arm_runs(arm)
    table = after_training(read_weights(study))
    table = table.assign(seed=table["run_id"].map(runs.set_index("run_id")["seed"])).dropna(subset=["seed"])
    if table.empty:
        raise NotRunError(f"the study `{study}` has not measured the weights of `{arm}`")
    return results, table


def _entropies(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the least and the largest entropy that the kept sums of spectra allow, median over matrices, by seed."""
    names = sorted((name for name in table if name.startswith("energy_")), key=lambda name: int(name.split("_")[1]))
    ends = [int(name.split("_")[1]) for name in names]
    side = table[["rows", "columns"]].min(axis="columns")
    sums = table[names].assign(all=1.0).to_numpy()
    shares = np.clip(np.diff(sums, axis=1, prepend=0.0), 0.0, 1.0)
    last = np.maximum(side.to_numpy() - ends[-1], 1)[:, None]
    sizes = np.hstack([np.broadcast_to(np.diff(ends, prepend=0), (len(table), len(ends))), last])
    least = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    found = pd.DataFrame({"least": least, "most": least + (shares * np.log(sizes)).sum(axis=1)}, index=table.index)
    return found.groupby(table["seed"]).median()


def _points(study: str, runs: pd.DataFrame) -> pd.DataFrame:
    """Returns what was measured on the matrices of some runs, after each kept step."""
    table = read_weights(study)
    return table[(table["kind"] == "matrix") & table["run_id"].isin(runs["run_id"])]


def _along(results: StudyResults, study: str, arm: str, name: str) -> dict[str, Quantity]:
    """Returns a quantity in the median matrix after each kept step."""
    mine = _points(study, results.arm_runs(arm))
    return {f"{name} after step {step:g}": float(value) for step, value in mine.groupby("step")[name].median().items()}

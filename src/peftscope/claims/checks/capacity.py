"""Reads what runs stored of random strings. Nothing is trained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from peftscope.analysis.capacity import FEWEST_SIZES, breaks, stored_bits
from peftscope.analysis.collect import read_runs
from peftscope.claims.measurement import Measurement, NotRunError, Quantity, geometric_mean_of, mean_of
from peftscope.layout import folder_with, how_to_run

FULL = "full fine-tuning"


def bits_per_parameter(
    experiment: str, model: str, ranks: list[int], least: float = 0.0, exposures: int = 0
) -> Measurement:
    """Returns the bits given at which storing stops following, for each trained parameter of LoRA.

    It is the geometric mean over ranks, with the interval over them.

    Args:
        least: A mean below this many bits counts only if every rank saw its strings often enough at its break.
        exposures: How often is enough.

    Raises:
        NotRunError: The experiment's sizes do not enclose the break of a rank. Leaving it out would bias the mean.
    """
    table = _stored(experiment, model)
    found = breaks(table[table["arm"].isin([f"LoRA, rank {rank}" for rank in ranks])])
    if len(found) < len(ranks):
        raise NotRunError(f"`{experiment}` has {len(found)} of {len(ranks)} ranks of {model} with {FEWEST_SIZES} sizes")
    evidence: dict[str, Quantity] = {}
    for row in found.to_dict("records"):
        if not row["is_bounded"]:
            raise NotRunError(f"the sizes of `{experiment}` do not enclose the break of {row['arm']} on {model}")
        evidence[f"break of {row['arm']}, bits"] = row["break_bits"]
        evidence[f"most stored by {row['arm']}, bits for each parameter"] = row["most_stored"] / row["parameters"]
        evidence[f"times that {row['arm']} saw each string at its break"] = row["exposures_at_break"]
    evidence["largest share stored of strings not trained on"] = max(0.0, float(found["largest_fresh_share"].max()))
    groups = table.groupby("arm", sort=False)
    mean = geometric_mean_of(
        np.log(found["break_per_parameter"]).tolist(),
        evidence=evidence,
        curves={str(arm): own.groupby("given")["stored"].mean().to_dict() for arm, own in groups},
        axes=("bits given", "bits stored"),
        model=f"{model}, random strings",
        run_ids=tuple(table["run_id"]),
    )
    seen, spoiled_by = found["exposures_at_break"].min(), ""
    if float(mean.value) < least and seen < exposures:
        spoiled_by = f"strings at a break were seen {seen:.0f} times, where {exposures:,} are needed"
    return replace(mean, spoiled_by=spoiled_by)


def share_of_full(
    experiment: str, model: str, rank: int, items: int, control: int | None = None, enough: float = 1.0
) -> Measurement:
    """Returns the bits that LoRA of a rank stores over those that full fine-tuning stores, of the same strings.

    Args:
        control: A rank with more parameters than the model. If the mean of its shares is below ``enough``, the training
            limits what is stored, and the share of a lower rank says nothing about its rank.
        enough: The share that counts as enough.
    """
    table = _stored(experiment, model)

    def shares(of: int) -> list[float]:
        pairs = pd.DataFrame({"lora": _by_seed(table, f"LoRA, rank {of}", items), "full": _by_seed(table, FULL, items)})
        return (pairs.dropna()["lora"] / pairs.dropna()["full"]).tolist()

    full = table[(table["arm"] == FULL) & (table["items"] == items)]
    load = float((full["given"] / full["parameters"]).mean())
    evidence: dict[str, Quantity] = {"bits given for each parameter of the model": load}
    spoiled_by = ""
    if control is not None:
        stored = float(np.mean(shares(control)))
        evidence[f"share that rank {control} stores"] = stored
        if stored < enough:
            said = f"rank {control}, with more parameters than the model, stores {100 * stored:.0f} %"
            spoiled_by = f"{said} after the same training, so that the training limits it"
    return replace(_over_seeds(shares(rank), table, items, evidence), spoiled_by=spoiled_by)


def furthest_ranks(experiment: str, model: str, ranks: list[int], items: int) -> Measurement:
    """Returns how much more one rank stores than another, as a share of what is given, of the two that differ most."""
    table = _stored(experiment, model)
    given = float(table.loc[table["items"] == items, "given"].max())
    stored = {rank: _by_seed(table, f"LoRA, rank {rank}", items) for rank in ranks}
    pairs = itertools.combinations(ranks, 2)
    differences = {(high, low): ((stored[high] - stored[low]) / given).dropna() for low, high in pairs}
    chosen = max(differences, key=lambda pair: abs(differences[pair].mean()))
    evidence: dict[str, Quantity] = {"shown": f"rank {chosen[0]} over rank {chosen[1]}"}
    evidence |= {f"mean share stored by rank {rank}": float(stored[rank].mean()) / given for rank in ranks}
    return _over_seeds(differences[chosen].tolist(), table, items, evidence)


def _stored(experiment: str, model: str) -> pd.DataFrame:
    """Returns the stored bits of a model's runs, of this workspace or as they were published.

    Raises:
        NotRunError: The experiment has not run, or not to its end.
    """
    folder = folder_with(experiment, "runs.csv")
    if folder is None:
        raise NotRunError(f"the experiment `{experiment}` has not run -> {how_to_run(experiment)}")
    runs = read_runs(experiment, folder)
    ended = runs["status"].isin(["ok", "diverged"])
    if not ended.all():
        raise NotRunError(f"the experiment `{experiment}` is not finished ({ended.sum()} of {len(runs)} runs done)")
    table = stored_bits(runs)
    return table[table["model"] == model]


def _by_seed(table: pd.DataFrame, arm: str, items: int) -> pd.Series:
    """Returns the bits that an arm stored of so many strings, by seed."""
    rows = table[(table["arm"] == arm) & (table["items"] == items)]
    if rows.empty:
        raise NotRunError(f"no run of {arm} on {items} strings")
    return rows.set_index("seed")["stored"]


def _over_seeds(
    values: Sequence[float], table: pd.DataFrame, items: int, evidence: Mapping[str, Quantity]
) -> Measurement:
    rows = table[table["items"] == items]
    evidence = {**evidence, "bits given": float(rows["given"].max())}
    about: Any = {"model": f"{table['model'].iloc[0]}, random strings", "run_ids": tuple(rows["run_id"].astype(str))}
    return mean_of(values, samples=tuple(values), evidence=evidence, **about)

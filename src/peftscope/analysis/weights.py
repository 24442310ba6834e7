"""Measurements on the weights that runs keep: one table an experiment, and its rows by arm. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from peftscope.errors import InputError, Problem
from peftscope.layout import folder_with, how_to_run, results_folder, run_folder
from peftscope.record import measured_path

WEIGHTS = "tables/weights.parquet"
ROUNDED = "{:.4g}"
"""Fractions keep four digits, which makes the table a third as large. Losses and counts keep all."""


def weights_path(results: Path) -> Path:
    """Returns the table of measured weights in a folder of results."""
    return results / WEIGHTS


def collect_weights(experiment: str, runs: Sequence[str]) -> None:
    """Writes one table of what was measured on the weights of runs: a row for each step and matrix, and each cut."""
    tables = [pd.read_csv(measured_path(run_folder(run))).assign(run_id=run) for run in runs]
    path = weights_path(results_folder(experiment))
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    measured = table.select_dtypes("float").columns.difference(["heldout_nll"])
    table[measured] = table[measured].map(lambda value: value if value.is_integer() else float(ROUNDED.format(value)))
    table.to_parquet(path, index=False, compression="zstd")


def weights_folder(experiment: str) -> Path:
    """Returns the folder of results with an experiment's table: this workspace's, or else the published one.

    Raises:
        InputError: Neither has it.
    """
    folder = folder_with(experiment, WEIGHTS)
    if folder is None:
        message = "its measured weights are not here"
        raise InputError(Problem(f"the study `{experiment}`", message, how_to_run(experiment)))
    return folder


def read_weights(experiment: str) -> pd.DataFrame:
    """Returns the table of an experiment, from this workspace or from the published files.

    Raises:
        InputError: There is none.
    """
    return pd.read_parquet(weights_path(weights_folder(experiment)))


def measured_runs(path: Path) -> dict[str, pd.DataFrame]:
    """Returns the rows of each run in a table of weights, without columns that have no value; empty without a table."""
    if not path.is_file():
        return {}
    return {
        str(run): rows.drop(columns="run_id").dropna(axis="columns", how="all")
        for run, rows in pd.read_parquet(path).groupby("run_id", sort=False)
    }


def after_training(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of matrices after the last step of each run."""
    matrices = table[table["kind"] == "matrix"]
    return matrices[matrices["step"] == matrices.groupby("run_id")["step"].transform("max")]

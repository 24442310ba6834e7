"""Compares two sweeps of one experiment, with bf16 products computed natively and in fp32: ``docs/processors.md``.

Make both reports on one idle machine, one after the other, the second in a clone of its own; then

    python -m benchmarks.processors results/quick/runs.csv ../clone/results/quick/runs.csv

copies what is compared to ``results/published/processors/`` and writes the table into the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from benchmarks.page import write_blocks

PUBLISHED = Path("results/published/processors")
ELSEWHERE = Path("results/published/quick/runs.csv")
"""The same runs, computed natively by a processor of another maker: how far rounding alone takes them."""
PAGE = Path("docs/processors.md")
WAYS = ("native", "fp32")
COLUMNS = [
    "run_id",
    "status",
    "label",
    "cpu",
    "cores",
    "torch",
    "bf16_products",
    "wall_seconds",
    "train_seconds",
    "step_seconds_median",
    "heldout_nll_nats_per_token",
    "exact_match_fraction",
    "train_peak_tensor_bytes",
    "predicted_train_peak_tensor_bytes",
]


def read_pair(folder: Path = PUBLISHED) -> pd.DataFrame:
    """Returns the runs of both sweeps side by side, columns of the second with ``_fp32`` at the end."""
    native, fp32 = (pd.read_csv(folder / f"{way}.csv") for way in WAYS)
    pair = native.merge(fp32, on="run_id", suffixes=("", "_fp32"), validate="one_to_one")
    elsewhere = pd.read_csv(ELSEWHERE)[["run_id", "cpu", "heldout_nll_nats_per_token"]]
    pair = pair.merge(elsewhere, on="run_id", suffixes=("", "_elsewhere"), validate="one_to_one")
    assert len(pair) == len(native) == len(fp32), "the sweeps have other runs"
    return pair


def render(pair: pd.DataFrame) -> str:
    """Returns the comparison as Markdown: a table with a row for each method, and a sentence on the whole."""
    lines = [
        "| method | runs | step (s), native | in fp32 | ratio | held-out NLL, native | in fp32 | another native one |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label, runs in pair.groupby("label", sort=False):
        steps = [runs["step_seconds_median"].median(), runs["step_seconds_median_fp32"].median()]
        native, *others = (runs[f"heldout_nll_nats_per_token{end}"] for end in ("", "_fp32", "_elsewhere"))
        trained = runs["train_seconds"].gt(0).any()
        times = [f"{steps[0]:.2f}", f"{steps[1]:.2f}", f"{steps[1] / steps[0]:.2f}"] if trained else ["-"] * 3
        apart = [f"{other.mean():.3f} (apart by {(other - native).abs().mean():.3f})" for other in others]
        lines.append(f"| {label} | {len(runs)} | " + " | ".join([*times, f"{native.mean():.3f}", *apart]) + " |")
    walls = [pair["wall_seconds"].sum() / 60, pair["wall_seconds_fp32"].sum() / 60]
    memory = "the same to the byte" if same_memory(pair) else "not the same"
    return "\n".join(
        [
            *lines,
            "",
            f"All {len(pair)} runs took {walls[0]:.1f} minutes of work natively and {walls[1]:.1f} in fp32, "
            f"{walls[1] / walls[0]:.2f} times as long. Peaks of tensors, measured and predicted, are {memory}. "
            f"Processor: {pair['cpu'][0]}, {pair['cores'][0]} cores; the other native one: "
            f"{pair['cpu_elsewhere'][0]}; torch {pair['torch'][0]}.",
        ]
    )


def same_memory(pair: pd.DataFrame) -> bool:
    """Returns whether every run's peaks, measured and predicted, are equal in both sweeps."""
    columns = ("train_peak_tensor_bytes", "predicted_train_peak_tensor_bytes")
    return all(pair[column].fillna(0).eq(pair[f"{column}_fp32"].fillna(0)).all() for column in columns)


if __name__ == "__main__":
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    for way, path in zip(WAYS, sys.argv[1:], strict=True):
        runs = pd.read_csv(path)[COLUMNS]
        assert set(runs["bf16_products"].dropna()) == {way}, f"{path} has other products than {way}"
        runs.to_csv(PUBLISHED / f"{way}.csv", index=False)
    write_blocks({"comparison": render(read_pair())}, PAGE)

"""The table of what a card of others measured, run by run, with the calculator's errors. No torch."""

from __future__ import annotations

import pandas as pd

from peftscope.report.tables import predictions
from peftscope.words import GIB, formatted

PEAKS = {"training": "tensors", "training, reserved": "reserved", "training, device": "card"}
"""The peaks of a training step whose errors are shown, with their short names: of tensors, the allocator, the card."""


def runs_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run as text: how it ended, its step, and its measured peaks with the prediction's errors."""
    table = pd.DataFrame(
        {
            "run": runs["run_id"],
            "ended": runs["status"].replace("oom", "OOM"),
            "step (s)": runs["step_seconds_median"].map(lambda seconds: formatted(seconds, ".3f")),
        }
    )
    errors = predictions(runs)
    for peak, name in PEAKS.items():
        found = errors[errors["peak"] == peak].set_index("run_id")
        said = (found["measured_bytes"] / GIB).map("{:.2f}".format) + found["error_percent"].map(", {:+.1f}".format)
        table[f"{name} (GiB, % off)"] = runs["run_id"].map(said).fillna("-")
    return table

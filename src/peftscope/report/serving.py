"""Tables of runs that were limited to a smaller card's memory, and of the latency of adapters. No torch."""

from __future__ import annotations

import pandas as pd

from peftscope.report.tables import variants
from peftscope.words import GIB, formatted

MILLI = 1e-3
STATES, PASSES = ("base", "apart", "merged"), ("prompt", "token")


def limited_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run with a memory limit: the limit, what it took, and whether it fits."""
    limited = runs[runs["memory_limit_gib"].notna()] if "memory_limit_gib" in runs else runs.iloc[:0]
    rows = []
    for name, (_, run) in zip(variants(limited), limited.iterrows(), strict=True):
        enforced = run["device"] == "cuda"
        endings = {"ok": "fits" if enforced else "not enforced on a processor", "oom": "does not fit"}
        rows.append(
            {
                "run": f"{run['model']}, {name}",
                "limit (GiB)": formatted(run["memory_limit_gib"], ",.1f"),
                "peak tensors, train (GiB)": formatted(run["train_peak_tensor_bytes"], ",.2f", GIB),
                "peak reserved, train (GiB)": formatted(run["train_peak_reserved_bytes"], ",.2f", GIB),
                "outcome": endings.get(run["status"], run["status"]),
            }
        )
    return pd.DataFrame(rows)


def latencies(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run whose latency was timed: medians in each state, and the ratios of these."""
    column = {(s, p): f"latency_{s}_{p}_seconds_median" for s in STATES for p in PASSES}
    known = set(column.values()) <= set(runs.columns)
    timed = runs[runs[column["merged", "token"]].notna()] if known else runs.iloc[:0]
    rows = []
    for name, (_, run) in zip(variants(timed), timed.iterrows(), strict=True):
        row = {"run": f"{run['model']}, {name}", "prompts at once": str(run["batch_size"])}
        for p in PASSES:
            row |= {f"{p}, {s} (ms)": formatted(run[column[s, p]], ",.3g", MILLI) for s in STATES}
            row[f"{p}, apart over merged"] = formatted(run[column["apart", p]], ".3f", run[column["merged", p]])
        rows.append(row)
    return pd.DataFrame(rows)

"""Compares each method's scores on lm-eval's benchmarks with those of its untouched base. No torch."""

from __future__ import annotations

import pandas as pd

from peftscope.analysis.collect import BENCHMARK, read_runs
from peftscope.analysis.stats import mean_interval
from peftscope.report.tables import variants, write_table
from peftscope.words import formatted, interval, percent

UNIT = "_fraction"


def benchmark_changes(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per benchmark and variant of a method: ``n``, ``before``, ``after`` and its interval, as shares.

    The rows cover the grid and single runs. The score before is that of the untouched base, in 4 bits for methods that
    train on a 4-bit base. It is empty if no run measured it.
    """
    chosen = runs[runs["comparisons"].str.contains(r"\b(?:grid|runs)\b") & (runs["status"] == "ok")]
    columns = [column for column in chosen if column.startswith(BENCHMARK) and column.endswith(UNIT)]
    four_bit = chosen["quant_type"].notna() if "quant_type" in chosen else pd.Series(False, chosen.index)
    weights = chosen["base_weights"] if "base_weights" in chosen else pd.Series("full", chosen.index)
    untouched = chosen["method"] == "none"
    names = variants(chosen)
    rows = []
    for column in columns:
        name = column.removeprefix(BENCHMARK).removesuffix(UNIT)
        trained = chosen[~untouched & chosen[column].notna()]
        for label, group in trained.groupby(names[trained.index], sort=False):
            base = untouched & (weights == ("nf4" if four_bit[group.index].any() else "full"))
            base &= chosen["model"] == group["model"].iloc[0]
            row = {"benchmark": name, "method": label, "n": len(group), "before": chosen.loc[base, column].mean()}
            found = mean_interval(list(group[column]))
            assert found is not None
            rows.append(row | {"after": found.mean, "low": found.low, "high": found.high})
    return pd.DataFrame(rows, columns=["benchmark", "method", "n", "before", "after", "low", "high"])


def readable_benchmarks(changes: pd.DataFrame) -> pd.DataFrame:
    """Returns the changes as text for people, in percent, with intervals in brackets."""
    rows = []
    for row in changes.to_dict("records"):
        change = row["after"] - row["before"]
        rows.append(
            {
                "method": row["method"],
                "benchmark": row["benchmark"],
                "runs": f"n = {row['n']}",
                "before (%)": formatted(row["before"], ".1f", 0.01),
                "after (%)": interval(row["after"], row["low"], row["high"], lambda share: f"{percent(share):.1f}"),
                "change (points)": formatted(change, "+.1f", 0.01),
            }
        )
    return pd.DataFrame(rows, columns=None if rows else ["method"])


def write_benchmarks(experiment: str) -> None:
    """Writes the changes of an experiment into its tables, as csv and html."""
    found = benchmark_changes(read_runs(experiment))
    write_table(experiment, "benchmarks", found, readable_benchmarks(found))

"""The report's section on a card: what it measured, beside what was predicted for it. No torch."""

from __future__ import annotations

from statistics import median
from typing import Any

import pandas as pd

from peftscope.hardware.cards import measured_card, without_bf16
from peftscope.layout import record_path
from peftscope.models.catalog import find_model
from peftscope.planning.forecast import Forecaster
from peftscope.record import read_record
from peftscope.report.tables import variants
from peftscope.words import GIB, formatted, percent

SAME_PEAK, SAME_SPEED = 0.02, 1.5
"""The share by which a peak, and the factor by which a speed, may differ from its prediction and still agree."""
PEAKS = {"tensors": "train_peak_tensor_bytes", "device": "train_peak_device_bytes"}


def card_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row for each training on a card: its peaks in bytes and its tokens a second, measured and predicted.

    The time model knows no card before Ampere, so that none of these has a predicted speed.
    """
    trained = runs[(runs["device"] == "cuda") & runs["train_peak_tensor_bytes"].notna()]
    rows = []
    for name, (_, run) in zip(variants(trained), trained.iterrows(), strict=True):
        spec = read_record(record_path(run["run_id"])).spec
        card = measured_card(run["gpu"], int(run["gpu_memory_bytes"]), float(run.fillna(0)["compute_capability"]))
        shape, row = find_model(spec.model).shape, {"run": f"{run['model']}, {name}", "seed": run["seed"]}
        for peak, column in PEAKS.items():
            row |= {peak: run[column], f"{peak}, predicted": run[f"predicted_{column}"]}
        step = Forecaster(card).step(spec, shape) if shape and not without_bf16(card.name, card.capability) else None
        row |= {"tokens/s": run["tokens_per_second"], "predicted": step and step.tokens / step.seconds}
        rows.append(row)
    return pd.DataFrame(rows)


def readable_card(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of ``card_runs`` as text, in GiB, with how far a measured peak lies from the predicted one."""
    rows = []
    for row in table.to_dict("records"):
        shown = {"run": row["run"], "seed": str(row["seed"])}
        for peak in PEAKS:
            shown |= {f"{peak} (GiB)": formatted(row[peak], ",.2f", GIB)}
            shown |= {f"{peak}, predicted": formatted(row[f"{peak}, predicted"], ",.2f", GIB)}
            shown |= {f"{peak}, off (%)": formatted(_off(row, peak), "+.1f", 0.01)}
        rows.append(shown | {"tokens/s": formatted(row["tokens/s"], ",.0f"), "tokens/s, predicted": _speed(row)})
    return pd.DataFrame(rows)


def card_summary(table: pd.DataFrame) -> list[str]:
    """Returns sentences on what agreed: peaks, speeds, and the repeats of one run."""
    if table.empty:
        return []
    rows = table.to_dict("records")
    said = []
    for peak in PEAKS:
        off = [abs(share) for row in rows if not pd.isna(share := _off(row, peak))]
        near = sum(share <= SAME_PEAK for share in off)
        said.append(
            f"{peak.capitalize()}: {near} of {len(off)} peaks lie within {percent(SAME_PEAK):.0f} % of the predicted."
        )
    ratios = [row["tokens/s"] / row["predicted"] for row in rows if row["predicted"] and not pd.isna(row["tokens/s"])]
    if ratios:
        near = sum(1 / SAME_SPEED <= ratio <= SAME_SPEED for ratio in ratios)
        said.append(f"Speed: {near} of {len(ratios)} lie within a factor of {SAME_SPEED:g} of the predicted.")
    for name, repeats in table.groupby("run"):
        speeds = repeats["tokens/s"].dropna().tolist()
        if len(speeds) > 2:
            spread = (max(speeds) - min(speeds)) / median(speeds)
            said.append(f"Noise: the {len(speeds)} repeats of {name} differ by {percent(spread):.1f} % in speed.")
    return said


def _off(row: dict[Any, Any], peak: str) -> float:
    return float(row[peak] / row[f"{peak}, predicted"] - 1) if row[f"{peak}, predicted"] else float("nan")


def _speed(row: dict[Any, Any]) -> str:
    return formatted(row["predicted"], ",.0f") if row["predicted"] else "-"

"""How far losses tell exact match where answers were not judged: ``python -m benchmarks.exact_match``.

Held-out items whose answers were generated and graded say how often an answer with some loss is right. The runs of
``sums``, of which every item was judged, say how far an estimate from that errs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from benchmarks.page import write_blocks
from peftscope.analysis.exact_match import GREEDY
from peftscope.analysis.study import StudyResults
from peftscope.planning.published import ITEMS
from peftscope.report.tables import markdown
from peftscope.words import signed

PAGE = Path("docs/error-rates.md")
COLUMNS = {
    "label": "arm",
    "learning_rate": "learning rate",
    "error": "mean error, points",
    "spread": "± from run to run",
}


def errors() -> pd.DataFrame:
    """Returns the mean and the standard deviation over seeds of the estimate's error, in points, by arm and rate."""
    study = StudyResults("sums", is_published=True)
    items = pd.read_parquet(study.folder / ITEMS, columns=["run_id", "nll", "correct"])
    graded = items.dropna().sort_values("nll")
    right = isotonic_regression(graded["correct"].astype(float), increasing=False).x
    items["estimate"] = np.interp(items["nll"], graded["nll"], right)
    arms = {label: study.rate_runs(arm).drop(columns="label") for arm, label in study.labels.items()}
    runs = pd.concat(arms, names=["label"]).reset_index("label").dropna(subset=[GREEDY])
    runs["error"] = 100 * (runs["run_id"].map(items.groupby("run_id")["estimate"].mean()) - runs[GREEDY])
    by_rate = runs.groupby(["label", "learning_rate"])["error"]
    return by_rate.agg(runs="size", error="mean", spread="std").reset_index()


if __name__ == "__main__":
    table = errors()
    table = table.assign(
        error=table["error"].map(partial(signed, form=".1f")), spread=table["spread"].map("{:.1f}".format)
    )
    write_blocks({"exact-match": markdown(table.rename(columns=COLUMNS))}, PAGE)

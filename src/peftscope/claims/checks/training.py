"""What studies found: best learning rates, and paired differences between arms at them. Reads tables, trains nothing.

Every arm of a study saw the same batches under the same seed, so that differences are taken seed by seed. Losses are
nats per response token of held-out items; a difference is a share of what full fine-tuning gains over the base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from peftscope.claims.measurement import Measurement, NotRunError
from peftscope.stats import bootstrap_interval, mean_interval, sign_flip_p

HELDOUT = "heldout_nll_nats_per_token"


def learning_rate_ratio(study: str, arm: str, against: str) -> Measurement:
    """Returns the best learning rate of one arm over another's.

    The bounds are those of the grids: each best rate is known to lie between its neighbours.
    """
    rates = {name: _tuned(study, name) for name in (arm, against)}
    ratio = rates[arm][1] / rates[against][1]
    return Measurement(
        ratio,
        low=rates[arm][0] / rates[against][2],
        high=rates[arm][2] / rates[against][0],
        evidence={f"best rate of {name}": best for name, (_, best, _) in rates.items()},
        curves={name: _curve(study, name) for name in (arm, against)},
        axes=("learning rate", "validation loss, nats per token"),
        model=_model(study),
        run_ids=tuple(_runs(study, f"tune-{arm}")["run_id"]) + tuple(_runs(study, f"tune-{against}")["run_id"]),
    )


def heldout_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how much lower an arm's held-out loss is than another's, as a share of full fine-tuning's gain."""
    both = _pairs(study, arm, against, HELDOUT)
    return _paired(study, (both[against] - both[arm]) / _full_gain(study), both)


def training_gain(study: str, arm: str, against: str) -> Measurement:
    """Returns how much lower an arm's loss is in the mean over all steps, each on batches that it had not yet seen.

    As a share of full fine-tuning's gain on held-out items; above 0 the arm learns faster.
    """
    losses = pd.read_csv(_folder(study) / "losses.csv").groupby("run_id")["nll_nats_per_token"].mean()
    both = _pairs(study, arm, against, HELDOUT, losses)
    return _paired(study, (both[against] - both[arm]) / _full_gain(study), both)


def largest_gap(study: str, arms: list[str]) -> Measurement:
    """Returns the paired difference between the two arms that are furthest apart, as a share of full's gain."""
    found = [heldout_gain(study, arm, other) for i, arm in enumerate(arms) for other in arms[i + 1 :]]
    return max(found, key=lambda measured: abs(float(measured.value)))


def _paired(study: str, differences: pd.Series, both: pd.DataFrame) -> Measurement:
    values = tuple(float(value) for value in differences)
    interval = mean_interval(values)
    if interval is None:
        raise NotRunError(f"the study `{study}` has no pair of finished runs; make report EXPERIMENT={study}")
    evidence: dict[str, Any] = {"full fine-tuning's gain, nats per token": _full_gain(study)}
    evidence |= {f"mean of {name}": float(both[name].mean()) for name in both}
    low, high = interval.low, interval.high
    if interval.n > 1 and low is None:  # no spread at all
        low = high = interval.mean
    elif interval.n > 1:
        below, above = bootstrap_interval(values)
        evidence |= {"bootstrap, lower": below, "bootstrap, upper": above, "sign-flip p": sign_flip_p(values)}
    arms = [run for name in both for run in _arm(study, str(name))["run_id"]]
    return Measurement(interval.mean, low, high, interval.n, values, evidence, model=_model(study), run_ids=tuple(arms))


def _pairs(study: str, arm: str, against: str, column: str, values: pd.Series | None = None) -> pd.DataFrame:
    """Returns one row a seed that both arms have finished, one column an arm."""
    columns = {}
    for name in (arm, against):
        runs = _arm(study, name).set_index("seed")
        columns[name] = runs[column] if values is None else runs["run_id"].map(values)
    return pd.DataFrame(columns).dropna()


def _full_gain(study: str) -> float:
    return float(_base(study)[HELDOUT]) - float(_arm(study, "full")[HELDOUT].mean())


def _base(study: str) -> pd.Series:
    runs = _table(study)
    return runs[(runs["method"] == "none") & (runs["base_weights"] == "full")].iloc[0]


def _arm(study: str, arm: str) -> pd.DataFrame:
    """Returns an arm's finished runs at its chosen rate."""
    rate, chosen = _tuned(study, arm)[1], json.loads((_folder(study) / "tuned.json").read_text())["arms"][arm]
    tuning = _table(study).set_index("run_id").loc[chosen["tried"][0]["run_ids"][0]]
    runs = _runs(study, "grid")
    return runs[(runs["method"] == tuning["method"]) & (runs["learning_rate"] == rate)]


def _runs(study: str, comparison: str) -> pd.DataFrame:
    """Returns the runs of one comparison that ended well.

    Raises:
        NotRunError: Some have not been made: nothing is concluded from half a study.
    """
    runs = _table(study)
    runs = runs[[comparison in names.split() for names in runs["comparisons"].fillna("")]]
    missing = int((runs["status"] == "missing").sum())
    if missing or runs.empty:
        done = f"{len(runs) - missing} of {len(runs)} runs done" if len(runs) else "its last runs have not begun"
        raise NotRunError(f"the study `{study}` is not finished ({done}); make report EXPERIMENT={study}")
    return runs[runs["status"] == "ok"]


def _tuned(study: str, arm: str) -> tuple[float, float, float]:
    """Returns an arm's best learning rate between its neighbours on the grid."""
    path = _folder(study) / "tuned.json"
    if not path.is_file():
        raise NotRunError(f"the study `{study}` has not chosen its learning rates; make report EXPERIMENT={study}")
    chosen = json.loads(path.read_text())["arms"][arm]
    rates = [tried["learning_rate"] for tried in chosen["tried"]]
    best = rates.index(chosen["learning_rate"])
    return rates[best - 1], rates[best], rates[best + 1]


def _curve(study: str, arm: str) -> dict[float, float]:
    tried = json.loads((_folder(study) / "tuned.json").read_text())["arms"][arm]["tried"]
    return {t["learning_rate"]: t["validation_nll"] for t in tried if t["validation_nll"] is not None}


def _model(study: str) -> str:
    return f"{_table(study)['model'].iloc[0]}, {_table(study)['task'].iloc[0]}"


def _table(study: str) -> pd.DataFrame:
    return pd.read_csv(_folder(study) / "runs.csv", dtype={"comparisons": str})


def _folder(study: str) -> Path:
    """Returns the folder of a study's own results, or of the published ones.

    Raises:
        NotRunError: There is neither.
    """
    for folder in (Path("results") / study, Path("results/published") / study):
        if (folder / "runs.csv").is_file():
            return folder
    raise NotRunError(f"the study `{study}` was not run; make report EXPERIMENT={study}")

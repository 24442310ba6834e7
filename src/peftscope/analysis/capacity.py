"""How many bits of random strings a model stores, and where storing stops following what is given. No torch.

The entropy of a random string is known, so what a model stores of the strings that it trained on is their entropy less
the length of their code under the model, which is its loss in bits. The entropy counts random symbols alone, while the
code pays for every token of a response: what a model knows of the form of a response is never counted. Strings that it
did not train on take no less than their entropy on average, whatever it has learned, and are the control.
Source: Morris et al. 2025, arXiv 2505.24832, section 3, who measure what is stored of uniform random data.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import HELDOUT
from peftscope.planning.published import VALIDATION

ARM = ["model", "arm"]
"""The columns that tell apart what stores: the model, and how it is trained."""
FEWEST_SIZES = 4
"""The sizes from which on an arm's break is fitted: its two numbers fit three sizes almost exactly."""
GRID = 400
"""The places at which a fit looks for the break, evenly spaced in the logarithm of the bits given."""
DRAWS = 1000
"""Bootstrap samples of a fit's residuals."""
SEED = 0


def stored_bits(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row for each arm, number of items and seed: the bits given and stored, and what they depend on.

    Of several learning rates the one that stores most counts. A run that diverged stores nothing, and no run stores
    less than nothing. ``fresh_bits`` is what would be stored of as many strings that the run did not train on.

    Args:
        runs: Rows of ``runs.csv``, of which those count that trained and were judged on random strings.
    """
    entropy = runs.get("judged_entropy_bits", pd.Series(0.0, runs.index))
    ended = runs["status"].isin(["ok", "diverged"]) & (runs["method"] != "none")
    rows = runs[ended & (entropy > 0) & (runs["judged_on"] == "train")].copy()
    per_item = rows["judged_entropy_bits"] / rows["judged_items"]
    tokens = rows["heldout_tokens"] / rows["judged_items"]
    losses = {"own": HELDOUT, "fresh": VALIDATION}
    left = {name: per_item - rows[loss] * tokens / math.log(2) for name, loss in losses.items()}
    table = pd.DataFrame(
        {
            "model": rows["model"],
            "arm": [_arm(row) for row in rows.to_dict("records")],
            "items": rows["train_items"],
            "seed": rows["seed"],
            "learning_rate": rows["learning_rate"],
            "exposures": rows["steps"] * rows["batch_size"] * rows["gradient_accumulation"] / rows["train_items"],
            "parameters": rows["trained_parameters"],
            "given": rows["train_items"] * per_item,
            "stored": (rows["train_items"] * left["own"]).fillna(0.0).clip(lower=0.0),
            "fresh_bits": rows["train_items"] * left["fresh"],
            "run_id": rows["run_id"],
        }
    )
    # A run that diverged saves no weights, whose number follows from the arm.
    table["parameters"] = table.groupby(ARM)["parameters"].transform("max")
    best = table.sort_values("stored", ascending=False, kind="stable").drop_duplicates([*ARM, "items", "seed"])
    return best.sort_values(["model", "parameters", "given", "seed"]).reset_index(drop=True)


def _arm(row: dict[str, object]) -> str:
    rank = row.get("rank")
    return str(row["label"]) if rank is None or pd.isna(rank) else f"{row['label']}, rank {rank:g}"


def fit_break(given: np.ndarray, stored: np.ndarray) -> dict[str, float]:
    """Returns the break of one arm, fitted by least squares to the share of the bits given that is stored.

    Up to ``break_bits`` the share ``followed_share`` of what is given is stored, and beyond it always
    ``plateau_bits``. Where the sizes do not bound the 95 % interval of the break, its ends are 0 and infinite.

    The model has two numbers: share(g) = share · min(1, break / g). Shares are fitted and not bits, because their noise
    is about the same at all sizes. Residuals, drawn anew, give the interval.
    """
    share = stored / given
    places = np.geomspace(given.min(), given.max(), GRID)
    shapes = np.minimum(1.0, places[:, None] / given)  # (GRID, n)
    norms = (shapes**2).sum(axis=1)

    def best(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best place and its slope for each row of shares (draws, n)."""
        slopes = np.clip(shares @ shapes.T / norms, 0.0, 1.0)  # (draws, GRID)
        errors = slopes**2 * norms - 2 * slopes * (shares @ shapes.T)
        found = errors.argmin(axis=1)
        return found, slopes[np.arange(len(shares)), found]

    (place,), (slope,) = best(share[None])
    fitted = slope * shapes[place]
    freedom = max(1, len(share) - 2)
    residuals = (share - fitted) * math.sqrt(len(share) / freedom)
    draws = np.random.default_rng(SEED).choice(residuals, (DRAWS, len(share)))
    redrawn, _ = best(fitted + draws)
    tail = (1 - CONFIDENCE) / 2
    low, high = (int(np.quantile(redrawn, q, method="nearest")) for q in (tail, 1 - tail))
    return {
        "break_bits": float(places[place]),
        "break_low": float(places[low]) if low > 0 else 0.0,
        "break_high": float(places[high]) if high < GRID - 1 else math.inf,
        "is_bounded": low > 0 and high < GRID - 1,
        "followed_share": float(slope),
        "plateau_bits": float(slope) * float(places[place]),
    }


def breaks(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row for each arm of ``stored_bits`` with enough sizes: its break, and the most that it stores."""
    rows = []
    for (model, arm), own in table.groupby(ARM, sort=False):
        if own["given"].nunique() < FEWEST_SIZES:
            continue
        found = fit_break(own["given"].to_numpy(float), own["stored"].to_numpy(float))
        parameters = float(own["parameters"].iloc[0])
        nearest = own.iloc[(own["given"] - found["break_bits"]).abs().argmin()]
        rows.append(
            {
                "model": model,
                "arm": arm,
                "parameters": parameters,
                "runs": len(own),
                **found,
                "break_per_parameter": found["break_bits"] / parameters,
                "plateau_per_parameter": found["plateau_bits"] / parameters,
                "most_stored": float(own["stored"].max()),
                "exposures_at_break": float(nearest["exposures"]),
                "largest_fresh_share": float((own["fresh_bits"] / own["given"]).max()),
            }
        )
    columns = None if rows else [*ARM, "is_bounded"]
    return pd.DataFrame(rows, columns=columns)

"""Shows results from the cards of others apart from ours: by card, with the calculator's errors. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from peftscope.analysis.contributed import Contribution, read_contributions
from peftscope.layout import CONTRIBUTED_PAGE
from peftscope.report.rendering import asset, rendered
from peftscope.report.tables import factors_within_methods, html, markdown, predictions, spoken_settings
from peftscope.spec import RunSpec
from peftscope.words import GIB, formatted

PEAKS = {"training": "tensors", "training, reserved": "reserved", "training, device": "card"}
"""The peaks of a training step whose errors are shown, with their short names: of tensors, the allocator, the card."""


def cards_table(experiment: str | None = None) -> pd.DataFrame:
    """Returns one row per contribution as text, of one experiment or of all: the card, the runs, the errors."""
    rows = []
    for each in read_contributions().values():
        if experiment in (None, each.experiment):
            rows.append({"card": each.card, "experiment": each.experiment, **_summary(each)})
    return pd.DataFrame(
        sorted(rows, key=lambda row: (row["card"], row["experiment"])), columns=None if rows else ["card"]
    )


def _summary(contribution: Contribution) -> dict[str, str]:
    """Returns a contribution in a row: how its runs ended, the versions, and the errors of predicted peaks."""
    runs = contribution.runs()
    errors = predictions(runs)
    ended = ", ".join(f"{count} {status}" for status, count in runs["status"].value_counts().sort_index().items())
    said = {
        "memory (GiB)": formatted(runs["gpu_memory_bytes"].max(), ".1f", GIB),
        "runs": ended,
        "torch": ", ".join(sorted(set(runs["torch"].dropna().astype(str)))) or "-",
        "day": ", ".join(sorted(set(runs["started_at"].dropna()))[-1:]) or "-",
        "code": ", ".join(sorted(set(_code(runs)))),
        "of the matmul rate (%)": formatted(pd.to_numeric(runs["matmul_share"]).median(), ".0f", 0.01),
    }
    for peak, name in PEAKS.items():
        sizes = errors.loc[errors["peak"] == peak, "error_percent"].abs()
        said[f"{name} (% off)"] = f"{sizes.mean():.1f}, worst {sizes.max():.1f}" if len(sizes) else "-"
    return said


def _code(runs: pd.DataFrame) -> list[str]:
    """Returns the commit of each run, with a word if the code differed from it."""
    commits = runs["git_commit"].map(lambda commit: "no repository" if pd.isna(commit) else str(commit)[:8])
    return [commit + " and changes" * bool(dirty) for commit, dirty in zip(commits, runs["git_dirty"], strict=True)]


def _names(runs: pd.DataFrame) -> list[str]:
    """Returns each run's model and method, with the settings in which it differs from most other runs."""
    factors = [field for field in factors_within_methods(runs) if field != "model"]
    # A method that lacks a field of its own has no value there, which is not the usual one.
    usual = {field: runs[field].mode(dropna=field not in RunSpec.model_fields).iloc[0] for field in factors}
    names = []
    for _, run in runs.iterrows():
        told = spoken_settings(run, [field for field in factors if run[field] != usual[field]])
        names.append(", ".join(filter(None, (run["model"], run["label"], told))))
    return names


def runs_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run as text: how it ended, its step, and its measured peaks with the prediction's errors."""
    errors = predictions(runs).set_index(["run_id", "peak"])
    rows = []
    for name, (_, run) in zip(_names(runs), runs.iterrows(), strict=True):
        ended = "OOM" if run["status"] == "oom" else run["status"]
        row = {
            "run": name,
            "ended": ended,
            "step (s)": formatted(run["step_seconds_median"], ".3f"),
        }
        for peak, short in PEAKS.items():
            found = errors.loc[(run["run_id"], peak)] if (run["run_id"], peak) in errors.index else None
            row[f"{short} (GiB, % off)"] = (
                f"{found['measured_bytes'] / GIB:.2f}, {found['error_percent']:+.1f}" if found is not None else "-"
            )
        rows.append(row)
    return pd.DataFrame(rows)


def write_contributed() -> Path:
    """Writes the page of all contributions, as HTML and Markdown, and returns its path.

    Raises:
        InputError: A contribution does not pass its checks.
    """
    found = read_contributions().values()
    cards: dict[str, list[dict[str, Any]]] = {}
    for number, each in enumerate(found):
        runs = runs_table(each.runs())
        shown = {"html": html(runs, f"runs-{number}"), "markdown": Markup(markdown(runs))}
        entry = {"experiment": each.experiment, **shown}
        cards.setdefault(each.card, []).append(entry)
    table = cards_table()
    content = {
        "cards": dict(sorted(cards.items())),
        "style": asset("report.css"),
        "html": html(table, "cards"),
        "markdown": Markup(markdown(table)),
    }
    CONTRIBUTED_PAGE.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".html", ".md"):
        CONTRIBUTED_PAGE.with_suffix(suffix).write_text(rendered(f"contributed{suffix}.j2", **content))
    return CONTRIBUTED_PAGE

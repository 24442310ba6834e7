"""Shows results from the cards of others apart from ours: by card, with the calculator's errors. No torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from peftscope.analysis.contributed import Contribution, read_contributions
from peftscope.errors import GIB
from peftscope.layout import CONTRIBUTED_PAGE
from peftscope.report.tables import formatted, html, markdown, markdown_text, predictions, variants

PEAKS = ("training", "training, reserved", "training, device")
"""The peaks of a training step whose errors are shown: of tensors, of the allocator, of the whole card."""


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
        "torch": ", ".join(sorted(set(runs["torch"].dropna()))) or "-",
        "day": ", ".join(sorted(set(runs["started_at"].dropna()))[-1:]) or "-",
        "code": ", ".join(sorted(set(_code(runs)))),
        "of the matmul rate (%)": formatted(pd.to_numeric(runs["matmul_share"]).median(), ".0f", 0.01),
    }
    for peak in PEAKS:
        sizes = errors.loc[errors["peak"] == peak, "error_percent"].abs()
        said[f"{peak} (% off)"] = f"{sizes.mean():.1f}, worst {sizes.max():.1f}" if len(sizes) else "-"
    return said


def _code(runs: pd.DataFrame) -> list[str]:
    """Returns the commit of each run, with a word if the code differed from it."""
    commits = runs["git_commit"].map(lambda commit: str(commit)[:8] if commit else "no repository")
    return [commit + " and changes" * bool(dirty) for commit, dirty in zip(commits, runs["git_dirty"], strict=True)]


def runs_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run as text: how it ended, its step, and its measured peaks with the prediction's errors."""
    errors = predictions(runs).set_index(["run_id", "peak"])
    names, rows = variants(runs), []
    for index, run in runs.iterrows():
        ended = "OOM" if run["status"] == "oom" else run["status"]
        row = {
            "run": f"{run['model']}, {names[index]}",
            "ended": ended,
            "step (s)": formatted(run["step_seconds_median"], ".3f"),
        }
        for peak in PEAKS:
            known = (run["run_id"], peak) in errors.index
            found = errors.loc[(run["run_id"], peak)] if known else None
            row[f"{peak} (GiB)"] = "-" if found is None else formatted(found["measured_bytes"], ".3f", GIB)
            row[f"{peak}, predicted (% off)"] = "-" if found is None else f"{found['error_percent']:+.1f}"
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
        entry = {"experiment": each.experiment, "html": html(runs, f"runs-{number}"), "markdown": markdown(runs)}
        cards.setdefault(each.card, []).append(entry)
    table = cards_table()
    style = files("peftscope.report").joinpath("templates/report.css").read_text()
    content = {
        "cards": dict(sorted(cards.items())),
        "style": style,
        "html": html(table, "cards"),
        "markdown": markdown(table),
    }
    CONTRIBUTED_PAGE.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".html", ".md"):
        is_html = suffix == ".html"
        environment = Environment(
            loader=PackageLoader("peftscope.report"),
            undefined=StrictUndefined,
            autoescape=is_html,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["text"] = markdown_text
        text = environment.get_template(f"contributed{suffix}.j2").render(**content)
        CONTRIBUTED_PAGE.with_suffix(suffix).write_text(text)
    return CONTRIBUTED_PAGE

"""Predicts the peaks that others published, with our methods and with estimators of others: ``make scorecard``.

Writes ``results/published/scorecard/``, the tables of ``docs/scorecard.md`` and ``memory/measured.json``, which answers
quote. Simulations and the answers of others are kept in ``results/scorecard/`` and computed again only if what decides
them changed.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from rich.console import Console
from rich.progress import track

from benchmarks.estimators import ESTIMATORS, answers_of
from benchmarks.outcomes import publish as publish_outcomes
from benchmarks.page import write_blocks
from benchmarks.points import POINTS_FILE, RULE, Point, by_formula, by_simulation, question_of, why_out
from peftscope.files.hub import without_hub_kernels
from peftscope.hardware.cards import find_gpu
from peftscope.memory.answer import MEASURED_FILE
from peftscope.report.plots import new_figure
from peftscope.words import GIB

PUBLISHED = Path("results/published/scorecard")
PAGE = Path("docs/scorecard.md")
OURS = ("closed form", "simulation")
SIZES = ((1e9, "under 1B"), (4e9, "1B to 4B"), (1e12, "over 4B"))
"""The groups of models, by the largest number of parameters."""
MISSED = 0.05
"""An error of the closed form beyond this is listed by name."""


def score(points: list[Point]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns all predictions, one row for each point, and the estimators of others with their versions."""
    apart = ("resident", "device")  # of other jobs than supervised fine-tuning, few other figures are published
    asked = [point for point in points if point.asked and (point.kind not in apart or "job" in point.asked)]
    tuned = [point for point in asked if "job" not in point.asked and point.gpu]  # others want to know the card
    predicted: dict[str, dict[str, int | str]] = {name: {} for name in OURS}
    for point in track(asked, console=Console(stderr=True), description="ours"):
        predicted["closed form"][point.id] = by_formula(point)
        if point.measured_bytes and not why_out(point):
            predicted["simulation"][point.id] = by_simulation(point)
    tools, on_one_card = [], [point for point in tuned if point.asked.get("gpus", 1) == 1]
    for one in track(ESTIMATORS, console=Console(stderr=True), description="others"):
        try:
            predicted[one.name], installed = answers_of(one, on_one_card), "yes"
        except subprocess.CalledProcessError as error:
            predicted[one.name], installed = {}, f"no: {error}"
        tools.append((one.name, one.version, one.models_activations, one.total, installed))
    rows = []
    for point in points:
        question, unasked = question_of(point) if point.asked else (None, [])
        shape = question.model.shape if question else None
        row = {
            "id": point.id,
            "source": point.source,
            "run": point.run,
            "what": _what(point),
            "method": point.asked.get("method", ""),
            "parameters": shape.parameters if shape else None,
            "kind": point.kind,
            "gpu": point.gpu,
            "capacity_bytes": find_gpu(point.gpu).usable_bytes if point.gpu else None,
            "measured_bytes": point.measured_bytes,
            "out_of_scope": why_out(point),
            "not_asked": " ".join(unasked),
        }
        sizes = {f"{name}_bytes": values.get(point.id) for name, values in predicted.items()}
        rows.append(row | {name: size if isinstance(size, int) else None for name, size in sizes.items()})
    frame = pd.DataFrame(rows)
    whole = [name for name in frame if name.endswith("_bytes") or name == "parameters"]
    frame[whole] = frame[whole].astype("Int64")
    return frame, pd.DataFrame(tools, columns=["name", "version", "models_activations", "total", "installed"])


def _what(point: Point) -> str:
    """Returns a run in a few words: model, method, batch and length."""
    asked = point.asked
    if not asked:
        return f"{point.model}, {point.method}"
    on = ", ".join(name.removesuffix("_proj") for name in asked.get("targets", []))
    adapter = f" r{asked['rank']} on {on}" if on else ""
    job = f" {asked['job']}" if "job" in asked else ""
    said = f"{point.preset}, {asked['method']}{adapter}{job}, {asked['batch_size']} × {asked['seq_len']}"
    said += f", {asked['gpus']} cards" if asked.get("gpus", 1) > 1 else ""
    said += ", offloaded" if asked.get("offload") else ""
    return said + (", recomputed" if asked.get("checkpointing") else "")


def read_scores(folder: Path = PUBLISHED) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns what ``score`` found, as it was published."""
    scores = pd.read_csv(folder / "scorecard.csv", keep_default_na=False, na_values={})
    for name in scores:
        if name.endswith("_bytes") or name == "parameters":
            scores[name] = pd.to_numeric(scores[name]).astype("Int64")
    return scores, pd.read_csv(folder / "estimators.csv")


def in_scope(scores: pd.DataFrame) -> pd.DataFrame:
    """Returns the points in scope that have a measured size."""
    return scores[(scores["out_of_scope"] == "") & scores["measured_bytes"].notna()]


def one_a_run(scores: pd.DataFrame) -> pd.DataFrame:
    """Returns one point of each run: what was reserved or, if nobody published that, what was allocated."""
    return scores.sort_values("kind", ascending=False, kind="stable").drop_duplicates("run").sort_index()


def errors(scores: pd.DataFrame, name: str) -> pd.Series:
    """Returns the signed errors of an estimator, as shares of what was measured."""
    return (scores[f"{name}_bytes"].astype(float) / scores["measured_bytes"].astype(float) - 1).dropna()


def render(scores: pd.DataFrame, tools: pd.DataFrame) -> str:
    """Returns the scorecard as Markdown: the rule, errors by method and size, and every point."""
    usual = [*OURS, *tools.loc[tools["models_activations"], "name"]]
    bare = list(tools.loc[~tools["models_activations"], "name"])
    inside, outside = in_scope(scores), scores[scores["out_of_scope"] != ""]
    full = scores[(scores["out_of_scope"] == "") & (scores["kind"] == "out of memory")]
    versions = ", ".join(f"{tool.name} {tool.version}" for tool in tools.itertuples() if tool.installed == "yes")
    absent = [
        f"{tool.name} {tool.version} ({tool.installed})" for tool in tools.itertuples() if tool.installed != "yes"
    ]
    asked = outside[outside["closed form_bytes"].notna()]
    lines = [
        f"A point is in scope if all of this holds. This is so for {len(inside)} of {len(scores)} figures, from "
        f"{inside['run'].nunique()} runs, and for {len(full)} runs out of memory.",
        "",
        *(f"{number}. {sentence}" for number, sentence in enumerate(RULE, 1)),
        "",
        f"Estimators: {versions}. Not installed: {', '.join(absent) or 'none'}.",
        "",
        "| estimator | the number that is compared |",
        "|---|---|",
        *(f"| {tool.name} | {tool.total} |" for tool in tools.itertuples()),
        "",
        "## By method and size",
        "",
        "Each run counts once: with what was reserved or, if nobody published that, what was allocated. A cell has the "
        "mean size of the errors, and the worst error with its sign.",
        "",
        *_summary(one_a_run(inside), usual),
        "",
        f"The closed form and the simulation tell tensors (allocated) from segments (reserved). "
        f"{inside['simulation_bytes'].notna().sum()} of {len(inside)} points were simulated.",
        "",
        *_by("method", inside, OURS),
        "",
        *_missed(inside),
        "",
        "## By source",
        "",
        f"Every point counts. {', '.join(bare)} models no activations: with full fine-tuning its number is that of "
        "training with Adam, with an adapter that of the weights. scorecard.csv has each point, with what a calculator "
        "could not be asked.",
        "",
        *_by("source", inside, usual, bare),
        "",
        "## Out of memory",
        "",
        "What the card would have needed, in GiB. These runs were not simulated.",
        "",
        *_full(full, usual),
        "",
        "## Out of scope",
        "",
        "| why | figures |",
        "|---|---:|",
        *(f"| {reason} | {count} |" for reason, count in outside.groupby("out_of_scope", sort=False).size().items()),
        "",
        "Those that state enough to ask all the same:",
        "",
        *_by("source", asked[asked["measured_bytes"].notna()], usual, bare),
    ]
    return "\n".join(lines)


def _percent(error: float) -> str:
    return "-" if pd.isna(error) else f"{100 * error:+.1f}"


def _cell(scores: pd.DataFrame, name: str) -> str:
    """Returns the mean size of an estimator's errors, and the worst of them."""
    found = errors(scores, name)
    if found.empty:
        return "-"
    return f"{100 * found.abs().mean():.1f} ({_percent(found[found.abs().idxmax()])})"


def _summary(scores: pd.DataFrame, names: list[str]) -> list[str]:
    lines = [f"| method | model | runs | {' | '.join(names)} |", f"|---|---|---:|{'---:|' * len(names)}"]
    for method, group in [*scores.groupby("method", sort=True), ("all", scores)]:
        smallest = 0.0
        for largest, label in SIZES if method != "all" else [(inf, "all")]:
            sizes = group["parameters"].astype(float)
            part = group[(sizes >= smallest) & (sizes < largest)]
            smallest = largest
            if len(part):
                cells = " | ".join(_cell(part, name) for name in names)
                lines.append(f"| {method} | {label} | {len(part)} | {cells} |")
    return lines


def _by(first: str, scores: pd.DataFrame, names: Sequence[str], bare: Sequence[str] = ()) -> list[str]:
    names = [*(name for name in names if scores[f"{name}_bytes"].notna().any()), *bare]
    heads = " | ".join(f"*{name}*" if name in bare else name for name in names)
    lines = [f"| {first} | counted | points | {heads} |", f"|---|---|---:|{'---:|' * len(names)}"]
    for (name, kind), part in scores.groupby([scores[first].str.split("[ #;]").str[0], "kind"]):
        lines.append(f"| {name} | {kind} | {len(part)} | {' | '.join(_cell(part, each) for each in names)} |")
    return lines


def _missed(scores: pd.DataFrame) -> list[str]:
    """Returns the points where the closed form is far off, the largest error first, and what it was not asked."""
    found = errors(scores, "closed form")
    rows = scores.loc[found[found.abs() > MISSED].abs().sort_values(ascending=False).index]
    lines = [f"The closed form is off by more than {MISSED:.0%} at {len(rows)} of {len(scores)} points.", ""]
    for index, row in rows.iterrows():
        unasked = f" (not asked: {row['not_asked'].replace(' ', ', ')})" if row["not_asked"] else ""
        lines.append(f"- {_percent(found[index])} %: {row['what']}, {row['kind']}{unasked}")
    return lines


def measured(scores: pd.DataFrame) -> dict[str, Any]:
    """Returns how far the closed form is from measured peaks, by method and by what was counted, and on which cards."""
    found: dict[str, Any] = {}
    for (method, kind), part in in_scope(scores).groupby(["method", "kind"]):
        percent = 100 * errors(part, "closed form")
        found.setdefault(method, {})[kind] = {
            "points": len(percent),
            "mean_percent": round(percent.abs().mean(), 2),
            "worst_percent": round(percent[percent.abs().idxmax()], 2) + 0.0,  # -0.0 is 0
            "cards": [find_gpu(name).name for name in sorted(set(part["gpu"]))],
        }
    return found


def _full(scores: pd.DataFrame, names: list[str]) -> list[str]:
    """Returns the runs that ended out of memory, with what the card would have needed, in GiB."""
    names = [name for name in names if scores[f"{name}_bytes"].notna().any()]
    lines = [f"| run | card (GiB) | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for _, row in scores.iterrows():
        sizes, most = [row[f"{name}_bytes"] for name in names], row["capacity_bytes"]
        cells = ["-" if pd.isna(s) else f"{s / GIB:.0f}{'' if s > most else ' (fits)'}" for s in sizes]
        lines.append(f"| {row['what']} | {row['capacity_bytes'] / GIB:.1f} | {' | '.join(cells)} |")
    return lines


def draw(scores: pd.DataFrame, tools: pd.DataFrame, path: Path) -> None:
    """Draws the signed errors of every run, with one row for each estimator that models activations."""
    runs = one_a_run(in_scope(scores))
    names = [*OURS, *tools.loc[tools["models_activations"], "name"]]
    parts = [
        pd.DataFrame({"estimator": name, "error": 100 * found, "method": runs["method"].loc[found.index]})
        for name in names
        if len(found := errors(runs, name))
    ]
    long = pd.concat(parts, ignore_index=True)
    hues = {"hue": "method", "hue_order": sorted(set(runs["method"])), "palette": "colorblind"}
    with new_figure(path, 9, 3.6) as axes:
        sns.stripplot(long, x="error", y="estimator", **hues, jitter=False, dodge=True, ax=axes)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set(xlabel="error (% of what was measured)", ylabel="", xlim=(-100, 100))
        axes.legend(title="", fontsize=8)


@without_hub_kernels()
def main() -> None:
    """Predicts every point and writes the tables, the figure and the page."""
    scores, tools = score(Point.read(POINTS_FILE))
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    scores.to_csv(PUBLISHED / "scorecard.csv", index=False)
    tools.to_csv(PUBLISHED / "estimators.csv", index=False)
    scores, tools = read_scores()
    MEASURED_FILE.write_text(json.dumps(measured(scores), indent=2) + "\n")
    draw(scores, tools, PUBLISHED / "errors.png")
    write_blocks({"scorecard": render(scores, tools)}, PAGE)
    publish_outcomes(PUBLISHED, PAGE)


if __name__ == "__main__":
    main()

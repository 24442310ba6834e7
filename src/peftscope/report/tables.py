"""Tables with one row per method with intervals over seeds, per rung of each ladder, and per run."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from html import escape
from typing import Any

import pandas as pd

from peftscope.analysis.collect import read_runs
from peftscope.analysis.stats import Interval, mean_interval
from peftscope.layout import results_folder
from peftscope.methods import METHODS
from peftscope.planning.cells import ARM
from peftscope.planning.experiment import A_A
from peftscope.spec import RunSpec, start_without_seed
from peftscope.words import MIB, formatted, interval, percent, plain

MOST_SETTINGS, MOST_RUNS = 60, 500
"""The most rows of the tables for people. The CSV files have all rows."""
FEWEST_FOR_MEANS = 3
"""The runs from which on their mean is shown with its interval. Two are shown as two values."""
MOST_VARIANTS = 20
"""The most settings that a figure labels one by one; with more, it groups them by method."""

SCORES: dict[str, str] = {
    "heldout_nll": "heldout_nll_nats_per_token",
    "exact_match": "exact_match_fraction",
    "retention_change": "retention_change_bits_per_byte",
}
"""The columns that vary with the seed and get an interval, by their short names."""
PREDICTED_PEAK = "predicted_train_peak_tensor_bytes"
FACTS: dict[str, str] = {
    "load_peak_bytes": "load_peak_tensor_bytes",
    "train_peak_bytes": "train_peak_tensor_bytes",
    "predicted_train_peak_bytes": PREDICTED_PEAK,
    "evaluate_peak_bytes": "evaluate_peak_tensor_bytes",
    "step_seconds": "step_seconds_median",
    "tokens_per_second": "tokens_per_second",
    "matmul_share": "matmul_share",
    "trained_parameters": "trained_parameters",
    "adapter_bytes": "adapter_bytes",
}
"""The columns of which tables show the median over seeds, by their short names."""
PREDICTED: dict[str, str] = {
    "forward": "forward_peak_tensor_bytes",
    "backward": "backward_peak_tensor_bytes",
    "optimizer": "optimizer_peak_tensor_bytes",
    "training": "train_peak_tensor_bytes",
    "evaluation": "evaluate_peak_tensor_bytes",
    "training, reserved": "train_peak_reserved_bytes",
    "training, device": "train_peak_device_bytes",
}
"""The columns of peaks that are both predicted and measured. The prediction's column has the prefix ``predicted_``."""


ONLY_SCORED = (
    *("seed", "init_seed", "method", "name", "benchmarks", "benchmark_items", "generation_items"),
    *("validation_every", "retention_tokens", "retention_every", "latency_tokens"),
)
"""The settings that do not make a variant of a method: they say what is measured, or are shown elsewhere."""


def summarise(runs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Returns one row per combination of ``keys``: n, statuses, mean scores with 95 % intervals, and median facts."""
    change = runs["retention_bits_per_byte"] - runs["retention_bits_per_byte_before"]
    runs = runs.assign(retention_change_bits_per_byte=change)
    is_good = runs["status"] == "ok"
    by: Any = {"by": [runs[key] for key in keys], "sort": False, "dropna": False}
    # Whole columns are aggregated at once, because one frame per group takes a hundred times as long.
    groups = runs.reindex(columns=[*SCORES.values(), *FACTS.values()]).where(is_good).groupby(**by)
    table = is_good.groupby(**by).sum().to_frame("n")
    endings = runs["status"].where(~is_good).groupby(**by)
    table["other_endings"] = endings.agg(lambda names: ", ".join(sorted(names.dropna())))
    nothing = Interval(float("nan"), None, None, 0)
    for name, column in SCORES.items():
        found = [mean_interval(values.tolist()) or nothing for _, values in groups[column]]
        table[name] = [interval.mean for interval in found]
        table[f"{name}_low"] = [interval.low for interval in found]
        table[f"{name}_high"] = [interval.high for interval in found]
        table[f"{name}_least"], table[f"{name}_most"] = groups[column].min(), groups[column].max()
    for name, column in FACTS.items():
        table[name] = groups[column].median()
    return table.reset_index()


def method_summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the summary of the grid and of single runs, which the comparison of methods shows.

    Runs that set an arm against itself have rows of their own.
    """
    chosen = pooled(runs[runs["comparisons"].str.contains(r"\b(?:grid|runs)\b")])
    factors = factors_within_methods(chosen)
    is_again = chosen["comparisons"].str.contains(rf"\b{ARM}\S+{A_A}\b")
    chosen = chosen.assign(label=chosen["label"].mask(is_again, chosen["label"] + " against itself (A/A)"))
    return summarise(chosen, ["label", *factors]) if len(chosen) else pd.DataFrame()


def pooled(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns runs with the start of each named without its seed, so that starts that differ by it alone are one.

    A start that runs of several seeds share keeps its name. Runs without a start have no ``start_as``. Rows without
    seeds are pooled already.
    """
    if "seed" not in runs or "start_from" not in runs or not runs["start_from"].notna().any():
        return runs
    seeds = runs.groupby("start_from")["seed"].nunique()
    starts = [
        start_without_seed(start, seed) if isinstance(start, str) and seeds[start] == 1 else start
        for start, seed in zip(runs["start_from"], runs["seed"], strict=True)
    ]
    found = runs.assign(start_from=starts)
    if "start_as" in runs:
        found["start_as"] = runs["start_as"].where(runs["start_from"].notna())
    return found


def factors_within_methods(runs: pd.DataFrame) -> list[str]:
    """Returns the settings, except the seed, that vary between runs of the same method.

    A setting that the method decides, such as full fine-tuning's precision, says no more than the method's name.
    """
    return [field for field in settings(runs) if (runs.groupby("label")[field].nunique(dropna=False) > 1).any()]


def settings(runs: pd.DataFrame) -> list[str]:
    """Returns the columns that are settings of a run or of its method, except the seed."""
    fields = [*RunSpec.model_fields, *(field for cls in METHODS.values() for field in cls.model_fields)]
    return list(dict.fromkeys(field for field in fields if field in runs and field not in ONLY_SCORED))


def spoken_settings(row: pd.Series, fields: list[str]) -> str:
    """Returns the settings that a run has a value for, in words."""
    return ", ".join(f"{field.replace('_', ' ')} {plain(row[field])}" for field in fields if pd.notna(row[field]))


def with_peaks(methods: pd.DataFrame) -> pd.DataFrame:
    """Returns a summary with the peak of training, and whether that is predicted because no run was probed."""
    measured = methods["train_peak_bytes"]
    predicted = methods["predicted_train_peak_bytes"]
    return methods.assign(peak=measured.fillna(predicted), is_predicted=measured.isna() & predicted.notna())


def variants(runs: pd.DataFrame) -> pd.Series:
    """Returns the variant of each run: its method, with the settings that distinguish it from the method's other runs.

    Runs of the same variant may be pooled.
    """
    runs = pooled(runs)
    factors = factors_within_methods(runs)

    def name(row: pd.Series) -> str:
        told = spoken_settings(row, factors)
        return str(row["label"]) + (f" ({told})" if told else "")

    return runs.apply(name, axis=1) if len(runs) else pd.Series(dtype=str)


def grid_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs with the status ``ok`` that most figures show: those of the grid, or without one the listed."""
    ok = runs[runs["status"] == "ok"]
    grid = ok[ok["comparisons"].str.contains(r"\bgrid\b")]
    return grid if len(grid) else ok[ok["comparisons"].str.contains(r"\bruns\b")]


def is_crowded(runs: pd.DataFrame) -> bool:
    """Returns whether there are more variants than a figure can label."""
    return variants(runs).nunique() > MOST_VARIANTS


def best_settings(methods: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the method table that people see: equally many of each method, by held-out loss."""
    if len(methods) <= MOST_SETTINGS:
        return methods
    place = methods.groupby("label")["heldout_nll"].rank(method="first", na_option="bottom")
    return methods.loc[place.nsmallest(MOST_SETTINGS).index.sort_values()]


def notable_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs that people see one by one: those that are not ``ok``, then those with the lowest loss."""
    if len(runs) <= MOST_RUNS:
        return runs
    place = runs["heldout_nll_nats_per_token"].rank(method="first", na_option="bottom")
    return runs.loc[place.where(runs["status"] == "ok", 0).nsmallest(MOST_RUNS).index.sort_values()]


def ladder_summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per rung of every ladder: ``field``, ``value``, ``line`` and the summary.

    A ``line`` is the method with what distinguishes it otherwise. Ladders that differ in their seeds alone share it.
    """
    parts = []
    for field, names in ladders(runs).items():
        rungs = runs[[not names.isdisjoint(names_of_run.split()) for names_of_run in runs["comparisons"]]]
        lines = variants(rungs.drop(columns=field))
        part = summarise(rungs.assign(line=lines), ["line", "label", field]).rename(columns={field: "value"})
        parts.append(part.assign(field=field))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["line", "label", "field", "value"])


def ladders(runs: pd.DataFrame) -> dict[str, set[str]]:
    """Returns the names of the ladders of an experiment, by the field that they vary."""
    found: dict[str, set[str]] = {}
    for name in sorted({n for names in runs["comparisons"] for n in names.split() if n.startswith("ladder-")}):
        found.setdefault(name.rpartition("-")[2], set()).add(name)
    return found


def predictions(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per finished run and peak: ``predicted_bytes``, ``measured_bytes``, and ``error_percent``.

    CUDA's evaluation is left out: its measured peak also covers generation, its prediction only one held-out batch.
    """
    runs = runs[runs["status"] == "ok"]
    about = runs[["run_id", "label", "method", "device"]]
    parts = [
        about.assign(predicted_bytes=runs[f"predicted_{column}"], measured_bytes=runs[column], peak=name)
        for name, column in PREDICTED.items()
    ]
    found = pd.concat(parts, ignore_index=True).dropna(subset=["predicted_bytes", "measured_bytes"])
    found = found[~((found["device"] == "cuda") & (found["peak"] == "evaluation"))]
    return found.assign(error_percent=100 * (found["predicted_bytes"] / found["measured_bytes"] - 1))


def is_judged_on_training(runs: pd.DataFrame) -> bool:
    """Returns whether runs are judged on the items that they trained on, as those that memorise are.

    Runs that others only start from do not count.
    """
    return bool((runs.loc[runs["comparisons"] != "", "judged_on"] == "train").all())


def readable_predictions(compared: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean and the worst absolute error of each method's predictions, in percent."""
    rows = []
    for label, group in compared.groupby("label", sort=False):
        row: dict[str, Any] = {"method": label, "runs": f"{group['run_id'].nunique()}"}
        for peak in [name for name in PREDICTED if (compared["peak"] == name).any()]:
            errors = group.loc[group["peak"] == peak, "error_percent"].abs()
            row[f"{peak} (%)"] = f"{errors.mean():.3f}, worst {errors.max():.3f}" if len(errors) else "-"
        rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else ["method"])


def write_table(experiment: str, name: str, frame: pd.DataFrame, readable: pd.DataFrame | None = None) -> None:
    """Writes a table of an experiment with all its digits (csv) and, if there is any, its text for people (html)."""
    path = results_folder(experiment) / "tables" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
    if readable is not None and len(readable):
        path.with_suffix(".html").write_text(html(readable, name))


def write_tables(experiment: str) -> None:
    """Writes methods (csv, md, html), ladders (csv), runs (html) and predictions (csv, html) of an experiment."""
    runs = read_runs(experiment)
    methods, found = method_summary(runs), predictions(runs)
    shown = readable_methods(best_settings(methods))
    write_table(experiment, "methods", methods, shown)
    write_table(experiment, "ladders", ladder_summary(runs))
    write_table(experiment, "predictions", found, readable_predictions(found))
    folder = results_folder(experiment) / "tables"
    (folder / "methods.md").write_text(markdown(shown))
    (folder / "runs.html").write_text(html(readable_runs(notable_runs(runs)), "runs"))


def readable_methods(methods: pd.DataFrame) -> pd.DataFrame:
    """Returns the method table as text for people, with sizes in MiB and intervals in brackets."""
    if methods.empty:
        return pd.DataFrame({"method": []})
    factors = [c for c in methods.columns[: list(methods.columns).index("n")] if c != "label"]
    rows = []
    for row in with_peaks(methods).to_dict("records"):
        shown = {"method": row["label"], **{field: plain(row[field]) for field in factors}}
        shown["runs"] = f"n = {row['n']}" + (f" ({row['other_endings']})" if row["other_endings"] else "")
        shown |= {
            "held-out NLL (nats/token)": _mean(row, "heldout_nll", "{:.3f}".format),
            "exact match (%)": _mean(row, "exact_match", lambda share: f"{percent(share):.1f}"),
            "English, change (bits/byte)": _mean(row, "retention_change", "{:+.3f}".format),
            "peak tensors, train (MiB)": formatted(row["peak"], ",.0f", MIB) + " (predicted)" * row["is_predicted"],
            "peak tensors, load (MiB)": formatted(row["load_peak_bytes"], ",.0f", MIB),
            "step (s)": formatted(row["step_seconds"], ".2f"),
            "tokens/s": formatted(row["tokens_per_second"], ",.0f"),
            "of the matmul rate (%)": formatted(row["matmul_share"], ".0f", 0.01),
            "trained parameters": formatted(row["trained_parameters"], ",.0f"),
            "saved (MiB)": formatted(row["adapter_bytes"], ",.1f", MIB),
        }
        rows.append(shown)
    return pd.DataFrame(rows)


def readable_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns runs as text for people, each with its status. A run on too small a card ends as OOM."""
    ending = runs["status"].map(lambda status: "OOM" if status == "oom" else status)
    return pd.DataFrame(
        {
            "run": runs["run_id"],
            "part of": runs["comparisons"].str.replace(" ", ", "),
            "ended": ending,
            "reason": runs["reason"].astype(object).fillna(""),
            "seed": runs["seed"].astype(str),
            "learning rate": runs["learning_rate"].map(plain),
            "held-out NLL": runs["heldout_nll_nats_per_token"].map(lambda v: formatted(v, ".3f")),
            "exact match (%)": runs["exact_match_fraction"].map(lambda v: formatted(v, ".1f", 0.01)),
            "peak tensors, train (MiB)": runs["train_peak_tensor_bytes"].map(lambda v: formatted(v, ",.0f", MIB)),
            "peak resident, train (MiB)": runs["train_peak_resident_bytes"].map(lambda v: formatted(v, ",.0f", MIB)),
            "step (s)": runs["step_seconds_median"].map(lambda v: formatted(v, ".2f")),
            "initialise (s)": runs["initialise_seconds"].map(lambda v: formatted(v, ".1f")),
            "wall (s)": runs["wall_seconds"].map(lambda v: formatted(v, ".0f")),
        }
    )


def markdown(frame: pd.DataFrame) -> str:
    """Returns a frame of text as a Markdown table with numbers aligned to the right."""
    rows = [map(markdown_cell, map(str, row)) for row in (frame.columns, *frame.itertuples(index=False))]
    first, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([first, "|" + "|".join(["---", *["---:"] * (len(frame.columns) - 1)]) + "|", *others]) + "\n"


def markdown_text(text: str) -> str:
    """Returns text that is safe in Markdown: on one line, without HTML."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("\n", " "))


def markdown_cell(text: str) -> str:
    """Returns text that is safe in a cell of a Markdown table.

    >>> markdown_cell("a|b <script>, 1 < 2")
    'a\\\\|b &lt;script>, 1 < 2'
    """
    return markdown_text(text).replace("|", "\\|")


def html(frame: pd.DataFrame, name: str) -> str:
    """Returns a frame of text as an HTML table that a page can sort, without columns that are empty in every row.

    Without rows it is empty.
    """
    if frame.empty:
        return ""
    empty = [column for column in list(frame.columns)[1:] if frame[column].isin(["-", ""]).all()]
    frame = frame.drop(columns=empty)
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in frame.columns)
    rows = ("".join(f"<td>{escape(str(value))}</td>" for value in row) for row in frame.itertuples(index=False))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<table id="{escape(name)}" class="sorts"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n'
    )


def _mean(row: dict[Hashable, Any], name: str, told: Callable[[float], str]) -> str:
    """Returns a mean over seeds with its interval; two runs are told as they are."""
    if pd.isna(row[name]):
        return "-"
    if row["n"] == FEWEST_FOR_MEANS - 1:
        return f"{told(row[f'{name}_least'])} and {told(row[f'{name}_most'])}"
    return interval(row[name], row[f"{name}_low"], row[f"{name}_high"], told)

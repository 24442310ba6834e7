"""Scores of runs, read from what the suite and lm-eval write, or from a CSV. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from peftscope.analysis.collect import main_metric
from peftscope.analysis.scored import FRACTION, LOSS, LOSSES, NATS, Scored
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.files.content import parse_json, read_text
from peftscope.layout import how_to_run, published_paths, run_folder
from peftscope.planning.published import ITEMS, RECORDS
from peftscope.spec import RunSpec, start_without_seed

LARGEST_LOG = 2_000_000_000
"""The largest file of scores that is read, in bytes."""
NAMES = "give a run's id, a file, or STUDY:ARM"


def read_scores(source: str, metric: str | None = None) -> list[Scored]:
    """Returns the runs that a text names.

    Args:
        source: Run ids or files, joined by commas, or ``STUDY:ARM``.
        metric: The score to read, as the files name it; None for each format's main score.

    Raises:
        InputError: There is nothing of this name, it is none of the formats, or it has no such score.
    """
    parts = [source] if os.path.exists(source) else [part.strip() for part in source.split(",") if part.strip()]
    if not parts:
        raise InputError(Problem(shown(source), "names nothing", NAMES))
    return [run for part in parts for run in _read(part, metric)]


def _read(source: str, metric: str | None) -> list[Scored]:
    study, _, arm = source.partition(":")
    if os.path.exists(source):
        return _read_file(Path(source), metric)
    if arm:
        return _read_study(study, arm, metric)
    if runs := _own_runs([source], metric):
        return list(runs.values())
    raise InputError(Problem(source, "no run or file of this name", NAMES))


FORMATS = "items.jsonl of a run, samples_*.jsonl of lm-eval, or a CSV"


def _read_file(path: Path, metric: str | None) -> list[Scored]:
    if path.is_file() and path.suffix == ".jsonl":
        rows = list(_lines(path))
        if not rows:
            raise InputError(Problem(str(path), "is empty"))
        return [_own(path, rows, metric) if "nll" in rows[0] else _lm_eval(path, rows, metric)]
    if path.is_file() and path.suffix == ".csv":
        return _csv(path, metric)
    raise InputError(Problem(str(path), "no format that is known", f"scores are {FORMATS}"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_text(path, LARGEST_LOG).split("\n"), 1):
        if line.strip():
            row = parse_json(line, f"{path}: line {number}")
            if not isinstance(row, dict):
                raise InputError(Problem(f"{path}: line {number}", f"not a mapping (got {shown(row)})"))
            yield row


# --- the suite's own runs


def _read_study(name: str, arm: str, metric: str | None) -> list[Scored]:
    study = StudyResults(name)
    if arm not in study.arms:
        raise InputError(Problem(f"{name}:{arm}", "the study has no such arm", close_match(arm, study.arms)))
    wanted = list(study.arm_runs(arm)["run_id"])
    runs = _own_runs(wanted, metric)
    if missing := [run for run in wanted if run not in runs]:
        said = "its items are neither in the store nor published"
        raise InputError(Problem(missing[0], said, how_to_run(name)))
    return [replace(runs[run], system=arm, study=(name, arm)) for run in wanted]


def _own_runs(names: Sequence[str], metric: str | None) -> dict[str, Scored]:
    """Returns runs of the store by their ids, and the published ones that the store lacks."""
    paths = {name: run_folder(name) / "items.jsonl" for name in names}
    runs = {name: _own(path, list(_lines(path)), metric) for name, path in paths.items() if os.path.exists(path)}
    for path in published_paths(ITEMS):
        runs |= _published(path.parent, [name for name in names if name not in runs], metric)
    return runs


def _published(folder: Path, names: Sequence[str], metric: str | None) -> dict[str, Scored]:
    try:
        records = pd.read_parquet(folder / RECORDS).set_index("run_id")["record"]
        known = [name for name in names if name in records.index]
        items = pd.read_parquet(folder / ITEMS, filters=[("run_id", "in", known)]) if known else None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(Problem(str(folder), f"its {RECORDS} and {ITEMS} cannot be read: {error}")) from None
    return {
        str(run): _own_scores(str(run), rows, _all_fields(json.loads(records[run])["spec"]), metric, str(run))
        for run, rows in (items.groupby("run_id", sort=False) if items is not None else ())
    }


def _own(path: Path, rows: list[dict[str, Any]], metric: str | None) -> Scored:
    spec = path.with_name("spec.json")
    fields = parse_json(read_text(spec), str(spec)) if spec.is_file() else {}
    name = path.parent.name or path.stem
    spec_fields = _all_fields(fields) if isinstance(fields, dict) else {}
    return _own_scores(name, pd.DataFrame(rows), spec_fields, metric, str(path))


def _all_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a run with those that it is older than, at their defaults; others' files as they are."""
    try:
        return RunSpec.model_validate(fields).model_dump(mode="json")
    except ValidationError:
        return fields


def _own_scores(name: str, rows: pd.DataFrame, spec: dict[str, Any], metric: str | None, where: str) -> Scored:
    columns = {LOSS: "nll", "exact_match": "correct"}
    missing = {"item", "prompt", "target", "nll", "tokens"} - set(rows)
    if missing:
        raise InputError(Problem(where, f"no `{min(missing)}` in its rows", "give items.jsonl as a run writes it"))
    has = [each for each, column in columns.items() if column in rows and rows[column].notna().any()]
    chosen = _chosen(metric, has, has[0] if has else None, where)
    rows = rows.dropna(subset=[columns[chosen]])
    tokens = _numbers(rows["tokens"], f"{where}: tokens") if chosen == LOSS else 1.0
    values = _numbers(_numbers(rows[columns[chosen]], f"{where}: {columns[chosen]}") / tokens, f"{where}: tokens")
    content = rows["prompt"].astype(str) + "\n" + rows["target"].astype(str)
    seed, init = (value if isinstance(value := spec.get(key), int) else None for key in ("seed", "init_seed"))
    rest = {key: value for key, value in spec.items() if key not in ("seed", "init_seed")}
    if seed is not None and isinstance(start := spec.get("start_from"), str):
        rest["start_from"] = start_without_seed(start, seed)
    if init is not None and seed is not None:
        rest["init_seed less seed"] = init - seed
    return Scored(
        system=f"{name.rpartition(f'-s{seed}-')[0] or name} at {spec.get('learning_rate')}" if spec else name,
        where=where,
        seed=seed,
        metric=chosen,
        unit=NATS if chosen == LOSS else FRACTION,
        items=_items(rows["item"], values, tokens, content, where),
        setting=json.dumps(rest, sort_keys=True) if spec else "",
    )


# --- lm-eval


def _lm_eval(path: Path, rows: list[dict[str, Any]], metric: str | None) -> Scored:
    """Returns the scores of a log of lm-eval, one row per item and filter.

    Source: lm-eval 0.4, ``evaluator.evaluate`` and ``EvaluationTracker.save_results_samples``.
    """
    if "doc_id" not in rows[0]:
        raise InputError(Problem(str(path), "neither lm-eval's log nor a run's items", f"scores are {FORMATS}"))
    names: dict[str, None] = {}
    for row in rows:
        # Logs of older versions do not list their metrics.
        listed = row.get("metrics")
        if not isinstance(listed, list):
            listed = [name for name, value in row.items() if name not in ("doc_id", "metrics") and _is_number(value)]
        names |= {f"{name},{row.get('filter', 'none')}": None for name in listed}
    wanted = f"{metric},none" if f"{metric},none" in names else metric
    chosen = _chosen(wanted, list(names), main_metric(names), str(path))
    name, _, filtered = chosen.rpartition(",")
    found = [row for row in rows if str(row.get("filter", "none")) == filtered and {name, "doc_id"} <= {*row}]
    kept = pd.DataFrame(found)
    if kept.empty:
        raise InputError(Problem(str(path), f"no row has the score `{name}` that it lists", "give another --metric"))
    values = _numbers(kept[name], f"{path}: {name}")
    hashes = [column for column in ("doc_hash", "target_hash") if column in kept]
    content = kept[hashes or ["doc_id"]].astype(str).agg(" ".join, axis=1)
    return Scored(
        system=path.parent.name or path.stem,
        where=str(path),
        seed=None,
        metric=chosen,
        unit=_unit(values, chosen),
        items=_items(kept["doc_id"], values, 1.0, content, str(path)),
    )


# --- a CSV


def _csv(path: Path, metric: str | None) -> list[Scored]:
    """Returns the runs of a CSV that has a score, and the columns ``name``, ``seed`` and ``item`` or some of them."""
    where = str(path)
    try:
        table = pd.read_csv(path)
        if "name" in table:  # as it is written: a system may have the name None
            table["name"] = pd.read_csv(path, usecols=["name"], dtype=str, keep_default_na=False)["name"]
    except (ValueError, OSError) as error:  # pandas' errors of parsing are ValueErrors
        raise InputError(Problem(where, f"cannot be read as CSV: {error}")) from None
    keys = [column for column in ("name", "seed", "item") if column in table]
    scores = [column for column in table.columns if column not in keys]
    default = "score" if "score" in scores else scores[0] if len(scores) == 1 else None
    chosen = _chosen(metric, [str(column) for column in scores], default, where)
    if table.empty:
        raise InputError(Problem(where, "has no rows"))
    if not keys and len(table) > 1:
        raise InputError(Problem(where, "does not say what a row is", "add a column `seed`, `item`, or `name`"))
    for key in keys:
        if (empty := table[key].isna() | (table[key] == "")).any():
            raise InputError(Problem(f"{where}: {key}", f"empty in row {empty.idxmax()}", "fill it in every row"))
    values = _numbers(table[chosen], f"{where}: {chosen}")
    runs = []
    by = [column for column in ("name", "seed") if column in table]
    for _, rows in table.groupby(by, sort=False) if by else [((), table)]:
        own = values[rows.index]
        if "item" not in table and len(rows) > 1:
            said = ", ".join(f"{column} {rows[column].iloc[0]}" for column in by)
            raise InputError(Problem(where, f"{len(rows)} rows for {said}", "add a column `seed` or `item`"))
        runs.append(
            Scored(
                system=str(rows["name"].iloc[0]) if "name" in table else path.stem,
                where=where,
                seed=_seed(rows["seed"].iloc[0], where) if "seed" in table else None,
                metric=chosen,
                unit=_unit(values, chosen),
                items=_items(rows["item"], own, 1.0, rows["item"], where) if "item" in table else _whole(own.iloc[0]),
                setting=json.dumps({"name": str(rows["name"].iloc[0])}) if "name" in table else "",
            )
        )
    return runs


def _seed(value: Any, where: str) -> int:
    if not _is_number(value) or value != int(value):
        raise InputError(Problem(f"{where}: seed", f"no whole number (got {shown(value)})"))
    return int(value)


# --- parts of all


def _chosen(metric: str | None, names: Sequence[str], default: str | None, where: str) -> str:
    chosen = metric or default
    if chosen is None:
        raise InputError(Problem(where, "does not say which score is meant", f"give --metric: {', '.join(names)}"))
    if chosen not in names:
        raise InputError(Problem(where, f"has no score `{chosen}`", close_match(chosen, names)))
    return chosen


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_) and bool(np.isfinite(value))


def _numbers(values: pd.Series, where: str) -> pd.Series:
    wrong = values[~values.map(_is_number)]
    if len(wrong):
        # One word in a column of a CSV makes text of its numbers, too: the word is at fault.
        words = wrong[pd.to_numeric(wrong, errors="coerce").isna()]
        row, value = next((words if len(words) else wrong).items())
        raise InputError(Problem(where, f"not a number in row {row} (got {shown(value)})"))
    return values.astype(float)


def _unit(values: pd.Series, metric: str) -> str:
    is_loss = any(word in metric.lower() for word in LOSSES)
    return FRACTION if values.between(0, 1).all() and not is_loss else ""


def _items(index: pd.Series, values: pd.Series, weights: Any, content: pd.Series, where: str) -> pd.DataFrame:
    items = pd.DataFrame({"value": values, "weight": weights, "content": content})
    items = items.set_axis([str(item) for item in index])
    if not items.index.is_unique:
        twice = items.index[items.index.duplicated()][0]
        raise InputError(Problem(where, f"item {twice} appears twice", "give the scores of one run"))
    return items


def _whole(score: float) -> pd.DataFrame:
    """Returns the one row of a run whose items were not kept apart."""
    return pd.DataFrame({"value": [float(score)], "weight": [1.0], "content": [""]})

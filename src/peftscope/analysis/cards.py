"""Finds runs that a CUDA card measured on random weights, by the options of ``peftscope memory``. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from peftscope.hardware.cards import PRETENDED
from peftscope.memory.base import describe_model
from peftscope.memory.question import METHOD_OPTIONS, SPEC_OPTIONS, ask
from peftscope.spec import RunSpec

TASK = "filler"
"""The task of such runs: every sequence is as long as ``seq_len`` allows."""
PREFIX = "random-"
"""Begins the names of models that have the shape of a preset and random weights."""

Row = dict[str, Any]


def read_cards(folders: Iterable[Path]) -> dict[str, list[Row]]:
    """Returns the rows of runs on random weights by the name of their card; rows of processors are ignored, even
    of one that stands in for a card.

    Args:
        folders: The folders whose subfolders have a ``runs.csv``. A run that two of them have counts once.
    """
    cards: dict[str, dict[str, Row]] = {}
    for table in (pd.read_csv(path) for folder in folders for path in sorted(folder.glob("*/runs.csv"))):
        if "device" not in table or not (table["device"] == "cuda").any():
            continue
        table = table[(table["device"] == "cuda") & (table["task"] == TASK) & table["status"].isin(["ok", "oom"])]
        table = table[~table["gpu"].astype(str).str.startswith(PRETENDED)]
        for row in table.astype(object).where(table.notna(), None).to_dict("records"):
            cards.setdefault(str(row["gpu"]), {}).setdefault(str(row["run_id"]), row)
    return {card: list(rows.values()) for card, rows in sorted(cards.items())}


def find_run(rows: Iterable[Row], model: str, options: Mapping[str, Any], measured: str = "status") -> Row | None:
    """Returns the row of a run without a limit of its memory, or None.

    Args:
        model: The preset whose shape the run's model has.
        options: The options of ``peftscope.memory.question.ask``; the others have the defaults that they have there.
            With ``latency_tokens``, the latency of a prompt of so many tokens is meant, whatever the run trained on.
        measured: A column that the row must have, unless the run ran out of memory.
    """
    wanted = _wanted(model, options) | {"memory_limit_gib": None}
    for row in rows:
        has_value = row["status"] == "oom" or row.get(measured) is not None
        # A field that a table has no column for came later, and had its default.
        if has_value and all(row.get(name, _DEFAULTS.get(name)) == value for name, value in wanted.items()):
            return row
    return None


_DEFAULTS = {name: field.default for name, field in RunSpec.model_fields.items()}


def _wanted(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns that tell apart what takes other memory or time, with the values of a run."""
    known_as = {name: value for name, value in options.items() if name != "latency_tokens"}
    spec = ask(describe_model(model), known_as).spec
    fields = spec.method.columns() | spec.model_dump(mode="json", exclude={"method"})
    tokens = options.get("latency_tokens", 0)
    open_fields = {"alpha", "eval_batch_size", *(["seq_len"] if tokens else [])} - options.keys()
    known = {name: fields[name] for name in (*METHOD_OPTIONS, *SPEC_OPTIONS) if name in fields.keys() - open_fields}
    known = {name: None if value == "" else value for name, value in known.items()}  # as an empty cell is read
    return {"model": PREFIX + model, "method": spec.method.name, "latency_tokens": tokens, **known}


def quartiles(row: Row, name: str) -> tuple[float, float, float, int]:
    """Returns lower quartile, median, upper quartile and number of a row's times, of ``step`` or of ``latency_...``."""
    count = "timed_steps" if name == "step" else f"{name}_repeats"
    lower, middle, upper = (row[f"{name}_seconds_{which}"] for which in ("lower_quartile", "median", "upper_quartile"))
    return lower, middle, upper, int(row[count])

"""Published runs: three Parquet files per experiment, with ``records``, ``items`` and ``losses``.

No rule of the workflow reads them. Estimates read them, and ``peftscope restore`` copies runs from them into the store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem
from peftscope.layout import published, published_paths

TRAINING = "nll_nats_per_token"
VALIDATION = "validation_nll_nats_per_token"
"""The columns of the loss of each step, and of that on validation items: at the end of a run, or along its training."""
RETENTION = "retention_bits_per_byte"
"""The column of the score on English prose."""
SHIFT = "shift_from_base_nats"
"""The column of how far the answers moved from the base's: at the end of a run, or along its training."""
RECORDS, ITEMS, LOSSES = "records.parquet", "items.parquet", "losses.parquet"
LARGEST_BYTES = 5_000_000
"""The size limit of a published file, above which it must not be committed."""

_ITEM_FIELDS = ("item", "prompt", "target", "nll", "tokens", "argmax", "answer", "correct")
_NOT_ALWAYS = ("argmax", "answer", "correct")
"""Fields that runs of older versions lack, or items that were not asked for an answer."""


def write_runs(folder: Path, runs: Iterable[Path]) -> None:
    """Writes the Parquet files of finished runs.

    A record's JSON text is kept as it is, so that its checksum stays true.

    ``runs`` are the folders of the runs, each with ``record.json`` and, unless the run failed, ``items.jsonl``.

    Raises:
        InputError: A file is too large to commit.
    """
    files: dict[str, list[dict[str, Any]]] = {RECORDS: [], ITEMS: [], LOSSES: []}
    for run in runs:
        text = (run / "record.json").read_text()
        files[RECORDS].append({"run_id": run.name, "record": text})
        files[LOSSES] += [{"run_id": run.name, **row} for row in loss_rows(json.loads(text))]
        if (run / "items.jsonl").is_file():
            lines = (run / "items.jsonl").read_text().splitlines()
            files[ITEMS] += [{"run_id": run.name, **dict.fromkeys(_ITEM_FIELDS), **json.loads(line)} for line in lines]
    for name, rows in files.items():
        if (path := _write(folder / name, rows)).stat().st_size > LARGEST_BYTES:
            raise InputError(Problem(str(path), f"is over {LARGEST_BYTES:,} bytes, which is too large to commit"))


def loss_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns one row per training step of a record: its training loss and, where measured, what else was scored."""
    along, prose, moved = (record["quality"].get(f"{name}_curve", {}) for name in ("validation", "retention", "shift"))
    return [
        {
            "step": step,
            TRAINING: nll,
            VALIDATION: along.get(str(step)),
            RETENTION: prose.get(str(step)),
            SHIFT: moved.get(str(step), {}).get("from_base"),
        }
        for step, nll in enumerate(record["train_nll"], 1)
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    # As small as they get, for the wheel: rows are much alike, and a page of all of them is compressed as one.
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=False,
        data_page_size=1 << 30,
    )
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def published_records(experiment: str) -> dict[str, str]:
    """Returns the JSON text of an experiment's published records, by run id.

    Raises:
        InputError: The experiment has no published runs.
    """
    path = published(experiment) / RECORDS
    if not path.is_file():
        raise InputError(Problem(str(path), "no published runs"))
    return {row["run_id"]: row["record"] for row in _rows(path)}


def all_published_records() -> Iterator[tuple[str, str, str]]:
    """Yields (experiment, run id, JSON text of the record) for all published runs."""
    for path in published_paths(RECORDS):
        yield from ((path.parent.name, row["run_id"], row["record"]) for row in _rows(path))


def published_items(experiment: str) -> dict[str, str]:
    """Returns the text of ``items.jsonl`` of each published run, byte for byte as the run wrote it.

    A wheel has no items, so that there they are none.
    """
    lines: dict[str, list[str]] = {}
    path = published(experiment) / ITEMS
    for row in _rows(path) if path.is_file() else ():
        fields = {name: row.get(name) for name in _ITEM_FIELDS if name not in _NOT_ALWAYS or row.get(name) is not None}
        lines.setdefault(row["run_id"], []).append(json.dumps(fields, ensure_ascii=False) + "\n")
    return {run: "".join(text) for run, text in lines.items()}

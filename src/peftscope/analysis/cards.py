"""Reads the JSON files that the check on a card writes. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem
from peftscope.files.content import parse_json, read_text
from peftscope.layout import PUBLISHED_RESULTS

KINDS = ("fits", "steps", "latency", "memory")
"""The kinds of jobs in their order; those that decide most claims come first. Each has a JSON and a CSV file."""

CARD_FILE = "card.json"
PUBLISHED = PUBLISHED_RESULTS / "gpu"

_NAMED = ("method", "batch_size", "seq_len", "checkpointing")


@dataclass(frozen=True)
class Card:
    """The results of one card.

    Attributes:
        facts: The content of ``card.json``.
        rows: The row of each job, by kind and label.
    """

    facts: dict[str, Any]
    rows: dict[str, dict[str, dict[str, Any]]]

    @property
    def name(self) -> str:
        """The card's name according to its driver."""
        return str(self.facts["name"])

    def find(self, kind: str, label: str) -> dict[str, Any] | None:
        """Returns the row of a job that was measured or ran out of memory, or None."""
        row = self.rows[kind].get(label)
        return row if row is not None and row["status"] in ("ok", "out of memory") else None


def label_of(model: str, options: Mapping[str, Any], limit: str = "", headroom: float = 0) -> str:
    """Returns the label of a job, by which a claim finds its row.

    Args:
        model: A preset, or the path of a ``config.json``.
        options: The options of ``peftscope.memory.question.ask``.
        limit: The card to whose memory the job is limited.
        headroom: The share of this memory that stays free.

    >>> label_of("llama-2-7b", {"method": "lora", "targets": "attention", "checkpointing": True}, "rtx4090")
    'llama-2-7b-lora-1x512-checkpointing-attention-on-rtx4090'
    """
    parts = [Path(model).stem if model.endswith(".json") else model, str(options.get("method", "lora"))]
    parts.append(f"{options.get('batch_size', 1)}x{options.get('seq_len', 512)}")
    parts += ["checkpointing"] if options.get("checkpointing") else []
    for name, value in sorted(options.items()):
        if name not in _NAMED:
            parts.append(value if isinstance(value, str) else f"{name}={json.dumps(value)}")
    parts += [f"on-{limit}"] if limit else []
    parts += [f"headroom={headroom:g}"] if headroom else []
    return "-".join(parts)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of one kind by their labels, or no rows if the file does not exist.

    Raises:
        InputError: The file is damaged.
    """
    if not path.is_file():
        return {}
    rows = read_facts(path)
    if not all(isinstance(row, dict) and isinstance(row.get("status"), str) for row in rows.values()):
        raise InputError(Problem(str(path), "not rows of the check on a card", "remove it and run make gpu-check"))
    return rows


def read_cards(folder: Path) -> list[Card]:
    """Returns the results of CUDA cards in a folder and its subfolders; results of processors are ignored.

    Raises:
        InputError: A file is damaged.
    """
    cards = []
    for path in sorted([*folder.glob(CARD_FILE), *folder.glob(f"*/{CARD_FILE}")]):
        if not is_of_card(path):
            continue
        facts = read_facts(path)
        rows = {kind: read_rows(path.with_name(f"{kind}.json")) for kind in KINDS}
        cards.append(Card(facts, {kind: _of_cards(found) for kind, found in rows.items()}))
    return cards


def is_of_card(path: Path) -> bool:
    """Returns whether a ``card.json`` belongs to a CUDA card, not to a processor that stood in for one.

    Raises:
        InputError: The file is damaged.
    """
    facts = read_facts(path)
    return facts.get("device") == "cuda" and "name" in facts


def _of_cards(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {label: row for label, row in rows.items() if row.get("device") == "cuda"}


def read_facts(path: Path) -> dict[str, Any]:
    """Returns the mapping that a JSON file holds.

    Raises:
        InputError: The file is damaged.
    """
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise InputError(Problem(str(path), "not a mapping", "remove it and run make gpu-check"))
    return content

"""Scores of a trained model by generated answers and benchmarks, and the losses of each item, written down."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftscope.data.sources import Item
from peftscope.evaluation.heldout import ItemLoss
from peftscope.record import RunRecord
from peftscope.spec import RunSpec


def score_answers(
    model: Any, tokenizer: Any, spec: RunSpec, record: RunRecord, items: list[Item]
) -> list[dict[str, Any]]:
    """Returns the answers to items, each with its item and whether it is right, and writes their score."""
    if not spec.generation_items:
        return []
    # This import is slow, and only these runs need it.
    from peftscope.evaluation import answers as generated

    began = time.perf_counter()
    answers = generated.score_answers(model, tokenizer, spec, items)
    if record.provenance["alone"]:
        record.speed.generation_seconds = time.perf_counter() - began
    record.quality.exact_match = sum(row["correct"] for row in answers) / len(answers)
    record.quality.exact_match_items = len(answers)
    return answers


def score_benchmarks(model: Any, tokenizer: Any, spec: RunSpec) -> dict[str, dict[str, float]]:
    """Returns the scores of lm-eval's benchmarks that the spec asks for."""
    if not spec.benchmarks:
        return {}
    from peftscope.evaluation import benchmarks

    return benchmarks.score_benchmarks(model, tokenizer, spec)


def write_items(path: Path, items: list[Item], per_item: Sequence[ItemLoss], answers: list[dict[str, Any]]) -> None:
    """Writes one line for each held-out item: its loss and, where it was asked, its answer."""
    by_item = {row["item"]: row for row in answers}
    rows = []
    for index, (item, loss) in enumerate(zip(items, per_item, strict=True)):
        row = {"item": index, "prompt": item.prompt, "target": item.response, **loss._asdict()}
        answer = by_item.get(index)
        rows.append(row | ({"answer": answer["answer"], "correct": answer["correct"]} if answer else {}))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

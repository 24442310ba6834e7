"""Scores of a trained model by generated answers and benchmarks, and the losses of each item, written down."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftscope.data.sources import Item
from peftscope.evaluation.heldout import ItemLoss
from peftscope.spec import RunSpec


def score_answers(model: Any, tokenizer: Any, spec: RunSpec, items: list[Item]) -> tuple[list[dict[str, Any]], float]:
    """Returns the answers to items, each with its item and whether it is right, and the seconds that they took."""
    if not spec.generation_items:
        return [], 0.0
    # This import is slow, and only these runs need it.
    from peftscope.evaluation import answers as generated

    began = time.perf_counter()
    answers = generated.score_answers(model, tokenizer, spec, items)
    return answers, time.perf_counter() - began


def write_items(path: Path, items: list[Item], per_item: Sequence[ItemLoss], answers: list[dict[str, Any]]) -> None:
    """Writes one line for each held-out item: its loss and, where it was asked, its answer."""
    by_item = {row["item"]: row for row in answers}
    rows = []
    for index, (item, loss) in enumerate(zip(items, per_item, strict=True)):
        row = {"item": index, "prompt": item.prompt, "target": item.response, **loss._asdict()}
        answer = by_item.get(index)
        rows.append(row | ({"answer": answer["answer"], "correct": answer["correct"]} if answer else {}))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

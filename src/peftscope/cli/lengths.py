"""``peftscope memory --lengths`` and ``--data``: the peaks of batches as wide as the items of a data set are long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from peftscope.cli.console import print_json
from peftscope.cli.show import show_headroom, show_lengths
from peftscope.errors import InputError, Problem, needs
from peftscope.memory.question import Question
from peftscope.sizing.lengths import answer_lengths, count_tokens, read_lengths


def items_asked(lengths: Path | None, data: Path | None, model: str | None, own: Mapping[str, Any]) -> list[int]:
    """Returns the lengths of the data set that was named; empty if none was. ``own`` are options about it alone.

    Raises:
        InputError: The file is wrong, two were named, or an option needs one and none was.
    """
    if lengths and data:
        raise InputError(Problem("lengths", "--data was given as well", "leave out one of the two"))
    if lengths:
        return read_lengths(lengths)
    if data:
        fields = [field.strip() for field in (own["fields"] or "text").split(",")]
        return count_tokens(data, fields, lambda: _load_tokenizer(own["tokenizer"] or model))
    if stray := [name for name, value in own.items() if value]:
        raise InputError(Problem(stray[0], "is about a data set", "give its --lengths or --data"))
    return []


def _load_tokenizer(name: str | None) -> Any:
    """Returns the tokenizer in a folder, or of a model of models.yaml that was fetched."""
    from peftscope.models.catalog import model_folder

    remedy = "give --tokenizer with a folder that has a tokenizer.json, or --lengths"
    if name is None:
        raise InputError(Problem("tokenizer", "none given", remedy))
    folder = Path(name) if Path(name).is_dir() else model_folder(name)
    if not folder.is_dir():
        raise InputError(Problem("tokenizer", f"{name} is no folder, and no model that was fetched", remedy))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it fails in many ways, and the user needs one line
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(Problem("tokenizer", f"none can be loaded from {folder}: {reason}", remedy)) from None


def tell_lengths(
    question: Question, items: list[int], own: Mapping[str, Any], console: Console, *, as_json: bool
) -> bool:
    """Prints the answer about a data set, draws its figure, and returns whether the widest batch fits, if on a card."""
    answer = answer_lengths(question, items)
    if own["figure"]:
        with needs("report"):
            from peftscope.report.memory import draw_lengths

            draw_lengths(answer, own["figure"])
    if as_json:
        print_json(asdict(answer))
    else:
        show_lengths(answer, console)
        if question.gpu:
            show_headroom(question.gpu, answer.quantiles[-1], console)
    return answer.fits != "no"

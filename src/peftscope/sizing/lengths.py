"""The peaks of batches as wide as the items of a data set are long. No torch."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.files.content import LARGEST_COUNT, read_lines
from peftscope.files.limits import check_characters
from peftscope.hardware.cards import Fits
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.assumptions import assumptions_of
from peftscope.memory.beside import JOBS
from peftscope.memory.formula.step import TrainingTraces
from peftscope.memory.question import Question

SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""The shares of items whose lengths and peaks an answer lists."""


@dataclass(frozen=True)
class Quantile:
    """A share of the items, from the shortest, with the longest of them and the peaks of a full batch as wide."""

    share: float
    width: int
    peak_allocated_bytes: int
    peak_device_bytes: int
    least_device_bytes: int


@dataclass(frozen=True)
class LengthsAnswer:
    """The answer about a data set's batches.

    Attributes:
        model: The model's name, as the question gave it.
        method: The name of the method.
        items: The number of items.
        cut_items: The number of items that were longer than a row, and are cut.
        too_long_items: The items that are longer than the widest full batch that fits; None without a card.
        batch_size: The rows or, where an item is two of them, the pairs of a full batch.
        batch_of: What those are: row or pair.
        capacity_bytes: The memory of the card that CUDA can use; None without a card.
        fits_width: The widest full batch whose tensors fit, up to the longest item; None without a card.
        quantiles: The lengths of items, once cut, and the peaks of full batches as wide; the last is the widest batch.
        assumptions: The assumptions behind the answer, one sentence each.
        fits: Whether the widest batch fits, as ``Gpu.fits`` says it; None without a card.
        headroom_bytes: The memory that it leaves; negative: torch gives back what it caches; None without a card.
        missing_bytes: The memory that is missing for its tensors; 0 if they fit; None without a card.
    """

    model: str
    method: str
    items: int
    cut_items: int
    too_long_items: int | None
    batch_size: int
    batch_of: str
    capacity_bytes: int | None
    fits_width: int | None
    quantiles: tuple[Quantile, ...]
    assumptions: tuple[str, ...]
    fits: Fits | None = None
    headroom_bytes: int | None = None
    missing_bytes: int | None = None


def read_lengths(path: Path) -> list[int]:
    """Returns the lengths in a file with one whole number on each line. Empty lines are left out.

    Raises:
        InputError: The file cannot be read, has no length, or has a line that is not a whole number above 0.
    """

    def length(line: str) -> int:
        if not (line.isascii() and line.isdigit() and 0 < int(line) <= LARGEST_COUNT):
            raise ValueError(f"is not a whole number above 0 (got {shown(line)})")
        return int(line)

    return _items_of(path, length, "write one length in tokens on each line")


def count_tokens(path: Path, fields: Sequence[str], load_tokenizer: Callable[[], Any]) -> list[int]:
    """Returns the tokens of the texts in a file with one JSON object on each line.

    A length is that of all fields together, with the special tokens that the tokenizer adds to a text, and one end of
    sequence.

    Args:
        path: The file.
        fields: The names of the fields that are text.
        load_tokenizer: It returns a tokenizer of transformers, and is called once the file was read.

    Raises:
        InputError: The file cannot be read, has no item, or has a line without these fields as text.
    """

    def texts(line: str) -> list[str]:
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ValueError(f"is not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"is not a JSON object (got {shown(content)})")
        for field in fields:
            if field not in content:
                raise ValueError(f"has no field `{field}`; {close_match(field, content)}")
            if not isinstance(content[field], str):
                raise ValueError(f"`{field}` is not text (got {shown(content[field])})")
            check_characters(content[field])
        return [content[field] for field in fields]

    items = _items_of(path, texts, "name the fields that are text, as in --fields prompt,response")
    tokenizer = load_tokenizer()
    more = tokenizer.num_special_tokens_to_add() + 1
    counts = [
        [len(ids) for ids in tokenizer([item[number] for item in items], add_special_tokens=False)["input_ids"]]
        for number in range(len(fields))
    ]
    return [sum(of_item) + more for of_item in zip(*counts, strict=True)]


def _items_of(path: Path, read: Callable[[str], Any], remedy: str) -> list[Any]:
    items = list(read_lines(path, read, remedy))
    if not items:
        raise InputError(Problem(str(path), "is empty", remedy))
    return items


def answer_lengths(question: Question, lengths: Sequence[int]) -> LengthsAnswer:
    """Returns the peaks of full batches that are as wide as the items of a data set are long.

    The question's ``seq_len`` is the most tokens of a row, and ``lengths`` are the tokens of each item.

    Raises:
        InputError: The run has no closed form, trains nothing, or packs its items.
    """
    spec = question.spec
    if not question.has_closed_form or not spec.method.trains:
        message = f"{question.model.name} with {spec.method.name} has no training in closed form"
        raise InputError(Problem("lengths", message, "use another method, or a model of `peftscope models`"))
    if spec.packing:
        message = f"packed rows have up to seq_len={spec.seq_len} tokens, whatever the lengths of the items"
        raise InputError(Problem("packing", message, "leave out the data set, or add --padded"))
    cut = sorted(min(length, spec.seq_len) for length in lengths)
    rows = min(spec.batch_size, len(cut))
    peaks = _peaks_by_width(question, rows)
    capacity = question.gpu.usable_bytes if question.gpu else None
    width = None
    if capacity is not None:  # the widest batch up to the longest item whose tensors fit, or 0
        width = bisect_right(range(cut[-1] + 1), capacity, lo=1, key=lambda width: peaks(width).least_bytes) - 1
    widest = peaks(cut[-1])
    return LengthsAnswer(
        model=question.model.name,
        method=spec.method.name,
        items=len(cut),
        cut_items=sum(length > spec.seq_len for length in lengths),
        too_long_items=None if width is None else sum(length > width for length in cut),
        batch_size=rows,
        batch_of="pair" if JOBS[question.beside.job].rows > 1 else "row",
        capacity_bytes=capacity,
        fits_width=width,
        quantiles=tuple(_quantile(share, cut, peaks) for share in SHARES),
        assumptions=tuple(_assumptions(question)),
        **(question.gpu.room(widest.least_bytes, widest.device_bytes) if question.gpu else {}),
    )


def _peaks_by_width(question: Question, rows: int) -> Callable[[int], Peaks]:
    """Returns a function that asks for the peaks of training on a batch by its width, once for each.

    The same share of its positions as in the question has a loss.
    """
    traces = TrainingTraces()
    unpadded = {"padding": "none"} if rows * JOBS[question.beside.job].rows == 1 else {}
    beside = question.beside.model_copy(update=unpadded)

    @cache
    def peaks(width: int) -> Peaks:
        sizes = {"batch_size": rows, "eval_batch_size": rows, "seq_len": width}
        spec = question.spec.model_copy(update=sizes)
        responses = max(1, round(question.responses * width / question.spec.seq_len))
        asked = replace(question, spec=spec, responses=responses, beside=beside)
        return peaks_by_formula(asked, traces=traces)

    return peaks


def _quantile(share: float, ordered: Sequence[int], peaks: Callable[[int], Peaks]) -> Quantile:
    items = len(ordered)
    width = ordered[bisect_left(range(items), share, key=lambda place: (place + 1) / items)]
    at = peaks(width)
    return Quantile(share, width, at.allocated_bytes, at.device_bytes, at.least_bytes)


def _assumptions(question: Question) -> list[str]:
    spec = question.spec
    return [
        f"an item has at most seq_len={spec.seq_len} tokens; a batch is as wide as its longest row; "
        f"{question.responses / spec.seq_len:.0%} of the positions carry a loss",
        "the longest item is taken to be in a full batch",
        f"a batch of one row has no padding, and so no mask; larger ones: padding={question.beside.padding}",
        "the peaks of a batch are those of two steps of it; a run whose widths vary may reserve more",
        *(line for line in assumptions_of(question) if not line.startswith(("batch_size=", "packing="))),
    ]

"""The peaks of the batches that a data set really makes, from the lengths of its items. No torch."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from math import ceil
from pathlib import Path
from statistics import median_low
from typing import Any

from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.files.content import LARGEST_COUNT, check_characters
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.epochs import (
    ARRANGEMENTS,
    Arrangement,
    Shape,
    chance_of_a_wide_batch,
    epoch_shapes,
    widths_by_counting,
)
from peftscope.memory.formula import TrainingTraces, without_collector
from peftscope.memory.question import Question

SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""The shares of batches whose widths and peaks an answer lists."""
SAMPLED_EPOCHS, SAMPLED_ITEMS = 1000, 300_000
"""The most epochs that are sampled where nothing can be counted, and the most items in all of them, for a second."""
SHOWN_LINES = 5


@dataclass(frozen=True)
class Quantile:
    """A share of an epoch's batches, from the narrowest, with the width and the peaks of the widest among them."""

    share: float
    width: int
    peak_allocated_bytes: int
    peak_device_bytes: int


@dataclass(frozen=True)
class Epochs:
    """What one way of making batches gives.

    Attributes:
        arrangement: The way.
        how: Whether shares and chance are counted over all orders, or sampled.
        batches: The batches of an epoch; of packed epochs the first one's.
        padding_share: The share of all positions that hold padding.
        quantiles: Widths and peaks of full batches.
        fits_width: The widest full batch that fits, up to the longest row; None without a card.
        chance: The chance that the run meets a batch that does not fit; None without a card.
    """

    arrangement: Arrangement
    how: str
    batches: int
    padding_share: float
    quantiles: tuple[Quantile, ...]
    fits_width: int | None = None
    chance: float | None = None


@dataclass(frozen=True)
class LengthsAnswer:
    """The answer about a data set's batches.

    Attributes:
        model: The model's name, as the question gave it.
        method: The name of the method.
        items: The number of items.
        cut_items: The number of items that were longer than a row, and are cut.
        shortest: The tokens of the shortest item.
        median: The tokens that half of the items do not exceed.
        longest: The tokens of the longest item, once cut.
        too_long_items: The items that are longer than the widest full batch that fits; None without a card.
        batch_size: The rows of a full batch.
        last_rows: The rows of an epoch's last batch if it is smaller and kept, or 0.
        drop_last: Whether a smaller last batch is left out.
        seed: The seed of the orders.
        steps: The optimizer steps of the run.
        capacity_bytes: The memory of the card that CUDA can use; None without a card.
        first_epoch: The shapes of the first epoch's batches, in order, as the seed makes them.
        epochs: What each way of making batches gives; the way that was asked about comes first.
        assumptions: The assumptions behind the answer, one sentence each.
    """

    model: str
    method: str
    items: int
    cut_items: int
    shortest: int
    median: int
    longest: int
    too_long_items: int | None
    batch_size: int
    last_rows: int
    drop_last: bool
    seed: int
    steps: int
    capacity_bytes: int | None
    first_epoch: tuple[Shape, ...]
    epochs: tuple[Epochs, ...]
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the answer as JSON content. The keys are stable."""
        return asdict(self) | {"first_epoch": [shape._asdict() for shape in self.first_epoch]}


def read_lengths(path: Path) -> list[int]:
    """Returns the lengths in a file with one whole number on each line. Empty lines are left out.

    Raises:
        InputError: The file cannot be read, has no length, or has a line that is not a whole number above 0.
    """

    def length(line: str) -> int:
        if not (line.isascii() and line.isdigit() and 0 < int(line) <= LARGEST_COUNT):
            raise ValueError(f"is not a whole number above 0 (got {shown(line)})")
        return int(line)

    return list(_read_lines(path, length, "write one length in tokens on each line"))


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

    items = list(_read_lines(path, texts, "name the fields that are text, as in --fields prompt,response"))
    tokenizer = load_tokenizer()
    more = tokenizer.num_special_tokens_to_add() + 1
    counts = [
        [len(ids) for ids in tokenizer([item[number] for item in items], add_special_tokens=False)["input_ids"]]
        for number in range(len(fields))
    ]
    return [sum(of_item) + more for of_item in zip(*counts, strict=True)]


def _read_lines(path: Path, read: Callable[[str], Any], remedy: str) -> Iterator[Any]:
    problems, items = [], 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                items += 1
                try:
                    yield read(line.strip())
                except (ValueError, RecursionError) as error:
                    problems.append(Problem(f"{path}: line {number}", str(error), remedy))
    except FileNotFoundError:
        raise InputError(Problem(str(path), "no such file", "give the path of a file that exists")) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise InputError(Problem(str(path), f"cannot be read: {error}", "give a text file in UTF-8")) from None
    if len(problems) > SHOWN_LINES:
        rest = Problem(str(path), f"wrong lines beside these: {len(problems) - SHOWN_LINES:,}", remedy)
        problems = [*problems[:SHOWN_LINES], rest]
    if problems:
        raise InputError(problems)
    if not items:
        raise InputError(Problem(str(path), "is empty", remedy))


class _Asker:
    """Asks for the peaks of batches of other rows and widths than the question's, each once."""

    def __init__(self, question: Question) -> None:
        self.question, self._traces = question, TrainingTraces()
        self._known: dict[tuple[int, int, bool], Peaks] = {}

    def peaks(self, rows: int, width: int, arrangement: Arrangement) -> Peaks:
        """Returns the peaks of training on a batch. The same share of its positions as in the question has a loss."""
        question, packed = self.question, arrangement == "packed"
        key = rows, width, packed
        if key not in self._known:
            sizes = {"batch_size": rows, "eval_batch_size": rows, "seq_len": width, "packing": packed}
            spec = question.spec.model_copy(update=sizes)
            responses = max(1, round(question.responses * width / question.spec.seq_len))
            unpadded = {"padding": "none"} if rows == 1 else {}
            beside = question.beside.model_copy(update=unpadded)
            asked = replace(question, spec=spec, responses=responses, beside=beside)
            with without_collector():
                self._known[key] = peaks_by_formula(asked, evaluation=False, traces=self._traces)
        return self._known[key]

    def fits_width(self, rows: int, longest: int, arrangement: Arrangement) -> int | None:
        """Returns the widest batch up to the longest row that fits on the card, or 0; None without a card.

        Reserved bytes fall a little at some widths, so that a slightly wider one may fit as well.
        """
        if self.question.gpu is None:
            return None

        def takes(width: int) -> int:
            return self.peaks(rows, width, arrangement).device_bytes

        capacity = self.question.gpu.usable_bytes
        if takes(longest) <= capacity:
            return longest
        return bisect_right(range(longest + 1), capacity, lo=1, key=takes) - 1

    def quantiles(
        self, rows: int, widths: Sequence[tuple[int, float]], arrangement: Arrangement
    ) -> tuple[Quantile, ...]:
        """Returns the widths and peaks of the listed shares. ``widths`` has each with the share that it reaches."""
        found = []
        for share in SHARES:
            width = widths[bisect_left(widths, share, key=lambda pair: pair[1])][0]
            peaks = self.peaks(rows, width, arrangement)
            found.append(Quantile(share, width, peaks.allocated_bytes, peaks.device_bytes))
        return tuple(found)


def answer_lengths(
    question: Question,
    lengths: Sequence[int],
    *,
    steps: int | None = None,
    seed: int = 0,
    drop_last: bool = False,
    grouped: bool = False,
) -> LengthsAnswer:
    """Returns the peaks of the batches that a data set makes, and the chance that a run meets one that does not fit.

    Args:
        question: The run, whose ``seq_len`` is the most tokens of a row, and the card.
        lengths: The tokens of each item.
        steps: The optimizer steps of the run; None means one epoch.
        seed: The seed of the orders.
        drop_last: Whether an epoch's smaller last batch is left out.
        grouped: Whether items of similar length are put together.

    Raises:
        InputError: The run has no closed form, trains nothing, or its options contradict the data set.
    """
    spec = question.spec
    if not question.has_closed_form or not spec.method.trains:
        message = f"{question.model.name} with {spec.method.name} has no training in closed form"
        raise InputError(Problem("lengths", message, "use another method, or a model of `peftscope models`"))
    if grouped and spec.packing:
        raise InputError(Problem("group_by_length", "does nothing for packed rows", "leave out one of the two"))
    if steps is not None and steps < 1:
        raise InputError(Problem("steps", f"must be at least 1 (got {steps})"))
    if drop_last and len(lengths) < spec.batch_size:
        message = f"{len(lengths)} items make no batch of {spec.batch_size} rows"
        raise InputError(Problem("drop_last", message, "use a smaller --batch-size, or leave out --drop-last"))
    cut = [min(length, spec.seq_len) for length in lengths]
    rows = min(spec.batch_size, len(cut))
    asked: Arrangement = "packed" if spec.packing else "grouped by length" if grouped else "shuffled"

    def shapes_of(arrangement: Arrangement, epoch: int = 0) -> list[Shape]:
        return epoch_shapes(
            cut, rows, arrangement, row_tokens=spec.seq_len, drop_last=drop_last, seed=seed, epoch=epoch
        )

    first = shapes_of(asked)
    if not first:
        message = f"{len(cut)} items, packed, make no batch of {rows} rows"
        raise InputError(Problem("drop_last", message, "use a smaller --batch-size, or leave out --drop-last"))
    per_step = spec.gradient_accumulation * question.gpus
    run_steps = steps or ceil(len(first) / per_step)
    asker = _Asker(question)
    epochs: dict[Arrangement, Epochs] = {}
    for way in (asked, *ARRANGEMENTS):
        if way in epochs or (way == "packed" and not spec.method.supports_packing) or not shapes_of(way):
            continue
        whole, rest = _batches_taken(run_steps, len(shapes_of(way)), per_step)
        if way == "shuffled":
            epochs[way] = _count(asker, cut, rows, whole, rest, drop_last=drop_last)
        else:
            sampled = range(max(1, min(SAMPLED_EPOCHS, SAMPLED_ITEMS // len(cut))))
            epochs[way] = _sample(asker, way, [shapes_of(way, epoch) for epoch in sampled], whole, rest)
    fits = epochs[asked].fits_width
    return LengthsAnswer(
        model=question.model.name,
        method=spec.method.name,
        items=len(cut),
        cut_items=sum(length > spec.seq_len for length in lengths),
        shortest=min(cut),
        median=median_low(cut),
        longest=max(cut),
        too_long_items=None if fits is None else sum(length > fits for length in cut),
        batch_size=rows,
        last_rows=0 if first[-1].rows == rows else first[-1].rows,
        drop_last=drop_last,
        seed=seed,
        steps=run_steps,
        capacity_bytes=question.gpu.usable_bytes if question.gpu else None,
        first_epoch=tuple(first),
        epochs=tuple(epochs.values()),
        assumptions=tuple(_assumptions(question, seed)),
    )


def _batches_taken(steps: int, batches: int, per_step: int) -> tuple[int, int]:
    """Returns the whole epochs of a run, and the batches of its last one. No step goes on in the next epoch."""
    whole, rest = divmod(steps, ceil(batches / per_step))
    return whole, min(rest * per_step, batches)


def _count(asker: _Asker, lengths: Sequence[int], rows: int, whole: int, rest: int, *, drop_last: bool) -> Epochs:
    """Returns what shuffled epochs give, over all orders."""
    widths, longest, last = widths_by_counting(lengths, rows), max(lengths), len(lengths) % rows
    shares_before = [0.0, *(share for _, share in widths)]
    expected = sum(width * (share - before) for (width, share), before in zip(widths, shares_before, strict=False))
    batches = len(lengths) // rows + bool(last and not drop_last)
    fits, chance = asker.fits_width(rows, longest, "shuffled"), None
    if fits is not None:
        fits_last = asker.fits_width(last, longest, "shuffled") if last and fits < longest else longest
        chance = chance_of_a_wide_batch(
            lengths, rows, whole * batches + rest, fits=fits, fits_last=fits_last or 0, drop_last=drop_last
        )
    padding = 1 - sum(lengths) / len(lengths) / expected
    quantiles = asker.quantiles(rows, widths, "shuffled")
    return Epochs("shuffled", "counted over all orders", batches, padding, quantiles, fits, chance)


def _sample(
    asker: _Asker, arrangement: Arrangement, sampled: Sequence[Sequence[Shape]], whole: int, rest: int
) -> Epochs:
    """Returns what other epochs give, from samples of them."""
    rows = max(shape.rows for shapes in sampled for shape in shapes)
    full = [shape for shapes in sampled for shape in shapes if shape.rows == rows]
    counts = Counter(shape.width for shape in full)
    reached = accumulate(counts[width] for width in sorted(counts))
    widths = [(width, count / len(full)) for width, count in zip(sorted(counts), reached, strict=True)]
    fits, chance = asker.fits_width(rows, widths[-1][0], arrangement), None
    if fits is not None:

        def too_wide(shape: Shape) -> bool:
            """Returns whether a batch is too wide. A smaller last one is asked about only if a full one would be."""
            return shape.width > fits and (
                shape.rows == rows or shape.width > (asker.fits_width(shape.rows, widths[-1][0], arrangement) or 0)
            )

        firsts_too_wide = [next((n for n, s in enumerate(shapes) if too_wide(s)), None) for shapes in sampled]
        good = sum(first is None for first in firsts_too_wide) / len(sampled)
        good_rest = sum(first is None or first >= rest for first in firsts_too_wide) / len(sampled)
        chance = 1 - good**whole * good_rest
    padding = 1 - sum(shape.tokens for shape in full) / sum(shape.rows * shape.width for shape in full)
    how = f"in {len(sampled):,} sampled epoch{'s' if len(sampled) > 1 else ''}"
    quantiles = asker.quantiles(rows, widths, arrangement)
    return Epochs(arrangement, how, len(sampled[0]), padding, quantiles, fits, chance)


def _assumptions(question: Question, seed: int) -> list[str]:
    spec = question.spec
    cards = f" on {question.gpus} cards, which take batches in turn" if question.gpus > 1 else ""
    return [
        f"an item has at most seq_len={spec.seq_len} tokens; a batch is as wide as its longest row; "
        f"{question.responses / spec.seq_len:.0%} of the positions carry a loss",
        f"a step takes gradient_accumulation={spec.gradient_accumulation} batches{cards}, and ends with its epoch",
        f"epochs with seed={seed} are in the order of this project's runs; other loaders draw other orders, with the "
        "same chances",
        "shares are of full batches; a smaller last batch counts in the chance",
        f"a batch of one row has no padding, and so no mask; larger ones: padding={question.beside.padding}",
        "grouped by length: as transformers' Trainer does it, with the longest item in the first batch",
        "packed: a row is filled in shuffled order until the next item does not fit",
        "the peaks of a batch are those of two steps of it; a run whose widths vary may reserve more",
        "no evaluation",
        *(line for line in question.assumptions if not line.startswith(("batch_size=", "evaluation with", "packing="))),
    ]

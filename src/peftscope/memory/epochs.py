"""The batches that epochs make from the lengths of a data set, and the chances that follow by counting. No torch."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple, get_args

Arrangement = Literal["shuffled", "grouped by length", "packed"]
ARRANGEMENTS: tuple[Arrangement, ...] = get_args(Arrangement)

LARGEST_GROUP = 50
"""The most batches that are sorted together. Source: ``get_length_grouped_indices`` in transformers."""


class Shape(NamedTuple):
    """The shape of a batch: its rows, the tokens of its longest row, and its tokens without padding."""

    rows: int
    width: int
    tokens: int


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """Returns the order in which an epoch of this project's runs sees its items."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def group_by_length(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    """Returns an order in which neighbours have similar lengths and the longest item comes first.

    Source: ``get_length_grouped_indices`` in transformers, behind the Trainer's grouping by length.
    """
    together = batch_size * (min(len(order) // (4 * batch_size), LARGEST_GROUP) or 1)
    groups = [sorted(order[i : i + together], key=lambda item: -lengths[item]) for i in range(0, len(order), together)]
    longest = max(groups, key=lambda group: lengths[group[0]])
    groups[0][0], longest[0] = longest[0], groups[0][0]
    return [item for group in groups for item in group]


def pack(lengths: Sequence[int], row_tokens: int) -> list[int]:
    """Returns the lengths of packed rows: a row is filled in order until the next item does not fit."""
    rows: list[int] = []
    for length in lengths:
        if rows and rows[-1] + length <= row_tokens:
            rows[-1] += length
        else:
            rows.append(length)
    return rows


def epoch_shapes(
    lengths: Sequence[int],
    batch_size: int,
    arrangement: Arrangement,
    *,
    row_tokens: int,
    drop_last: bool,
    seed: int,
    epoch: int,
) -> list[Shape]:
    """Returns the shapes of an epoch's batches, in order.

    Args:
        lengths: The tokens of each item.
        batch_size: The rows of a batch.
        arrangement: The way in which items become rows and batches.
        row_tokens: The most tokens of a packed row.
        drop_last: Whether a smaller last batch is left out.
        seed: The seed of the order.
        epoch: The number of the epoch, from 0.
    """
    order = epoch_order(len(lengths), seed, epoch)
    if arrangement == "grouped by length":
        order = group_by_length(order, lengths, batch_size)
    rows = [lengths[item] for item in order]
    if arrangement == "packed":
        rows = pack(rows, row_tokens)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if drop_last and len(batches[-1]) < batch_size:
        batches.pop()
    return [Shape(len(batch), max(batch), sum(batch)) for batch in batches]


def chance_of_none(items: int, marked: int, drawn: int) -> float:
    """Returns the chance that none of the marked items is among those drawn, without putting any back.

    >>> chance_of_none(10, 1, 4), chance_of_none(10, 2, 9)
    (0.6, 0.0)
    """
    fewer, more = sorted((marked, drawn))
    if fewer + more > items:
        return 0.0
    chance = 1.0
    for number in range(fewer):
        chance *= (items - more - number) / (items - number)
    return chance


def widths_by_counting(lengths: Sequence[int], batch_size: int) -> list[tuple[int, float]]:
    """Returns each width that a shuffled batch can have, with the chance that a batch is at most so wide.

    >>> widths_by_counting([5, 1, 5, 9], 2)
    [(5, 0.5), (9, 1.0)]
    """
    ordered = sorted(lengths)
    reached = [(width, bisect_right(ordered, width)) for width, _ in groupby(ordered)]
    return [
        (width, chance_of_none(len(ordered), len(ordered) - count, batch_size))
        for width, count in reached
        if count >= batch_size
    ]


def chance_of_a_wide_batch(
    lengths: Sequence[int], batch_size: int, batches: int, *, fits: int, fits_last: int, drop_last: bool
) -> float:
    """Returns the chance that a run on shuffled epochs meets a batch that is too wide.

    Args:
        lengths: The tokens of each item.
        batch_size: The rows of a batch, at most one for each item.
        batches: The batches that the run takes.
        fits: The widest full batch that fits.
        fits_last: The widest smaller last batch of an epoch that fits.
        drop_last: Whether that batch is left out.
    """
    items, last = len(lengths), len(lengths) % batch_size
    marked = sum(length > fits for length in lengths)
    whole, rest = divmod(batches, items // batch_size + bool(last and not drop_last))
    good = chance_of_none(items, marked, items - last)
    if last and not drop_last and any(length > fits_last for length in lengths):
        good = 0.0  # such an item does not fit wherever it falls
    return 1 - good**whole * chance_of_none(items, marked, rest * batch_size)

"""What the batches of a data set take: equal to brute force over all orders, or over 1,000 epochs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import islice, permutations
from math import ceil
from typing import Any

import pytest
import torch
from test_memory import model_of, small_shape
from transformers.trainer_pt_utils import get_length_grouped_indices

from peftscope.data.batching import training_order
from peftscope.errors import InputError
from peftscope.hardware.cards import CONTEXT_BYTES, Gpu
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.epochs import (
    ARRANGEMENTS,
    Arrangement,
    Shape,
    chance_of_a_wide_batch,
    epoch_order,
    epoch_shapes,
    group_by_length,
)
from peftscope.memory.lengths import SHARES, Epochs, LengthsAnswer, answer_lengths
from peftscope.memory.question import Question, ask

ROWS = 4
LENGTHS = [*range(20, 140, 5), 190, 190, 240, 300, 310, 420]  # 30: two rows are left over
MODEL = model_of(small_shape(vocab_size=32_000, max_seq_len=512))
"""With so many logits that reserved bytes grow with the width, as they do in a real model."""
EPOCHS = 1000


def question_of(**options: Any) -> Question:
    return ask(MODEL, {"batch_size": ROWS, "seq_len": max(LENGTHS)} | options)


@cache
def peaks(rows: int, width: int, packed: bool = False) -> Peaks:
    """The peaks of a batch, asked for as a question of its own."""
    return peaks_by_formula(question_of(batch_size=rows, seq_len=width, packing=packed), evaluation=False)


def on_a_card(width: int, **options: Any) -> Question:
    """The question, on a card that just holds full batches of this width."""
    needed = peaks_by_formula(question_of(**options, seq_len=width), evaluation=False).device_bytes
    return replace(question_of(**options), gpu=Gpu("a card", needed))


def shapes(arrangement: Arrangement, epoch: int, drop_last: bool = False) -> list[Shape]:
    sizes = {"row_tokens": max(LENGTHS), "drop_last": drop_last, "seed": 0, "epoch": epoch}
    return epoch_shapes(LENGTHS, ROWS, arrangement, **sizes)


def fails(shape: Shape, card: Gpu, packed: bool) -> bool:
    return peaks(shape.rows, shape.width, packed).device_bytes > card.usable_bytes


def way_of(answer: LengthsAnswer, arrangement: Arrangement) -> Epochs:
    return next(way for way in answer.epochs if way.arrangement == arrangement)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 7, 8, 20])
def test_the_chance_is_that_of_all_orders(steps: int, drop_last: bool) -> None:
    lengths, rows = [3, 5, 5, 8, 9, 2, 7], 3
    for fits, fits_last in ((8, 8), (8, 9), (7, 8), (4, 9), (9, 9)):
        batches = 2 if drop_last else 3
        epochs = [
            [
                max(order[start : start + rows]) > (fits if start < 6 else fits_last)
                for start in range(0, 3 * batches, 3)
            ]
            for order in permutations(lengths)
        ]
        whole, rest = divmod(steps, batches)
        good, good_rest = (sum(not any(epoch[:some]) for epoch in epochs) / len(epochs) for some in (batches, rest))
        found = chance_of_a_wide_batch(lengths, rows, steps, fits=fits, fits_last=fits_last, drop_last=drop_last)
        assert found == pytest.approx(1 - good**whole * good_rest, abs=1e-12)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_shares_and_chance_are_those_of_a_thousand_epochs(arrangement: Arrangement) -> None:
    packed = arrangement == "packed"
    question = on_a_card(400 if packed else 250, packing=packed)
    steps = 4
    answer = answer_lengths(question, LENGTHS, steps=steps, grouped=arrangement == "grouped by length")
    way = answer.epochs[0]
    assert way.arrangement == arrangement
    epochs = [shapes(arrangement, epoch) for epoch in range(EPOCHS)]
    assert answer.first_epoch == tuple(epochs[0])
    full = [shape for epoch in epochs for shape in epoch if shape.rows == ROWS]
    sizes = sorted(peaks(ROWS, shape.width, packed).allocated_bytes for shape in full)
    padding = 1 - sum(shape.tokens for shape in full) / sum(ROWS * shape.width for shape in full)
    batches = len(epochs[0])
    good = [not any(fails(shape, question.gpu, packed) for shape in epoch) for epoch in epochs]
    rest = [not any(fails(shape, question.gpu, packed) for shape in epoch[: steps % batches]) for epoch in epochs]
    chance = 1 - (sum(good) / EPOCHS) ** (steps // batches) * sum(rest) / EPOCHS
    # Samples of the same epochs are equal; what is counted over all orders is equal but for sampling.
    tolerance = 0.03 if arrangement == "shuffled" else 1e-9
    assert way.chance == pytest.approx(chance, abs=tolerance)
    assert way.padding_share == pytest.approx(padding, abs=tolerance / 3)
    assert [one.share for one in way.quantiles] == list(SHARES)
    for one in way.quantiles:
        below, up_to = (bisect_left(sizes, one.peak_allocated_bytes + more) / len(sizes) for more in (0, 1))
        assert below - tolerance <= one.share <= up_to + tolerance, one
        assert one.peak_device_bytes == peaks(ROWS, one.width, packed).device_bytes
    assert 0 < way_of(answer, "shuffled").chance < 1
    assert way_of(answer, "grouped by length").chance == 1


def test_a_smaller_last_batch_may_hold_what_a_full_one_cannot() -> None:
    """The longest item fits only in a last batch of two rows: it is good one time in fifteen."""
    lengths = [*[50] * 29, 420]
    card = Gpu("a card", peaks(2, 420).device_bytes)
    question = replace(question_of(), gpu=card)
    kept, dropped = (answer_lengths(question, lengths, drop_last=drop) for drop in (False, True))
    for answer, last in ((kept, 2), (dropped, 0)):
        assert answer.epochs[0].chance == pytest.approx(28 / 30)
        assert (answer.last_rows, answer.too_long_items) == (last, 1)
    none = answer_lengths(replace(question, gpu=Gpu("a card", CONTEXT_BYTES)), lengths)
    assert (none.epochs[0].fits_width, none.epochs[0].chance, none.too_long_items) == (0, 1, 30)


def test_steps_take_batches_of_their_epoch_alone() -> None:
    question, accumulated = on_a_card(250), on_a_card(250, gradient_accumulation=3)
    assert answer_lengths(accumulated, LENGTHS).steps == ceil(8 / 3)

    def chance(asked: Question, steps: int) -> float:
        found = answer_lengths(asked, LENGTHS, steps=steps).epochs[0].chance
        assert found is not None
        return found

    assert chance(accumulated, 1) == chance(question, 3)
    assert chance(accumulated, 3) == chance(question, 8)
    assert chance(accumulated, 4) == chance(question, 11)


def test_a_batch_of_one_row_has_no_padding() -> None:
    asked = {"batch_size": 1, "seq_len": 420, "attention": "sdpa"}
    for padding in ("none", "some"):
        (widest,) = [
            one for one in answer_lengths(question_of(**asked, padding=padding), [420]).epochs[0].quantiles[-1:]
        ]
        alone = peaks_by_formula(question_of(**asked, padding="none"), evaluation=False)
        assert widest.peak_allocated_bytes == alone.allocated_bytes
    padded = peaks_by_formula(question_of(**asked, padding="some"), evaluation=False)
    assert padded.allocated_bytes > alone.allocated_bytes


def test_what_is_longer_than_a_row_is_cut() -> None:
    question = question_of(seq_len=100)
    answer = answer_lengths(question, LENGTHS)
    assert answer.cut_items == sum(length > 100 for length in LENGTHS)
    assert answer.longest == answer.epochs[0].quantiles[-1].width == 100
    assert answer.epochs[0].chance is None


def test_packed_rows_are_full_and_fewer() -> None:
    answer = answer_lengths(question_of(), LENGTHS)
    packed, shuffled = way_of(answer, "packed"), way_of(answer, "shuffled")
    assert packed.batches < shuffled.batches
    assert packed.padding_share < shuffled.padding_share
    assert "packed" not in {
        way.arrangement for way in answer_lengths(question_of(method="prompt-tuning"), LENGTHS).epochs
    }


def test_orders_are_those_of_the_runs_and_of_transformers() -> None:
    mine = [item for epoch in range(2) for item in epoch_order(len(LENGTHS), 3, epoch)]
    assert mine == list(islice(training_order(len(LENGTHS), 3), 2 * len(LENGTHS)))
    for rows, lengths in ((4, LENGTHS), (2, LENGTHS), (1, list(range(300, 0, -1)))):
        theirs = get_length_grouped_indices(lengths, rows, generator=torch.Generator().manual_seed(7))
        order: Sequence[int] = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(7)).tolist()
        assert group_by_length(order, lengths, rows) == theirs


@pytest.mark.parametrize(
    ("options", "more", "what"),
    [
        ({"packing": True}, {"grouped": True}, "group_by_length: does nothing for packed rows"),
        ({"method": "none"}, {}, "with none has no training in closed form"),
        ({}, {"steps": 0}, "steps: must be at least 1"),
        ({"batch_size": 31}, {"drop_last": True}, "30 items make no batch of 31 rows"),
        ({"batch_size": 12, "packing": True}, {"drop_last": True}, "packed, make no batch of 12 rows"),
    ],
)
def test_a_question_that_contradicts_itself(options: dict[str, Any], more: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        answer_lengths(question_of(**options), LENGTHS, **more)

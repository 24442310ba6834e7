"""What batches as wide as the items of a data set take: equal to questions about one batch of that width."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from test_memory import model_of, small_shape

from peftscope.hardware.cards import CONTEXT_BYTES, Gpu
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.question import Question, ask
from peftscope.sizing.lengths import SHARES, answer_lengths

ROWS = 4
LENGTHS = [420, *range(20, 140, 5), 190, 190, 240, 300, 310]
MODEL = model_of(small_shape(vocab_size=32_000, max_seq_len=512))
"""With so many logits that reserved bytes grow with the width, as they do in a real model."""


def question_of(**options: Any) -> Question:
    return ask(MODEL, {"batch_size": ROWS, "seq_len": max(LENGTHS)} | options)


@cache
def peaks(rows: int, width: int, gpu: Gpu | None = None) -> Peaks:
    """The peaks of a batch, asked for as a question of its own."""
    return peaks_by_formula(replace(question_of(batch_size=rows, seq_len=width), gpu=gpu), evaluation=False)


def on_a_card(usable_bytes: int) -> Question:
    return replace(question_of(), gpu=Gpu("a card", usable_bytes))


def test_a_quantile_is_the_shortest_length_that_a_share_of_the_items_does_not_exceed() -> None:
    answer = answer_lengths(question_of(), LENGTHS)
    assert [one.share for one in answer.quantiles] == list(SHARES)
    for one in answer.quantiles:
        shorter, up_to = (sum(length < one.width + more for length in LENGTHS) / len(LENGTHS) for more in (0, 1))
        assert shorter < one.share <= up_to or (one.share, one.width) == (0, min(LENGTHS))
        asked = peaks(ROWS, one.width)
        assert (one.peak_allocated_bytes, one.peak_device_bytes) == (asked.allocated_bytes, asked.device_bytes)
    assert answer.quantiles[-1].width == max(LENGTHS)
    assert (answer.headroom_bytes, answer.fits_width, answer.too_long_items) == (None, None, None)


def test_the_widest_batch_decides_whether_a_data_set_fits() -> None:
    widest = peaks(ROWS, max(LENGTHS))
    cards = (widest.device_bytes, widest.least_bytes, widest.least_bytes - 1)
    roomy, cut, misses = (answer_lengths(on_a_card(card), LENGTHS) for card in cards)
    assert (roomy.fits, roomy.headroom_bytes, roomy.fits_width, roomy.too_long_items) == ("yes", 0, max(LENGTHS), 0)
    assert (cut.fits, cut.missing_bytes > 1, cut.too_long_items) == ("no", True, 1)  # its segments do not fit
    assert (misses.fits, misses.missing_bytes, misses.too_long_items) == ("no", 1, 1)
    assert misses.fits_width is not None and misses.fits_width < max(LENGTHS)


def test_the_widest_batch_that_fits_is_found() -> None:
    card = Gpu("a card", peaks(ROWS, 250).device_bytes)
    answer = answer_lengths(replace(question_of(), gpu=card), LENGTHS)
    fits = [peaks(ROWS, answer.fits_width + more, card).least_bytes <= card.memory_bytes for more in (0, 1)]
    assert fits == [True, False]
    assert answer.too_long_items == sum(length > answer.fits_width for length in LENGTHS) == 3
    none = answer_lengths(on_a_card(CONTEXT_BYTES), LENGTHS)
    assert (none.fits_width, none.too_long_items) == (0, len(LENGTHS))


def test_a_data_set_that_makes_no_full_batch_has_one_of_all_its_items() -> None:
    answer = answer_lengths(question_of(), [50, 420])
    assert (answer.batch_size, answer.batch_of) == (2, "row")
    assert answer_lengths(question_of(job="dpo"), [50, 420]).batch_of == "pair"
    assert answer.quantiles[-1].peak_allocated_bytes == peaks(2, 420).allocated_bytes


def test_a_batch_of_one_row_has_no_padding() -> None:
    asked = {"batch_size": 1, "seq_len": 420, "attention": "sdpa"}
    alone = peaks_by_formula(question_of(**asked, padding="none"), evaluation=False)
    for padding in ("none", "some"):
        widest = answer_lengths(question_of(**asked, padding=padding), [420]).quantiles[-1]
        assert widest.peak_allocated_bytes == alone.allocated_bytes
    padded = peaks_by_formula(question_of(**asked, padding="some"), evaluation=False)
    assert padded.allocated_bytes > alone.allocated_bytes


def test_what_is_longer_than_a_row_is_cut() -> None:
    answer = answer_lengths(question_of(seq_len=100), LENGTHS)
    assert answer.cut_items == sum(length > 100 for length in LENGTHS)
    assert answer.quantiles[-1].width == 100

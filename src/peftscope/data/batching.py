"""Tokenising and batching, with one collator and one order for every method."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from peftscope.data.sources import Item
from peftscope.errors import Problem, raise_any
from peftscope.files.content import SHOWN_LINES

IGNORED = -100
"""The label of positions that carry no loss, as in torch and transformers."""


@dataclass(frozen=True)
class Example:
    """A tokenised item.

    Attributes:
        tokens: The prompt, the response and the end-of-sequence token.
        prompt_length: The number of prompt tokens, which carry no loss.
    """

    tokens: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences with B rows, S positions, and K positions that the loss of some row needs.

    Attributes:
        input_ids: (B, S) int64.
        attention_mask: (B, S) int64, 1 for tokens and 0 for padding.
        labels: (B, S) int64, -100 outside responses.
        kept_positions: (K,) int64, positions whose logits predict a response token of some row.
        kept_labels: (B, K) int64, the token that follows each kept position, or -100.
        response_tokens: () int64, the number of tokens that carry loss.
        tokens: The number of tokens that are not padding.
        position_ids: (B, S) int64, which start at 0 in every example; packed batches only.
        example_ids: (B, S) int64, the example within its row that a position belongs to; packed batches only.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    kept_positions: torch.Tensor
    kept_labels: torch.Tensor
    response_tokens: torch.Tensor
    tokens: int
    position_ids: torch.Tensor | None = None
    example_ids: torch.Tensor | None = None

    def to(self, device: str) -> Batch:
        """Returns the batch on a device."""
        moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in vars(self).items()}
        return Batch(**moved)


def first_tokens(tokenizer: Any) -> list[int]:
    """Returns the tokens that a tokenizer puts before a text by itself: Gemma's ``<bos>``, or none, as for SmolLM2."""
    of_nothing = tokenizer("")["input_ids"]
    return of_nothing[:1] if of_nothing[:1] == [tokenizer.bos_token_id] else []


def tokenise(items: Sequence[Item], tokenizer: Any, seq_len: int) -> list[Example]:
    """Returns the tokens of each item: those before any text, the prompt, a space and the response, and the end.

    Prompt and response are tokenised separately, so that training sees the same prompt tokens as generation. A prompt
    that is too long loses its start; a response is never cut.

    Raises:
        InputError: The response of an item leaves no room in ``seq_len``, or its prompt has no token.
    """
    if not items:
        return []
    prompts = tokenizer([item.prompt for item in items], add_special_tokens=False)["input_ids"]
    responses = tokenizer([f" {item.response}" for item in items], add_special_tokens=False)["input_ids"]
    first = first_tokens(tokenizer)
    examples, problems = [], []
    for item, prompt, response in zip(items, prompts, responses, strict=True):
        answer = [*response, tokenizer.eos_token_id]
        room = seq_len - len(first) - len(answer)
        if room < 1 or not prompt:
            message = f"seq_len={seq_len} is too short for the response, {len(answer)} tokens, beside a prompt"
            problems.append(Problem(f"item {item.prompt[:60]!r}", message if prompt else "its prompt has no token"))
            continue
        kept = [*first, *prompt[-room:]]
        examples.append(Example((*kept, *answer), len(kept)))
    raise_any(problems[:SHOWN_LINES])
    return examples


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Returns a right-padded batch, with the positions that response-only logits need."""
    rows = [torch.tensor(example.tokens) for example in examples]
    answers = [row.clone() for row in rows]
    for answer, example in zip(answers, examples, strict=True):
        answer[: example.prompt_length] = IGNORED
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = pad_sequence(answers, batch_first=True, padding_value=IGNORED)
    return Batch(
        input_ids=input_ids, attention_mask=attention_mask, tokens=int(attention_mask.sum()), **_targets(labels)
    )


def _targets(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the fields of a batch that follow from its labels."""
    next_labels = torch.cat([labels[:, 1:], torch.full((len(labels), 1), IGNORED)], dim=1)
    positions = (next_labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    return {
        "labels": labels,
        "kept_positions": positions,
        "kept_labels": next_labels[:, positions],
        "response_tokens": (labels != IGNORED).sum(),
    }


def training_order(size: int, seed: int) -> Iterator[int]:
    """Yields indices of training items without end. The seed decides a new permutation for each epoch."""
    epoch = 0
    while True:
        order = list(range(size))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from order
        epoch += 1


def pack(rows: Sequence[Sequence[Example]], pad_token_id: int) -> Batch:
    """Returns a batch in which each row holds several examples one after the other.

    The last token of an example predicts nothing in the next example: the end of sequence is its last target.
    """
    batch = collate([Example(tuple(t for e in row for t in e.tokens), 0) for row in rows], pad_token_id)
    labels = torch.full_like(batch.input_ids, IGNORED)
    position_ids, example_ids = torch.zeros_like(labels), torch.full_like(labels, -1)
    for number, row in enumerate(rows):
        start = 0
        for index, example in enumerate(row):
            end = start + len(example.tokens)
            first = start + max(1, example.prompt_length)  # nothing predicts the first token of an example
            labels[number, first:end] = batch.input_ids[number, first:end]
            position_ids[number, start:end] = torch.arange(end - start)
            example_ids[number, start:end] = index
            start = end
    return replace(batch, **_targets(labels), position_ids=position_ids, example_ids=example_ids)


def training_batches(
    examples: Sequence[Example], *, seed: int, batch_size: int, pad_token_id: int, pack_to: int | None = None
) -> Iterator[Batch]:
    """Yields training batches of ``batch_size`` rows without end, from at least one example.

    The same seed gives every method the same batches in the same order. ``pack_to`` is the most tokens of a row that
    holds several examples; None puts one example in each row.
    """
    order = (examples[index] for index in training_order(len(examples), seed))
    if pack_to is None:
        while True:
            yield collate([next(order) for _ in range(batch_size)], pad_token_id)
    waiting = next(order)
    while True:
        rows = []
        for _ in range(batch_size):
            row, length = [waiting], len(waiting.tokens)
            waiting = next(order)
            while length + len(waiting.tokens) <= pack_to:
                row.append(waiting)
                length += len(waiting.tokens)
                waiting = next(order)
            rows.append(row)
        yield pack(rows, pad_token_id)


def evaluation_batches(examples: Sequence[Example], *, batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Yields batches of the examples in their given order."""
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size], pad_token_id)


def widest_batch(batches: Iterable[Batch]) -> Batch:
    """Returns the first of the batches with the longest sequence, and of these with the most logits."""
    return max(batches, key=lambda batch: (batch.input_ids.shape[1], batch.kept_positions.numel()))

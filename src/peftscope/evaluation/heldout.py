"""The held-out loss on response tokens, its file of items, and how far answers moved from the base's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peftscope.data.batching import IGNORED, Batch, Example, evaluation_batches
from peftscope.data.sources import Item
from peftscope.spec import RunSpec
from peftscope.training.load import autocast

SHIFT_ITEMS = 128
"""The items whose distributions of the base are kept on the host: 50 MB for SmolLM2, 600 MB for Gemma 3 on words."""


class ItemLoss(NamedTuple):
    """The loss of one item's response.

    Attributes:
        nll: The nll of the response and its end, summed, in nats.
        tokens: The number of these tokens.
        argmax: A character for each of them: 1 if it is the most likely one after the right tokens before it, else 0.
            Greedy decoding gives the response exactly if there is no 0.
    """

    nll: float
    tokens: int
    argmax: str


def response_logits(model: Any, batch: Batch, spec: RunSpec, offset: int) -> torch.Tensor:
    """Returns the logits at the kept positions, (B, K, vocabulary), in the precision of the model, and at no others.

    The model is in evaluation mode; ``offset`` is how many positions its method adds before the tokens.
    """
    with torch.no_grad(), autocast(spec):
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=batch.kept_positions + offset,
            use_cache=False,
        ).logits


@torch.no_grad()
def losses_of(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns the nll at the kept positions in nats, (B, K) fp32, with 0 where a row has no response token."""
    return torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), batch.kept_labels, ignore_index=IGNORED, reduction="none"
    )


def heldout_nll(model: Any, examples: Sequence[Example], spec: RunSpec, pad_token_id: int) -> list[ItemLoss]:
    """Returns the loss of each example, in order."""
    return nll_and_shift(model, examples, spec, pad_token_id, ())[0]


def nll_and_shift(
    model: Any, examples: Sequence[Example], spec: RunSpec, pad_token_id: int, of_base: Iterable[torch.Tensor]
) -> tuple[list[ItemLoss], dict[str, float]]:
    """Returns the loss of each example, in order, and how far the training moved the answers, both from one pass.

    The shift is the mean KL divergence in nats for each answer token, with the right tokens before it. ``from_base`` is
    that of the trained model from the base, KL(base, trained), ``to_base`` the other way.
    Source: Shenfeld et al. 2025, arXiv 2509.04259, section 4, which takes the first.

    The model is in evaluation mode. Without ``base_answers`` to these items, the shift is empty.
    """
    results, moved = [], []
    batches = evaluation_batches(examples, batch_size=spec.eval_batch_size, pad_token_id=pad_token_id)
    kept = iter(of_base)
    for batch in batches:
        batch = batch.to(spec.device)
        logits = response_logits(model, batch, spec, spec.method.logit_offset())
        nll, counted = losses_of(logits, batch).sum(dim=1).tolist(), batch.kept_labels != IGNORED
        hits = logits.argmax(dim=2) == batch.kept_labels
        for loss, row, in_row in zip(nll, hits, counted, strict=True):
            argmax = "".join("1" if hit else "0" for hit in row[in_row].tolist())
            results.append(ItemLoss(loss, len(argmax), argmax))
        if (base := next(kept, None)) is not None:
            logits = logits[counted][: len(base)]  # those of the whole batch take no memory any more
            moved.append((*_divergences(base.to(logits.device), logits), len(base)))
    if not moved:
        return results, {}
    from_base, to_base, tokens = map(sum, zip(*moved, strict=True))
    return results, {"from_base": from_base / tokens, "to_base": to_base / tokens}


def base_answers(base: Any, examples: Sequence[Example], spec: RunSpec, pad_token_id: int) -> list[torch.Tensor]:
    """Returns what the base says at each token of the first ``SHIFT_ITEMS`` answers, before the training.

    These are the logits of each batch, (answer tokens, vocabulary), in the precision of the model, on the host. The
    base is in evaluation mode; its 4-bit weights are those that the run trains on.
    """
    answers = []
    batches = evaluation_batches(examples, batch_size=spec.eval_batch_size, pad_token_id=pad_token_id)
    for start, batch in zip(range(0, SHIFT_ITEMS, spec.eval_batch_size), batches, strict=False):
        counted = batch.kept_labels != IGNORED
        counted[SHIFT_ITEMS - start :] = False
        logits = response_logits(base, batch.to(spec.device), spec, 0)
        answers.append(logits[counted.to(logits.device)].cpu())
    return answers


def _divergences(base: torch.Tensor, now: torch.Tensor) -> tuple[float, float]:
    """Returns KL(base, now) and KL(now, base) in nats, summed over the rows of logits."""
    now, base = now.float().log_softmax(dim=1), base.float().log_softmax(dim=1)
    return float((base.exp() * (base - now)).sum()), float((now.exp() * (now - base)).sum())


def mean_nll(per_item: Sequence[ItemLoss]) -> float:
    """Returns the mean nll per response token, in nats.

    >>> mean_nll([ItemLoss(2.0, 1, "1"), ItemLoss(4.0, 2, "01")])
    2.0
    """
    return sum(item.nll for item in per_item) / sum(item.tokens for item in per_item)


def write_items(path: Path, items: list[Item], per_item: Sequence[ItemLoss], answers: list[dict[str, Any]]) -> None:
    """Writes one line for each held-out item: its loss and, where it was asked, its answer."""
    by_item = {row["item"]: row for row in answers}
    rows = []
    for index, (item, loss) in enumerate(zip(items, per_item, strict=True)):
        row = {"item": index, "prompt": item.prompt, "target": item.response, **loss._asdict()}
        answer = by_item.get(index)
        rows.append(row | ({"answer": answer["answer"], "correct": answer["correct"]} if answer else {}))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

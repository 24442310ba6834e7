"""The held-out loss on response tokens, a score with low variance that every run measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftscope.data.batching import IGNORED, Batch, Example, evaluation_batches
from peftscope.spec import RunSpec
from peftscope.training.load import autocast


@torch.no_grad()
def heldout_losses(model: Any, batch: Batch, spec: RunSpec) -> torch.Tensor:
    """Returns the nll at the kept positions in nats, (B, K) fp32, with 0 where a row has no response token.

    Logits are computed at response positions only and the loss in fp32, whatever path training takes.
    """
    with autocast(spec):
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=batch.kept_positions + spec.method.logit_offset(),
            use_cache=False,
        ).logits
    return torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), batch.kept_labels, ignore_index=IGNORED, reduction="none"
    )


def heldout_nll(model: Any, examples: Sequence[Example], spec: RunSpec, pad_token_id: int) -> list[tuple[float, int]]:
    """Returns (summed nll in nats, number of response tokens) for each example, in order."""
    results = []
    for batch in evaluation_batches(examples, batch_size=spec.eval_batch_size, pad_token_id=pad_token_id):
        batch = batch.to(spec.device)
        losses = heldout_losses(model, batch, spec)
        counts = (batch.kept_labels != IGNORED).sum(dim=1)
        results += list(zip(losses.sum(dim=1).tolist(), counts.tolist(), strict=True))
    return results


def mean_nll(per_item: Sequence[tuple[float, int]]) -> float:
    """Returns the mean nll per response token, in nats.

    >>> mean_nll([(2.0, 1), (4.0, 2)])
    2.0
    """
    return sum(nll for nll, _ in per_item) / sum(count for _, count in per_item)

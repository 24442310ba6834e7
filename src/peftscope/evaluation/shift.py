"""How far training moved a model: the distribution of its answers from the base's, and its weights from theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftscope.data.batching import IGNORED, Batch, Example, evaluation_batches
from peftscope.evaluation.heldout import response_logits
from peftscope.evaluation.updates import energies, entropy, spectrum, updated_matrices
from peftscope.spec import RunSpec

ITEMS = 128
"""The items whose distributions of the base are kept on the host: 50 MB for SmolLM2, 600 MB for Gemma 3 on words."""


class BaseAnswers:
    """What the base says at each token of some answers, kept from before the training.

    Args:
        base: The untouched model, in evaluation mode; 4-bit weights are those that the run trains on.
        examples: Tokenised items, of which the first ``ITEMS`` count.
        spec: The run.
        pad_token_id: The token that fills short rows.
    """

    def __init__(self, base: Any, examples: Sequence[Example], spec: RunSpec, pad_token_id: int) -> None:
        self._spec = spec
        batches = evaluation_batches(examples[:ITEMS], batch_size=spec.eval_batch_size, pad_token_id=pad_token_id)
        self._kept = [(batch, self._logits(base, batch, 0).cpu()) for batch in batches]

    def _logits(self, model: Any, batch: Batch, offset: int) -> torch.Tensor:
        """Returns the logits at response tokens, (their number, vocabulary)."""
        logits = response_logits(model, batch.to(self._spec.device), self._spec, offset)
        return logits[(batch.kept_labels != IGNORED).to(logits.device)]

    def shift(self, model: Any) -> dict[str, float]:
        """Returns the mean KL divergence in nats for each answer token, with the right tokens before it.

        ``from_base`` is that of the trained model from the base, KL(base, trained), ``to_base`` the other way.
        Source: Shenfeld et al. 2025, arXiv 2509.04259, section 4, which takes the first.
        """
        from_base = to_base = tokens = 0.0
        for batch, logits in self._kept:
            now = self._logits(model, batch, self._spec.method.logit_offset()).float().log_softmax(dim=1)
            base = logits.to(now.device).float().log_softmax(dim=1)
            from_base += float((base.exp() * (base - now)).sum())
            to_base += float((now.exp() * (now - base)).sum())
            tokens += len(now)
        return {"from_base": from_base / tokens, "to_base": to_base / tokens}


def weights_before(base: Any, spec: RunSpec) -> dict[str, torch.Tensor]:
    """Returns the base's weights on the host by name, or none if the run's updates cannot be told from them."""
    method = spec.method
    if method.quantization() or spec.shards > 1 or not (method.trains_base or method.plain_update):
        return {}
    frozen = not method.trains_base and spec.device == "cpu"
    return {name: p.detach() if frozen else p.detach().cpu().clone() for name, p in base.named_parameters()}


@torch.no_grad()
def update_spectra(model: Any, before: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Returns by kind of matrix (``q_proj``, ...) the mean over layers of what the spectrum of its update says.

    Beside the values of ``spectrum``, these are ``relative_size``, the update's norm over the weight's, and the
    entropies of ``entropy``. Updates of zero are left out.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for name, old, new in updated_matrices(model, before):
        if (update := new - old).any():
            squares = energies(update)
            of = {"relative_size": float(update.norm() / old.norm()), **spectrum(squares), **entropy(squares)}
            found.setdefault(name.rpartition(".")[2], []).append(of)
    return {kind: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} for kind, rows in found.items()}

"""Losses that never hold the logits of all positions, on a tape. No torch."""

from __future__ import annotations

from typing import Any

from peftscope.memory.formula.decoder import keep_positions
from peftscope.memory.formula.linear import TapedModel
from peftscope.memory.tape import Gradients, Shaped

# Source: TRL 1.16.0, sft_trainer.py: compute_loss; ml-cross-entropy at d42911f, PatchOptions.train_only is off;
# liger-kernel 0.8.5, transformers/model/llama.py: skip_logits is on in training alone.
ALSO_IN_EVALUATION = ("chunked", "cut-cross-entropy")
"""Losses that an evaluation takes, too; with Liger's it computes logits."""


def fused_loss(model: TapedModel, x: Shaped, *, kept: bool = False) -> Shaped:
    """Stands for head and loss in one operation, on hidden states at all positions or at those that are kept."""
    x = keep_positions(model, x) if kept or model.loss == "chunked" else x
    model.tape.module = "loss"
    if model.loss == "chunked":
        loss = model.tape.op([chunked_log_probs(model, x)], (), 4)
    else:
        loss = _liger(model, x, model.head) if model.loss == "liger" else _cut(model, x, model.head)
    model.tape.module = ""
    return loss


def _liger(model: TapedModel, x: Shaped, head: Shaped) -> Shaped:
    """Stands for ``LigerFusedLinearCrossEntropyFunction``, whose forward pass already has the gradients."""
    tape = model.tape
    gradients = [tape.new(x.dims, x.width, term="gradient of the hidden states (Liger)")]
    trains = head.node is not None
    gradients += [tape.new(head.dims, head.width, term="gradient of the head (Liger)")] if trains else []
    losses = tape.new(("N",), 4)
    width = 2 if tape.autocast else max(x.width, head.width)
    copy = tape.new(head.dims, width, term="16-bit weights (autocast)") if head.width != width else None
    # Without casts, each chunk is written into the same block; otherwise the last one lives until the next is there.
    one_block = not tape.autocast and x.width == head.width
    several = model.sizes["c"] < model.sizes["N"]
    chunks = [
        tape.new(("c", "V"), width, term="logits of a chunk (Liger)") for _ in range(1 if one_block else 1 + several)
    ]
    del chunks, copy, losses
    loss = tape.new((), 4)
    tape.record([x, head], [loss], lambda _, saved: [*saved, None][:2], gradients)
    return loss


def _cut(model: TapedModel, x: Shaped, head: Shaped) -> Shaped:
    """Stands for cut-cross-entropy's ``LinearCrossEntropyFunction``, which keeps hidden states and log-sum-exps."""
    tape, width = model.tape, head.width
    x = tape.cast(x, 2, "16-bit copy for the fused loss")
    sums = tape.new(("N",), 4, term="log-sum-exp of the logits")
    trains = head.node is not None

    def backward(_: list[Any], __: Any) -> list[Any]:
        return [tape.new(x.dims, 2), tape.new(head.dims, width) if trains else None]

    return tape.op([x, head], (), 4, backward, (x, head, sums))


def chunked_log_probs(model: TapedModel, x: Shaped) -> Shaped:
    """Stands for ``ChunkedLogProbFunction``: tiles of logits, and gradients that are summed in 32 bits."""
    tape, head = model.tape, model.head
    tape.module = "loss"
    width = 2 if tape.autocast else x.width
    columns = min("wV", key=lambda name: model.sizes[name])

    def tile() -> list[Shaped]:
        factors = [(("n", "h"), x), ((columns, "h"), head)]
        copies = [tape.new(dims, width) for dims, factor in factors if factor.width != width]
        return [tape.new(("n", "w"), width, term="tile of logits"), *copies]

    def backward(*_: Any) -> Gradients:
        needed = [t if t.node is not None else None for t in (x, head)]
        wide = [t and tape.new(t.dims, 4, term="gradients in 32 bits") for t in needed]
        _held = tile()
        return [t and (w if t.width == 4 else tape.new(t.dims, t.width)) for t, w in zip(needed, wide, strict=True)]

    statistics = [tape.new(("N",), 4) for _ in range(7)]
    tile().clear()
    return tape.op([x, head], ("N",), 4, backward, (x, *statistics[:2]))

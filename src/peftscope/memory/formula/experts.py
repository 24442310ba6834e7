"""The experts of a mixture on a tape, as transformers 5 computes them on a card: grouped products. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftscope.memory.formula.linear import EXPERT_DIMS, TapedModel
from peftscope.memory.tape import Gradients, Shaped
from peftscope.models.stored import BLOCK

KEPT = "what experts keep"


def run_experts(model: TapedModel, path: str, x: Shaped) -> Shaped:
    """Stands for ``MixtralSparseMoeBlock`` and ``Qwen3MoeSparseMoeBlock`` with ``grouped_mm_experts_forward``."""
    tape, dims, width = model.tape, x.dims, x.width
    scores, logits = _route(model, f"{path}.gate", x)
    tape.module = f"{path}.experts"
    order = [tape.new(("m",), 8) for _ in range(3)]  # experts, their order, and the token of each place
    tokens = tape.op([x], ("m", "h"), width, None, order[2:], KEPT)
    scores = tape.op([scores], ("m",), scores.width, None, order[1:2])
    offsets = tape.new(("e",), 4)
    joined = _grouped(model, path, "gate_up_proj", tokens, "2J", offsets, KEPT)
    gate, up = joined.view(("m", "J")), joined.view(("m", "J"))
    tape.record([joined], [gate, up], None)
    active = tape.op([gate], gate.dims, gate.width, None, (gate,), "output of the activation function")
    inner = tape.multiply(active, up)
    del joined, gate, up, active
    output = _grouped(model, path, "down_proj", inner, "h", offsets, KEPT)
    del inner
    weighted = tape.multiply(output, scores, KEPT)
    inverse = tape.new(("m",), 8)
    tape.new(("m",), 8)
    weighted = tape.op([weighted], ("m", "h"), weighted.width, None, (inverse,))
    total = tape.cast(tape.op([weighted], dims, weighted.width), width)
    del tokens, output, weighted, inverse, order, offsets, logits
    return total


def _route(model: TapedModel, path: str, x: Shaped) -> tuple[Shaped, Shaped]:
    """Stands for ``MixtralTopKRouter`` and ``Qwen3MoeTopKRouter``: the weight of each copy of a token, and logits."""
    tape = model.tape
    tape.module = path
    logits = tape.matmul(x, model.weights[path], ("T", "e"), "logits of the router")
    wide = tape.cast(logits, 4)
    chances = tape.with_saved_output([wide], ("T", "e"), 4, "probabilities of the router")
    del wide
    chosen = tape.new(("m",), 8)
    best = tape.op([chances], ("m",), 4, None, (chosen,))
    total = tape.op([best], ("T",), 4)
    best = tape.op([best, total], ("m",), 4, None, (best, total))
    return (best if model.shape.family == "mixtral" else tape.cast(best, logits.width)), logits


def _grouped(model: TapedModel, path: str, name: str, x: Shaped, outputs: str, offsets: Shaped, term: str) -> Shaped:
    """Stands for ``grouped_mm``, which autocast does not reach: the input takes the precision of the weights."""
    tape, full, dims = model.tape, f"{path}.experts.{name}", EXPERT_DIMS[name]
    if model.beside.quantize_moe_experts:
        constants = tape.new(dims, 4 / BLOCK, term="dequantised constants") if model.nested else None
        weight = tape.new(dims, 2, term="dequantised experts of one layer")
        del constants
    else:
        weight = model.weights[full]
    x = tape.cast(x, weight.width)
    x_dims, width = x.dims, x.width

    def backward(_: list[Any], __: Sequence[Any]) -> Gradients:
        return [tape.new(x_dims, width) if x_needs else None, tape.new(dims, width) if weight_needs else None]

    x_needs, weight_needs = x.node is not None, weight.node is not None
    saves = (x if weight_needs else None, weight if x_needs else None, offsets)
    return tape.op([x, weight], ("m", outputs), width, backward, saves, term)

"""A decoder on a tape: norms, attention, feed-forward layers, embeddings and logits. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from peftscope.memory.formula.experts import run_experts
from peftscope.memory.formula.linear import TapedModel, linear
from peftscope.memory.kernels import attention_kernel
from peftscope.memory.tape import Dims, Gradients, Shaped, Tape
from peftscope.models.shapes import LOCAL_OF_SIX

GEMMAS = ("gemma", "gemma2", "gemma3_text")
"""Families whose norms have a gain in 32 bits, and whose embeddings are scaled."""
WINDOWED = GEMMAS[1:]
"""Those with norms before and after attention and feed-forward layers, and two masks."""

_BEFORE = ("before attention", "before feed-forward")
_AFTER = ("after attention", "after feed-forward")
NORM_PLACES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(WINDOWED, (_BEFORE[0], _AFTER[0], _BEFORE[1], _AFTER[1])),
    "olmo2": _AFTER,
}
"""Where the norms of a block run, in their order; elsewhere before attention and before the feed-forward layers."""


def _norm(model: TapedModel, name: str, x: Shaped, groups: str = "1") -> Shaped:
    """Stands for ``LlamaRMSNorm``, ``Gemma2RMSNorm``, ``Gemma3RMSNorm`` and ``Olmo2RMSNorm``.

    ``groups`` is the number of parts of a token that are each divided by a root of their own, as a named dimension.
    """
    tape, weight, before = model.tape, model.weights[name], x.width
    tape.module = name
    x = tape.cast(x, 4, "32-bit copy of a norm's input")
    dims, narrow = x.dims, (*x.dims[:-1], groups)
    square = tape.op([x], dims, 4, lambda *_: [tape.last_of(3, dims, 4)], (x,))
    mean = tape.op([square], narrow, 4)
    del square
    root = tape.op([mean], narrow, 4, None, ())
    scaled = tape.multiply(x, root, "normalised input")
    if model.shape.family in GEMMAS:
        gain = tape.op([tape.cast(weight, 4)], weight.dims, 4)
        return tape.cast(tape.multiply(scaled, gain), before)
    if model.shape.family == "olmo2":
        return tape.cast(tape.multiply(scaled, weight), before)
    return tape.multiply(tape.cast(scaled, before, "normalised input"), weight)


def _rotate(model: TapedModel, x: Shaped, cos: Shaped, sin: Shaped) -> Shaped:
    """Stands for ``apply_rotary_pos_emb`` on queries or keys."""
    tape, before = model.tape, x.width
    straight = tape.multiply(x, cos)
    rotated = tape.multiply(_rotate_half(tape, x), sin)
    total = tape.add(straight, rotated)
    del straight, rotated
    if model.shape.family == "olmo2":  # it alone returns to the width of its input
        total = tape.cast(total, before)
    if model.shape.family == "phi3":
        total = tape.contiguous(total, "rotated heads")
    total.storage.block.term = "rotated heads"
    return total


def _rotate_half(tape: Tape, x: Shaped) -> Shaped:
    dims, width = x.dims, x.width
    half = tape.new(dims, width / 2)
    output = tape.op([x], dims, width, lambda *_: [tape.last_of(2, dims, width)])
    del half
    return output


def _attention(
    model: TapedModel, index: int, x: Shaped, rotary: tuple[Shaped, Shaped], mask: Shaped | None
) -> tuple[Shaped, Shaped | None]:
    """Stands for the attention module of a block, which returns its probabilities as well if it has them."""
    tape, block = model.tape, {layer.name: layer for layer in model.shape.block}
    module = f"layers.{index}.self_attn"
    if model.shape.family == "phi3":
        joined = linear(model, f"{module}.qkv_proj", block["qkv_proj"], x)
        query, key, value = (joined.view(("T", width)) for width in "qkk")
        for part in (query, key, value):  # slices of one tensor, whose gradients are each as large as all of it
            tape.record([joined], [part], None)
        del joined, part
    else:
        query, key, value = (linear(model, f"{module}.{n}", block[n], x) for n in ("q_proj", "k_proj", "v_proj"))
    if model.shape.head_norms:
        heads = ("1", "1") if model.shape.family == "olmo2" else ("a", "g")
        query = _norm(model, f"{module}.q_norm", query, heads[0])
        key = _norm(model, f"{module}.k_norm", key, heads[1])
    tape.module = module
    if model.shape.rotates(index):
        query = _rotate(model, query, *rotary)
        key = _rotate(model, key, *rotary)
    if model.prefix:
        key, value = _with_prefix(model, key), _with_prefix(model, value)
        if index == model.shape.num_layers - 1:
            model.past = None  # the cache holds longer keys and values in its place
    probabilities = None
    if model.spec.attention == "eager":
        output, probabilities = _eager_attention(model, query, key, value, mask)
    else:
        output = _sdpa(model, query, key, value, mask)
        if model.shape.family == "phi3":  # its queries, and with them the output, are laid out head by head
            output = tape.contiguous(output, "output of attention, in the order of tokens")
    return linear(model, f"{module}.o_proj", block["o_proj"], output), probabilities


def _with_prefix(model: TapedModel, x: Shaped) -> Shaped:
    """Stands for ``DynamicCache.update``: the trained keys or values, then those of the tokens."""
    tape, dims, past, width = model.tape, x.dims, model.past.dims, max(x.width, model.past.width)

    def backward(grads: list[Any], _: Sequence[Any]) -> Gradients:
        return [tape.new(past, width), grads[0].view(dims)]

    output = tape.op([model.past, x], ("B", "P", "k"), width, backward, term="keys or values with prefix")
    model.cache.append(output.view(output.dims))
    return output


def _repeat(model: TapedModel, x: Shaped, term: str) -> Shaped:
    """Stands for ``repeat_kv``: every query head gets a copy of its keys or values."""
    if not model.grouped:
        return x
    return model.tape.op([x], (*x.dims[:-1], "q"), x.width, term=term)


def _sdpa(model: TapedModel, query: Shaped, key: Shaped, value: Shaped, mask: Shaped | None) -> Shaped:
    """Stands for ``sdpa_attention_forward``; the kernel keeps its output and a log-sum-exp per head."""
    tape, additive = model.tape, None
    if mask is not None:
        key, value = _repeat(model, key, "keys for every head"), _repeat(model, value, "values for every head")
    if tape.autocast or model.spec.attention == "flash_attention_2":
        query, key, value = (tape.cast(x, 2, "16-bit copy for the attention kernel") for x in (query, key, value))
    grouped, head_dim = model.grouped and mask is None, model.shape.head_dim
    asked = {"masked": mask is not None, "grouped": grouped, "before_ampere": model.before_ampere}
    kernel = attention_kernel(query.width, head_dim, **asked)
    if kernel == "math":
        return _math_attention(model, query, key, value, mask)
    if mask is not None:
        additive = tape.new(mask.dims, query.width, term="additive mask of each layer")
    output = tape.new(query.dims, query.width, term="output of attention")
    sums = tape.new(("B", "S", "a"), 4, term="log-sum-exp of attention")
    saves = (query, key, value, output.storage, sums, additive)
    tape.record([query, key, value], [output], None, saves)
    return output


def _math_attention(model: TapedModel, query: Shaped, key: Shaped, value: Shaped, mask: Shaped | None) -> Shaped:
    """Stands for ``_scaled_dot_product_attention_math``: 32-bit scores of every pair of positions."""
    tape, before = model.tape, query.width
    autocasts, tape.autocast = tape.autocast, False  # it ends where the kernel begins
    query, key, value = (tape.cast(x, 4) for x in (query, key, value))
    query = tape.scale(query)
    additive = tape.new(mask.dims if mask else ("S", "P"), 4, term="additive mask of each layer")
    if mask is None:
        key, value = _repeat(model, key, "keys for every head"), _repeat(model, value, "values for every head")
    key = tape.scale(key)
    key.storage.block.term = "keys for every head"
    query = tape.contiguous(query, "contiguous queries")
    scores = tape.matmul(query, key, ("B", "a", "S", "P"), "scores")
    scores = tape.op([scores], scores.dims, 4, lambda grads, _: [grads[0]])
    scores = tape.with_saved_output([scores], scores.dims, 4, "attention probabilities in 32 bits")
    output = tape.cast(tape.matmul(scores, value, query.dims, "output of attention"), before)
    tape.autocast = autocasts
    del additive
    return tape.contiguous(output, "output of attention")


def _eager_attention(
    model: TapedModel, query: Shaped, key: Shaped, value: Shaped, mask: Shaped | None
) -> tuple[Shaped, Shaped]:
    """Stands for ``eager_attention_forward``: scores of every pair of positions."""
    tape, scores, before = model.tape, ("B", "a", "S", "P"), 4 if model.tape.autocast else query.width
    key, value = _repeat(model, key, "keys for every head"), _repeat(model, value, "values for every head")
    weights = _product(model, query, key, scores, "scores")
    weights = tape.scale(weights)
    if model.shape.family == "gemma2":
        weights = tape.scale(weights)
        weights = tape.with_saved_output([weights], weights.dims, weights.width, "scores after the soft cap")  # tanh
        weights = tape.scale(weights)
    if mask is not None:
        weights = tape.op([weights], scores, max(weights.width, mask.width), lambda grads, _: [grads[0]])
    wide = tape.with_saved_output([tape.cast(weights, 4)], scores, 4, "attention probabilities in 32 bits")
    weights = tape.cast(wide, before, "attention probabilities")
    del wide
    output = _product(model, weights, value, query.dims, "output of attention")
    return tape.contiguous(output, "output of attention"), weights


def _product(model: TapedModel, left: Shaped, right: Shaped, dims: Dims, term: str) -> Shaped:
    """Stands for ``torch.matmul`` of heads: it copies what is not contiguous; repeated keys are, and so are those
    with a prefix."""
    if left.dims != ("B", "a", "S", "P"):
        left = model.tape.contiguous(left, "contiguous queries")
    if not model.grouped and not model.prefix:
        right = model.tape.contiguous(right, "contiguous keys or values")
    return model.tape.matmul(left, right, dims, term)


def _mlp(model: TapedModel, index: int, x: Shaped) -> Shaped:
    """Stands for ``LlamaMLP``, ``Gemma2MLP`` and ``Phi3MLP``."""
    if model.shape.experts:
        return run_experts(model, f"layers.{index}.mlp", x)
    tape, block = model.tape, {layer.name: layer for layer in model.shape.block}
    module = f"layers.{index}.mlp"
    if model.shape.family == "phi3":
        joined = linear(model, f"{module}.gate_up_proj", block["gate_up_proj"], x)
        tape.module = module
        gate, up = joined.view(("T", "I")), joined.view(("T", "I"))
        tape.record([joined], [gate, up], None)
        del joined
        inner = tape.multiply(up, _activation(tape, gate))
        return linear(model, f"{module}.down_proj", block["down_proj"], inner)  # with `gate` still alive
    gate = linear(model, f"{module}.gate_proj", block["gate_proj"], x)
    tape.module = module
    active = _activation(tape, gate)
    del gate
    inner = tape.multiply(active, linear(model, f"{module}.up_proj", block["up_proj"], x))
    del active
    return linear(model, f"{module}.down_proj", block["down_proj"], inner)


def _activation(tape: Tape, gate: Shaped) -> Shaped:
    return tape.op([gate], gate.dims, gate.width, None, (gate,), "output of the activation function")


def _layer(model: TapedModel, index: int, x: Shaped, rotary: tuple[Shaped, Shaped], mask: Shaped | None) -> Shaped:
    """Stands for a decoder layer."""
    tape, path, family = model.tape, f"layers.{index}", model.shape.family
    norms = dict(zip(NORM_PLACES.get(family, _BEFORE), model.shape.norms, strict=True))

    def normed(place: str, x: Shaped) -> Shaped:
        x = _norm(model, f"{path}.{norms[place]}", x) if place in norms else x
        tape.module = path
        return tape.scale(x) if family == "granite" and place.startswith("after") else x

    residual = x
    x, probabilities = _attention(model, index, normed("before attention", x), rotary, mask)
    x = normed("after attention", x)
    x = tape.add(residual, x)
    residual = x
    x = _mlp(model, index, normed("before feed-forward", x))
    x = normed("after feed-forward", x)
    x = tape.add(residual, x)
    x.storage.block.term = "output of each layer"
    del probabilities  # transformers' local variable keeps them for as long
    return x


def _embed(model: TapedModel) -> Shaped:
    """Stands for the embedding of tokens, with virtual ones before them."""
    tape, weight = model.tape, model.embedding
    tape.module = "embed_tokens"
    tokens = "U" if model.prompt else "T"
    x = tape.op([weight], (tokens, "h"), weight.width, term="embedded tokens")
    if model.shape.family in GEMMAS:
        x = tape.scale(x)
    if model.spec.checkpointing and tape.training and x.node is None:
        tape.require_grad(x)  # peft's enable_input_require_grads
    if model.prompt:
        tape.module = "prompt_encoder"
        prompts = tape.op([model.weights["prompt_encoder"]], ("B", "v", "h"), 4)
        prompts = tape.cast(prompts, x.width)
        before, tokens_dims, width = prompts.dims, x.dims, x.width

        def backward(grads: list[Any], _: Sequence[Any]) -> Gradients:
            return [tape.new(before, width), tape.new(tokens_dims, width)]

        x = tape.op([prompts, x], ("T", "h"), width, backward)
    return x


def run_decoder(model: TapedModel, *, masked: bool) -> Shaped:
    """Stands for the decoder without its head."""
    tape, spec, shape = model.tape, model.spec, model.shape
    embedded = x = tape.scale(_embed(model)) if shape.family == "granite" else _embed(model)
    tape.module = ""
    eager = spec.attention == "eager"
    seen = tape.new(("B", "S", "P"), 1, term="mask") if masked else None
    added = 2 if spec.packing and tape.training and spec.precision != "fp32" else model.embedded
    mask = tape.new(("B", "S", "P"), added, term="mask") if eager else seen
    del seen
    # One mask for layers with a window and one for the others, and in Gemma 3 angles for each as well.
    other_mask = tape.new(mask.dims, mask.width, term="mask") if mask and shape.family in WINDOWED else None
    pairs = 2 if shape.family == "gemma3_text" and shape.num_layers > LOCAL_OF_SIX else 1
    if model.prefix:
        past = tape.op([model.weights["prompt_encoder"]], ("B", "v", "L", "k", "2"), 4)
        if spec.precision != "amp":
            past = tape.cast(past, model.width)
        model.past = past.view(("B", "v", "k"))
        del past
    angle_width = 4 if shape.family == "olmo2" else x.width
    positions = "T" if spec.packing and tape.training else "S"  # packed rows count their positions each for itself
    angles = [tape.new((positions, "d"), angle_width, term="rotary embedding") for _ in range(2 * pairs)]
    for index in range(shape.num_layers):
        run = partial(_layer, model, index, rotary=(angles[0], angles[1]), mask=mask)
        x = tape.checkpoint(run, x) if spec.checkpointing and tape.training else run(x)
    x = _norm(model, "norm", x)
    del embedded, other_mask  # transformers' local variables keep them for as long
    return x


def keep_positions(model: TapedModel, x: Shaped) -> Shaped:
    """Stands for the slice of hidden states whose logits are needed."""
    return model.tape.op([x], ("N", "h"), x.width)


def run_head(model: TapedModel, x: Shaped, *, kept: bool) -> Shaped:
    """Stands for the language-model head, at the positions that are kept or at all of them."""
    tape = model.tape
    x = keep_positions(model, x) if kept else x
    tape.module = "lm_head"
    logits = tape.matmul(x, model.head, ("N", "V"), "logits")
    if model.shape.family == "gemma2":
        logits = tape.scale(logits)
        logits = tape.with_saved_output([logits], logits.dims, logits.width, "logits after the soft cap")  # tanh
        logits = tape.scale(logits)
    if model.shape.family == "granite":
        logits = tape.scale(logits)
    tape.module = ""
    return logits

"""How long a training step takes on a card, from its shapes: arithmetic, bytes and launches. No torch.

``docs/time.md`` explains the model, and compares it with measured speeds. Operations are counted in the code that
``memory/formula`` stands for: transformers 5.24, peft 0.21, bitsandbytes 0.50 and torch 2.13 without torch.compile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from peftscope.hardware.cards import Speed
from peftscope.memory.formula.linear import WIDTHS
from peftscope.memory.formula.terms import sizes_of
from peftscope.memory.question import Question
from peftscope.models.shapes import LinearLayer, ModelShape

FITTED_FILE = Path(__file__).with_name("speed.json")
"""The constants, and how far left-out speeds were from the prediction. ``make speed`` writes this file."""

NORM_BYTES, NORM_LAUNCHES = 36, 8
"""The cost of a value that ``LlamaRMSNorm`` reads in 16 bits: it is computed in fp32, one kernel an operation."""
ROTARY_BYTES, ROTARY_LAUNCHES = 18, 5
"""The cost of a value of queries or keys in ``apply_rotary_pos_emb``."""
DEQUANTISED_BYTES = 2.56
"""The bytes of unpacking a 4-bit weight in ``dequantize_4bit``: it and its share of a constant, and 16 bits."""
DORA_BYTES = 26
"""The bytes of a weight in ``DoraLinearLayer.get_weight_norm``: B·A, the weight and their sum in fp32, and its norm."""
OPTIMIZER_BYTES = {"foreach": 21, "single": 21, "fused": 7}
"""The bytes of a trained value, over its width, in torch's ``adamw``. Foreach decays the weight (2 reads and
writes), updates the moments (3, 2 and 4), makes the divisor (2, 2 and 2) and takes the step (4); a fused kernel reads
four and writes three."""
LOSS = "logits and loss"
WAITS = "waiting for launches"
"""The part of a step in which the card waits for the host."""


@dataclass(frozen=True)
class Constants:
    """The constants of the model.

    Attributes:
        rate_share: The share of a card's rate that products reach.
        memory_share: The share of its memory's bandwidth that other kernels reach.
        launch_seconds: The least time of an operation: Python and the launch of its kernel.
    """

    rate_share: float
    memory_share: float
    launch_seconds: float


@dataclass(frozen=True)
class Operation:
    """An operation of the forward pass, and what its backward pass takes.

    Attributes:
        part: What the operation belongs to.
        bytes: The bytes that it reads and writes.
        launches: The number of kernels.
        flops: The floating-point operations of its products.
        backward: What the backward pass takes, over what the forward pass takes.
        fp32: Whether its products are of fp32 numbers.
        times: How often a pass has it.
        recomputed: Whether recomputation repeats it.
    """

    part: str
    bytes: float
    launches: float = 1
    flops: float = 0.0
    backward: float = 2.0
    fp32: bool = False
    times: int = 1
    recomputed: bool = True


def operations(question: Question, shape: ModelShape, dequantised_bytes: float) -> Iterator[Operation]:
    """Yields the operations of the forward pass on one batch; arguments as of ``passes_of``."""
    spec, method, sizes, layers = question.spec, question.spec.method, sizes_of(question), shape.num_layers
    tokens, hidden, full = sizes["T"], shape.hidden_size, method.trains_base
    wide, quantization = spec.precision == "fp32", method.quantization()
    width = 4 if wide else 2
    prepared = method.model_dump().get("kbit_preparation", "none")
    stream = 4 if spec.precision == "amp" or prepared != "none" else width  # of hidden states between layers
    product_wide = wide or (quantization is not None and quantization.compute_dtype == "fp32")
    fused = question.beside.loss == "liger"
    norms = len(shape.norms) * hidden + (sizes["q"] + sizes["k"] if shape.head_norms else 0)
    count = len(shape.norms) + (2 if shape.head_norms else 0)
    norm_bytes, norm_launches = (2 * width, 1) if fused else (NORM_BYTES, NORM_LAUNCHES)
    rotary_bytes, rotary_launches = (2 * width, 0.5) if fused else (ROTARY_BYTES, ROTARY_LAUNCHES)
    active_bytes, active_launches = (3 * width, 1) if fused else (5 * width, 2)
    yield Operation("norms", norm_bytes * tokens * norms, norm_launches * count, times=layers)
    rotated = tokens * (sizes["q"] + sizes["k"])
    yield Operation("rotary embedding", rotary_bytes * rotated, 2 * rotary_launches, times=layers)
    active = tokens * active_bytes * shape.intermediate_size
    yield Operation("activation, residuals", active, active_launches, times=layers)
    yield Operation("activation, residuals", tokens * 6 * stream * hidden, 2, times=layers)
    yield from _attention(question, shape, sizes, width)
    adapted = shape.linear_layers(method.targets_of())
    for layer in shape.block:
        yield _product("products of the base", tokens, layer.inputs, layer.outputs, width, layers, product_wide, full)
        yield from _weight_work(question, layer, layers, dequantised_bytes)
        number = sum(one is layer for one in adapted)
        if number:
            yield from _adapter(question, layer, sizes, number)
    kept, values = sizes["N"], sizes["N"] * shape.vocab_size
    head_wide = wide or (prepared == "peft" and not spec.autocasts)
    head = _product(
        LOSS, kept, hidden, shape.vocab_size, 4 if head_wide else 2, 1, head_wide, full or "lm_head" in question.saved
    )
    again = 1 if question.beside.loss in ("cut-cross-entropy", "chunked") else 0  # these compute the logits once more
    yield replace(head, backward=head.backward + again, recomputed=False)
    per_value = {"plain": 8 + 4 * width, "liger": 6, "chunked": 8, "cut-cross-entropy": 0}[question.beside.loss]
    yield Operation(LOSS, per_value * values, 6, backward=1, recomputed=False)
    yield Operation("norms", norm_bytes * tokens * hidden, norm_launches, recomputed=False)


def _product(
    part: str, tokens: int, inputs: int, outputs: int, width: float, times: int, fp32: bool, trained: bool
) -> Operation:
    """Returns ``nn.Linear``; its backward pass has a product for the input's gradient, and one for the weight's."""
    size = width * (tokens * (inputs + outputs) + inputs * outputs)
    return Operation(part, size, 1, 2.0 * tokens * inputs * outputs, 2 if trained else 1, fp32, times)


def _attention(question: Question, shape: ModelShape, sizes: dict[str, int], width: float) -> Iterator[Operation]:
    """Yields the kernel of attention. With a mask it computes every pair of positions, and has a key for every head."""
    spec, tokens = question.spec, sizes["T"]
    needed = spec.packing or (spec.loss_path == "hf" and question.padded) or not spec.method.mask_free_attention
    masked = spec.attention == "eager" or (spec.attention == "sdpa" and needed)
    pairs = tokens * sizes["P"] * (1 if masked else 0.5)
    size, launches = width * tokens * 2 * (sizes["q"] + sizes["k"]), 1
    if masked and shape.num_heads != shape.num_kv_heads:
        size, launches = size + 4 * width * tokens * sizes["q"], 3
    if spec.attention == "eager":  # scores, their scale, mask, softmax in fp32, and casts
        size, launches = size + 30 * pairs * shape.num_heads, 8
    flops = 4.0 * pairs * sizes["q"]
    yield Operation("attention", size, launches, flops, 2.5, spec.precision == "fp32", shape.num_layers)


def _weight_work(question: Question, layer: LinearLayer, times: int, dequantised_bytes: float) -> Iterator[Operation]:
    """Yields what a base layer does with its weight before each product: unpacking, or a cast under autocast."""
    quantization = question.spec.method.quantization()
    if quantization:
        size = dequantised_bytes + (8 if quantization.compute_dtype == "fp32" else 0)
        launches = 4 if quantization.double_quant else 2
        yield Operation("dequantisation", size * layer.weights, launches, backward=1, times=times)
    elif question.spec.precision == "amp":
        yield Operation("casts of weights", 6 * layer.weights, backward=0, times=times)


def _adapter(question: Question, layer: LinearLayer, sizes: dict[str, int], times: int) -> Iterator[Operation]:
    """Yields what an adapter adds to a linear layer."""
    spec, tokens, rank = question.spec, sizes["T"], sizes["r"]
    form = spec.method.closed_form.layer if spec.method.closed_form else "low-rank"
    fields = spec.method.model_dump()
    kept = fields.get("adapter_dtype") == "base"
    width = 2 if spec.autocasts else WIDTHS[spec.precision] if kept else 4
    casts = 0 if kept or spec.autocasts else 2 + width
    if form == "rescaled":
        changed = layer.inputs if spec.method.rescales_input(layer.name) else layer.outputs
        yield Operation("adapters", tokens * changed * (2 * width + casts), 3, times=times)
        return
    dropped = 2 * width + 1 if fields.get("dropout") else 0
    size = tokens * (layer.inputs * (casts + dropped) + layer.outputs * (4 * width + 2 + casts))
    yield Operation("adapters", size, 5 if dropped else 4, times=times)
    for inputs, outputs in ((layer.inputs, rank), (rank, layer.outputs)):
        yield _product("adapters", tokens, inputs, outputs, width, times, width == 4, trained=True)
    if form == "decomposed":
        flops = 2.0 * layer.inputs * rank * (layer.inputs + layer.outputs)
        gradient = 2 if fields.get("norm_gradient") else 0
        yield Operation("norms of DoRA", DORA_BYTES * layer.weights, 10, flops, gradient, True, times)
        yield Operation("norms of DoRA", 6 * width * tokens * layer.outputs, 6, times=times)
    if form == "triplets":
        yield Operation("adapters", 2 * width * tokens * layer.outputs, 4, times=times)


@dataclass(frozen=True)
class StepTime:
    """The seconds of an optimizer step on each card.

    Attributes:
        parts: The seconds of each part of it.
        tokens: The tokens of the step on one card, padding included.
        cards: The number of cards.
        forward_seconds: The seconds of one forward pass on one batch.
    """

    parts: dict[str, float]
    tokens: int
    cards: int
    forward_seconds: float

    @property
    def seconds(self) -> float:
        """The seconds of the step."""
        return sum(self.parts.values())


Passes = list[tuple[list[tuple[Operation, float]], int]]
"""Passes of a step: operations with what a pass takes over their forward pass, and how often a step has the pass."""


def passes_of(question: Question, dequantised_bytes: float = DEQUANTISED_BYTES) -> Passes:
    """Returns the forward pass and, of a method that trains, the backward pass with recomputation and the optimizer's.

    ``dequantised_bytes`` are those that unpacking a 4-bit weight reads and writes.
    """
    spec, shape = question.spec, question.model.shape
    assert shape is not None
    found = list(operations(question, shape, dequantised_bytes))
    forward: Passes = [([(one, 1.0) for one in found], spec.gradient_accumulation)]
    if not spec.method.trains:
        return forward
    again = [(one, 1.0) for one in found if one.recomputed and spec.checkpointing]
    backward = [(one, one.backward) for one in found] + again
    update = [(one, 1.0) for one in _update(question, shape)]
    return [*forward, (backward, spec.gradient_accumulation), (update, 1)]


def step_time(
    question: Question, speed: Speed, constants: Constants | None = None, passes: Passes | None = None
) -> StepTime:
    """Returns the time of an optimizer step.

    A kernel takes the larger of its arithmetic and its bytes. The host launches kernels ahead of the card, so that a
    pass takes the larger of its kernels and its launches.

    ``constants`` are those that were fitted, unless others are given; ``passes`` is what ``passes_of`` returns.
    """
    spec, shape, constants = question.spec, question.model.shape, constants or fitted()[0]
    assert shape is not None
    rate, size_rate = constants.rate_share, constants.memory_share * speed.memory_bytes
    parts: dict[str, float] = {}
    taken_by_pass = []
    for content, times in passes or passes_of(question):
        busy = launches = 0.0
        for one, factor in content:
            flops = one.flops / (rate * (speed.fp32_flops if one.fp32 else speed.bf16_flops))
            taken = factor * one.times * max(flops, one.bytes / size_rate)
            parts[one.part] = parts.get(one.part, 0.0) + times * taken
            busy, launches = busy + taken, launches + factor * one.times * one.launches
        waits = max(0.0, launches * constants.launch_seconds - busy)
        parts[WAITS] = parts.get(WAITS, 0.0) + times * waits
        taken_by_pass.append(busy + waits)
    if question.gpus > 1:
        moved = _moved(question, shape) / speed.link_bytes
        parts["waiting for other cards"] = max(0.0, moved - sum(parts.values()))
    tokens = spec.batch_size * spec.seq_len * spec.gradient_accumulation
    return StepTime(parts, tokens, question.gpus, taken_by_pass[0])


def _trained(question: Question, shape: ModelShape) -> int:
    """Returns the number of trained values, with those of modules that are saved."""
    own = question.spec.method.trainable_parameters(shape) or 0
    return own + len(question.saved) * shape.vocab_size * shape.hidden_size


def _update(question: Question, shape: ModelShape) -> Iterator[Operation]:
    """Yields what comes once a step, on a card's share: sums of gradients, their norm, and the optimizer."""
    spec, full = question.spec, question.spec.method.trains_base
    values = _trained(question, shape) / question.gpus
    narrow = full or spec.method.model_dump().get("adapter_dtype") == "base"
    width = WIDTHS[spec.precision] if narrow else 4
    adapted = len(shape.linear_layers(spec.method.targets_of()))
    tensors = shape.num_layers * (len(shape.block) + len(shape.norms)) if full else 2 * adapted
    repeats = spec.gradient_accumulation - 1
    yield Operation("sums of gradients", 3 * width * values * repeats, tensors * repeats)
    yield Operation("optimizer", 3 * width * values, 2 * tensors)  # the norm of the gradients, and their scale
    if spec.optimizer == "adamw":
        yield Operation("optimizer", OPTIMIZER_BYTES[spec.optimizer_implementation] * width * values, tensors)
    elif spec.optimizer == "sgd":
        yield Operation("optimizer", 5 * width * values, tensors)
    else:
        states = 4 if spec.optimizer.endswith("8bit") else 16
        yield Operation("optimizer", (3 * width + states) * values, 2 * tensors)


def _moved(question: Question, shape: ModelShape) -> float:
    """Returns the bytes that a card receives in a step: sharded weights in each pass, and gradients.

    Source: Rajbhandari et al. 2019, arXiv 1910.02054, section 7: ZeRO-3 gathers weights twice and reduces gradients.
    """
    spec, others = question.spec, (question.gpus - 1) / question.gpus
    weights = shape.parameters * (0.5 if spec.method.quantization() else WIDTHS[spec.precision])
    gradients = _trained(question, shape) * WIDTHS[spec.precision]
    return float(others * spec.gradient_accumulation * (2 * weights + gradients))


@cache
def fitted() -> tuple[Constants, dict[str, Any]]:
    """Returns the constants, and the rest of ``FITTED_FILE``."""
    content = json.loads(FITTED_FILE.read_text())
    return Constants(**content.pop("constants")), content

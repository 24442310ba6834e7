"""Weights of a model and its adapter, and the linear layers of every method. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftscope.memory.question import Question
from peftscope.memory.tape import Dims, Gradients, Shaped, Tape
from peftscope.memory.trace import Block, bytes_of, spoken_width
from peftscope.models.shapes import LinearLayer, is_named, module_path
from peftscope.models.stored import BLOCK, Stored, four_bits

WIDTHS = {"fp32": 4, "bf16": 2, "amp": 4}
"""Bytes of a weight in each precision."""

LINEAR_DIMS: dict[str, Dims] = {
    "q_proj": ("h", "q"),
    "k_proj": ("h", "k"),
    "v_proj": ("h", "k"),
    "qkv_proj": ("h", "q+2k"),
    "o_proj": ("q", "h"),
    "gate_proj": ("h", "I"),
    "up_proj": ("h", "I"),
    "gate_up_proj": ("h", "2I"),
    "down_proj": ("I", "h"),
}
"""Inputs and outputs of each linear layer, as named dimensions."""

EXPERT_DIMS: dict[str, Dims] = {"gate_up_proj": ("e", "2J", "h"), "down_proj": ("e", "h", "J")}
"""The fused parameters of the experts of a layer, as named dimensions."""

HEAD_NORM_DIMS: dict[str, tuple[str, str]] = {
    "qwen3": ("d", "d"),
    "qwen3_moe": ("d", "d"),
    "gemma3_text": ("d", "d"),
    "olmo2": ("q", "k"),
}
"""The widths of the norms of queries and keys, as named dimensions: of one head, or of all."""

TOWER = "vision tower, frozen"
COPY = "trained copy"
"""The last part of the name of a module that is trained in full beside an adapter."""


class TapedModel:
    """A model with its weights on a tape, and what its operations ask about it.

    Attributes:
        tape: What runs is written there.
        weights: By name.
        loss: The implementation of the loss of a training step: plain, or a fused one.
        beside: What the question says beside the run, the job among it.
        second: The weights of a second model that is the reference, by name; None if there is none.
    """

    def __init__(self, question: Question, sizes: dict[str, int]) -> None:
        spec, shape = question.spec, question.model.shape
        assert shape is not None
        self.spec, self.shape, self.method = spec, shape, spec.method
        self.saved, self.padded, self.loss = question.saved, question.padded, question.beside.loss
        self.beside, self.before_ampere = question.beside, question.before_ampere
        self.values: dict[str, Any] = spec.method.model_dump()
        assert self.method.closed_form is not None
        self.form = self.method.closed_form
        self.prompt = self.method.logit_offset() > 0
        self.prefix = sizes["v"] > 0 and not self.prompt
        self.sizes = sizes
        self.tape = Tape(self.sizes)
        self.tape.autocast = spec.autocasts
        self.width = WIDTHS[spec.precision]
        prepared = self.values.get("kbit_preparation", "none")
        self.other = self.width if prepared == "none" else 4  # of what is not quantised
        self.embedded = 4 if prepared == "peft" else self.width
        packed = spec.method.quantization()
        self.compute = WIDTHS[packed.compute_dtype] if packed else 2
        self.stored = stored_in(question)
        self.nested = self.stored is not None and "constants of block constants" in self.stored.parts
        self.adapter_width = self.width if self.values.get("adapter_dtype") == "base" else 4
        self.targets = spec.method.targets_of()
        self.weights: dict[str, Shaped] = {}
        self.tape.steps_in_backward, self.tape.offloads = self.beside.optimizer_in_bwd, self.beside.offload_activations
        self.grouped = shape.num_heads != shape.num_kv_heads
        # The backward pass has a thread of its own, with a handle and a workspace of its own.
        for _ in range(2 if spec.method.trains else 1):
            self.tape.trace.born(Block(question.cublas_bytes, "kernel workspace", term="cuBLAS workspace"))
        self.past: Any = None  # of prefix tuning: its keys and values
        self.cache: list[Shaped] = []  # and what transformers' cache keeps as long as its output lives
        _make_weights(self)
        self.second = _copies(self) if question.beside.reference == "copy" else None
        for block in tower_blocks(question):
            self.tape.trace.born(block)

    @property
    def embedding(self) -> Shaped:
        """The embedding of tokens that computes: the base's, or its trained copy."""
        return self.weights.get(f"embed_tokens.{COPY}", self.weights["embed_tokens"])

    @property
    def head(self) -> Shaped:
        """The head that computes: the base's, which may be its embedding, or a trained copy."""
        own = self.weights["embed_tokens" if self.shape.tied_embeddings else "lm_head"]
        return self.weights.get(f"lm_head.{COPY}", own)


def stored_in(question: Question) -> Stored | None:
    """Returns how the linear layers of the base are stored, if in few bits."""
    packed = question.spec.method.quantization()
    own = Stored("bnb-4bit", four_bits(nested=packed.double_quant), "both", "") if packed else None
    return question.model.stored or own


def tower_blocks(question: Question) -> list[Block]:
    """Returns the weights of a vision tower, which stays frozen, by its layers.

    bitsandbytes packs its linear layers as it packs those of the language model. Checkpoints of other formats leave a
    tower in 16 bits.
    """
    vision, stored = question.model.vision, stored_in(question)
    if vision is None:
        return []
    width = WIDTHS[question.spec.precision]
    packed = stored is not None and stored.name in ("bnb-4bit", "int8")
    parts = stored.parts if stored and packed else {TOWER: width}
    other = width if getattr(question.spec.method, "kbit_preparation", "none") == "none" else 4
    pieces = [(f"layers.{index}", "W", vision.block, parts) for index in range(vision.layers)]
    pieces += [("projector", "X", vision.outside, parts), ("rest", "Y", vision.other, {TOWER: other})]
    blocks = []
    for module, dim, values, own in pieces:
        kind = "quantised weights" if packed and own is parts else "weights"
        for term, each in own.items():
            size, formula = bytes_of(each, [dim], {dim: values}), f"{spoken_width(each)}·{dim}"
            blocks.append(Block(size, kind, f"vision_tower.{module}", term, formula))
    return [block for block in blocks if block.size]


def _make_weights(model: TapedModel) -> None:
    """Makes what stays: the base's weights, then the adapter's."""
    shape, other = model.shape, model.other
    _weight(model, "embed_tokens", ("V", "h"), model.embedded)
    for index in range(shape.num_layers):
        for layer in shape.block:
            _linear_weight(model, module_path(index, layer.name), layer)
        if shape.experts:
            _weight(model, f"layers.{index}.mlp.gate", ("e", "h"), other)
            for name, dims in EXPERT_DIMS.items():
                path, packed = f"layers.{index}.mlp.experts.{name}", model.beside.quantize_moe_experts
                _packed_weight(model, path, dims) if packed else _weight(model, path, dims, other)
        for name in shape.norms:
            _weight(model, f"layers.{index}.{name}", ("h",), other)
        if shape.head_norms:
            for name, dim in zip(("q_norm", "k_norm"), HEAD_NORM_DIMS[shape.family], strict=True):
                _weight(model, f"layers.{index}.self_attn.{name}", (dim,), other)
    _weight(model, "norm", ("h",), other)
    if model.beside.job == "reward":  # which PEFT trains beside an adapter
        (_weight if model.method.trains_base else _adapter)(model, "score", ("h",), model.width)
    elif not shape.tied_embeddings:
        _weight(model, "lm_head", ("V", "h"), model.embedded)
    _copy(model, "embed_tokens")
    for index in range(shape.num_layers):
        for layer in shape.block:
            if is_named(path := module_path(index, layer.name), model.targets):
                _adapter_weights(model, path, layer)
    if model.prompt or model.prefix:
        _adapter(model, "prompt_encoder", ("v", "h") if model.prompt else ("v", "L", "k", "2"), 4)
    _copy(model, "lm_head")


def _copy(model: TapedModel, name: str) -> None:
    """Stands for PEFT's ``ModulesToSaveWrapper``: the frozen module stays, and a copy of it is trained."""
    if name in model.saved:
        _adapter(model, f"{name}.{COPY}", ("V", "h"), 4 if model.saved[name] == "fp32" else model.embedded)


def _weight(model: TapedModel, name: str, dims: Dims, width: float) -> None:
    trained = model.method.trains_base and not (dims[0] == "V" and model.values.get("embeddings") == "frozen")
    model.weights[name] = model.tape.parameter(name, dims, width, "weights", trained=trained)


def _adapter(model: TapedModel, name: str, dims: Dims, width: float) -> None:
    model.weights[name] = model.tape.parameter(name, dims, width, "adapters", trained=True)


def _copies(model: TapedModel) -> dict[str, Shaped]:
    """Makes the weights of a second model, which stay as they are, and returns them by the names of the first."""
    copies, widest = {}, 2 if model.beside.logprobs == "whole" else 4  # LLaMA-Factory loads what is frozen in 16 bits
    for name, weight in model.weights.items():
        block, width = weight.storage.block, min(weight.width, widest)
        if block.kind in ("weights", "quantised weights"):
            path = f"reference.{block.module}"
            copies[name] = model.tape.parameter(path, weight.dims, width, block.kind, block.term, trained=False)
    return copies


def _linear_weight(model: TapedModel, path: str, layer: LinearLayer) -> None:
    inputs, outputs = LINEAR_DIMS[layer.name]
    dims = outputs, inputs
    _packed_weight(model, path, dims) if model.stored else _weight(model, path, dims, model.width)
    if layer.bias:
        _weight(model, f"{path}.bias", (outputs,), model.other)


def _packed_weight(model: TapedModel, path: str, dims: Dims) -> None:
    assert model.stored is not None
    for term, width in model.stored.parts.items():
        model.weights[f"{path}.{term}"] = model.tape.parameter(
            path, dims, width, "quantised weights", term, trained=False
        )


def _adapter_weights(model: TapedModel, path: str, layer: LinearLayer) -> None:
    inputs, outputs = LINEAR_DIMS[layer.name]
    width = model.adapter_width
    if model.form.layer == "rescaled":
        _adapter(model, f"{path}.ia3_l", (inputs if model.method.rescales_input(layer.name) else outputs,), width)
        return
    _adapter(model, f"{path}.lora_A", ("r", inputs), width)
    _adapter(model, f"{path}.lora_B", (outputs, "r"), width)
    if model.form.layer == "triplets":
        _adapter(model, f"{path}.lora_E", ("r",), width)
    if model.form.layer == "decomposed":
        _adapter(model, f"{path}.magnitude", (outputs,), width)


def linear(model: TapedModel, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
    """Stands for a linear layer with whatever adapter it has."""
    model.tape.module = path
    if not is_named(path, model.targets):
        return _base_linear(model, path, layer, x)
    return _ADAPTED[model.form.layer](model, path, layer, x)


def _base_linear(model: TapedModel, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
    """Stands for ``torch.nn.Linear``, or ``bitsandbytes.nn.Linear4bit``."""
    tape, (inputs, outputs) = model.tape, LINEAR_DIMS[layer.name]
    dims = (*x.dims[:-1], outputs)
    term, unpacked = f"output of {layer.name}", "dequantised weights of one layer"
    if not model.stored:
        return tape.matmul(x, model.weights[path], dims, term)
    compute, nested, product = model.compute, model.nested, model.stored.product
    if product == "kept":
        return tape.matmul(x, tape.new((outputs, inputs), x.width, term=unpacked), dims, term)

    def backward(grads: list[Any], _: Sequence[Any]) -> Gradients:
        constants = tape.new((outputs, inputs), 4 / BLOCK, term="dequantised constants") if nested else None
        weight = tape.new((outputs, inputs), 2, term=unpacked)
        del constants
        if compute == 4:
            weight = tape.new((outputs, inputs), 4, term=unpacked)
        result = tape.new(x_dims, compute)
        del weight
        return [result]

    x_dims = x.dims
    narrow = tape.cast(x, compute)  # lives while the kernel runs
    if product == "int8":  # the input in fp16 and in 8 bits, and sums in 32 bits
        rounded = [tape.new(x.dims, 2), tape.new(x.dims, 1), tape.new(dims, 4), tape.new(dims, 2)]
        rounded.clear()
    output = tape.op([narrow], dims, compute, backward, (narrow,) if product == "int8" else (), term)
    if product == "both":
        size, formula = tape.measure((outputs, inputs), 2)
        tape.trace.pass_by(Block(size, "kernel workspace", path, unpacked, formula))
    del narrow
    return tape.cast(output, x.width)


def _low_rank(model: TapedModel, path: str, x: Shaped, outputs: str) -> Shaped:
    """Stands for ``lora_B(lora_A(x))``."""
    tape = model.tape
    down = tape.matmul(x, model.weights[f"{path}.lora_A"], (*x.dims[:-1], "r"), "output of A")
    return tape.matmul(down, model.weights[f"{path}.lora_B"], (*x.dims[:-1], outputs), "output of B")


def _drops(model: TapedModel) -> bool:
    return bool(model.values.get("dropout")) and model.tape.training


def _dropped(model: TapedModel, x: Shaped) -> Shaped:
    """Stands for ``torch.nn.Dropout``: CUDA keeps one byte an element for the backward pass."""
    if not _drops(model):
        return x
    mask = model.tape.new(x.dims, 1, term="dropout mask")
    return model.tape.multiply(x, mask, "input of A after dropout")


def _adapter_input(model: TapedModel, x: Shaped) -> Shaped:
    """Stands for PEFT's ``_cast_input_dtype``: every adapted layer makes a copy of its own."""
    return model.tape.cast(x, model.adapter_width, "copy of the input of each adapted layer in the adapter's precision")


def _lora_linear(model: TapedModel, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
    """Stands for ``peft.tuners.lora``: ``layer.Linear`` or ``bnb.Linear4bit``."""
    tape, outputs = model.tape, LINEAR_DIMS[layer.name][1]
    result = _base_linear(model, path, layer, x)
    before = result.width
    if model.stored and model.stored.name not in ("gptq", "fp8"):  # whose layers of PEFT do what plain ones do
        if model.stored.product == "both":
            result = tape.scale(result)  # the clone; its gradient passes through
        # Under CUDA's autocast, PEFT's 4-bit layers leave out their casts.
        x = x if tape.autocast else _adapter_input(model, x)
        update = tape.scale(_low_rank(model, path, _dropped(model, x), outputs))
        update = update if tape.autocast else tape.cast(update, before)
        return tape.add(result, update)
    x = _adapter_input(model, x)
    result = tape.add(result, tape.scale(_low_rank(model, path, _dropped(model, x), outputs)))
    return tape.cast(result, before)


def _dora_linear(model: TapedModel, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
    """Stands for ``peft.tuners.lora.dora.DoraLinearLayer``."""
    tape, (inputs, outputs) = model.tape, LINEAR_DIMS[layer.name]
    result = _base_linear(model, path, layer, x)
    before = result.width
    x = _adapter_input(model, x)  # lives on in PEFT's frame beside what dropout makes of it
    dropped = _dropped(model, x)
    result = tape.add(result, _dora_update(model, path, dropped, result, inputs, outputs))
    return tape.cast(result, before)


def _dora_update(model: TapedModel, path: str, x: Shaped, result: Shaped, inputs: str, outputs: str) -> Shaped:
    tape, weight = model.tape, model.weights[path]
    a, b = model.weights[f"{path}.lora_A"], model.weights[f"{path}.lora_B"]
    follows_norm = bool(model.values.get("norm_gradient"))
    identity = None if follows_norm else tape.new((inputs, inputs), model.adapter_width, term="identity matrix of DoRA")
    down = tape.matmul(identity, a, (inputs, "r")) if identity else tape.contiguous(a, "transposed A of DoRA")
    product = tape.matmul(down, b, (inputs, outputs), "B·A of DoRA")
    del identity, down  # the tape still holds them, if there is a backward pass to come
    product = tape.cast(product, x.width)
    wide = tape.new((outputs, inputs), x.width, term="weight in the adapter's precision (DoRA)")
    if weight.width == x.width:
        wide = weight
    norm = _dora_norm(tape, product if follows_norm else Shaped(product.storage, product.dims, product.width), wide)
    magnitude = model.weights[f"{path}.magnitude"]
    ratio = tape.op([magnitude, norm], (outputs,), magnitude.width, None, (norm, magnitude if norm.node else None))
    update = _low_rank(model, path, x, outputs)
    if _drops(model):  # the base's output was for the input before dropout
        result = tape.matmul(x, wide, (*x.dims[:-1], outputs), "output of the base after dropout (DoRA)")
    change = tape.op([ratio], (outputs,), ratio.width)
    kept = tape.multiply(change, result)
    added = tape.scale(tape.multiply(ratio, update))
    del product, wide
    return tape.add(kept, added)


def _dora_norm(tape: Tape, product: Shaped, weight: Shaped) -> Shaped:
    """Stands for ``get_weight_norm``. Its gradient keeps the updated weight, and computes in two temporaries."""
    dims, width = weight.dims, product.width
    scaled = tape.op([product], dims, width, term="temporary of DoRA's norm")
    total = tape.op([scaled], dims, width, lambda grads, _: [grads[0]], term="updated weight whose norm DoRA takes")
    del scaled
    norm = tape.new(dims[:1], width)

    def backward(*_: Any) -> Gradients:
        return [tape.last_of(2, dims, width, "temporary of DoRA's norm")]

    tape.record([total], [norm], backward, (total, norm.storage))
    return norm


def _adalora_linear(model: TapedModel, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
    """Stands for ``peft.tuners.adalora.layer.SVDLinear``."""
    tape, outputs = model.tape, LINEAR_DIMS[layer.name][1]
    result = _base_linear(model, path, layer, x)
    x = _adapter_input(model, x)
    x = _dropped(model, x)
    triplets = tape.multiply(model.weights[f"{path}.lora_A"], model.weights[f"{path}.lora_E"])
    down = tape.matmul(x, triplets, (*x.dims[:-1], "r"), "output of A")
    update = tape.matmul(down, model.weights[f"{path}.lora_B"], (*x.dims[:-1], outputs), "output of B")
    update = tape.scale(update)
    ranks = tape.new(("1",), 4)
    update = tape.op([update], update.dims, 4, None, (ranks,))  # divided by the number of ranks, which has 32 bits
    # In place: the sum stays in the block of the base's output.
    tape.record([result, update], [result], lambda grads, _: [grads[0], grads[0]])
    return result


def _ia3_linear(model: TapedModel, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
    """Stands for ``peft.tuners.ia3.layer.Linear``."""
    tape, before = model.tape, x.width
    scaling = tape.scale(model.weights[f"{path}.ia3_l"])
    if model.method.rescales_input(layer.name):
        x = _adapter_input(model, x)
        rescaled = tape.cast(tape.multiply(x, scaling, "rescaled input"), before)
        return _base_linear(model, path, layer, rescaled)
    result = _base_linear(model, path, layer, x)
    before = result.width
    return tape.cast(tape.multiply(result, scaling, "rescaled output"), before)


_ADAPTED = {"low-rank": _lora_linear, "triplets": _adalora_linear, "decomposed": _dora_linear, "rescaled": _ia3_linear}

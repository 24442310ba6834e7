"""The closed form: what a training step keeps in memory, from the shape of the model alone. No torch.

Written against transformers 5.24, peft 0.21 and bitsandbytes 0.50: each function names the code that it stands for.
It is checked against the simulator, which runs that code itself, and answers at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peftscope.memory.shapes import LinearLayer, ModelShape
from peftscope.memory.tape import Dims, Gradients, Shaped, Tape
from peftscope.memory.trace import Block, Trace
from peftscope.spec import RunSpec

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

DIMENSIONS = {
    "B": "batch size",
    "S": "positions of a sequence, virtual tokens included",
    "P": "positions that attention looks at, a prefix included",
    "T": "tokens of a batch, B·S",
    "U": "tokens of a batch without virtual tokens",
    "N": "positions of a batch whose logits are computed",
    "L": "layers",
    "h": "hidden size",
    "q": "width of all queries",
    "k": "width of all keys",
    "q+2k": "width of queries, keys and values",
    "a": "attention heads",
    "d": "width of a head",
    "I": "intermediate size",
    "2I": "twice the intermediate size",
    "V": "vocabulary",
    "r": "rank",
    "v": "virtual tokens",
}
"""What the letters of a formula mean."""

LINEAR_BLOCK = 64
"""Weights that share one block constant in bitsandbytes' 4-bit storage; 256 such constants share one in turn."""
STATE_BLOCK = 256
"""Values that share one constant in its 8-bit optimizer states."""
LARGE_STATE = 4096
"""Tensors smaller than this keep 32-bit states."""
PAGED_FROM_VALUES = 100_000
"""bitsandbytes pages the states of tensors with at least so many values."""


OPTIMIZER_COPY = "temporary copy of the optimizer"

SOURCES = {
    "weights": "config.json; one element each, tied embeddings once",
    "quantised weights": "bitsandbytes.functional.quantize_4bit: half a byte a weight, constants per block of 64",
    "adapters": "peft: autocast_adapter_dtype keeps them in 32 bits",
    "gradients": "torch: the parameter's precision, until zero_grad",
    "saved activations": "torch: kept for the backward pass",
    "temporaries": "torch: gone within the pass",
    "logits and loss": "transformers ForCausalLMLoss, and its gradients",
    "logits": "transformers ForCausalLM.forward",
    "logits in 32 bits": "transformers ForCausalLMLoss",
    "log-softmax of the logits": "torch cross_entropy keeps it for its gradient",
    "32-bit copy of a norm's input": "transformers RMSNorm.forward: .to(torch.float32)",
    "normalised input": "transformers RMSNorm.forward",
    "copy of the input of each adapted layer in the adapter's precision": "peft BaseTunerLayer._cast_input_dtype",
    "output of A": "peft lora.Linear.forward",
    "output of B": "peft lora.Linear.forward",
    "keys for every head": "transformers repeat_kv, since a mask rules enable_gqa out",
    "values for every head": "transformers repeat_kv, since a mask rules enable_gqa out",
    "additive mask of each layer": "torch scaled_dot_product_attention: convert_boolean_attn_mask",
    "output of attention": "torch scaled_dot_product_attention keeps it for its gradient",
    "log-sum-exp of attention": "torch scaled_dot_product_attention keeps it for its gradient",
    "rotated heads": "transformers apply_rotary_pos_emb",
    "output of the activation function": "transformers MLP.forward",
    "first and second moments": "torch.optim.AdamW, or bitsandbytes.optim",
    "importance scores of AdaLoRA": "peft RankAllocator.update_ipt: three of each adapter matrix",
    OPTIMIZER_COPY: "torch.optim: foreach takes square roots of all states at once",
    "dequantised weights of one layer": "bitsandbytes MatMul4Bit",
    "cuBLAS workspace": "torch CublasHandlePool",
    "B·A of DoRA": "peft DoraLinearLayer.get_lora_weight",
    "identity matrix of DoRA": "peft DoraLinearLayer.get_lora_weight",
    "weight in the adapter's precision (DoRA)": "peft DoraLinearLayer.forward",
    "16-bit weights (autocast)": "torch.autocast",
    "16-bit copy of an input (autocast)": "torch.autocast",
}
"""The code that each term, or else each kind, stands for."""


def sizes_of(spec: RunSpec, shape: ModelShape, responses: int, batch_size: int | None = None) -> dict[str, int]:
    """Returns the value of every named dimension, for sequences of ``spec.seq_len`` tokens."""
    batch = spec.batch_size if batch_size is None else batch_size
    values = spec.method.model_dump()
    virtual = values.get("virtual_tokens", 0)
    prefix = virtual if spec.method.name == "prefix-tuning" else 0
    length = spec.seq_len + virtual - prefix
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "1": 1,
        "2": 2,
        "B": batch,
        "S": length,
        "P": length + prefix,
        "T": batch * length,
        "U": batch * spec.seq_len,
        "N": batch * (responses if spec.loss_path == "response_only" else length),
        "L": shape.num_layers,
        "h": shape.hidden_size,
        "q": queries,
        "k": keys,
        "q+2k": queries + 2 * keys,
        "a": shape.num_heads,
        "d": shape.head_dim,
        "I": shape.intermediate_size,
        "2I": 2 * shape.intermediate_size,
        "V": shape.vocab_size,
        "r": values.get("init_r", values.get("rank", 1)),
        "v": virtual,
    }


def trace_training(spec: RunSpec, shape: ModelShape, responses: int, cublas_bytes: int = 0) -> Trace:
    """Returns the trace of two training steps on batches of ``spec.batch_size`` sequences of ``spec.seq_len`` tokens.

    Args:
        spec: The run.
        shape: Of its base model.
        responses: Positions of a sequence that carry a loss.
        cublas_bytes: Size of cuBLAS's workspace; above 0 the trace also has what kernels take inside on CUDA.
    """
    with _without_collector():
        return _Step(spec, shape, sizes_of(spec, shape, responses), cublas_bytes).train()


def trace_evaluation(spec: RunSpec, shape: ModelShape, responses: int, cublas_bytes: int = 0) -> Trace:
    """Returns the trace of the held-out loss on ``spec.eval_batch_size`` sequences of ``spec.seq_len`` tokens."""
    sizes = sizes_of(spec, shape, responses, spec.eval_batch_size)
    sizes["N"] = spec.eval_batch_size * responses
    with _without_collector():
        return _Step(spec, shape, sizes, cublas_bytes).evaluate()


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@contextmanager
def _without_collector() -> Iterator[None]:
    """Blocks end when their last reference goes; looking for cycles among so many objects takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Step:
    """A model on a tape, and the project's own step on it."""

    def __init__(self, spec: RunSpec, shape: ModelShape, sizes: dict[str, int], cublas_bytes: int) -> None:
        self.spec, self.shape, self.method = spec, shape, spec.method
        self.values: dict[str, Any] = spec.method.model_dump()
        self.prefix = self.method.name == "prefix-tuning"
        self.sizes = sizes
        self.tape = Tape(self.sizes)
        self.tape.autocast = spec.precision == "amp"
        self.width = WIDTHS[spec.precision]
        self.quantization = spec.method.quantization()
        self.adapter_width = self.width if self.values.get("adapter_dtype") == "base" else 4
        self.targets = spec.method.targets_of()
        self.full = self.method.name == "full"
        self.weights: dict[str, Shaped] = {}
        self.grouped = shape.num_heads != shape.num_kv_heads
        self.on_cuda = cublas_bytes > 0
        if self.on_cuda:
            self.tape.trace.born(Block(cublas_bytes, "kernel workspace", term="cuBLAS workspace"))
        self.past: Any = None  # of prefix tuning: its keys and values
        self.cache: list[Shaped] = []  # and what transformers' cache keeps as long as its output lives
        self._make_weights()

    # Weights.

    def _make_weights(self) -> None:
        """Makes what stays: the base's weights, then the adapter's."""
        shape, other = self.shape, 4 if self.values.get("kbit_preparation") else self.width
        self._weight("embed_tokens", ("V", "h"), other)
        for index in range(shape.num_layers):
            for layer in shape.block:
                self._linear_weight(self._path(index, layer.name), layer)
            for name in self._norms():
                self._weight(f"layers.{index}.{name}", ("h",), other)
        self._weight("norm", ("h",), other)
        if not shape.tied_embeddings:
            self._weight("lm_head", ("V", "h"), other)
        for index in range(shape.num_layers):
            for layer in shape.block:
                if layer.name in self.targets:
                    self._adapter_weights(self._path(index, layer.name), layer)
        if self.method.name == "prompt-tuning":
            self._adapter("prompt_encoder", ("v", "h"), 4)
        elif self.method.name == "prefix-tuning":
            self._adapter("prompt_encoder", ("v", "L", "k", "2"), 4)

    def _norms(self) -> tuple[str, ...]:
        around = ("input_layernorm", "post_attention_layernorm")
        inside = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        return around + inside if self.shape.family == "gemma2" else around

    @staticmethod
    def _path(index: int, layer: str) -> str:
        part = "mlp" if layer in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") else "self_attn"
        return f"layers.{index}.{part}.{layer}"

    def _weight(self, name: str, dims: Dims, width: float) -> None:
        self.weights[name] = self.tape.parameter(name, dims, width, "weights", _last(name), trained=self.full)

    def _adapter(self, name: str, dims: Dims, width: float) -> None:
        self.weights[name] = self.tape.parameter(name, dims, width, "adapters", _last(name), trained=True)

    def _linear_weight(self, path: str, layer: LinearLayer) -> None:
        inputs, outputs = LINEAR_DIMS[layer.name]
        if not self.quantization:
            self._weight(path, (outputs, inputs), self.width)
        else:
            nested = self.quantization.double_quant
            parts = {"4-bit weights": 0.5, "block constants": (1 if nested else 4) / LINEAR_BLOCK}
            if nested:
                parts["constants of block constants"] = 4 / LINEAR_BLOCK / 256
            for term, width in parts.items():
                self.weights[f"{path}.{term}"] = self.tape.parameter(
                    path, (outputs, inputs), width, "quantised weights", term, trained=False
                )
        if layer.bias:
            self._weight(f"{path}.bias", (outputs,), self.width)

    def _adapter_weights(self, path: str, layer: LinearLayer) -> None:
        inputs, outputs = LINEAR_DIMS[layer.name]
        width = self.adapter_width
        if self.method.name == "ia3":
            self._adapter(f"{path}.ia3_l", (inputs if layer.name == "down_proj" else outputs,), width)
            return
        self._adapter(f"{path}.lora_A", ("r", inputs), width)
        self._adapter(f"{path}.lora_B", (outputs, "r"), width)
        if self.method.name == "adalora":
            self._adapter(f"{path}.lora_E", ("r",), width)
        if self.method.name == "dora":
            self._adapter(f"{path}.magnitude", (outputs,), width)

    # Parts of the model.

    def _linear(self, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
        """Stands for a linear layer with whatever adapter it has."""
        self.tape.module = path
        if layer.name not in self.targets:
            return self._base_linear(path, layer, x)
        return {
            "ia3": self._ia3_linear,
            "adalora": self._adalora_linear,
            "dora": self._dora_linear,
        }.get(self.method.name, self._lora_linear)(path, layer, x)

    def _base_linear(self, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
        """Stands for ``torch.nn.Linear``, or ``bitsandbytes.nn.Linear4bit``."""
        tape, (inputs, outputs) = self.tape, LINEAR_DIMS[layer.name]
        dims = (*x.dims[:-1], outputs)
        if not self.quantization:
            return tape.matmul(x, self.weights[path], dims, f"output of {layer.name}")
        compute = WIDTHS[self.quantization.compute_dtype]
        nested = self.quantization.double_quant

        def backward(grads: list[Any], _: Sequence[Any]) -> Gradients:
            constants = tape.new((outputs, inputs), 4 / LINEAR_BLOCK, term="dequantised constants") if nested else None
            weight = tape.new((outputs, inputs), 2, term="dequantised weights of one layer")
            del constants
            if compute == 4:
                weight = tape.new((outputs, inputs), 4, term="dequantised weights of one layer")
            result = tape.new(x_dims, compute)
            del weight
            return [result]

        x_dims = x.dims
        output = tape.op([tape.cast(x, compute)], dims, compute, backward, term=f"output of {layer.name}")
        if self.on_cuda:
            size, formula = tape.measure((outputs, inputs), 2)
            tape.trace.pass_by(Block(size, "kernel workspace", path, "dequantised weights of one layer", formula))
        return tape.cast(output, x.width)

    def _lora_path(self, path: str, x: Shaped, outputs: str) -> Shaped:
        """Stands for ``lora_B(lora_A(dropout(x)))``."""
        tape = self.tape
        if self.values.get("dropout"):
            noise = tape.new(x.dims, x.width, term="dropout mask")
            x = tape.multiply(x, noise, "input of A after dropout")
            del noise
        down = tape.matmul(x, self.weights[f"{path}.lora_A"], (*x.dims[:-1], "r"), "output of A")
        return tape.matmul(down, self.weights[f"{path}.lora_B"], (*x.dims[:-1], outputs), "output of B")

    def _adapter_input(self, x: Shaped) -> Shaped:
        """Stands for PEFT's ``_cast_input_dtype``: every adapted layer makes a copy of its own."""
        return self.tape.cast(
            x, self.adapter_width, "copy of the input of each adapted layer in the adapter's precision"
        )

    def _lora_linear(self, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
        """Stands for ``peft.tuners.lora``: ``layer.Linear`` or ``bnb.Linear4bit``."""
        tape, outputs = self.tape, LINEAR_DIMS[layer.name][1]
        result = self._base_linear(path, layer, x)
        before = result.width
        if self.quantization:
            result = tape.scale(result)  # the clone; its gradient passes through
            x = self._adapter_input(x)
            update = tape.scale(self._lora_path(path, x, outputs))
            update = tape.cast(update, before)
            return tape.add(result, update)
        x = self._adapter_input(x)
        result = tape.add(result, tape.scale(self._lora_path(path, x, outputs)))
        return tape.cast(result, before)

    def _dora_linear(self, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
        """Stands for ``peft.tuners.lora.dora.DoraLinearLayer``."""
        tape, (inputs, outputs) = self.tape, LINEAR_DIMS[layer.name]
        result = self._base_linear(path, layer, x)
        before = result.width
        x = self._adapter_input(x)
        result = tape.add(result, self._dora_update(path, x, result, inputs, outputs))
        return tape.cast(result, before)

    def _dora_update(self, path: str, x: Shaped, result: Shaped, inputs: str, outputs: str) -> Shaped:
        tape, weight = self.tape, self.weights[path]
        a, b = self.weights[f"{path}.lora_A"], self.weights[f"{path}.lora_B"]
        identity = tape.new((inputs, inputs), self.adapter_width, term="identity matrix of DoRA")
        down = tape.matmul(identity, a, (inputs, "r"))
        product = tape.matmul(down, b, (inputs, outputs), "B·A of DoRA")
        del identity, down  # the tape still holds them, if there is a backward pass to come
        product = tape.cast(product, x.width)
        wide = tape.new((outputs, inputs), x.width, term="weight in the adapter's precision (DoRA)")
        if weight.width == x.width:
            wide = weight
        scaled = tape.new((outputs, inputs), x.width, term="temporary of DoRA's norm")
        total = tape.new((outputs, inputs), x.width, term="temporary of DoRA's norm")
        del scaled
        norm = tape.new((outputs,), x.width)
        del total
        magnitude = self.weights[f"{path}.magnitude"]
        ratio = tape.op([magnitude], (outputs,), magnitude.width, None, (norm,))
        update = self._lora_path(path, x, outputs)
        change = tape.op([ratio], (outputs,), ratio.width)
        kept = tape.multiply(change, result)
        added = tape.scale(tape.multiply(ratio, update))
        del product, wide
        return tape.add(kept, added)

    def _adalora_linear(self, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
        """Stands for ``peft.tuners.adalora.layer.SVDLinear``."""
        tape, outputs = self.tape, LINEAR_DIMS[layer.name][1]
        result = self._base_linear(path, layer, x)
        x = self._adapter_input(x)
        if self.values.get("dropout"):
            noise = tape.new(x.dims, x.width, term="dropout mask")
            x = tape.multiply(x, noise, "input of A after dropout")
            del noise
        triplets = tape.multiply(self.weights[f"{path}.lora_A"], self.weights[f"{path}.lora_E"])
        down = tape.matmul(x, triplets, (*x.dims[:-1], "r"), "output of A")
        update = tape.matmul(down, self.weights[f"{path}.lora_B"], (*x.dims[:-1], outputs), "output of B")
        update = tape.scale(tape.cast(update, 4))
        update = tape.scale(update)
        # In place: the sum stays in the block of the base's output.
        tape.record([result, update], [result], lambda grads, _: [grads[0], grads[0]])
        return result

    def _ia3_linear(self, path: str, layer: LinearLayer, x: Shaped) -> Shaped:
        """Stands for ``peft.tuners.ia3.layer.Linear``."""
        tape, before = self.tape, x.width
        scaling = tape.scale(self.weights[f"{path}.ia3_l"])
        if layer.name == "down_proj":
            x = self._adapter_input(x)
            rescaled = tape.cast(tape.multiply(x, scaling, "rescaled input"), before)
            return self._base_linear(path, layer, rescaled)
        result = self._base_linear(path, layer, x)
        before = result.width
        return tape.cast(tape.multiply(result, scaling, "rescaled output"), before)

    def _norm(self, name: str, x: Shaped) -> Shaped:
        """Stands for ``LlamaRMSNorm`` and ``Gemma2RMSNorm``."""
        tape, weight, before = self.tape, self.weights[name], x.width
        tape.module = name
        x = tape.cast(x, 4, "32-bit copy of a norm's input")
        dims, narrow = x.dims, (*x.dims[:-1], "1")

        def square_backward(_: list[Any], __: Sequence[Any]) -> Gradients:
            power = tape.new(dims, 4)
            doubled = tape.new(dims, 4)
            result = tape.new(dims, 4)
            del power, doubled
            return [result]

        square = tape.op([x], dims, 4, square_backward, (x,))
        mean = tape.op([square], narrow, 4)
        del square
        root = tape.op([mean], narrow, 4, None, ())
        scaled = tape.multiply(x, root, "normalised input")
        if self.shape.family == "gemma2":
            gain = tape.op([tape.cast(weight, 4)], ("h",), 4)
            return tape.cast(tape.multiply(scaled, gain), before)
        return tape.multiply(tape.cast(scaled, before, "normalised input"), weight)

    def _rotate(self, x: Shaped, cos: Shaped, sin: Shaped) -> Shaped:
        """Stands for ``apply_rotary_pos_emb`` on queries or keys."""
        tape = self.tape
        straight = tape.multiply(x, cos)
        rotated = tape.multiply(self._rotate_half(x), sin)
        total = tape.add(straight, rotated)
        if self.shape.family == "phi3":
            total = tape.op([total], total.dims, total.width, lambda grads, _: [grads[0]], term="rotated heads")
        total.storage.block.term = "rotated heads"
        return total

    def _rotate_half(self, x: Shaped) -> Shaped:
        tape, dims, width = self.tape, x.dims, x.width
        half = tape.new(dims, width / 2)

        def backward(_: list[Any], __: Sequence[Any]) -> Gradients:
            one = tape.new(dims, width)
            two = tape.new(dims, width)
            del one
            return [two]

        output = tape.op([x], dims, width, backward)
        del half
        return output

    def _attention(
        self, index: int, x: Shaped, rotary: tuple[Shaped, Shaped], mask: Shaped | None
    ) -> tuple[Shaped, Shaped | None]:
        """Stands for the attention module of a block, which returns its probabilities as well if it has them."""
        tape, block = self.tape, {layer.name: layer for layer in self.shape.block}
        module = f"layers.{index}.self_attn"
        if self.shape.family == "phi3":
            joined = self._linear(f"{module}.qkv_proj", block["qkv_proj"], x)
            query, key, value = self._split(joined, (("T", "q"), ("T", "k"), ("T", "k")))
            del joined
        else:
            query, key, value = (self._linear(f"{module}.{n}", block[n], x) for n in ("q_proj", "k_proj", "v_proj"))
        tape.module = module
        query = self._rotate(query, *rotary)
        key = self._rotate(key, *rotary)
        if self.prefix:
            key, value = self._with_prefix(key), self._with_prefix(value)
        probabilities = None
        if self.spec.attention == "eager":
            output, probabilities = self._eager_attention(query, key, value, mask)
        else:
            output = self._sdpa(query, key, value, mask)
        return self._linear(f"{module}.o_proj", block["o_proj"], output), probabilities

    def _split(self, joined: Shaped, parts: Sequence[Dims]) -> list[Shaped]:
        """Stands for slices of one tensor: views of it, whose gradients are each as large as all of it."""
        tape, dims, width = self.tape, joined.dims, joined.width
        views = []
        for part in parts:
            view = joined.view(part)
            tape.record([joined], [view], lambda grads, _: [tape.new(dims, width)])
            views.append(view)
        return views

    def _with_prefix(self, x: Shaped) -> Shaped:
        """Stands for ``DynamicCache.update``: the trained keys or values, then those of the tokens."""
        tape, dims, past, width = self.tape, x.dims, self.past.dims, max(x.width, self.past.width)

        def backward(grads: list[Any], _: Sequence[Any]) -> Gradients:
            return [tape.new(past, width), grads[0].view(dims)]

        output = tape.op([self.past, x], ("B", "P", "k"), width, backward, term="keys or values with prefix")
        self.cache.append(output.view(output.dims))
        return output

    def _repeat(self, x: Shaped, term: str) -> Shaped:
        """Stands for ``repeat_kv``: every query head gets a copy of its keys or values."""
        if not self.grouped:
            return x
        tape, dims, width = self.tape, x.dims, x.width
        return tape.op([x], (*dims[:-1], "q"), width, lambda *_: [tape.new(dims, width)], term=term)

    def _sdpa(self, query: Shaped, key: Shaped, value: Shaped, mask: Shaped | None) -> Shaped:
        """Stands for ``sdpa_attention_forward``; the kernel keeps its output and a log-sum-exp per head."""
        tape = self.tape
        additive = None
        if mask is not None:
            key, value = self._repeat(key, "keys for every head"), self._repeat(value, "values for every head")
        if tape.autocast:
            query, key, value = (tape.cast(x, 2, "16-bit copy (autocast)") for x in (query, key, value))
        if mask is not None:
            additive = tape.new(mask.dims, query.width, term="additive mask of each layer")
        output = tape.new(query.dims, query.width, term="output of attention")
        sums = tape.new(("B", "S", "a"), 4, term="log-sum-exp of attention")
        saves = (query, key, value, output.storage, sums, additive)
        tape.record([query, key, value], [output], None, saves)
        return output

    def _eager_attention(self, query: Shaped, key: Shaped, value: Shaped, mask: Shaped | None) -> tuple[Shaped, Shaped]:
        """Stands for ``eager_attention_forward``: scores of every pair of positions."""
        tape, scores, before = self.tape, ("B", "a", "S", "P"), 4 if self.tape.autocast else query.width
        key, value = self._repeat(key, "keys for every head"), self._repeat(value, "values for every head")
        weights = self._product(query, key, scores, "scores")
        weights = tape.scale(weights)
        if self.shape.family == "gemma2":
            weights = tape.scale(weights)
            weights = self._tanh(weights, "scores after the soft cap")
            weights = tape.scale(weights)
        if mask is not None:
            width = max(weights.width, mask.width)
            weights = tape.op([weights], scores, width, lambda grads, _: [grads[0]])
        wide = self._with_saved_output([tape.cast(weights, 4)], scores, 4, "attention probabilities in 32 bits")
        weights = tape.cast(wide, before, "attention probabilities")
        del wide
        output = self._product(weights, value, query.dims, "output of attention")
        return self._contiguous(output, "output of attention"), weights

    def _product(self, left: Shaped, right: Shaped, dims: Dims, term: str) -> Shaped:
        """Stands for ``torch.matmul`` of heads: it copies what is not contiguous, as repeated keys already are."""
        if left.dims != ("B", "a", "S", "P"):
            left = self._contiguous(left, "contiguous queries")
        if not self.grouped:
            right = self._contiguous(right, "contiguous keys or values")
        return self.tape.matmul(left, right, dims, term)

    def _contiguous(self, x: Shaped, term: str) -> Shaped:
        return self.tape.op([x], x.dims, x.width, lambda grads, _: [grads[0]], term=term)

    def _with_saved_output(self, inputs: Sequence[Shaped], dims: Dims, width: float, term: str) -> Shaped:
        """Returns the output of an operation whose gradient needs that output."""
        output = self.tape.new(dims, width, term=term)
        self.tape.record(inputs, [output], None, (output.storage,))
        return output

    def _tanh(self, x: Shaped, term: str) -> Shaped:
        return self._with_saved_output([x], x.dims, x.width, term)

    def _mlp(self, index: int, x: Shaped) -> Shaped:
        """Stands for ``LlamaMLP``, ``Gemma2MLP`` and ``Phi3MLP``."""
        tape, block = self.tape, {layer.name: layer for layer in self.shape.block}
        module = f"layers.{index}.mlp"
        if self.shape.family == "phi3":
            joined = self._linear(f"{module}.gate_up_proj", block["gate_up_proj"], x)
            tape.module = module
            dims, width = joined.dims, joined.width
            gate, up = joined.view(("T", "I")), joined.view(("T", "I"))
            tape.record([joined], [gate, up], lambda grads, _: [tape.new(dims, width)])
            del joined
            inner = tape.multiply(up, self._activation(gate))
            return self._linear(f"{module}.down_proj", block["down_proj"], inner)  # with `gate` still alive
        gate = self._linear(f"{module}.gate_proj", block["gate_proj"], x)
        tape.module = module
        active = self._activation(gate)
        del gate
        inner = tape.multiply(active, self._linear(f"{module}.up_proj", block["up_proj"], x))
        del active
        return self._linear(f"{module}.down_proj", block["down_proj"], inner)

    def _activation(self, gate: Shaped) -> Shaped:
        return self.tape.op([gate], gate.dims, gate.width, None, (gate,), "output of the activation function")

    def _layer(self, index: int, x: Shaped, rotary: tuple[Shaped, Shaped], mask: Shaped | None) -> Shaped:
        """Stands for a decoder layer."""
        tape, path, gemma = self.tape, f"layers.{index}", self.shape.family == "gemma2"
        residual = x
        x = self._norm(f"{path}.input_layernorm", x)
        x, probabilities = self._attention(index, x, rotary, mask)
        if gemma:
            x = self._norm(f"{path}.post_attention_layernorm", x)
        tape.module = path
        x = tape.add(residual, x)
        residual = x
        x = self._norm(f"{path}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm", x)
        x = self._mlp(index, x)
        if gemma:
            x = self._norm(f"{path}.post_feedforward_layernorm", x)
        tape.module = path
        x = tape.add(residual, x)
        x.storage.block.term = "output of each layer"
        del probabilities  # transformers' local variable keeps them for as long
        return x

    def _embed(self) -> Shaped:
        """Stands for the embedding of tokens, with virtual ones before them."""
        tape, weight = self.tape, self.weights["embed_tokens"]
        tape.module = "embed_tokens"
        tokens = "U" if self.method.name == "prompt-tuning" else "T"
        x = tape.op([weight], (tokens, "h"), weight.width, term="embedded tokens")
        if self.shape.family == "gemma2":
            x = tape.scale(x)
        if self.spec.checkpointing and tape.training and not self.full:
            tape.require_grad(x)  # peft's enable_input_require_grads
        if self.method.name == "prompt-tuning":
            tape.module = "prompt_encoder"
            prompts = tape.op([self.weights["prompt_encoder"]], ("B", "v", "h"), 4)
            prompts = tape.cast(prompts, x.width)
            before = prompts.dims
            tokens_dims, width = x.dims, x.width

            def backward(grads: list[Any], _: Sequence[Any]) -> Gradients:
                return [tape.new(before, width), tape.new(tokens_dims, width)]

            x = tape.op([prompts, x], ("T", "h"), width, backward)
        return x

    def _backbone(self, *, masked: bool) -> Shaped:
        """Stands for the decoder without its head."""
        tape = self.tape
        embedded = x = self._embed()
        tape.module = ""
        spec = self.spec
        eager = spec.attention == "eager"
        seen = tape.new(("B", "S", "P"), 1, term="mask") if masked else None
        mask = tape.new(("B", "S", "P"), self.width if spec.precision != "amp" else 4, term="mask") if eager else seen
        if self.prefix:
            past = tape.op([self.weights["prompt_encoder"]], ("B", "v", "L", "k", "2"), 4)
            self.past = past.view(("B", "v", "k"))
            if past.width != self.width and spec.precision != "amp":
                self.past = tape.cast(past, self.width).view(("B", "v", "k"))
        cos = tape.new(("S", "d"), x.width, term="rotary embedding")
        sin = tape.new(("S", "d"), x.width, term="rotary embedding")
        for index in range(self.shape.num_layers):
            run: Callable[[Shaped], Shaped] = lambda h, i=index: self._layer(i, h, (cos, sin), mask)  # noqa: E731
            x = tape.checkpoint(run, x) if spec.checkpointing and tape.training else run(x)
        x = self._norm("norm", x)
        del embedded  # transformers' local variable keeps it for as long
        return x

    def _logits(self, x: Shaped, *, kept: bool) -> Shaped:
        """Stands for the language-model head, at the positions that are kept or at all of them."""
        tape = self.tape
        if kept:
            dims, width = x.dims, x.width
            x = tape.op([x], ("N", "h"), width, lambda grads, _: [tape.new(dims, width)])
        tape.module = "lm_head"
        head = self.weights["embed_tokens" if self.shape.tied_embeddings else "lm_head"]
        logits = tape.matmul(x, head, ("N", "V"), "logits")
        tape.module = ""
        if self.shape.family == "gemma2":
            tape.module = "lm_head"
            logits = tape.scale(logits)
            logits = self._tanh(logits, "logits after the soft cap")
            logits = tape.scale(logits)
        return logits

    def _loss(self, logits: Shaped) -> Shaped:
        """Stands for ``ForCausalLMLoss``: logits in 32 bits, then log-softmax and negative log likelihood."""
        tape = self.tape
        tape.module = "loss"
        wide = tape.cast(logits, 4, "logits in 32 bits")
        logs = self._with_saved_output([wide], ("N", "V"), 4, "log-softmax of the logits")
        loss = tape.scale(tape.op([logs], (), 4, None, (logs,)))
        if self.method.name != "adalora":
            return loss
        # Its gradients come first in the backward pass, and wait until those of the model come.
        tape.module = ""
        matrices = [w for name, w in self.weights.items() if name.endswith(("lora_A", "lora_B"))]
        return tape.op([loss, *(tape.op([w, w], ("r", "r"), 4, None, (w,)) for w in matrices)], (), 4)

    # Steps.

    def train(self) -> Trace:
        """Returns the trace of two steps: optimizer states appear in the first, the second is the steady one."""
        tape, spec = self.tape, self.spec
        batch = [tape.new(("T",), 8, "temporaries", "batch") for _ in range(3)]
        trained = [w for w in self.weights.values() if w.node is not None]
        masked = spec.packing or spec.loss_path == "hf" or not self.method.mask_free_attention
        masked = (masked and spec.attention != "flash_attention_2") or spec.attention == "eager"
        start = len(tape.trace.events)
        held: Shaped | None = None
        for _ in range(spec.gradient_accumulation):
            tape.trace.begin("forward")
            hidden = self._backbone(masked=masked)
            self.past = None
            logits = self._logits(hidden, kept=spec.loss_path == "response_only")
            loss = self._loss(logits)
            held = logits if spec.loss_path == "hf" else None
            tape.casts.clear()
            if held is None:
                self.cache.clear()
            del hidden, logits
            tape.trace.begin("backward")
            tape.backward(loss)
            del loss
        tape.trace.begin("optimizer")
        tape.module = ""
        states = self._states_of(trained)
        self._optimize(trained)
        for weight in trained:
            weight.node.grad = None
        del held
        self.cache.clear()
        tape.trace.begin("")
        tape.trace.name_open_blocks()
        tape.trace.repeat(start, {state.storage.index for state in states})
        del batch
        return tape.trace

    def _states_of(self, trained: list[Shaped]) -> list[Shaped]:
        """Returns what the first optimizer step makes and keeps."""
        states: list[Shaped] = []
        if self.spec.optimizer != "sgd":
            for weight in trained:
                states += self._moments(weight)
        if self.method.name == "adalora":
            states += [self._state(w, w.width, "importance scores of AdaLoRA") for w in trained for _ in range(3)]
        return states

    def _optimize(self, trained: list[Shaped]) -> None:
        """Stands for what ``optimizer.step`` takes for itself; bitsandbytes and fused implementations take nothing."""
        tape, spec = self.tape, self.spec
        if spec.optimizer not in ("adamw", "sgd") or (spec.optimizer == "sgd" and not spec.weight_decay):
            return
        groups = [trained]
        if self.method.name == "lora-plus":
            groups = [[w for w in trained if ("lora_B" in w.node.name) == second] for second in (False, True)]
        for group in groups:
            shapes = [(weight.dims, weight.width) for weight in group]
            if spec.optimizer_implementation == "foreach":
                copies = [tape.new(*shape, "temporaries", OPTIMIZER_COPY) for shape in shapes]
                copies.clear()
            elif spec.optimizer_implementation == "single":
                for shape in shapes:
                    copies = [tape.new(*shape, "temporaries", OPTIMIZER_COPY) for _ in range(2)]
                    copies.clear()

    def _moments(self, weight: Shaped) -> list[Shaped]:
        values = 1
        for name in weight.dims:
            values *= self.sizes[name]
        optimizer = self.spec.optimizer
        paged = optimizer.startswith("paged") and values >= PAGED_FROM_VALUES
        if optimizer.endswith("8bit") and values >= LARGE_STATE:
            widths = [1.0, 1.0, 4 / STATE_BLOCK, 4 / STATE_BLOCK]
        else:
            widths = [float(weight.width)] * 2 if optimizer == "adamw" else [4.0] * 2
        states = [self._state(weight, width, "first and second moments") for width in widths]
        for state in states[:2]:
            state.storage.block.paged = paged
        return states

    def _state(self, weight: Shaped, width: float, term: str) -> Shaped:
        state = self.tape.new(weight.dims, width, "optimizer states", term)
        state.storage.block.module = weight.node.name
        return state

    def evaluate(self) -> Trace:
        """Returns the trace of the held-out loss on one batch."""
        tape = self.tape
        tape.training = False
        for weight in self.weights.values():
            weight.node = None
        tape.trace.begin("evaluate")
        logits = self._logits(self._backbone(masked=True), kept=True)
        tape.casts.clear()
        self.cache.clear()
        tape.module = "loss"
        wide = tape.cast(logits, 4, "logits in 32 bits")
        logs = tape.new(("N", "V"), 4, term="log-softmax of the logits")
        del logits, wide, logs
        tape.trace.begin("")
        tape.trace.name_open_blocks()
        return tape.trace

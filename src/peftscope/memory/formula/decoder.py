"""A decoder on a tape: norms, attention, feed-forward layers, embeddings and logits. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from peftscope.memory.formula.linear import Linears
from peftscope.memory.tape import Dims, Gradients, Shaped


class Decoder(Linears):
    """A decoder of one of the families of ``shapes``."""

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
            if index == self.shape.num_layers - 1:
                self.past = None  # the cache holds longer keys and values in its place
        probabilities = None
        if self.spec.attention == "eager":
            output, probabilities = self._eager_attention(query, key, value, mask)
        else:
            output = self._sdpa(query, key, value, mask)
            if self.shape.family == "phi3":  # its queries, and with them the output, are laid out head by head
                output = self._contiguous(output, "output of attention, in the order of tokens")
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
        """Stands for ``torch.matmul`` of heads: it copies what is not contiguous; repeated keys are, and so are those
        with a prefix."""
        if left.dims != ("B", "a", "S", "P"):
            left = self._contiguous(left, "contiguous queries")
        if not self.grouped and not self.prefix:
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
        tokens = "U" if self.prompt else "T"
        x = tape.op([weight], (tokens, "h"), weight.width, term="embedded tokens")
        if self.shape.family == "gemma2":
            x = tape.scale(x)
        if self.spec.checkpointing and tape.training and not self.full:
            tape.require_grad(x)  # peft's enable_input_require_grads
        if self.prompt:
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
        added = 2 if spec.packing and tape.training and spec.precision == "amp" else self.width
        mask = tape.new(("B", "S", "P"), added, term="mask") if eager else seen
        if self.prefix:
            past = tape.op([self.weights["prompt_encoder"]], ("B", "v", "L", "k", "2"), 4)
            if spec.precision != "amp":
                past = tape.cast(past, self.width)
            self.past = past.view(("B", "v", "k"))
            del past
        cos = tape.new(("S", "d"), x.width, term="rotary embedding")
        sin = tape.new(("S", "d"), x.width, term="rotary embedding")
        for index in range(self.shape.num_layers):
            run = partial(self._layer, index, rotary=(cos, sin), mask=mask)
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
        if self.shape.family == "gemma2":
            logits = tape.scale(logits)
            logits = self._tanh(logits, "logits after the soft cap")
            logits = tape.scale(logits)
        tape.module = ""
        return logits

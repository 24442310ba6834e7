"""A 4-bit linear layer of bitsandbytes: the tensors that it stores, and the dtype in which it computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from peftscope.claims.lora_subjects import backward_steps, four_bit, nf4_layer
from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import BLOCK_LINEAR, tiny_llama, token_ids


def dtype_of_constants(double_quant: bool) -> Measurement:
    """Returns the dtype of a layer's quantisation constants, one per block of weights."""
    state = _layer(256, 256, double_quant=double_quant).weight.quant_state
    weights = state.shape.numel()
    return Measurement(
        _name(state.absmax.dtype),
        evidence={
            "weights per constant": weights / state.absmax.numel(),
            "bits of constants per weight": _bits([state.absmax]) / weights,
        },
        model="Linear4bit 256 × 256",
    )


def bits_of_a_constant(double_quant: bool) -> Measurement:
    """Returns the bits that a layer stores for each quantisation constant, without second-level constants."""
    state = _layer(256, 256, double_quant=double_quant).weight.quant_state
    evidence: dict[str, Any] = {"dtype": _name(state.absmax.dtype)}
    if state.nested:
        plain = _layer(256, 256, double_quant=False).weight.quant_state.absmax
        evidence |= {
            "constants per second-level constant": state.state2.blocksize,
            "dtype of second-level constants": _name(state.state2.absmax.dtype),
            "subtracted offset over the constants' mean": float(state.offset / plain.mean()),
        }
    return Measurement(_bits([state.absmax]) / state.absmax.numel(), evidence=evidence, model="Linear4bit 256 × 256")


def bits_per_weight(double_quant: bool, rows: int = 4096, columns: int = 4096) -> Measurement:
    """Returns the bits per weight of everything that a saved layer holds: packed weights, constants, tables."""
    layer = _layer(columns, rows, double_quant=double_quant)
    tensors = {name.removeprefix("weight."): tensor for name, tensor in layer.state_dict().items()}
    weights = rows * columns
    return Measurement(
        _bits(tensors.values()) / weights,
        evidence={f"{name.removeprefix('quant_state.')}, bits": _bits([t]) / weights for name, t in tensors.items()},
        model=f"Linear4bit {rows} × {columns}",
    )


def bits_saved(rows: int = 4096, columns: int = 4096) -> Measurement:
    """Returns the bits per weight that double quantization saves in a saved layer, with everything counted."""
    before, after = (float(bits_per_weight(double, rows, columns).value) for double in (False, True))
    evidence = {"without": before, "with": after}
    return Measurement(before - after, evidence=evidence, model=f"Linear4bit {rows} × {columns}")


def quantisations_in_a_forward_pass() -> Measurement:
    """Returns how often a layer quantises its weight in a forward pass whose input needs a gradient, as in training."""
    calls = _kernels(_layer(256, 256, double_quant=False), _inputs(256).requires_grad_())
    return Measurement(
        sum("bitsandbytes::quantize" in name for name, _ in calls),
        evidence={"dequantisations": sum(name == "bitsandbytes::dequantize_4bit" for name, _ in calls)},
        model="Linear4bit 256 × 256",
    )


def bits_of_the_multiplied_weight(compute_dtype: str = "bfloat16") -> Measurement:
    """Returns the bits per value of the weight that enters a layer's matrix product; QLoRA computes in bfloat16."""
    layer = _layer(256, 256, double_quant=True, compute_dtype=compute_dtype)
    inputs = _inputs(256)
    operands = next(types for name, types in _kernels(layer, inputs) if name == "aten::linear")
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(inputs.dtype)
    difference = (layer(inputs) - torch.nn.functional.linear(inputs, weight)).abs().max()
    dtype = getattr(torch, operands[1])
    return Measurement(
        torch.finfo(dtype).bits // (2 if operands[1].endswith("x2") else 1),  # these hold two values
        evidence={
            "dtype of the weight": operands[1],
            "dtype of the input": operands[0],
            "largest difference to the product with the dequantised weight": float(difference),
        },
        model="Linear4bit 256 × 256",
    )


def dtype_of_adapters(base_dtype: str = "bfloat16") -> Measurement:
    """Returns the dtype of the adapters that PEFT adds by default to a 4-bit base whose other weights are BF16."""
    model = _qlora(base_dtype)
    adapters = {p for name, p in model.named_parameters() if "lora_" in name}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(f"{folder}/adapter_model.safetensors").values()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(token_ids(model), labels=token_ids(model)).loss.backward()
    optimizer.step()
    moments = {value.dtype for state in optimizer.state.values() for name, value in state.items() if name != "step"}
    return Measurement(
        _names({p.dtype for p in adapters}),
        evidence={
            "dtype in the saved file": _names({t.dtype for t in saved}),
            "bytes per value in the saved file": _bits(saved) / 8 / sum(t.numel() for t in saved),
            "dtype of their gradients": _names({p.grad.dtype for p in trained if p.grad is not None}),
            "dtype of AdamW's moments": _names(moments),
            "dtype of the embeddings": _name(model.get_input_embeddings().weight.dtype),
        },
        model="tiny Llama, 4-bit",
    )


def changed_base_bits(steps: int = 5) -> Measurement:
    """Returns how many bits of the 4-bit weights and their constants differ after steps of AdamW with LoRA on them."""
    model = _qlora("float32")
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    before = [tensor.clone() for layer in layers for tensor in _stored(layer)]
    trained = [p for p in model.parameters() if p.requires_grad]
    started = [p.detach().clone() for p in trained]
    losses = list(backward_steps(model, steps, learning_rate=1e-2))  # so large that adapters change much
    after = [tensor for layer in layers for tensor in _stored(layer)]
    return Measurement(
        sum(_different_bits(a, b) for a, b in zip(before, after, strict=True)),
        n=len(layers),
        evidence={
            "bits in all": _bits(before),
            "4-bit weights that ask for a gradient": sum(layer.weight.requires_grad for layer in layers),
            "4-bit weights with a gradient": sum(layer.weight.grad is not None for layer in layers),
            "adapter matrices that moved": sum(not torch.equal(a, b) for a, b in zip(started, trained, strict=True)),
            "adapter matrices": len(trained),
            "loss at the first step": round(losses[0], 4),
            "at the last": round(losses[-1], 4),
        },
        model="tiny Llama, 4-bit",
    )


def _layer(inputs: int, outputs: int, *, double_quant: bool, compute_dtype: str = "bfloat16") -> Any:
    """Returns an NF4 layer of normal weights."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * inputs**-0.5
    return nf4_layer(weight, compute_dtype=getattr(torch, compute_dtype), double_quant=double_quant)


def _qlora(base_dtype: str) -> Any:
    """Returns a small Llama with 4-bit linear weights and the rest in ``base_dtype``, under LoRA by PEFT's defaults."""
    model = four_bit(tiny_llama(dtype=base_dtype))
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(BLOCK_LINEAR), task_type="CAUSAL_LM"))


def _inputs(width: int) -> torch.Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def _kernels(layer: Any, inputs: torch.Tensor) -> list[tuple[str, list[str]]]:
    """Returns the kernels of a forward pass in order, each with the dtypes of its arguments."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces its start on stderr
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        layer(inputs)
    events = profiler.profiler.kineto_results.events()
    events = sorted(events, key=lambda event: event.start_ns())
    return [(event.name(), [kind.removeprefix("c10::").lower() for kind in event.dtypes()]) for event in events]


def _stored(layer: Any) -> Iterator[torch.Tensor]:
    state = layer.weight.quant_state
    yield from (layer.weight.data, state.absmax, state.state2.absmax, state.offset)


def _bits(tensors: Any) -> int:
    return sum(8 * tensor.nbytes for tensor in tensors)


def _different_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    changed = a.contiguous().flatten().view(torch.uint8) ^ b.contiguous().flatten().view(torch.uint8)
    return sum(int((changed >> bit & 1).sum()) for bit in range(8))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(map(_name, dtypes)))

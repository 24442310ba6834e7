"""The memory of a training step without data: the same model code and the same step, on tensors with only shapes.

The base is built on ``meta``, the method is applied there, and every parameter is replaced by a fake tensor; then the
project's own step runs twice under the byte tracker, since optimizer states appear in the first. Nothing is fitted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from peftscope.data.batching import Batch
from peftscope.methods.fields import Quantization
from peftscope.models.load import DTYPES, training_attention
from peftscope.spec import RunSpec
from peftscope.training.build import apply_method
from peftscope.training.probe import track_steps


def simulate_training(spec: RunSpec, config: Any, batch: Batch) -> dict[str, int]:
    """Returns the peak of live tensor bytes in ``forward``, ``backward`` and ``optimizer`` of a spec's training step.

    Equal to the byte to what the probe tracks on a real CPU run. AdaLoRA is simulated before it prunes, which frees
    nothing. Initialisations that compute (PiSSA, LoftQ) are not part of a step.

    Args:
        spec: The run.
        config: The transformers configuration of its base model.
        batch: Only its shapes count.
    """
    quantization = spec.method.quantization()
    base = _empty_base(spec, config, quantization)
    with torch.device("meta"):
        model, loss_function = apply_method(base, spec, spec.method.build_empty)
    if getattr(spec.method, "adapter_dtype", "fp32") == "base":
        # PEFT gives adapters the base's dtype when it moves them to its device, and moves nothing on meta.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[spec.precision])
    if quantization:
        # bitsandbytes makes this table value by value, which fake tensors cannot.
        from bitsandbytes.functional import create_dynamic_map, name2qmap

        name2qmap.setdefault("dynamic", create_dynamic_map())
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fill_with_fakes(model, quantization)
        shapes = {name: torch.empty_like(v, device="cpu") for name, v in vars(batch).items() if torch.is_tensor(v)}
        return track_steps(model, Batch(**shapes, tokens=batch.tokens), spec, loss_function, steps=2)


def _empty_base(spec: RunSpec, config: Any, quantization: Quantization | None) -> Any:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[spec.precision], attn_implementation=training_attention(spec)
        )
    base.config.use_cache = False
    if quantization:
        from bitsandbytes.nn import Linear4bit

        for name, module in list(base.named_modules()):
            if isinstance(module, torch.nn.Linear) and module is not base.get_output_embeddings():
                parent = base.get_submodule(name.rpartition(".")[0])
                packed = Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=DTYPES[quantization.compute_dtype],
                    compress_statistics=quantization.double_quant,
                    quant_type=quantization.quant_type,
                    quant_storage=torch.uint8,
                    device="meta",
                )
                packed.support_avx512bf16_for_cpu = False
                setattr(parent, name.rpartition(".")[2], packed)
        base.is_loaded_in_4bit = True
    return base


def _fill_with_fakes(model: torch.nn.Module, quantization: Quantization | None) -> None:
    """Replaces every parameter and buffer by an empty one; ties stay tied, 4-bit weights get their packed form."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    made[id(old)] = (old, _fake_like(old, quantization))
                tensors[name] = made[id(old)][1]
    # PEFT's indices of virtual tokens are neither parameters nor buffers.
    indices = getattr(model, "prompt_tokens", {})
    indices |= {name: torch.empty_like(old, device="cpu") for name, old in indices.items()}


def _fake_like(old: torch.Tensor, quantization: Quantization | None) -> torch.Tensor:
    if quantization and type(old).__name__ == "Params4bit":
        from bitsandbytes.functional import quantize_4bit

        weight = torch.empty(old.shape, dtype=DTYPES["bf16"])
        packed, state = quantize_4bit(
            weight,
            blocksize=old.blocksize,
            compress_statistics=quantization.double_quant,
            quant_type=quantization.quant_type,
            quant_storage=torch.uint8,
        )
        new = torch.nn.Parameter(packed, requires_grad=False)
        new.quant_state = state
        return new
    new = torch.empty(old.shape, dtype=old.dtype)
    return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new

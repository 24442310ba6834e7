"""Models and batches without values: they are built on ``meta``, and fake tensors replace what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils import set_additional_trainable_modules
from transformers import AutoModelForCausalLM

from peftscope.data.batching import Batch
from peftscope.memory.as_on_cuda import FLASH_STAND_IN
from peftscope.memory.beside import Beside
from peftscope.methods.fields import Quantization
from peftscope.spec import RunSpec
from peftscope.training.build import apply_method
from peftscope.training.load import (
    DTYPES,
    MASK_FREE_SDPA,
    bitsandbytes_config,
    disable_weight_repacking,
    training_attention,
)
from peftscope.training.step import TrainedModel


def empty_batch(*, rows: int, width: int, responses: int, packed: bool = False, padded: bool = True) -> Batch:
    """Returns a batch on ``meta`` of rows x width tokens. In each row, ``responses`` positions carry a loss.

    A mask on ``meta`` counts as padded. Without padding, it has values.
    """
    full = torch.ones(rows, width, dtype=torch.int64)
    with torch.device("meta"):
        ids = torch.empty(rows, width, dtype=torch.int64)
        return Batch(
            input_ids=ids,
            attention_mask=torch.empty_like(ids) if padded else full,
            labels=torch.empty_like(ids),
            kept_positions=torch.empty(responses, dtype=torch.int64),
            kept_labels=torch.empty(rows, responses, dtype=torch.int64),
            response_tokens=torch.empty((), dtype=torch.int64),
            tokens=rows * width,
            position_ids=torch.empty_like(ids) if packed else None,
            example_ids=torch.empty_like(ids) if packed else None,
        )


def fake_batch(batch: Batch) -> Batch:
    """Returns a batch of fake tensors with the shapes of this one, under a mode that makes them."""
    tensors = {n: torch.empty_like(v, device="cpu") for n, v in vars(batch).items() if torch.is_tensor(v)}
    return Batch(**{**vars(batch), **tensors})


def empty_model(spec: RunSpec, config: Any, beside: Beside) -> TrainedModel:
    """Returns the model of a run on ``meta``, with its adapter and with copies of modules that are trained in full."""
    saved = beside.modules_to_save
    quantization = spec.method.quantization()
    base = empty_base(spec, config, quantization)

    def build(model: Any, spec: RunSpec) -> Any:
        """Returns the model with its adapter, and with trained copies of whole modules."""
        model = spec.method.build_empty(model, spec)
        if getattr(spec.method, "adapter_dtype", "fp32") == "base":
            # PEFT casts adapters to the base's dtype when it moves them to a device, and on meta it moves nothing.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(DTYPES[spec.precision])
        if saved:
            adapter = model.peft_config["default"]
            adapter.modules_to_save = list(saved)
            set_additional_trainable_modules(model.get_base_model(), adapter, model.config.to_dict(), "default")
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name and beside.modules_to_save_dtype == "fp32":
                parameter.data = parameter.data.float()
        return model

    with torch.device("meta"):
        trained = apply_method(base, spec, build)
    # bitsandbytes computes this table value by value, which is impossible with fake tensors.
    if quantization:
        from bitsandbytes.functional import create_dynamic_map, name2qmap

        name2qmap.setdefault("dynamic", create_dynamic_map())
    return trained


def empty_base(spec: RunSpec, config: Any, quantization: Quantization | None) -> Any:
    """Returns the base of a run on ``meta``; in 4 bits, its linear layers are those of bitsandbytes."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config,
            dtype=DTYPES[spec.precision],
            attn_implementation=attention_stand_in(training_attention(spec), spec, []),
        )
    base.config.use_cache = False
    if quantization:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        head = [name for name, module in base.named_modules() if module is base.get_output_embeddings()]
        replace_with_bnb_linear(base, head, bitsandbytes_config(quantization))
        disable_weight_repacking(base)
        base.is_loaded_in_4bit = True
    return base


def attention_stand_in(implementation: str, spec: RunSpec, batches: Sequence[Batch]) -> str:
    """Returns the attention to simulate with: that of the spec, or SDPA without a mask for what keeps as much.

    Flash attention keeps the same: output and log-sum-exp. For batches without padding, transformers leaves the mask
    out, but it cannot know that of fake batches.
    """
    if implementation == "flash_attention_2":
        return FLASH_STAND_IN
    masks = [batch.attention_mask for batch in batches if spec.method.mask_free_attention]
    unpadded = bool(masks) and not any(mask.is_meta or (mask == 0).any() for mask in masks)
    return MASK_FREE_SDPA if implementation == "sdpa" and unpadded else implementation


def fill_with_fakes(model: torch.nn.Module, quantization: Quantization | None, *, packs_experts: bool) -> None:
    """Replaces every parameter and buffer by a fake tensor. Tied weights stay tied; 4-bit weights are packed."""
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
    if packs_experts:
        _pack_experts(model, quantization)


def _pack_experts(model: torch.nn.Module, quantization: Any) -> None:
    """Packs fused experts as axolotl does, monkeypatch/moe_quant.py at 01cd194: by bitsandbytes' parametrization."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for name, module in list(model.named_modules()):
        for key, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim > 2 and "expert" in f"{name}.{key}":
                weight.data = weight.data.to(DTYPES["bf16"])
                replace_parameter_4bit(module, key, quantization.double_quant, quantization.quant_type)
                packed: Any = module.parametrizations[key]
                packed.original.quant_state = packed[0].quant_state  # where the tracker looks for it


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

"""Loads a base model in the precision, quantisation and attention of a spec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from peftscope.errors import InputError, Problem
from peftscope.methods.fields import Quantization
from peftscope.models.catalog import LOCAL, model_folder
from peftscope.models.rounding import round_linear_weights
from peftscope.spec import RunSpec

MASK_FREE_SDPA = "sdpa_mask_free"
"""SDPA under a name for which transformers builds no mask. It is exact only for right-padded causal batches."""

MASK_FREE_SDPA_CPU = "sdpa_mask_free_cpu"
"""The same for bf16 models on a CPU, with short sequences computed in fp32."""

SHORT_SEQUENCE = 128
"""The longest sequence for which torch's CPU attention is faster in fp32. A layer's backward pass takes 4.2 ms in bf16
and 0.7 ms in fp32 at 16 x 12 tokens, 5.2 and 4.7 at 4 x 128, 4.2 and 5.3 at 2 x 256 (2 cores with AMX, torch 2.13)."""


def _sdpa_short_in_fp32(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    if query.shape[-2] > SHORT_SEQUENCE:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(query.dtype), None


AttentionInterface.register(MASK_FREE_SDPA, sdpa_attention_forward)
AttentionInterface.register(MASK_FREE_SDPA_CPU, _sdpa_short_in_fp32)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}


def load_base(spec: RunSpec) -> Any:
    """Returns the base model in the precision and storage of a spec.

    It is on the spec's device, or on the host if it will be sharded.

    Raises:
        InputError: The package of the attention kernel is missing.
        OSError: The model was not fetched, or has no safetensors.
        ValueError: The model can be loaded only with code of its own.
    """
    if spec.attention == "flash_attention_2" and not is_flash_attn_2_available():
        message = "flash_attention_2 needs the package flash-attn, whose kernel is missing on this machine"
        raise InputError(Problem("attention", message, "install flash-attn, or use sdpa"))
    options: dict[str, Any] = {"dtype": DTYPES[spec.precision], "attn_implementation": training_attention(spec)}
    # No card can hold a whole model that needs sharding. Its shares move to the cards layer by layer.
    device = spec.device if spec.shards == 1 else "cpu"
    quantization = spec.method.quantization()
    if quantization:
        options["quantization_config"] = bitsandbytes_config(quantization)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(spec.model, spec.revision), device_map={"": device}, **LOCAL, **options
    )
    if quantization:
        disable_weight_repacking(model)
    if code := spec.method.rounding():
        round_linear_weights(model, code)
    model.config.use_cache = False
    return model


def load_tokenizer(spec: RunSpec) -> Any:
    """Returns the base model's tokenizer, with a padding token."""
    folder = model_folder(spec.model, spec.revision)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def bitsandbytes_config(quantization: Quantization) -> BitsAndBytesConfig:
    """Returns the 4-bit configuration with every option set; bitsandbytes' own defaults are fp4 and fp32 compute."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=DTYPES[quantization.compute_dtype],
        bnb_4bit_quant_storage=torch.uint8,
    )


def disable_weight_repacking(model: torch.nn.Module) -> None:
    """Keeps 4-bit weights in the layout from which gradients are computed.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weights in the first evaluation pass. From then on, every
    gradient is wrong by a factor of about ten, without a warning.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def training_attention(spec: RunSpec) -> str:
    """Returns the attention implementation for training and probing.

    The ``hf`` loss path uses what a plain script uses. The other path omits the mask if that is exact.
    """
    exact = spec.attention == "sdpa" and spec.method.mask_free_attention and not spec.packing
    if not exact or spec.loss_path == "hf":
        return spec.attention
    return MASK_FREE_SDPA_CPU if spec.device == "cpu" and spec.precision != "fp32" else MASK_FREE_SDPA


def autocast(spec: RunSpec) -> Any:
    """Returns the context in which the spec's forward passes run."""
    if not spec.autocasts:
        return nullcontext()
    # The cache would keep a bf16 copy of every gathered weight until the pass ends, and undo what sharding saves.
    return torch.autocast(spec.device, torch.bfloat16, cache_enabled=spec.shards == 1)


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """Switches to another attention implementation inside this context."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before

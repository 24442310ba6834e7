"""Loading a base model as a spec asks for it: precision, quantisation, attention."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftscope.methods.fields import Quantization
from peftscope.models.catalog import model_folder
from peftscope.spec import RunSpec

MASK_FREE_SDPA = "sdpa_mask_free"
"""SDPA under a name for which transformers builds no mask: exact for right-padded causal batches, and only there."""

AttentionInterface.register(MASK_FREE_SDPA, sdpa_attention_forward)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}


def load_base(spec: RunSpec) -> Any:
    """Returns the base model on the spec's device, in its precision and storage, without gradients or dropout set up.

    Raises:
        FileNotFoundError: The model was not fetched.
    """
    options: dict[str, Any] = {"dtype": DTYPES[spec.precision], "attn_implementation": training_attention(spec)}
    quantization = spec.method.quantization()
    if quantization:
        options["quantization_config"] = bitsandbytes_config(quantization)
    model = AutoModelForCausalLM.from_pretrained(
        require_folder(spec), device_map={"": spec.device}, local_files_only=True, **options
    )
    if quantization:
        disable_weight_repacking(model)
    model.config.use_cache = False
    return model


def require_folder(spec: RunSpec) -> Path:
    """Returns the folder of the spec's base model; raises FileNotFoundError if it was not fetched."""
    folder = model_folder(spec.model, spec.revision)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"the base model {spec.model} is not in {folder}: run `peftscope fetch {spec.model}`")
    return folder


def load_tokenizer(spec: RunSpec) -> Any:
    """Returns the base model's tokenizer, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(require_folder(spec), local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def bitsandbytes_config(quantization: Quantization) -> BitsAndBytesConfig:
    """Returns the 4-bit configuration with every option set; the library's own defaults are fp4 and fp32 compute."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=DTYPES[quantization.compute_dtype],
        bnb_4bit_quant_storage=torch.uint8,
    )


def disable_weight_repacking(model: torch.nn.Module) -> None:
    """Keeps 4-bit weights in the layout that gradients are computed from.

    bitsandbytes 0.50 repacks them in the first evaluation pass on CPUs with AVX512-BF16, and every gradient after
    that is wrong by a factor of about ten, without a word.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def training_attention(spec: RunSpec) -> str:
    """Returns the attention implementation for training and probing.

    The ``hf`` loss path keeps what a plain script gets. The fast path leaves the mask out where that is exact.
    """
    exact = spec.attention == "sdpa" and spec.method.accepts_padding_free_attention
    return MASK_FREE_SDPA if exact and spec.loss_path == "response_only" else spec.attention


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """Runs a block under another attention implementation, then goes back."""
    config = getattr(model, "config", None)
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


class FloatWeights:
    """Reads single tensors of a fetched model in full precision, without loading the rest."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        self.files: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns a tensor by its name in the checkpoint."""
        from safetensors import safe_open

        with safe_open(self.folder / self.files.get(name, "model.safetensors"), framework="pt") as file:
            return file.get_tensor(name)

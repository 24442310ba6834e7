"""The subjects of checks: small models with random weights, models without weights, real weight matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peftscope.claims.measurement import NotRunError
from peftscope.models.catalog import model_folder
from peftscope.models.presets import PRESETS
from peftscope.models.shapes import ModelShape

if TYPE_CHECKING:
    import torch

TINY = "a Llama of two layers, 64 wide, with random weights"
"""The description of ``tiny_llama`` for readers."""

BLOCK_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shape_of(preset: str) -> ModelShape:
    """Returns the shape of a preset of the memory calculator."""
    return PRESETS[preset][1]


def tiny_llama(seed: int = 0, dtype: str = "float32", **sizes: Any) -> Any:
    """Returns a Llama of two narrow layers with random weights, in evaluation mode. ``sizes`` override its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
            "pad_token_id": 0,
            "use_cache": False,
            **sizes,
        }
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def meta_model(preset: str) -> Any:
    """Returns a preset's model on ``meta``, with all modules and shapes but without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = shape_of(preset).to_config()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


def token_ids(model: Any, length: int = 12, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Returns (batch, length) random tokens of a model's vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)


def weight_matrices(model: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name and the (out, in) fp32 weights of every linear layer inside the blocks of a fetched model.

    Raises:
        NotRunError: The model was not fetched.
    """
    import torch
    from safetensors import safe_open

    path = model_folder(model) / "model.safetensors"
    if not path.is_file():
        raise NotRunError(f"the weights of {model} are missing; run `peftscope fetch {model}`")
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            if ".layer" in name and name.endswith(".weight") and "norm" not in name.lower():
                yield name.removesuffix(".weight"), file.get_tensor(name).to(torch.float32)

"""PEFT's LoRA on small layers and models: what checks of adapters measure on, and short names for its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftscope.claims.subjects import BLOCK_LINEAR, token_ids

TINY = "a Llama of two layers, 64 wide, with random weights"


def lora_layer(inputs: int, outputs: int, rank: int, alpha: float = 8, seed: int = 0, **options: Any) -> Any:
    """Returns one PEFT LoRA layer over a random linear layer; ``options`` go to ``LoraConfig``."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    base = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False))
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **options), base)[0]


def lora_model(base: Any, rank: int = 8, alpha: float = 16, seed: int = 1, **options: Any) -> Any:
    """Returns a model with PEFT's LoRA on every linear layer of its blocks; ``options`` go to ``LoraConfig``."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=list(BLOCK_LINEAR), bias="none", **options
    )
    return get_peft_model(base, config)


def four_bit(model: Any) -> Any:
    """Returns the model with the linear layers of its blocks in NF4 with double quantization, computing in fp32."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    from peftscope.models.load import disable_weight_repacking

    for path in linear_names(model):
        parent, _, name = path.rpartition(".")
        old = model.get_submodule(path)
        new = Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        packed = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.weight = packed.to("cpu")
        setattr(model.get_submodule(parent), name, new)
    model.is_loaded_in_4bit = True
    disable_weight_repacking(model)
    return model


def linear_names(model: Any) -> list[str]:
    """Returns the paths of the linear layers inside a model's blocks."""
    return [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in BLOCK_LINEAR]


def named_lora_layers(model: Any) -> list[tuple[str, Any]]:
    """Returns path and module of every layer that PEFT wrapped."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def lora_layers(model: Any) -> list[Any]:
    """Returns every layer that PEFT wrapped."""
    return [layer for _, layer in named_lora_layers(model)]


def factor_a(layer: Any) -> Any:
    """Returns A, (rank, inputs)."""
    return layer.lora_A["default"].weight


def factor_b(layer: Any) -> Any:
    """Returns B, (outputs, rank)."""
    return layer.lora_B["default"].weight


def update_of(layer: Any) -> Any:
    """Returns ΔW as PEFT would merge it, (outputs, inputs)."""
    return layer.get_delta_weight("default").detach()


def randomise_b(layer: Any, spread: float = 0.1, seed: int = 2) -> None:
    """Fills B with normal values of this standard deviation."""
    import torch

    with torch.no_grad():
        factor_b(layer).normal_(std=spread, generator=torch.Generator().manual_seed(seed))


def backward_steps(
    model: Any, steps: int, learning_rate: float = 1e-3, optimizer: str = "AdamW", after: bool = False
) -> Iterator[int]:
    """Yields each step's number, from 1, when its gradients are there; ``after``: when its update is done."""
    import torch

    ids = token_ids(model)
    update = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for step in range(1, steps + 1):
        update.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if not after:
            yield step
        update.step()
        if after:
            yield step

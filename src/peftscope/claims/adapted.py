"""Tiny models with LoRA adapters in them, and what checks read off them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftscope.claims.subjects import BLOCK_LINEAR, tiny_llama, token_ids

if TYPE_CHECKING:
    import torch

TINY = "Llama of two narrow layers, random weights"
ADAPTERS = ("first", "second", "third")
WEIGHT_STD = 0.1
"""Of the tiny model's weights."""


def adapted_llama(
    names: Sequence[str] = ("first",),
    *,
    base: Any = None,
    ranks: Sequence[int] = (),
    rank: int = 4,
    alpha: float = 8,
    targets: Sequence[str] = BLOCK_LINEAR,
    size: float = 0.1,
    dtype: str = "float32",
    **options: Any,
) -> Any:
    """Returns a tiny Llama with adapters that each change every target by ``size`` of its norm; the first is active.

    An adapter's values depend on its name and shapes only.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(dtype=dtype) if base is None else base
    model: Any = None
    for name, r in zip(names, ranks or [rank] * len(names), strict=True):
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), **options)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(ADAPTERS.index(name))
        for layer in lora_layers(model).values():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a.data.normal_(generator=generator)
            b.data.normal_(generator=generator)
            change = layer.scaling[name] * (b.data @ a.data).norm()
            b.data *= size * WEIGHT_STD * (b.shape[0] * a.shape[1]) ** 0.5 / change
    return model.eval()


def lora_layers(model: Any) -> dict[str, Any]:
    """Returns PEFT's LoRA layers by the names that they have in the base model."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}


def logits_of(model: Any) -> torch.Tensor:
    """Returns (24, vocabulary) logits of fixed tokens in fp64."""
    import torch

    with torch.no_grad():
        return model(input_ids=token_ids(model)).logits.double().flatten(0, 1)


def relative_distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the norm of the difference over the norm of what was wanted."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())

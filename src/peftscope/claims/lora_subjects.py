"""PEFT's LoRA on small layers and models, on which checks of adapters measure, and the quantities that they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from peftscope.claims.subjects import BLOCK_LINEAR, tiny_llama, token_ids
from peftscope.training.load import disable_weight_repacking

ADAPTERS = ("first", "second", "third")
WEIGHT_STD = 0.1
"""The standard deviation of the tiny model's weights."""


def lora_layer(inputs: int, outputs: int, rank: int, alpha: float = 8, seed: int = 0, **options: Any) -> Any:
    """Returns a PEFT LoRA layer over a random linear layer. ``options`` go to ``LoraConfig``."""
    torch.manual_seed(seed)
    base = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False))
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **options), base)[0]


def regression(seed: int, examples: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random inputs and random targets of a linear layer, each (examples, width)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x, target = torch.randn(2, examples, width, generator=generator)
    return x, target


def lora_model(base: Any, rank: int = 8, alpha: float = 16, seed: int = 1, **options: Any) -> Any:
    """Returns a model with PEFT's LoRA on every linear layer of its blocks. ``options`` go to ``LoraConfig``."""
    torch.manual_seed(seed)
    targets = list(BLOCK_LINEAR)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=targets, **options)
    return get_peft_model(base, config)


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
    """Returns a tiny Llama with adapters that each change every target by ``size`` of its norm. The first is active.

    An adapter's values depend only on its name and its shapes.
    """
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


def four_bit(model: Any) -> Any:
    """Returns the model with the linear layers of its blocks in double-quantized NF4, computing in their own dtype."""
    for path in linear_names(model):
        parent, _, name = path.rpartition(".")
        weight = model.get_submodule(path).weight
        setattr(model.get_submodule(parent), name, nf4_layer(weight.data, compute_dtype=weight.dtype))
    model.is_loaded_in_4bit = True
    return model


def nf4_layer(weight: torch.Tensor, *, compute_dtype: torch.dtype, double_quant: bool = True) -> Any:
    """Returns a linear layer with these weights in NF4, in the layout from which gradients are computed."""
    outputs, inputs = weight.shape
    # On meta it draws no random numbers for weights that are replaced.
    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    options = {"compress_statistics": double_quant, "quant_type": "nf4", "module": layer}
    layer.weight = Params4bit(weight, requires_grad=False, **options).to("cpu")
    disable_weight_repacking(layer)
    return layer


def linear_names(model: Any) -> list[str]:
    """Returns the paths of the linear layers inside a model's blocks."""
    return [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in BLOCK_LINEAR]


def lora_layers(model: Any) -> dict[str, Any]:
    """Returns the layers that PEFT wrapped, by their names in the base model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def factor_of(layer: Any, letter: str) -> Any:
    """Returns the factor A, (rank, inputs), or the factor B, (outputs, rank)."""
    return getattr(layer, f"lora_{letter}")["default"].weight


def update_of(layer: Any) -> Any:
    """Returns the update ΔW that PEFT would merge, (outputs, inputs)."""
    return layer.get_delta_weight("default").detach()


def randomise_b(layer: Any, spread: float = 0.1, seed: int = 2) -> None:
    """Fills B with normal values of this standard deviation."""
    with torch.no_grad():
        factor_of(layer, "B").normal_(std=spread, generator=torch.Generator().manual_seed(seed))


def descend(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor], steps: int = 1) -> None:
    """Takes steps of an optimizer down a loss."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def backward_steps(
    model: Any, steps: int, learning_rate: float = 1e-3, optimizer: str = "AdamW", after: bool = False, batch: int = 2
) -> Iterator[float]:
    """Yields the loss of each step once its gradients exist, or with ``after`` once its update is done."""
    ids = token_ids(model, batch=batch)
    update = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        update.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if not after:
            yield loss.item()
        update.step()
        if after:
            yield loss.item()


def trained(model: Any, steps: int, **options: Any) -> Any:
    """Returns the model after ``backward_steps``, which get the options."""
    for _ in backward_steps(model, steps, **options):
        pass
    return model


def logits_of(model: Any) -> torch.Tensor:
    """Returns the (24, vocabulary) logits of fixed tokens in fp64."""
    with torch.no_grad():
        return model(input_ids=token_ids(model)).logits.double().flatten(0, 1)


def relative_distance(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the norm of the difference divided by the norm of the wanted tensor."""
    actual, wanted = actual.detach().double(), wanted.detach().double()
    return float((actual - wanted).norm() / wanted.norm())

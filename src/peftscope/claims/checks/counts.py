"""Counts that follow from a model's sizes by arithmetic, and counts on the modules of the real libraries."""

from __future__ import annotations

from typing import Any, Literal

import peft
import torch
from bitsandbytes import functional

from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import meta_model, operations, tiny_llama, token_ids
from peftscope.methods.fields import target_modules
from peftscope.methods.lora import LoRA
from peftscope.models.presets import PRESETS

Trained = Literal["full", "lora", "dora", "adalora"]

GB = 10**9
MB = 10**6
BLOCK, SECOND_BLOCK = 64, 256
"""The weights that share a constant, and the constants that share one. Source: Dettmers et al. 2023, section 3."""


def quotient(numerator: float, denominator: float) -> Measurement:
    """Returns the quotient of two printed figures."""
    return Measurement(numerator / denominator)


def gigabytes(parameters: float | str, dtypes: dict[str, str]) -> Measurement:
    """Returns the GB of the values that training keeps for every parameter, each in its own torch dtype.

    Args:
        parameters: The number of parameters, or a preset whose modules are counted.
        dtypes: The torch dtype of each kept value, by the value's name.
    """
    name = parameters if isinstance(parameters, str) else ""
    count = _count(meta_model(parameters)) if isinstance(parameters, str) else parameters
    sizes = {value: getattr(torch, dtype).itemsize for value, dtype in dtypes.items()}
    evidence = {f"{value}, GB": size * count / GB for value, size in sizes.items()}
    evidence |= {"parameters": count, "bytes per parameter": sum(sizes.values())}
    return Measurement(sum(sizes.values()) * count / GB, evidence=evidence, model=name)


def matrix_values(rows: int, columns: int) -> Measurement:
    """Returns the number of values of a linear layer's weight, counted on torch's module."""
    return Measurement(_count(_linears(rows, columns)))


def factor_values(rows: int, columns: int, rank: int) -> Measurement:
    """Returns the number of values of the two factors that PEFT adds to a linear layer."""
    return Measurement(_lora_count(_linears(rows, columns), rank))


def factor_values_deviation(sizes: list[list[int]]) -> Measurement:
    """Returns the largest relative difference between PEFT's factors and rank x (rows + columns).

    Args:
        sizes: The rows, columns and rank of each layer.
    """
    evidence: dict[str, int] = {}
    worst = 0.0
    for rows, columns, rank in sizes:
        counted = _lora_count(_linears(rows, columns), rank)
        worst = max(worst, abs(counted / (rows * rank + rank * columns) - 1))
        evidence[f"values of {rows} × {columns}, rank {rank}"] = counted
        # From this rank on, the factors have at least as many values as their product.
        evidence[f"smallest rank that saves nothing, {rows} × {columns}"] = -(-rows * columns // (rows + columns))
    return Measurement(worst, n=len(sizes), evidence=evidence)


def lora_parameters(preset: str, rank: int, targets: str) -> Measurement:
    """Returns the parameters that PEFT trains for LoRA on a model of this shape, counted on its modules."""
    method = LoRA(rank=rank, targets=targets)
    trained = _lora_count(meta_model(preset), rank, target_modules(targets))
    formula = method.trainable_parameters(PRESETS[preset].shape)
    return Measurement(trained, model=preset, evidence={"by formula": formula})


def lora_percent(preset: str, rank: int, targets: str) -> Measurement:
    """Returns the parameters that PEFT trains for LoRA, in percent of the model's own."""
    model = meta_model(preset)
    own = _count(model)
    trained = _lora_count(model, rank, target_modules(targets))
    evidence = {"trained": trained, "of the model": own, "percent of 7 billion": 100 * trained / 7e9}
    return Measurement(100 * trained / own, model=preset, evidence=evidence)


def lora_gigabytes(preset: str, rank: int, targets: str, dtypes: dict[str, str]) -> Measurement:
    """Returns the GB of the values that training keeps for every parameter of a LoRA adapter; see ``gigabytes``."""
    found = gigabytes(_lora_count(meta_model(preset), rank, target_modules(targets)), dtypes)
    half_gb_rank = rank * 0.5 / float(found.value)
    evidence = {**found.evidence, "rank that takes 0.5 GB": half_gb_rank}
    return Measurement(found.value, model=preset, evidence=evidence)


def lora_checkpoint(layers: int, width: int, matrices: int, rank: int, unit: int = MB, of: float = 0) -> Measurement:
    """Returns the size of a 16-bit LoRA file of square matrices, or how many times smaller it is than ``of`` bytes.

    Args:
        layers: The number of layers of the model.
        width: The rows and the columns of every adapted matrix.
        matrices: The number of adapted matrices in each layer.
        rank: The rank of the adapter.
        unit: The bytes of the unit.
        of: The bytes to compare with; 0 returns the size itself.
    """
    values = _lora_count(_linears(width, width, layers * matrices), rank)
    size = 2 * values
    evidence = {"values": values, "bytes": size, "MB": size / MB, "MiB": size / 2**20}
    return Measurement(of / size if of else size / unit, evidence=evidence)


def stored_gigabytes(values: float, storage: str) -> Measurement:
    """Returns the GB of a number of weights, from the bytes of a matrix in this storage type, without constants.

    Args:
        values: The number of weights.
        storage: A torch dtype, or ``nf4`` as bitsandbytes packs it.
    """
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    if storage == "nf4":
        stored, _ = functional.quantize_4bit(weight, quant_type="nf4")
    else:
        stored = weight.to(getattr(torch, storage))
    size = stored.nbytes / weight.numel()
    return Measurement(size * values / GB, evidence={"bits per weight": 8 * size, "kept as": str(stored.dtype)})


def average_bits(preset: str, rest: str = "bfloat16") -> Measurement:
    """Returns the bits per parameter of a model in NF4, including the weights that are not quantised.

    Args:
        preset: The model. Every linear layer except its head is quantised, as in transformers, and block constants too.
        rest: The torch dtype of all other weights.
    """
    model = meta_model(preset)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    quantised = sum(module.weight.numel() for module in linears)
    others = _count(model) - quantised
    bits = quantised * (4 + (8 + 32 / SECOND_BLOCK) / BLOCK) + 8 * getattr(torch, rest).itemsize * others
    evidence = {
        "quantised weights": quantised,
        "other weights": others,
        "GB": bits / 8 / GB,
        "times smaller than in 16 bits": 16 * _count(model) / bits,
    }
    return Measurement(bits / _count(model), evidence=evidence, model=preset)


def operations_ratio(method: Trained, against: Trained, width: int, rank: int, tokens: int = 512) -> Measurement:
    """Returns the operations of a training step through one square layer, divided by those of another method."""
    this, other = (_training_operations(name, width, rank, tokens) for name in (method, against))
    return Measurement(this / other, evidence={f"operations, {method}": this, f"operations, {against}": other})


def merged_operations(method: Literal["lora", "dora"]) -> Measurement:
    """Returns how many more operations a forward pass takes after merging than in the base, in percent."""
    base = tiny_llama()
    ids = token_ids(base)
    own, own_values = _forward_operations(base, ids), _count(base)
    model = peft.get_peft_model(base, _peft_config(method, 8, target_modules("all-linear")))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    apart = _forward_operations(model, ids)
    merged = model.merge_and_unload()
    evidence = {
        "before merging, percent more": 100 * (apart / own - 1),
        "parameters more after merging": _count(merged) - own_values,
    }
    found = 100 * (_forward_operations(merged, ids) / own - 1)
    return Measurement(found, evidence=evidence, model="a Llama of two narrow layers")


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _linears(rows: int, columns: int, count: int = 1) -> Any:
    """Returns ``count`` linear layers on ``meta``, without values."""
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(columns, rows, bias=False) for _ in range(count)))


def _lora_count(model: Any, rank: int, targets: list[str] | None = None) -> int:
    """Adds an adapter to a model and returns the parameters that PEFT trains. The default targets are all layers."""
    names = targets or [name for name, _ in model.named_children()]
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=names), model)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _peft_config(method: str, rank: int, targets: list[str]) -> Any:
    if method == "adalora":
        return peft.AdaLoraConfig(init_r=rank, target_r=max(1, rank // 2), total_step=10, target_modules=targets)
    return peft.LoraConfig(r=rank, target_modules=targets, use_dora=method == "dora")


def _training_operations(method: str, width: int, rank: int, tokens: int) -> int:
    layer = _linears(width, width)
    if method != "full":
        layer = peft.inject_adapter_in_model(_peft_config(method, rank, ["0"]), layer)
    # The layers before this one need the gradient of its input.
    return operations(lambda: layer(torch.empty(tokens, width, device="meta", requires_grad=True)).sum().backward())


def _forward_operations(model: Any, ids: Any) -> int:
    with torch.no_grad():
        return operations(lambda: model(input_ids=ids))

"""An adapter that is applied beside its base, merged into it, and removed from it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.integrations import dequantize_module_weight

from peftscope.claims.lora_subjects import (
    adapted_llama,
    four_bit,
    logits_of,
    lora_layers,
    lora_model,
    relative_distance,
    trained,
)
from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import BLOCK_LINEAR, TINY, flat, meta_model, operations, tiny_llama, token_ids
from peftscope.methods.lora import LoRA
from peftscope.models.presets import PRESETS


def model_formula_error(targets: Sequence[str]) -> Measurement:
    """Returns how far, in %, a doubled adapter scale is from doubling the change of the logits.

    If a model's output were the base's plus lora_scale times something, the change would double.
    """
    model = adapted_llama(targets=targets)
    base = logits_of(tiny_llama())
    changes = {}
    for scale in (0.5, 1.0, 2.0, 4.0):
        with rescale_adapter_scale(model, scale):
            changes[scale] = logits_of(model) - base
    once = float(changes[1.0].norm())
    return Measurement(
        100 * relative_distance(changes[2.0], 2 * changes[1.0]),
        n=len(lora_layers(model)),
        evidence={"change of the logits, % of them": 100 * once / float(base.norm())},
        curves={
            "measured": {scale: float(change.norm()) / once for scale, change in changes.items()},
            "by the formula": {scale: scale for scale in changes},
        },
        axes=("adapter scale, times", "change of the logits, times"),
        model=TINY,
    )


def extra_flops(preset: str, rank: int, targets: str, merged: bool) -> Measurement:
    """Returns the floating-point operations of a forward pass that an adapter adds, in % of the base's."""
    method = LoRA(rank=rank, targets=targets)
    base = _flops(meta_model(preset))
    model = get_peft_model(meta_model(preset), LoraConfig(r=rank, target_modules=list(method.targets_of())))
    adapted = lora_layers(model)
    found = _flops(model.merge_and_unload() if merged else model)
    hidden = PRESETS[preset].shape.hidden_size
    return Measurement(
        100 * (found / base - 1),
        n=len(adapted),
        evidence={
            "GFLOP a token, base": base / 1e9,
            "matrix products added by layers that stay adapted": 0 if merged else 2 * len(adapted),
            "in one adapted square matrix, %": 0.0 if merged else 100 * rank * 2 / hidden,
        },
        model=preset,
    )


def merged_weight_error(rank: int, alpha: float, scaled: bool) -> Measurement:
    """Returns the largest relative error of merged weights against W + (alpha / rank) B A, or W + B A if not scaled."""
    model = adapted_llama(rank=rank, alpha=alpha)
    wanted = {}
    for name, layer in lora_layers(model).items():
        product = layer.lora_B["first"].weight.double() @ layer.lora_A["first"].weight.double()
        wanted[name] = layer.base_layer.weight.double() + (alpha / rank if scaled else 1.0) * product
    merged = model.merge_and_unload()
    errors = [relative_distance(merged.get_submodule(name).weight, weight) for name, weight in wanted.items()]
    return Measurement(max(errors), n=len(errors), evidence={"alpha / rank": alpha / rank}, model=TINY)


def merged_structure_differences() -> Measurement:
    """Returns how many modules (by name, class) and parameters (by name, shape, dtype) differ after merging."""

    def structure(model: Any) -> set[tuple[Any, ...]]:
        modules = {(name, type(module)) for name, module in model.named_modules()}
        return modules | {(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()}

    base, adapted = structure(tiny_llama()), adapted_llama()
    apart = structure(adapted.get_base_model())
    merged = structure(adapted.merge_and_unload())
    evidence = {"in the base": len(base), "differences before merging": len(base ^ apart)}
    return Measurement(len(base ^ merged), evidence=evidence, model=TINY)


def change_left_after_undoing(way: str, dtype: str) -> Measurement:
    """Returns how much of an adapter's change, in %, is left in the weights after merging and undoing it.

    Args:
        way: ``unmerge_adapter`` (PEFT's, after ``merge_adapter``), or ``subtract``: from a model that went through
            ``merge_and_unload``, the product that is computed from the adapter's factors.
        dtype: The dtype of the base's weights. Adapters are fp32, which is PEFT's default.
    """
    sizes = (0.01, 0.02, 0.05, 0.1, 0.2)
    found = {size: _undo(way, dtype, size) for size in sizes}
    left, unequal, error = found[0.1]
    return Measurement(
        left,
        n=2 * len(BLOCK_LINEAR),
        evidence={"weights not restored to the bit, %": unequal, "largest error of a weight": error},
        curves={"left": {100 * size: values[0] for size, values in found.items()}},
        axes=("size of the change, % of the weights' norm", "left after undoing, %"),
        model=f"{TINY}, {dtype}",
    )


def distance_after_merging(way: str) -> Measurement:
    """Returns how far a merged model stays from the base and from another adapter's model, the farther of the two.

    In units of the distance right after merging: 1 means no step towards it, 0 that it is reached.

    Args:
        way: How the first adapter is merged. After ``merge_adapter``, PEFT's ``unmerge_adapter``, ``disable_adapter``
            and ``set_adapter`` are used. After ``merge_and_unload``, which leaves no adapter in the model, its file is
            loaded again, with the weight -1, and then the other adapter's beside it, with the weight 1.
    """
    wanted = {"the base": logits_of(tiny_llama()), "another adapter": logits_of(adapted_llama(("second",)))}
    model = adapted_llama(("first", "second"))
    files = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("first", "second")}
    found = {}
    if way == "merge_adapter":
        model.merge_adapter(["first"])
        merged = logits_of(model)
        model.unmerge_adapter()
        with model.disable_adapter():
            found["the base"] = logits_of(model)
        model.set_adapter("second")
        found["another adapter"] = logits_of(model)
    else:
        plain = model.merge_and_unload(adapter_names=["first"])
        merged = logits_of(plain)
        model = adapted_llama(("first", "second"), base=plain)
        for name, file in files.items():
            set_peft_model_state_dict(model, file, name)
        for goal, weights in (("the base", [-1.0, 0.0]), ("another adapter", [-1.0, 1.0])):
            model.add_weighted_adapter(list(files), weights, goal, combination_type="cat")
            model.set_adapter(goal)
            found[goal] = logits_of(model)
    distances = {f"to {n}": float((found[n] - w).norm() / (merged - w).norm()) for n, w in wanted.items()}
    return Measurement(max(distances.values()), n=2, evidence=distances, model=TINY)


def requantisation_error() -> Measurement:
    """Returns the weights' error after PEFT merged an adapter into NF4 weights, in % of the adapter's change."""
    sizes = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    found = {size: _merge_into_four_bits(size) for size in sizes}
    error, kept = found[0.1]
    return Measurement(
        error,
        n=2 * len(BLOCK_LINEAR),
        evidence={"kept of the change, along it, %": kept},
        curves={
            "error": {100 * size: values[0] for size, values in found.items()},
            "kept along the change": {100 * size: values[1] for size, values in found.items()},
        },
        axes=("size of the change, % of the weights' norm", "% of the change"),
        model=f"{TINY}, NF4 with double quantization",
    )


def requantised_divergence_ratio(size: float) -> Measurement:
    """Returns how many times further from the unmerged QLoRA model the next token's distribution is (mean KL).

    After merging into 4 bits, over after merging into the dequantised weights in bf16.

    Args:
        size: The norm of the adapter's change as a share of the weights' norm.
    """
    apart = adapted_llama(base=four_bit(tiny_llama(dtype="bfloat16")), size=size)
    logits = logits_of(apart)
    plain = adapted_llama(base=_dequantised_llama(), size=size).merge_and_unload()
    in_bf16 = float(_divergences(logits, logits_of(plain)).mean())
    with apart.disable_adapter():
        without = float(_divergences(logits, logits_of(apart)).mean())
    in_four_bits = float(_divergences(logits, logits_of(_merged(apart))).mean())
    return Measurement(
        in_four_bits / in_bf16,
        evidence={
            "merged into 4 bits, nats": in_four_bits,
            "merged into bf16, nats": in_bf16,
            "no adapter, nats": without,
        },
        model=f"{TINY}, NF4 with double quantization",
    )


def gain_lost(
    into: Literal["16-bit base", "dequantised base", "4-bit base"], batches: list[int], steps: int, rate: float
) -> Measurement:
    """Returns the largest share of what a QLoRA adapter has learned that is lost when PEFT merges it.

    The adapter learns random tokens by heart, 12 in a sequence. What it has learned is the fall of their loss from the
    untouched 4-bit base to the adapter apart. The 16-bit base has the weights before they were quantised. ``batches``
    are numbers of sequences, each learned apart. AdamW trains for ``steps``.
    """
    losses = {batch: dict(_merged_losses(batch, steps, rate)) for batch in batches}
    lost = {
        float(batch): (each[into] - each["adapter apart"]) / (each["untouched 4-bit base"] - each["adapter apart"])
        for batch, each in losses.items()
    }
    chosen = max(lost, key=lambda batch: lost[batch])
    return Measurement(
        lost[chosen],
        n=len(batches),
        evidence={"sequences": chosen, **{f"loss, {name}": loss for name, loss in losses[int(chosen)].items()}},
        curves={f"merged into the {into}": lost},
        axes=("sequences", "share of the gain that is lost"),
        model=f"{TINY}, NF4 with double quantization",
    )


@cache
def _merged_losses(batch: int, steps: int, rate: float) -> tuple[tuple[str, float], ...]:
    """Returns the loss of what an adapter has learned, apart, without it, and after each way to merge it."""
    apart = trained(lora_model(four_bit(tiny_llama(dtype="bfloat16"))), steps, learning_rate=rate, batch=batch)
    ids = token_ids(apart, batch=batch)

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    found = {"adapter apart": loss(apart)}
    with apart.disable_adapter():
        found["untouched 4-bit base"] = loss(apart)
    adapter = get_peft_model_state_dict(apart)
    for name, base in (("16-bit base", tiny_llama(dtype="bfloat16")), ("dequantised base", _dequantised_llama())):
        other = lora_model(base)
        set_peft_model_state_dict(other, adapter)
        found[name] = loss(other.merge_and_unload())
    found["4-bit base"] = loss(_merged(apart))
    return tuple(found.items())


def _divergences(wanted: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Returns each token's KL divergence of the actual from the wanted distribution, in nats."""
    p, q = wanted.log_softmax(-1), actual.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _flops(model: Any) -> int:
    """Returns the floating-point operations of a forward pass of one token."""
    token = torch.ones(1, 1, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta")  # complete: transformers does not read its values
    with torch.no_grad():
        return operations(lambda: model(input_ids=token, attention_mask=mask, use_cache=False))


def _undo(way: str, dtype: str, size: float) -> tuple[float, float, float]:
    """Returns the rest of the change and the share of weights that differ, both in %, and the largest error."""
    model = adapted_llama(dtype=dtype, size=size)
    layers = lora_layers(model)
    before = {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}
    changes = {name: layer.get_delta_weight("first").detach().clone() for name, layer in layers.items()}
    if way == "unmerge_adapter":
        model.merge_adapter()
        model.unmerge_adapter()
        after = {name: layer.base_layer.weight.detach() for name, layer in layers.items()}
    else:
        merged = model.merge_and_unload()
        after = {n: (merged.get_submodule(n).weight.detach() - d).to(before[n].dtype) for n, d in changes.items()}
    errors = flat(after[name].double() - before[name].double() for name in before)
    change = flat(change.double() for change in changes.values())
    unequal = 100 * float((errors != 0).double().mean())
    return 100 * float(errors.norm() / change.norm()), unequal, float(errors.abs().max())


def _dequantised_llama() -> Any:
    """Returns the tiny Llama in bf16 with the dequantised values of the 4-bit one."""
    model = tiny_llama(dtype="bfloat16")
    quantised = four_bit(tiny_llama(dtype="bfloat16"))
    for name, weight in model.named_parameters():
        weight.data.copy_(dequantize_module_weight(quantised.get_submodule(name.removesuffix(".weight"))))
    return model


def _merged(model: Any) -> Any:
    """Returns a 4-bit model with its adapter merged, without PEFT's warning about the error that is measured here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merge lora module to 4-bit linear", UserWarning)
        return model.merge_and_unload()


def _merge_into_four_bits(size: float) -> tuple[float, float]:
    """Returns the error, and the part that is kept along the adapter's change, both in % of the change."""
    model = adapted_llama(base=four_bit(tiny_llama(dtype="bfloat16")), size=size)
    layers = lora_layers(model)
    changes = {name: layer.get_delta_weight("first").detach().double() for name, layer in layers.items()}
    before = {name: dequantize_module_weight(layer.base_layer).double() for name, layer in layers.items()}
    merged = _merged(model)
    after = {name: dequantize_module_weight(merged.get_submodule(name)).double() for name in before}
    change = flat(changes.values())
    moved = flat(after[name] - before[name] for name in before)
    return 100 * relative_distance(moved, change), 100 * float(moved @ change / (change @ change))

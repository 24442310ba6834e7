"""Several adapters in one model, swapped, and summed in the ways of PEFT and LoraHub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from peftscope.claims.lora_subjects import ADAPTERS, adapted_llama, logits_of, lora_layers, relative_distance
from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import TINY


def swaps_exact(order: Sequence[str]) -> Measurement:
    """Returns the share of swaps after which logits equal, bit for bit, those of a model with that adapter only."""
    alone = {name: logits_of(adapted_llama((name,))) for name in dict.fromkeys(order)}
    model = adapted_llama(tuple(alone))
    exact = 0
    for name in order:
        model.set_adapter(name)
        exact += logits_of(model).equal(alone[name])
    others = [relative_distance(alone[a], alone[b]) for a in alone for b in alone if a != b]
    evidence = {"smallest difference between two adapters' logits, %": 100 * min(others)}
    return Measurement(exact / len(order), n=len(order), evidence=evidence, model=TINY)


def merged_sum_error() -> Measurement:
    """Returns the largest relative error of weights after PEFT merged two adapters, against W + change 1 + change 2."""
    names = ADAPTERS[:2]
    model = adapted_llama(names)
    wanted = _sums(model, names, (1.0, 1.0))
    before = {name: layer.base_layer.weight.double() for name, layer in lora_layers(model).items()}
    merged = model.merge_and_unload(adapter_names=list(names))
    errors = [relative_distance(merged.get_submodule(n).weight, before[n] + wanted[n]) for n in wanted]
    return Measurement(max(errors), n=len(errors), model=TINY)


def combination_error(
    combination: str, weights: Sequence[float], ranks: Sequence[int], rank_stabilised: bool = False
) -> Measurement:
    """Returns the largest relative error of a combined adapter's change against the weighted sum of its parts' changes.

    Args:
        combination: The option of PEFT's ``add_weighted_adapter``: ``cat``, ``linear`` or ``svd``. A single adapter
            is always combined linearly.
        weights: The weight of each adapter.
        ranks: The rank of each adapter; all have alpha 8.
        rank_stabilised: Whether the scale is rsLoRA's, alpha over the root of the rank.
    """
    names = ADAPTERS[: len(ranks)]
    model = adapted_llama(names, ranks=ranks, use_rslora=rank_stabilised)
    wanted = _sums(model, names, weights)
    model.add_weighted_adapter(list(names), list(weights), "sum", combination_type=combination)
    layers = lora_layers(model)
    found = {name: layer.get_delta_weight("sum").double() for name, layer in layers.items()}
    errors = [relative_distance(found[name], change) for name, change in wanted.items()]
    return Measurement(
        max(errors),
        n=len(errors),
        evidence={
            "rank of the combination": model.peft_config["sum"].r,
            "its scale": next(iter(layers.values())).scaling["sum"],
            "its change over the sum's, norms": _norm(found) / _norm(wanted),
        },
        model=TINY,
    )


def lorahub_error(weights: Sequence[float]) -> Measurement:
    """Returns the relative error of LoraHub's composed change against the weighted sum of the adapters' changes.

    Source: https://github.com/sail-sg/lorahub, lorahub/algorithm.py, get_final_weights: every tensor of the adapters'
    files, A and B alike, is replaced by its weighted sum.
    """
    names = ADAPTERS[: len(weights)]
    model = adapted_llama(names)
    wanted, own = _sums(model, names, weights), _sums(model, names, [w**2 for w in weights])
    files = [get_peft_model_state_dict(model, adapter_name=name) for name in names]
    composed = {key: sum(w * file[key] for w, file in zip(weights, files, strict=True)) for key in files[0]}
    set_peft_model_state_dict(model, composed, names[0])
    found = {name: layer.get_delta_weight(names[0]).double() for name, layer in lora_layers(model).items()}
    cross = {name: found[name] - own[name] for name in found}
    return Measurement(
        _norm({name: found[name] - wanted[name] for name in found}) / _norm(wanted),
        n=len(found),
        evidence={
            "cross terms over the sum, norms": _norm(cross) / _norm(wanted),
            "adapters' own products over the sum, norms": _norm(own) / _norm(wanted),
        },
        model=TINY,
    )


def methods_known(names: Sequence[str]) -> Measurement:
    """Returns for how many of these methods PEFT has a configuration and an implementation."""
    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} & {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    missing = sorted(set(names) - known)
    return Measurement(
        len(names) - len(missing),
        n=len(names),
        evidence={"methods in PEFT": len(known), "missing": ", ".join(missing) or "none"},
    )


def _sums(model: Any, names: Sequence[str], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Returns each layer's weighted sum of its adapters' changes, computed from A and B in fp64."""
    sums = {}
    for layer_name, layer in lora_layers(model).items():
        changes = [
            weight * layer.scaling[name] * (layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double())
            for name, weight in zip(names, weights, strict=True)
        ]
        sums[layer_name] = sum(changes).detach()
    return sums


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(sum(tensor.detach().norm() ** 2 for tensor in tensors.values()) ** 0.5)

"""Where gradients flow in a model with LoRA, and which weights training steps change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from peftscope.claims.lora_subjects import (
    backward_steps,
    factor_of,
    four_bit,
    linear_names,
    lora_layers,
    lora_model,
    trained,
    update_of,
)
from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import TINY, flat, tiny_llama, token_ids


def share_with_gradient(factor: str, step: int) -> Measurement:
    """Returns the share of all A, or of all B, that have a nonzero gradient in this step (the first is 1)."""
    model = lora_model(tiny_llama())
    layers = list(lora_layers(model).values())
    norms: list[float] = []
    for _ in backward_steps(model, step):
        norms = [factor_of(layer, factor).grad.norm().item() for layer in layers]
    share = sum(norm > 0 for norm in norms) / len(norms)
    return Measurement(share, n=len(norms), evidence={"largest gradient norm": max(norms)}, model=TINY)


def update_before_training() -> Measurement:
    """Returns ‖ΔW‖ / ‖W₀‖ (Frobenius, over all layers) before the first step."""
    return Measurement(_relative_size(list(lora_layers(lora_model(tiny_llama())).values())), model=TINY)


def share_of_growing_steps(steps: int) -> Measurement:
    """Returns the share of AdamW steps, at a rate of 1e-3, that change every B and make ‖ΔW‖ larger."""
    model = lora_model(tiny_llama())
    layers = list(lora_layers(model).values())
    curve, grew = {0.0: _relative_size(layers)}, 0
    before = [factor_of(layer, "B").detach().clone() for layer in layers]
    for step, _ in enumerate(backward_steps(model, steps, after=True), start=1):
        after = [factor_of(layer, "B").detach().clone() for layer in layers]
        curve[float(step)] = _relative_size(layers)
        changed = not any(old.equal(new) for old, new in zip(before, after, strict=True))
        grew += changed and curve[float(step)] > curve[float(step - 1)]
        before = after
    return Measurement(
        grew / steps,
        n=steps,
        evidence={"‖ΔW‖ / ‖W₀‖ after the last step": curve[float(steps)]},
        curves={"‖ΔW‖ / ‖W₀‖": curve},
        axes=("step", "‖ΔW‖ / ‖W₀‖"),
        model=TINY,
    )


def gradient_from_zero(steps: int) -> Measurement:
    """Returns the largest gradient of any adapter value in this many steps if A and B both start at zero."""
    model = lora_model(tiny_llama())
    factors = [factor_of(layer, letter) for layer in lora_layers(model).values() for letter in "AB"]
    with torch.no_grad():
        for factor in factors:  # B is zero already
            factor.zero_()
    largest = [max(float(factor.grad.abs().max()) for factor in factors) for _ in backward_steps(model, steps)]
    return Measurement(max(largest), n=steps, model=TINY)


def rank_from_equal_rows(steps: int, rank: int, equal: bool) -> Measurement:
    """Returns the largest numerical rank of ΔW after training if all rows of A start equal (or as PEFT draws them).

    Training is plain gradient descent in fp64. Singular values below 1e-6 of the largest count as zero.
    """
    model = lora_model(tiny_llama(dtype="float64"), rank=rank)
    if equal:
        with torch.no_grad():
            for layer in lora_layers(model).values():
                a = factor_of(layer, "A")
                a.copy_(a[:1].expand_as(a).clone())
    trained(model, steps, learning_rate=0.1, optimizer="SGD")
    ranks = [int(torch.linalg.matrix_rank(update_of(layer), rtol=1e-6)) for layer in lora_layers(model).values()]
    return Measurement(max(ranks), n=len(ranks), evidence={"smallest": min(ranks)}, model=TINY)


def share_in_first_gradient(
    factor: Literal["A", "B"], optimizer: Literal["SGD", "AdamW"], rate: float, steps: int, rank: int
) -> Measurement:
    """Returns how much of a factor's subspace lies in as many leading singular vectors of the first full gradient.

    That is the gradient of the whole matrix in the first step of full fine-tuning, on the batch that LoRA then trains
    on. The value is the mean squared cosine of the principal angles, from 0 to 1, mean over matrices. B is compared
    with left singular vectors and A with right ones. Source: Zhang et al. 2025, LoRA-One, arXiv 2502.01235.
    """
    base = tiny_llama()
    ids = token_ids(base)
    base(input_ids=ids, labels=ids).loss.backward()
    leading = {}
    for name in linear_names(base):
        left, _, right = torch.linalg.svd(base.get_submodule(name).weight.grad, full_matrices=False)
        leading[name] = left[:, :rank] if factor == "B" else right[:rank].T
    base.zero_grad()
    model = lora_model(base, rank=rank, alpha=2 * rank)
    layers, curve, losses = lora_layers(model), {}, []
    for step, loss in enumerate(backward_steps(model, steps, rate, optimizer, after=True), start=1):
        factors = {name: factor_of(layer, factor).detach() for name, layer in layers.items()}
        bases = {name: torch.linalg.qr(each if factor == "B" else each.T).Q for name, each in factors.items()}
        shares = [float((leading[name].T @ basis).square().sum()) / rank for name, basis in bases.items()]
        curve[float(step)] = sum(shares) / len(shares)
        losses.append(loss)
    chance = sum(rank / len(each) for each in leading.values()) / len(leading)
    return Measurement(
        curve[float(steps)],
        n=len(layers),
        evidence={"by chance": chance, "after one step": curve[1.0], "first loss": losses[0], "last loss": losses[-1]},
        curves={"part in the gradient's subspace": curve},
        axes=("step", "mean squared cosine"),
        model=TINY,
    )


def base_tensors_changed(steps: int) -> Measurement:
    """Returns how many of a 4-bit base's tensors differ in any bit after training steps with LoRA."""
    model = lora_model(four_bit(tiny_llama()))
    before = {name: tensor.clone() for name, tensor in _tensors(model)}
    trained(model, steps)
    changed = {name for name, tensor in _tensors(model) if not torch.equal(before[name], tensor)}
    adapters = {name for name in before if "lora_" in name}
    return Measurement(
        len(changed - adapters),
        n=len(before) - len(adapters),
        evidence={"adapter tensors": len(adapters), "adapter tensors changed": len(changed & adapters)},
        model=f"{TINY}, NF4",
    )


def cosine_without_base_path(steps: int) -> Measurement:
    """Returns the cosine between the first block's adapter gradients with and without the path through frozen weights.

    The model has first trained some steps on a 4-bit base. To cut the path, the inputs of frozen layers are detached,
    but not those of adapters.
    """
    model = trained(lora_model(four_bit(tiny_llama())), steps)

    def gradient() -> Any:
        trained(model, 1, learning_rate=0.0)
        return flat(p.grad for n, p in model.named_parameters() if "layers.0." in n and "lora_" in n)

    whole = gradient()
    for layer in lora_layers(model).values():
        layer.get_base_layer().register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))
    cut = gradient()
    return Measurement(
        torch.nn.functional.cosine_similarity(whole, cut, dim=0).item(),
        evidence={"norm without over norm with": (cut.norm() / whole.norm()).item()},
        model=f"{TINY}, NF4",
    )


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields every parameter's tensor, and the block constants behind 4-bit ones."""
    for name, parameter in model.named_parameters():
        yield name, parameter.data
        if getattr(parameter, "quant_state", None) is not None:
            yield f"{name}.absmax", parameter.quant_state.absmax


def _relative_size(layers: Sequence[Any]) -> float:
    base = sum(layer.get_base_layer().weight.square().sum().item() for layer in layers)
    return (sum(update_of(layer).square().sum().item() for layer in layers) / base) ** 0.5

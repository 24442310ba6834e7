"""LoRA+, DoRA and AdaLoRA as PEFT runs them, and quantities that follow from a rank by arithmetic."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model, optimizers
from torch.utils._python_dispatch import TorchDispatchMode

from peftscope.claims.checks.counts import _count, _lora_count, _training_operations
from peftscope.claims.lora_subjects import descend, factor_of, lora_layers, lora_model
from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import BLOCK_LINEAR, TINY, meta_model, tiny_llama, token_ids
from peftscope.methods.fields import target_modules


def share_of_directions(rank: int, rows: int, columns: int) -> Measurement:
    """Returns the largest rank of an update B A, as a share of the rank that a full update can have."""
    full, low_rank = rows * columns, rank * (rows + columns)
    return Measurement(rank / min(rows, columns), evidence={"share of the matrix's values": low_rank / full})


def share_of_values(rank: int, rows: int, columns: int) -> Measurement:
    """Returns the values of A and B, as a share of the values of the matrix that they adapt."""
    full, low_rank = rows * columns, rank * (rows + columns)
    return Measurement(low_rank / full, evidence={"values of A and B": low_rank, "values of the matrix": full})


def share_of_training_flops(rank: int, width: int) -> Measurement:
    """Returns the FLOPs of a forward and backward pass with PEFT's LoRA over those of training the matrix itself.

    Counted by PyTorch on a square layer whose input needs a gradient, as inside a model.
    """
    full, lora = (_training_operations(method, width, rank, tokens=1) for method in ("full", "lora"))
    formula = (2 * width**2 + 6 * width * rank) / (3 * width**2)
    return Measurement(lora / full, evidence={"full": full, "LoRA": lora, "by formula": formula})


def times_fewer_parameters(preset: str, rank: int, targets: str) -> Measurement:
    """Returns a model's parameters over those that PEFT trains for LoRA, counted on its modules."""
    model = meta_model(preset)
    base, trained = _count(model), _lora_count(model, rank, target_modules(targets))
    return Measurement(base / trained, model=preset, evidence={"trained": trained, "model": base})


def loraplus_step_ratio(ratio: float) -> Measurement:
    """Returns how many times further B moves than A, a value, in its first step with PEFT's LoRA+ optimizer.

    Adam's first step moves every value by its learning rate. B moves in step 1, and A, which has no gradient there, in
    step 2. Over matrices, the smallest step of B stands against the largest of A.
    Source: Hayou et al. 2024, arXiv 2402.12354.
    """
    model = lora_model(tiny_llama(), rank=4, alpha=8, seed=0)
    options: Any = {"lr": 1e-4, "loraplus_lr_ratio": ratio, "betas": (0.0, 0.0), "weight_decay": 0.0}
    optimizer = optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, **options)
    ids = token_ids(model)
    steps: dict[str, list[float]] = {}
    for letter in "BA":
        factors = [parameter for name, parameter in model.named_parameters() if f".lora_{letter}." in name]
        before = [factor.detach().clone() for factor in factors]
        descend(optimizer, lambda: model(input_ids=ids, labels=ids).loss)
        steps[letter] = [float((now - old).detach().abs().median()) for now, old in zip(factors, before, strict=True)]
    evidence = {"step of A": max(steps["A"]), "step of B": min(steps["B"]), "matrices": sum(map(len, steps.values()))}
    return Measurement(min(steps["B"]) / max(steps["A"]), model=TINY, evidence=evidence)


def dora_column_norms(rank: int, alpha: float) -> Measurement:
    """Returns the largest relative difference between the norms of DoRA's weight vectors and their magnitudes m.

    B and m are changed at random from their initial values. A layer's weight is read from its outputs for unit vectors.
    Norms are taken over the inputs of each output, which is a row in PyTorch's layout.
    Source: Liu et al. 2024, arXiv 2402.09353, equation 5.
    """
    norms, cosines = [], []
    for layer in lora_layers(lora_model(tiny_llama(), rank, alpha, seed=0, use_dora=True).eval()).values():
        factor_of(layer, "B").data.normal_(std=0.1)
        trained = layer.lora_magnitude_vector["default"].weight
        trained.data *= torch.empty_like(trained).uniform_(0.5, 2)
        base = layer.get_base_layer().weight.detach()
        update = factor_of(layer, "B").detach() @ factor_of(layer, "A").detach()
        updated = base + layer.scaling["default"] * update
        weight = layer(torch.eye(base.shape[1])).detach().T
        magnitude = trained.detach()
        norms.append(float(((weight.norm(dim=1) - magnitude).abs() / magnitude).max()))
        cosines.append(float(torch.cosine_similarity(weight, updated, dim=1).min()))
    evidence = {"smallest cosine with the direction of W + sBA": min(cosines)}
    error = round(max(norms), 6)  # digits below fp32's rounding differ between machines
    return Measurement(error, n=len(norms), model=TINY, evidence=evidence)


def adalora_rank_spread(steps: int, init_rank: int, target_rank: int) -> Measurement:
    """Returns the largest minus the smallest rank that AdaLoRA's last allocation keeps."""
    ranks, _ = _train_adalora(steps, init_rank, target_rank)
    return Measurement(
        max(ranks) - min(ranks),
        n=len(ranks),
        model=TINY,
        evidence={"largest": max(ranks), "smallest": min(ranks)},
        curves={"rank kept": {float(index): float(rank) for index, rank in enumerate(ranks)}},
        axes=("adapted matrix, in the model's order", "rank"),
    )


def adalora_decompositions(steps: int, init_rank: int, target_rank: int) -> Measurement:
    """Returns how many singular value decompositions PyTorch carries out in a training run with AdaLoRA.

    Operators are counted below Python. PiSSA's initialisation, which does use them, is counted as a control.
    """
    with OperatorCounter() as counter:
        ranks, allocations = _train_adalora(steps, init_rank, target_rank)
    with OperatorCounter() as control:
        lora_model(tiny_llama(), rank=target_rank, alpha=target_rank, seed=0, init_lora_weights="pissa")
    evidence = {
        "training steps": steps,
        "allocations": allocations,
        "triplets pruned": sum(init_rank - rank for rank in ranks),
        "eigenvalue or QR decompositions": counter.count("linalg_eig", "linalg_qr"),
        "for comparison, in PiSSA's initialisation": control.count("svd"),
    }
    return Measurement(counter.count("svd"), model=TINY, evidence=evidence)


def _train_adalora(steps: int, init_rank: int, target_rank: int) -> tuple[list[int], int]:
    """Returns the ranks after a short training run with PEFT's AdaLoRA, and the number of allocations.

    PEFT updates its scores only when ``update_and_allocate`` is called, after the step and before ``zero_grad``.
    """
    base = tiny_llama()
    tokens = token_ids(base, length=24, batch=4)
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=init_rank,
        target_r=target_rank,
        lora_alpha=2 * init_rank,
        target_modules=list(BLOCK_LINEAR),
        tinit=steps // 5,
        tfinal=steps // 4,
        deltaT=1,
        total_step=steps,
        orth_reg_weight=0.1,
    )
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    allocations = 0
    for step in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        before = config.rank_pattern
        model.base_model.update_and_allocate(step)
        allocations += config.rank_pattern is not before
        optimizer.zero_grad()
    kept = {name.removeprefix("base_model.model."): sum(each) for name, each in (config.rank_pattern or {}).items()}
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_parameters() if ".lora_E." in name]
    return [kept.get(name, init_rank) for name in names], allocations


class OperatorCounter(TorchDispatchMode):
    """A context that counts by name the operators that PyTorch runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def count(self, *parts: str) -> int:
        """Returns how many operators ran whose name has one of these parts."""
        return sum(number for name, number in self.names.items() if any(part in name for part in parts))

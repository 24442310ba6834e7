"""Rank, alpha and learning rate: their bounds, their scales, and the changes of them that cancel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from peft import LoraConfig
from pydantic import Field
from scipy.linalg import qr

from peftscope.analysis.stats import share_interval
from peftscope.claims.checks.adapters import scale
from peftscope.claims.lora_subjects import (
    descend,
    factor_of,
    lora_layer,
    lora_layers,
    lora_model,
    regression,
    trained,
    update_of,
)
from peftscope.claims.measurement import Measurement, log_slope
from peftscope.claims.subjects import TINY, tiny_llama, token_ids
from peftscope.files.content import Strict


def product_rank_excess(shapes: int) -> Measurement:
    """Returns by how much the numerical rank of random products (m × r)(r × n) exceeds r at most."""
    excess = [int(torch.linalg.matrix_rank(left @ right)) - left.shape[1] for left, right in _thin_pairs(shapes)]
    return Measurement(max(excess), n=shapes, evidence={"smallest": min(excess)}, model="fp64, up to 200 × 200")


def factorisation_error(shapes: int) -> Measurement:
    """Returns the largest relative error (Frobenius) of rank-r matrices rebuilt from two thin factors.

    The factors are r of the matrix's own columns, chosen by a pivoted QR, and the coefficients of all columns in them.
    The value is the next power of ten, because the digits of rounding errors differ between machines.
    """
    errors = []
    for left, right in _thin_pairs(shapes):
        matrix, rank = left @ right, left.shape[1]
        columns = matrix[:, qr(matrix.numpy(), pivoting=True, mode="r")[1][:rank]]
        coefficients = torch.linalg.lstsq(columns, matrix).solution
        errors.append(((columns @ coefficients - matrix).norm() / matrix.norm()).item())
    return Measurement(10.0 ** math.ceil(math.log10(max(errors))), n=shapes, model="fp64, up to 200 × 200")


def trajectory_gap(
    alpha: float, init_a: float, rate_a: float, rate_b: float, epsilon: float, steps: int = 200
) -> Measurement:
    """Returns how far two training runs part: the largest |W₀ + ΔW| difference over max |W₀ + ΔW|, at any step.

    torch's Adam without weight decay, on a one-block Llama in fp64. All but the last two parameters are factors by
    which the second run's settings differ from the first's. Source: Schulman et al. 2025, LoRA Without Regret.

    Args:
        alpha: The factor of the scale's numerator.
        init_a: The factor of the initial A.
        rate_a: The factor of A's learning rate.
        rate_b: The factor of B's learning rate.
        epsilon: Adam's epsilon in both runs; 0 divides zero by zero, since A has no gradient in the first step.
        steps: The length of both runs.
    """
    changed = _trajectory(alpha, init_a, rate_a, rate_b, epsilon, steps)
    gaps, of_update = {}, 0.0
    runs = zip(_trajectory(1, 1, 1, 1, epsilon, steps), changed, strict=True)
    for step, (first, second) in enumerate(runs, start=1):
        difference = max((one - other).abs().max().item() for (one, _), (other, _) in zip(first, second, strict=True))
        gaps[float(step)] = difference / max(weight.abs().max().item() for weight, _ in first)
        of_update = difference / max(update.abs().max().item() for _, update in first)
    return Measurement(
        math.nan if any(math.isnan(gap) for gap in gaps.values()) else max(gaps.values()),
        evidence={"at the end, relative to the largest |ΔW|": of_update},
        curves={"gap": {step: gap for step, gap in gaps.items() if step == 1 or step % 10 == 0}},
        axes=("step", "largest difference of weights / largest weight"),
        model="a Llama of one block, 32 wide, fp64",
    )


def gradient_slope(rank_stabilised: bool, ranks: Sequence[int], seeds: int) -> Measurement:
    """Returns the log-log slope of ‖∂L/∂B‖ before training against the rank, at fixed alpha, with its interval.

    Squared error to random targets; PEFT's default A and B. Source: Kalajdzievski 2023, arXiv 2312.03732.
    """

    def norm(layer: Any, x: Any, target: Any) -> float:
        (layer(x) - target).square().mean().backward()
        return factor_of(layer, "B").grad.norm().item()

    return _slope(norm, rank_stabilised, ranks, seeds, "‖∂L/∂B‖")


def update_slope(rank_stabilised: bool, ranks: Sequence[int], seeds: int, steps: int) -> Measurement:
    """Returns the log-log slope of ‖ΔW‖ after steps of Adam (rate 1e-3) against the rank, at fixed alpha."""

    def norm(layer: Any, x: Any, target: Any) -> float:
        optimizer = torch.optim.Adam([factor_of(layer, "A"), factor_of(layer, "B")], lr=1e-3)
        descend(optimizer, lambda: (layer(x) - target).square().mean(), steps)
        return update_of(layer).norm().item()

    return _slope(norm, rank_stabilised, ranks, seeds, "‖ΔW‖")


def factor_error(ranks: Sequence[int], alphas: Sequence[float]) -> Measurement:
    """Returns the largest relative difference between the factor before BAx in PEFT's output and alpha/rank."""
    errors = [abs(float(scale(rank, alpha).value) / (alpha / rank) - 1) for rank in ranks for alpha in alphas]
    return Measurement(max(errors), n=len(errors), model="a linear layer, 256 × 192, fp32")


def trained_rank(ranks: Sequence[int], alpha_over_rank: float, steps: int) -> Measurement:
    """Returns the largest ratio of the numerical rank of ΔW after training to the configured rank.

    Singular values below 1e-9 of the largest count as zero.
    """
    curve = {}
    for rank in ranks:
        model = lora_model(tiny_llama(dtype="float64"), rank=rank, alpha=alpha_over_rank * rank).double()
        trained(model, steps)
        found = [int(torch.linalg.matrix_rank(update_of(layer), rtol=1e-9)) for layer in lora_layers(model).values()]
        curve[float(rank)] = float(max(found))
    shares = [found / rank for rank, found in curve.items()]
    drawn: Any = {"curves": {"ΔW": curve}, "axes": ("rank that was set", "rank of ΔW")}
    return Measurement(max(shares), n=len(shares), evidence={"smallest": min(shares)}, model=TINY, **drawn)


class Published(Strict):
    """The numbers that a paper prints."""

    name: str
    source: Annotated[str, Field(min_length=8, description="paper, and table, section or script")]


class Setting(Published):
    """A setting."""

    value: float


class Placement(Published):
    """The matrices that a LoRA run adapts."""

    matrices: list[str]


def share_of_settings(settings: list[Setting], low: float, high: float, default: str) -> Measurement:
    """Returns the share of published settings that lie in a range, with its interval as a sample of practice.

    Args:
        settings: The settings of papers.
        low: The lower end of the range.
        high: Its upper end.
        default: The options of PEFT's ``LoraConfig`` whose default is a further setting: one, or two with a slash for
            their ratio.
    """
    above, _, below = default.partition("/")
    config = LoraConfig()
    values = {f"{each.name} ({each.source})": each.value for each in map(Setting.model_validate, settings)}
    values["PEFT's default (LoraConfig)"] = getattr(config, above) / (getattr(config, below) if below else 1)
    inside = sum(low <= value <= high for value in values.values())
    bounds = share_interval(inside, len(values))
    return Measurement(inside / len(values), *bounds, n=len(values), evidence=values, model="published settings")


def placements_beyond(placements: list[Placement], described: list[str]) -> Measurement:
    """Returns how many published runs adapt a matrix that is not among the described ones."""
    listed = list(map(Placement.model_validate, placements))
    beyond = [each for each in listed if set(each.matrices) - set(described)]
    evidence = {f"{each.name} ({each.source})": ", ".join(each.matrices) for each in listed}
    return Measurement(len(beyond), n=len(listed), evidence=evidence, model="published runs")


def smallest_growth(alphas: list[float], rank: int, steps: int) -> Measurement:
    """Returns the smallest ratio of ‖ΔW‖ at one alpha to that at the alpha before it, after AdamW steps at one rate."""
    sizes = {}
    for alpha in alphas:
        model = trained(lora_model(tiny_llama(), rank=rank, alpha=alpha), steps)
        squares = [float(update_of(layer).square().sum()) for layer in lora_layers(model).values()]
        sizes[float(alpha)] = sum(squares) ** 0.5
    ratios = [later / earlier for earlier, later in pairwise(sizes.values())]
    axes = ("alpha", "‖ΔW‖ after training")
    return Measurement(min(ratios), n=len(ratios), curves={"‖ΔW‖": sizes}, axes=axes, model=TINY)


def _thin_pairs(count: int) -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(0)
    options: Any = {"generator": generator, "dtype": torch.float64}
    pairs = []
    for _ in range(count):
        rows, columns = torch.randint(2, 201, (2,), generator=generator).tolist()
        rank = int(torch.randint(1, min(rows, columns) + 1, (1,), generator=generator))
        pairs.append((torch.randn(rows, rank, **options), torch.randn(rank, columns, **options)))
    return pairs


def _trajectory(alpha: float, init_a: float, rate_a: float, rate_b: float, epsilon: float, steps: int) -> Any:
    """Yields, after every step, the merged weight and the update of each layer; all but the last two are factors."""
    base = tiny_llama(dtype="float64", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = lora_model(base, rank=4, alpha=8 * alpha).double()
    layers = lora_layers(model).values()
    with torch.no_grad():
        for layer in layers:
            factor_of(layer, "A").mul_(init_a)
    rates = {"A": 1e-3 * rate_a, "B": 1e-3 * rate_b}
    groups = [{"params": [factor_of(layer, name) for layer in layers], "lr": rate} for name, rate in rates.items()]
    optimizer = torch.optim.Adam(groups, eps=epsilon)
    ids = token_ids(model)
    for _ in range(steps):
        descend(optimizer, lambda: model(input_ids=ids, labels=ids).loss)
        yield [(layer.get_base_layer().weight + update_of(layer), update_of(layer)) for layer in layers]


def _slope(norm: Any, rank_stabilised: bool, ranks: Sequence[int], seeds: int, name: str) -> Measurement:
    """Returns the slope of log(norm) over log(rank), one per seed, on a linear layer of 576 × 576."""

    def norm_at(seed: int, rank: int) -> float:
        layer = lora_layer(576, 576, rank=rank, alpha=16, seed=seed, use_rslora=rank_stabilised)
        return float(norm(layer, *regression(seed, 64, 576)))

    return log_slope(ranks, seeds, norm_at, name, "rank", "a linear layer, 576 × 576")

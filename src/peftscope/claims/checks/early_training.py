"""The first training steps of a LoRA layer as its rank or its width grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from peftscope.claims.lora_subjects import descend, factor_of, lora_layer, regression
from peftscope.claims.measurement import Measurement, log_slope

WIDTH = 256
"""The inputs and outputs of the layer whose rank grows."""
LAYER = f"a linear layer, {WIDTH} × {WIDTH}"
EXAMPLES = 8
FEATURE_CHANGE = 0.5
"""The root mean square of each part of the features' change at rates that count as efficient."""


RATES = {"SGD": 1e-5, "Adam": 1e-4}
"""Rates at which training changes outputs a little. Plain gradient descent at 1e-3 diverges with the factor α/√r."""


def loss_drop_slope(rank_stabilised: bool, ranks: Sequence[int], seeds: int, steps: int) -> Measurement:
    """Returns the log-log slope of how far the loss falls in the first steps against the rank, at fixed alpha.

    Squared error to random targets, Adam at a rate of 1e-4; one slope for each seed of the data and of A.
    Source: Schulman et al. 2025, LoRA Without Regret.
    """

    def drop(seed: int, rank: int) -> float:
        x, target = regression(seed, EXAMPLES, WIDTH)
        layer = lora_layer(WIDTH, WIDTH, rank=rank, alpha=16, seed=seed, use_rslora=rank_stabilised)
        before = _loss(layer, x, target)
        _train(layer, x, target, torch.optim.Adam(_factors(layer), lr=1e-4), steps)
        return before - _loss(layer, x, target)

    return log_slope(ranks, seeds, drop, "fall of the loss", "rank", LAYER)


def moment_slope(
    where: Literal["output", "input gradient"],
    rank_stabilised: bool,
    optimizer: Literal["SGD", "Adam"],
    ranks: Sequence[int],
    seeds: int,
    starts: int,
) -> Measurement:
    """Returns the log-log slope of an adapter's output, or of the gradient at its input, against the rank.

    The root mean square is taken after training, over the training inputs, of the mean over ``starts`` random A, since
    the theorem is one in expectation over A. Source: Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2.

    Args:
        where: The adapter's output s B A x, or s Aᵀ Bᵀ v, the gradient at its input, v as at first.
        rank_stabilised: Whether s is alpha / √rank instead of alpha / rank.
        optimizer: Plain gradient descent, as in the theorem's proof, or Adam.
        ranks: The ranks.
        seeds: The number of data sets, each of which gives one slope.
        starts: The number of random A that are averaged; 1 shows the size for a single A.
    """

    def size(seed: int, rank: int) -> float:
        x, target = regression(seed, EXAMPLES, WIDTH)
        total, squares = torch.zeros(EXAMPLES, WIDTH), 0.0
        for start in range(starts):
            layer = lora_layer(WIDTH, WIDTH, rank=rank, alpha=16, seed=1000 * seed + start, use_rslora=rank_stabilised)
            above = (layer(x) - target).detach()
            update = getattr(torch.optim, optimizer)(_factors(layer), lr=RATES[optimizer])
            _train(layer, x, target, update, steps=5)
            a, b, scale = factor_of(layer, "A").detach(), factor_of(layer, "B").detach(), layer.scaling["default"]
            found = scale * (x @ a.T @ b.T if where == "output" else above @ b @ a)
            total += found
            squares += float(found.square().mean()) / starts
        square = float((total / starts).square().mean())
        if starts > 1:  # without the variance that so few starts leave in their mean
            square -= (squares - square) / (starts - 1)
        return math.sqrt(square)

    return log_slope(ranks, seeds, size, f"root mean square of the {where}", "rank", LAYER)


def efficient_rate_slope(widths: Sequence[int], seeds: int, steps: int = 10) -> Measurement:
    """Returns the log-log slope of the ratio of B's to A's efficient learning rate against the width, under Adam.

    Rates are efficient if both factors move the features by an amount that does not depend on the width:
    B A₀ x and B (A − A₀) x both have a root mean square of ``FEATURE_CHANGE`` after training. Both are solved for.
    Source: Hayou et al. 2024, arXiv 2402.12354.
    """

    def ratio(seed: int, width: int) -> float:
        rate_a, rate_b = 1 / width, 0.1
        for _ in range(8):
            by_a, by_b = _feature_changes(width, seed, rate_a, rate_b, steps)
            rate_a, rate_b = rate_a * math.sqrt(by_b / by_a), rate_b * math.sqrt(FEATURE_CHANGE / by_b)
        return rate_b / rate_a

    return log_slope(widths, seeds, ratio, "rate of B over rate of A", "width", "a linear layer")


def _feature_changes(width: int, seed: int, rate_a: float, rate_b: float, steps: int) -> tuple[float, float]:
    """Returns the sizes of both parts of the features' change: through A's update, and through B alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES, width, generator=generator)
    head = torch.randn(width, generator=generator) / width**0.5
    labels = torch.randn(EXAMPLES, generator=generator).sign()
    layer = lora_layer(width, width, rank=4, alpha=4, seed=seed)
    start = factor_of(layer, "A").detach().clone()
    groups = [{"params": [factor_of(layer, "A")], "lr": rate_a}, {"params": [factor_of(layer, "B")], "lr": rate_b}]
    optimizer = torch.optim.Adam(groups, eps=1e-30)
    descend(optimizer, lambda: (-(layer(x) @ head) * labels).mean(), steps)
    left = factor_of(layer, "B").detach()
    parts = ((factor_of(layer, "A").detach() - start), start)
    by_a, by_b = (float((x @ right.T @ left.T).square().mean().sqrt()) for right in parts)
    return by_a, by_b


def _factors(layer: Any) -> list[Any]:
    return [factor_of(layer, "A"), factor_of(layer, "B")]


def _loss(layer: Any, x: Any, target: Any) -> float:
    return float((layer(x) - target).detach().square().mean())


def _train(layer: Any, x: Any, target: Any, optimizer: Any, steps: int) -> None:
    """Trains on the sum of squared errors of each example, whose gradient at the outputs is of order 1."""
    descend(optimizer, lambda: (layer(x) - target).square().sum() / 2, steps)

"""Training of weights that are stored in four bits, on a regression small enough to repeat many times."""

from __future__ import annotations

from functools import cache

import torch

from peftscope.claims.checks.codes import CodeBook
from peftscope.claims.measurement import Measurement

WIDTH = 64
RATES = tuple(10 ** (exponent / 4) for exponent in range(-7, 8))
SHIFTS = (0.02, 0.05, 0.1, 0.2)
ROUNDED = ("new constants each step", "constants kept")
LORA, SHADOW = "LoRA", "shadow weights"
STEPS, BATCH, RANK, TRUE_RANK = 300, 16, 8, 4


def share_of_lora_gain(shift: float, seeds: int = 2) -> Measurement:
    """Returns the share of LoRA's gain that SGD reaches on 4-bit weights that are rounded after each step.

    A linear map of 64 inputs, whose variances fall like 1/index, learns a change of rank 4 from noiseless batches. All
    arms start from the same NF4 weights and run plain SGD at the best of 15 learning rates; the score is their exact
    expected loss. Rounding either recomputes each block's constant or keeps it, and the better of the two counts.
    Shadow weights are kept in full precision and rounded for each gradient.

    Args:
        shift: The norm of the change divided by that of the weights; one of ``SHIFTS``.
        seeds: The number of regressions to average over.
    """
    gains: dict[str, dict[float, float]] = {name: {} for name in (*ROUNDED, LORA, SHADOW)}
    moved: dict[float, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices this small, threads cost more time than they save
    for size in SHIFTS:
        runs = [_train(size, seed) for seed in range(seeds)]
        for name, by_shift in gains.items():
            by_shift[size] = sum(float(1 - losses[name].min()) for losses, _ in runs) / seeds
        moved[size] = sum(float(changed[losses[ROUNDED[1]].argmin()]) for losses, changed in runs) / seeds
    torch.set_num_threads(threads)
    shares = {name: {s: gains[name][s] / gains[LORA][s] for s in SHIFTS} for name in (*ROUNDED, SHADOW)}
    return Measurement(
        max(shares[name][shift] for name in ROUNDED),
        n=seeds,
        evidence={
            "share of the loss that LoRA removes": gains[LORA][shift],
            **{f"share of LoRA's gain, {name}": share[shift] for name, share in shares.items()},
            "weights that ever change their level, constants kept": moved[shift],
        },
        curves={**shares, "weights that ever change their level, constants kept": moved},
        axes=("norm of the change over norm of the weights", "share of LoRA's gain"),
        model="linear regression, 64 × 64",
    )


@cache
def _train(shift: float, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns for every rate each arm's loss after training divided by that before, and the share of moved weights.

    The second result is the share of weights that ever change their level, with constants kept.
    """
    book = CodeBook("nf4")
    book.levels = book.levels.double()  # in single precision, results would depend on the number of threads
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    variances = 1 / torch.arange(1, WIDTH + 1, dtype=torch.float64)
    mixing = torch.linalg.qr(normal(WIDTH, WIDTH)).Q * (variances / variances.sum()).sqrt()
    weight = normal(WIDTH, WIDTH) / WIDTH**0.5
    change = normal(WIDTH, TRUE_RANK) @ normal(TRUE_RANK, WIDTH)
    target = weight + shift * weight.norm() / change.norm() * change
    rates = torch.tensor(RATES, dtype=torch.float64).view(-1, 1, 1)

    def loss(weights: torch.Tensor) -> torch.Tensor:
        return ((weights - target) @ mixing).square().sum((-2, -1))

    def step(weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return rates * 2 * ((weights - target) @ inputs.T) @ inputs / BATCH

    first, constants = book.encoded(weight, WIDTH)
    start = (book.levels[first] * constants).expand(len(RATES), -1, -1)
    anew = kept = shadow = start
    moved = torch.zeros_like(start, dtype=torch.bool)
    down, up = normal(RANK, WIDTH) / WIDTH**0.5, torch.zeros(len(RATES), WIDTH, RANK, dtype=torch.float64)
    for _ in range(STEPS):
        inputs = normal(BATCH, WIDTH) @ mixing.T
        anew = book.rounded_by_definition(anew - step(anew, inputs), WIDTH)
        index = book.nearest((kept - step(kept, inputs)) / constants)
        kept, moved = book.levels[index] * constants, moved | (index != first)
        shadow = shadow - step(book.rounded_by_definition(shadow, WIDTH), inputs)
        through = step(start + up @ down, inputs)
        up, down = up - through @ down.mT, down - up.mT @ through
    ends = (anew, kept, start + up @ down, book.rounded_by_definition(shadow, WIDTH))
    losses = [(loss(weights) / loss(start)).nan_to_num(torch.inf) for weights in ends]
    return dict(zip((*ROUNDED, LORA, SHADOW), losses, strict=True)), moved.float().mean((1, 2))

"""The update of a weight matrix by training: the size, the rank and the directions of its update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from peftscope.spec import RunSpec

ENERGY = 0.9 - 1e-9
"""The share of the energy that ``rank_90`` has to hold, less the rounding of sums."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""The ranks at which the share of an update's energy is told."""
LEADING = 10
"""The leading singular vectors among which intruders are counted."""
COSINES = (0.3, 0.5, 0.7)
"""The cosines below which a vector resembles none of the pretrained ones."""
GRID_BLOCK, GRID_STEPS = 32, 15
"""Values that share a scale in a 4-bit file such as SmolLM2's, and the steps between their lowest and highest."""


def updated_matrices(model: Any, base: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yields the name of each linear layer inside the blocks, and its weight before and after the training, in fp32.

    The model has adapters of LoRA, DoRA or AdaLoRA, or is fully fine-tuned; ``base`` has the weights before the
    training by the names that they have without adapters.
    """
    for name, module in model.named_modules():
        plain = name.removeprefix("base_model.model.")
        before = base.get(f"{plain}.weight")
        if before is None or before.ndim != 2 or ".layers." not in plain:
            continue
        before = before.float()
        if not hasattr(module, "get_delta_weight"):
            yield plain, before, module.weight.detach().float().cpu()
            continue
        after = before + module.get_delta_weight("default").detach().float().cpu()
        if "default" in getattr(module, "lora_magnitude_vector", {}):
            magnitude = module.lora_magnitude_vector["default"].weight.detach().float().cpu()
            after *= (magnitude / after.norm(dim=1))[:, None]
        yield plain, before, after


def energies(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the squares of a matrix's singular values in descending order, in fp64."""
    return torch.linalg.eigvalsh(_gram(matrix)).clamp(min=0).flip(0)


def singular_vectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (rows, side) left and (columns, side) right singular vectors in fp64, those of the largest values first.

    ``side`` is the smaller side. Vectors of the value zero have no partner on the longer side, and are zero there.
    """
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh(_gram(matrix))
    values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
    rounding = 1e-14 * values[0]
    scale = torch.where(values > rounding, values.rsqrt(), 0.0)
    tall = matrix.shape[0] > matrix.shape[1]
    others = (matrix if tall else matrix.T) @ vectors * scale
    return (others, vectors) if tall else (vectors, others)


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the product of a matrix with itself over its longer side. Its eigenvalues are squared singular values."""
    matrix = matrix.double()
    return matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T


def spectrum(squares: torch.Tensor) -> dict[str, float]:
    """Returns what the squares of singular values say of a matrix's rank.

    ``rank_90`` singular values hold 90 % of the energy. ``stable_rank`` is the energy over its largest part.
    ``energy_K`` is the share in the largest K.

    >>> spectrum(torch.tensor([8.0, 1.0, 1.0]))
    {'rank_90': 2, 'stable_rank': 1.25, 'energy_1': 0.8, 'energy_2': 0.9}
    """
    total = squares.sum()
    if total == 0:
        return {"rank_90": 0, "stable_rank": 0.0}
    shares = squares.double().cumsum(0) / total
    within = [rank for rank in RANKS if rank <= len(shares)]
    return {
        "rank_90": int((shares < ENERGY).sum()) + 1,
        "stable_rank": float(total / squares[0]),
        **{f"energy_{rank}": float(shares[rank - 1]) for rank in within},
    }


def entropy(squares: torch.Tensor) -> dict[str, float]:
    """Returns the entropies in nats of singular values, and of their squares, each as shares of their sum.

    >>> entropy(torch.tensor([1.0, 1.0, 0.0]))
    {'entropy_values': 0.693147, 'entropy_energies': 0.693147}
    """
    wholes = {"values": squares.double().sqrt(), "energies": squares.double()}
    shares = {name: parts / parts.sum() for name, parts in wholes.items()}
    return {f"entropy_{name}": round(float(torch.special.entr(each).sum()), 6) for name, each in shares.items()}


def weights_before(base: Any, spec: RunSpec) -> dict[str, torch.Tensor]:
    """Returns the base's weights on the host by name, or none if the run's updates cannot be told from them."""
    method = spec.method
    if method.quantization() or spec.shards > 1 or not (method.trains_base or method.plain_update):
        return {}
    frozen = not method.trains_base and spec.device == "cpu"
    return {name: p.detach() if frozen else p.detach().cpu().clone() for name, p in base.named_parameters()}


@torch.no_grad()
def update_spectra(model: Any, before: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Returns by kind of matrix (``q_proj``, ...) the mean over layers of what the spectrum of its update says.

    Beside the values of ``spectrum``, these are ``relative_size``, the update's norm over the weight's, and the
    entropies of ``entropy``. Updates of zero are left out.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for name, old, new in updated_matrices(model, before):
        if (update := new - old).any():
            squares = energies(update)
            of = {"relative_size": float(update.norm() / old.norm()), **spectrum(squares), **entropy(squares)}
            found.setdefault(name.rpartition(".")[2], []).append(of)
    return {kind: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} for kind, rows in found.items()}


def decomposed_change(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Returns the mean change of the norms of weight vectors, and of their directions (1 minus the cosine).

    A weight vector has the weights of one output, which is a row in PyTorch's layout.
    Source: Liu et al. 2024, arXiv 2402.09353, section 3.2.
    """
    magnitude = (after.norm(dim=1) - before.norm(dim=1)).abs().mean()
    direction = 1 - torch.cosine_similarity(before.double(), after.double(), dim=1)
    return float(magnitude), float(direction.mean())


def intruders(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Returns how many leading left singular vectors of a trained matrix resemble none of the pretrained ones.

    There is one number for each of ``COSINES``. Source: Shuttleworth et al. 2024, arXiv 2410.21228.
    """
    old, new = (singular_vectors(matrix)[0] for matrix in (before, after))
    nearest = (old.T @ new[:, :LEADING]).abs().amax(dim=0)
    return [int((nearest < cosine).sum()) for cosine in COSINES]


def amplification(before: torch.Tensor, update: torch.Tensor, rank: int) -> float:
    """Returns the norm of an update over that of the pretrained matrix in its ``rank`` leading directions.

    Source: Hu et al. 2021, arXiv 2106.09685, section 7.3.
    """
    left, right = (vectors[:, :rank] for vectors in singular_vectors(update))
    return float(update.norm() / (left.T @ before.double() @ right).norm())


def leading_directions(update: torch.Tensor, count: int) -> torch.Tensor:
    """Returns (smaller side, count) singular vectors on the smaller side, those of the largest values first."""
    vectors = torch.linalg.eigh(_gram(update)).eigenvectors
    return vectors.flip(1)[:, :count].to(update.dtype)


def cut(update: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Returns the best approximation of an update by a matrix of low rank, from its leading directions."""
    if update.shape[0] > update.shape[1]:
        return update @ directions @ directions.T
    return directions @ (directions.T @ update)


def grid_noise(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns what rounding to a 4-bit grid of a weight's own scale changes: uniform within half a step of each block.

    Source: the format Q4_1 of llama.cpp, blocks of 32 values with a scale and an offset.
    """
    block = GRID_BLOCK if weight.shape[1] % GRID_BLOCK == 0 else weight.shape[1]
    blocks = weight.reshape(weight.shape[0], -1, block)
    step = (blocks.amax(-1) - blocks.amin(-1)) / GRID_STEPS
    return ((torch.rand(blocks.shape, generator=generator) - 0.5) * step[..., None]).reshape(weight.shape)

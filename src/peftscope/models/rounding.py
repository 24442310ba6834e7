"""Weights rounded to normal-float codes of few bits and kept in their dtype: a simulation, because nothing is packed.

Source: Dettmers et al. 2023, arXiv 2305.14314, section 3, for the quantiles of the codes; Li et al. 2023, arXiv
2310.08659, for codes of fewer bits.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from peftscope.models.stored import BLOCK

if TYPE_CHECKING:
    import torch

OFFSET = 0.9677083
"""The quantile of the outermost levels, that of bitsandbytes."""


def normal_float_levels(bits: int) -> list[float]:
    """Returns the levels of a normal-float code in ascending order, scaled to -1 to 1: one more above zero than below.

    >>> [round(level, 4) for level in normal_float_levels(2)]
    [-1.0, 0.0, 0.3379, 1.0]
    """
    half = 2 ** (bits - 1)
    above, below = (
        [NormalDist().inv_cdf(OFFSET + (0.5 - OFFSET) * step / count) for step in range(count)]
        for count in (half, half - 1)
    )
    return sorted([level / above[0] for level in above] + [0.0] + [-level / above[0] for level in below])


def rounded(weight: torch.Tensor, code: str) -> torch.Tensor:
    """Returns the nearest values of ``nf2``, ``nf3`` or ``nf4``, in the weight's dtype. Zeros fill the last block."""
    import torch

    levels = torch.tensor(normal_float_levels(int(code[2:])), device=weight.device)
    values = weight.float().flatten()
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    constants = blocks.abs().amax(1, keepdim=True)
    index = torch.bucketize(
        blocks / constants.clamp_min(torch.finfo().tiny), (levels[1:] + levels[:-1]) / 2, out_int32=True
    )
    return (levels[index] * constants).flatten()[: values.numel()].view_as(weight).to(weight.dtype)


def linear_layers(model: Any) -> list[Any]:
    """Returns the linear layers that 4-bit loading would quantise: all but the output embeddings."""
    import torch

    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def round_linear_weights(model: Any, code: str) -> None:
    """Rounds the weights of a model's linear layers in place."""
    import torch

    with torch.no_grad():
        for layer in linear_layers(model):
            layer.weight.copy_(rounded(layer.weight, code))

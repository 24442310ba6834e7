"""Optimizers that runs of this project do not have: what each keeps of a weight, and takes for its step. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from peftscope.memory.tape import Dims

LARGE_STATE = 4096
"""Tensors smaller than this keep 32-bit states."""
STATE_BLOCK = 256
"""Values that share one constant in bitsandbytes' 8-bit optimizer states, and in torchao's."""
FOUR_BIT_BLOCK = 128
"""The same in torchao's 4-bit states."""

Tensors = list[tuple[Dims, float]]

OTHER_OPTIMIZERS = {
    "adamw_torch_4bit": "torchao at 0372e5f, optim/adam.py: two states in 4 bits",
    "adafactor": "transformers 5.24, optimization.py, Adafactor.step without a first moment",
    "lion": "bitsandbytes 0.50, optim/lion.py: one state in 32 bits",
    "lion_8bit": "bitsandbytes 0.50, optim/lion.py: one state in 8 bits",
    "muon": "torch 2.13, optim/_muon.py, on matrices of layers; AdamW elsewhere",
    "galore": "GaLore at 55b8419, galore_projector.py, on matrices of layers; AdamW elsewhere",
    "apollo": "arXiv 2412.05270, table 1, on matrices of layers; AdamW elsewhere",
}
"""The names that ``optimizer`` takes beside those of a run, and the code or table that says what they keep."""


def states_of(name: str, dims: Dims, width: float, sizes: Mapping[str, int], *, layer: bool) -> tuple[Tensors, Tensors]:
    """Returns the states of a weight, which may belong to a layer, and the temporaries of its step."""
    matrix = len(dims) > 1
    if name == "adafactor":  # gradient, weight and update in 32 bits, and the update once more with another sign
        states = [(dims[:-1], 4.0), (dims[:-2] + dims[-1:], 4.0)] if matrix else [(dims, 4.0)]
        return states, [(dims, 4.0)] * 4
    if name.startswith("lion"):
        small = name == "lion_8bit" and prod(sizes[dim] for dim in dims) >= LARGE_STATE
        return [(dims, 1.0), (dims, 4 / STATE_BLOCK)] if small else [(dims, 4.0)], []
    if name == "adamw_torch_4bit":  # compiled: its step makes no copies
        small = prod(sizes[dim] for dim in dims) >= LARGE_STATE
        return ([(dims, 0.5), (dims, 4 / FOUR_BIT_BLOCK)] if small else [(dims, width)]) * 2, []
    if not (matrix and layer):
        return [(dims, width)] * 2, []
    if name == "muon":
        return [(dims, width)], [(dims, width), (dims, 2.0), (dims, 2.0)]
    short, long = sorted(dims[-2:], key=lambda dim: sizes[dim])
    moments: Tensors = [((*dims[:-2], long, "o"), width)] * 2
    projection: Tensors = [((*dims[:-2], short, "o"), width)]
    if name == "apollo":  # draws its projection anew from a seed
        return moments, projection
    return moments + projection, [(dims, 4.0)] * 2  # a decomposition in 32 bits

"""Worlds in which torch, bitsandbytes or gguf compute otherwise, for the table of ``test_mutations.py``."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from gguf import quants
from worlds_of_peft import World, around, instead, without_text

from peftscope.claims.checks import codes, four_bit, initialisation, memory, merging, timing
from peftscope.methods import loftq
from peftscope.methods.qlora import QLoRA


def nothing(patch: pytest.MonkeyPatch) -> None:
    """The libraries are as they are; the ledger's numbers differ."""


# Optimizers and gradients.

resting_optimizer = instead(torch.optim.AdamW, "step", lambda self, closure=None: None)
gradient_descent = instead(torch.optim, "Adam", lambda groups, eps, **_: torch.optim.SGD(groups))
states_in_16_bits = instead(Optimizer8bit, "get_state_buffer", lambda self, p, dtype=None: torch.zeros_like(p))


def states_in_32_bits(patch: pytest.MonkeyPatch) -> None:
    """torch keeps its moments in 32 bits."""
    like = torch.zeros_like
    patch.setattr(torch, "zeros_like", lambda tensor, **options: like(tensor, **options | {"dtype": torch.float32}))
    patch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, closure=None: self._init_group(self.param_groups[0], [], [], [], [], [], []),
    )


def rates_over_the_width(patch: pytest.MonkeyPatch) -> None:
    """Adam divides the rate of every matrix by its number of inputs."""
    original = torch.optim.Adam

    def adam(groups: Any, **options: Any) -> torch.optim.Adam:
        scaled = [group | {"lr": 64 * group["lr"] / group["params"][0].shape[1]} for group in groups[:1]]
        return original([*scaled, *groups[1:]], **options)

    patch.setattr(torch.optim, "Adam", adam)


# The codes of 4 bits, and their constants.


def quantising(change: Any) -> World:
    """Returns the world in which bitsandbytes quantises as is made of how it does."""
    return around(functional, "quantize_4bit", change)


def afterwards(change: Any) -> World:
    """Returns the world in which what bitsandbytes has quantised is changed: its codes and its state."""

    def changed(original: Any) -> Any:
        def quantise(*args: Any, **options: Any) -> Any:
            packed, state = original(*args, **options)
            return change(packed, state)

        return quantise

    return quantising(changed)


def _in_half_precision(packed: Any, state: Any) -> Any:
    state.absmax = state.absmax.half()
    return packed, state


def _with_more(packed: Any, state: Any) -> Any:
    state.state2.absmax = torch.zeros(int(0.24 * packed.numel() * 2 / 32))
    return packed, state


even_nf4 = instead(functional, "get_4bit_type", lambda name, device=None, blocksize=64: torch.linspace(-1, 1, 16))
poor_nf4 = quantising(lambda original: lambda values, **options: original(values + 0.1, **options))
no_double_quantization = quantising(
    lambda original: lambda *args, **options: original(*args, **options | {"compress_statistics": False})
)
unpacked_codes = afterwards(lambda packed, state: (packed.repeat(2, 1), state))
constants_in_half_precision = afterwards(_in_half_precision)
more_constants = afterwards(_with_more)
cubed_gguf = around(quants, "dequantize", lambda original: lambda *given: original(*given) ** 3)
integers_of_16_levels = instead(
    functional, "create_linear_map", lambda signed, total_bits: (torch.arange(-8, 8) / 8).repeat(16).sort().values
)
nothing_to_fit = instead(codes, "_fitted", lambda block: codes.CodeBook("nf4"))


def base_on_the_grid(patch: pytest.MonkeyPatch) -> None:
    """The 16-bit base holds what 4 bits hold, so that nothing is lost between the two."""
    merging._merged_losses.cache_clear()
    on_the_grid = merging._dequantised_llama()
    patch.setattr(merging, "tiny_llama", lambda dtype: deepcopy(on_the_grid))


def large_constants(patch: pytest.MonkeyPatch) -> None:
    """The constants of double quantization come back several times too large."""
    patch.setitem(functional.name2qmap, "dynamic", torch.linspace(5, 9, 256))


def even_levels_for_even_values(patch: pytest.MonkeyPatch) -> None:
    even_nf4(patch)
    patch.setattr(codes, "_matrices", lambda model: [2 * torch.rand(256, 256) - 1 for _ in range(4)])


def heavy_tails(patch: pytest.MonkeyPatch) -> None:
    """The weights are the cubes of what they were."""
    weights = codes.weight_matrices
    patch.setattr(codes, "weight_matrices", lambda model: ((name, matrix**3) for name, matrix in weights(model)))


# Layers of 4 bits.


def products_of_4_bit_floats(patch: pytest.MonkeyPatch) -> None:
    original = four_bit._kernels

    def kernels(layer: Any, inputs: torch.Tensor) -> list[tuple[str, list[str]]]:
        return [
            (name, ["bfloat16", "float4_e2m1fn_x2"] if name == "aten::linear" else t)
            for name, t in original(layer, inputs)
        ]

    patch.setattr(four_bit, "_kernels", kernels)


def quantised_just_in_time(patch: pytest.MonkeyPatch) -> None:
    multiply = bitsandbytes.matmul_4bit

    def just_in_time(inputs: torch.Tensor, weight: Params4bit, bias: Any = None, quant_state: Any = None) -> Any:
        dense = functional.dequantize_4bit(weight.data, quant_state)
        packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
        return multiply(inputs, packed, bias=bias, quant_state=state)

    patch.setattr(bitsandbytes, "matmul_4bit", just_in_time)


def layers_that_write_to_their_weights(patch: pytest.MonkeyPatch) -> None:
    forward = Linear4bit.forward

    def writes(layer: Linear4bit, inputs: torch.Tensor) -> torch.Tensor:
        layer.weight.data[0] ^= 1
        return forward(layer, inputs)

    patch.setattr(Linear4bit, "forward", writes)


no_gradients_through_4_bits = around(Linear4bit, "forward", lambda original: lambda self, x: original(self, x.detach()))


def plain_recipe(patch: pytest.MonkeyPatch) -> None:
    """QLoRA leaves its constants in 32 bits."""
    original = QLoRA.quantization
    patch.setattr(QLoRA, "quantization", lambda self: original(self.model_copy(update={"double_quant": False})))
    memory._asked.cache_clear()


# Algebra, starts and times.


class _RoundedSolution:
    def __init__(self, found: Any) -> None:
        self.solution = found.solution.half().double()


ranks_that_count_rounding = around(
    torch.linalg, "matrix_rank", lambda original: lambda matrix, **options: original(matrix, **options) + 1
)
least_squares_in_16_bits = around(
    torch.linalg, "lstsq", lambda original: lambda columns, matrix: _RoundedSolution(original(columns, matrix))
)
useless_qpissa = instead(initialisation, "_qpissa", lambda weight, rank, iterations: weight * 0)
one_iteration_of_loftq = around(
    initialisation, "_own_start", lambda original: lambda weight, rank, alpha, _: original(weight, rank, alpha, 1)
)
loftq_that_doubles_the_error = instead(
    initialisation, "_own_start", lambda weight, rank, alpha, iterations: 2 * initialisation._nf4(weight) - weight
)
loftq_that_ignores_the_scale = without_text(loftq.LoftQ, "_initialise", loftq, " / scale**0.5")
swapped_times = around(timing, "_paired", lambda original: lambda above, below, *rest: original(below, above, *rest))
"""The slower of two works is the faster one."""

"""Checks of adapters and gradients: against hand-computed values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from peftscope.claims.checks import adapters, gradients
from peftscope.claims.lora_subjects import (
    factor_a,
    factor_b,
    four_bit,
    lora_layer,
    lora_layers,
    lora_model,
    randomise_b,
)
from peftscope.claims.subjects import tiny_llama, token_ids


@pytest.mark.parametrize(("alpha", "rank", "expected"), [(8, 8, 1), (16, 8, 2), (16, 64, 0.25), (32, 4, 8)])
def test_scale_is_alpha_over_rank(alpha: float, rank: int, expected: float) -> None:
    assert adapters.scale(rank, alpha).value == pytest.approx(expected, rel=1e-5)


def test_rank_stabilised_scale_is_alpha_over_root_of_rank() -> None:
    assert adapters.scale(16, 8, rank_stabilised=True).value == pytest.approx(2, rel=1e-5)


def test_shapes_are_those_of_the_paper_not_of_the_chapters_first_section() -> None:
    found = adapters.factor_shape("A")
    assert found.value == "r × n"
    assert found.evidence == {"A": "r × n", "B": "m × r", "W": "m × n"}


def test_formula_without_scale_is_off_by_the_missing_half_of_the_adapter() -> None:
    layer = lora_layer(256, 192, rank=8, alpha=16)
    randomise_b(layer)
    x = torch.randn(32, 256)
    missing = ((x @ factor_a(layer).T) @ factor_b(layer).T).abs().max() / layer(x).abs().max()
    assert adapters.formula_error(8, 16, with_scale=False).value == pytest.approx(missing.item(), rel=1e-4)
    assert adapters.formula_error(8, 16, with_scale=True).value < 1e-6
    assert adapters.formula_error(8, 8, with_scale=False).value < 1e-6


def test_lora_starts_bitwise_at_its_base_also_with_a_zero_a_and_others_up_to_rounding() -> None:
    assert adapters.start_shift("lora").value == 0
    assert float(adapters.start_shift("dora").value) < 1e-5
    assert float(adapters.start_shift("adalora").value) < 1e-5
    assert float(adapters.start_shift("swapped").value) == 0


def test_default_init_is_uniform_and_gaussian_has_the_spread_of_one_over_rank() -> None:
    """Trap 9 of the ledger: a sweep over ranks changes the spread of PEFT's gaussian option."""
    uniform = adapters.distance_from_normal(True, rank=8, inputs=4096)
    assert float(uniform.evidence["distance to the uniform distribution of this spread"]) < 0.01
    assert uniform.evidence["spread × √inputs"] == pytest.approx(1 / math.sqrt(3), rel=0.01)
    assert uniform.evidence["spread at rank 1 over spread at rank 64"] == pytest.approx(1, rel=0.03)
    gaussian = adapters.distance_from_normal("gaussian", rank=8, inputs=4096)
    assert gaussian.evidence["spread × rank"] == pytest.approx(1, rel=0.02)
    assert gaussian.evidence["spread at rank 1 over spread at rank 64"] == pytest.approx(64, rel=0.03)


def test_only_b_has_a_gradient_in_the_first_step() -> None:
    """Trap 22: A's gradient is exactly zero there."""
    assert gradients.share_with_gradient("A", step=1).value == 0
    assert gradients.share_with_gradient("A", step=2).value == 1
    assert gradients.share_with_gradient("B", step=1).value == 1


def test_equal_rows_of_a_stay_equal() -> None:
    assert gradients.rank_from_equal_rows(3, rank=4, equal=True).value == 1
    assert gradients.rank_from_equal_rows(3, rank=4, equal=False).value == 4


def test_dropout_zeroes_the_input_of_a_and_nothing_else() -> None:
    found = adapters.zeros_in_factors(0.3)
    assert found.value == 0
    assert found.evidence["in the input of A"] == pytest.approx(0.3, abs=0.02)
    assert found.evidence["in the input of W₀"] == 0
    assert found.evidence["in the input of B"] == 0


def test_4_bit_layers_keep_their_gradients_after_an_evaluation_pass() -> None:
    """bitsandbytes repacks weights in evaluation passes on some CPUs; gradients after that are wrong."""
    model = lora_model(four_bit(tiny_llama()))
    for layer in lora_layers(model).values():
        randomise_b(layer)
    ids = token_ids(model)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([factor_a(layer).grad.flatten() for layer in lora_layers(model).values()])

    before = gradient()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    torch.testing.assert_close(gradient(), before, rtol=1e-4, atol=1e-6)


def test_names_of_the_chapter_are_llamas() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = {
        family: adapters.targets_found(family, names).value for family in ("llama", "mistral", "qwen2", "phi3", "gpt2")
    }
    assert found == {"llama": 7, "mistral": 7, "qwen2": 7, "phi3": 2, "gpt2": 0}


def test_a_random_b_changes_the_loss_the_more_the_wider_it_is(toy: Path) -> None:
    found = adapters.loss_jump("toy", spread=0.01)
    jumps = [abs(jump) for jump in found.curves["rise"].values()]
    assert list(found.curves["rise"]) == list(adapters.SPREADS)
    assert jumps == sorted(jumps)
    assert found.value == pytest.approx(0, abs=5e-3)
    assert found.n == len(found.samples) == 8 and found.low < found.value < found.high

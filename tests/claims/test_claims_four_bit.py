"""What 4-bit layers store and compute in."""

from __future__ import annotations

import pytest
import torch

from peftscope.claims.checks import four_bit


@pytest.mark.parametrize(("double_quant", "by_formula"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_stored_bits_are_the_formula_s(double_quant: bool, by_formula: float) -> None:
    measured = four_bit.bits_per_weight(double_quant, rows=2048, columns=2048)
    assert measured.value == pytest.approx(by_formula, rel=0.005)
    assert measured.value >= by_formula
    assert measured.value == pytest.approx(sum(measured.evidence.values()))


def test_constants_of_a_layer() -> None:
    plain = four_bit.dtype_of_constants(double_quant=False)
    assert plain.value == "float32"
    assert plain.evidence["bits of constants per weight"] == 0.5
    assert plain.evidence["weights per constant"] == 64
    double = four_bit.bits_of_a_constant(double_quant=True)
    assert (double.value, double.evidence["dtype"]) == (8, "uint8")
    assert double.evidence["constants per second-level constant"] == 256
    assert double.evidence["dtype of second-level constants"] == "float32"
    assert double.evidence["subtracted offset over the constants' mean"] == pytest.approx(1)
    assert four_bit.bits_of_a_constant(double_quant=False).value == 32


def test_a_forward_pass_dequantises_once_and_multiplies_in_the_compute_type() -> None:
    for trains in (True, False):
        found = four_bit.quantisations_in_a_forward_pass(trains)
        assert (found.value, found.evidence["dequantisations"]) == (0, 1)
    product = four_bit.bits_of_the_multiplied_weight("bfloat16")
    assert product.value == 16
    assert product.evidence["dtype of the weight"] == product.evidence["dtype of the input"] == "bfloat16"
    assert product.evidence["largest difference to the product with the dequantised weight"] == 0
    assert four_bit.bits_of_the_multiplied_weight("float32").value == 32
    stored = four_bit.bits_of_the_stored_weight()
    assert (stored.value, stored.evidence["dtype"], stored.evidence["bytes that a forward pass changed"]) == (
        4,
        "uint8",
        0,
    )


def test_adapters_on_a_bf16_base_are_fp32_in_memory_and_on_disk() -> None:
    found = four_bit.dtype_of_adapters("bfloat16")
    assert found.value == "float32"
    assert found.evidence["dtype of the embeddings"] == "bfloat16"
    assert found.evidence["bytes per value in the saved file"] == 4
    assert found.evidence["dtype of AdamW's moments"] == found.evidence["dtype of their gradients"] == "float32"


def test_training_moves_adapters_and_no_bit_of_the_base() -> None:
    found = four_bit.changed_base_bits(steps=5)
    assert found.value == 0
    assert found.n == 14
    assert (
        found.evidence["4-bit weights that ask for a gradient"] == found.evidence["4-bit weights with a gradient"] == 0
    )
    assert found.evidence["adapter matrices that moved"] == found.evidence["adapter matrices"] == 28
    assert found.evidence["at the last"] < found.evidence["loss at the first step"]


def test_every_option_of_a_layer_is_set() -> None:
    """bitsandbytes' own defaults are FP4 and whatever type the input has."""
    layer = four_bit._layer(64, 128, double_quant=False)
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.shape == (128, 64)
    assert not layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16
    assert layer.support_avx512bf16_for_cpu is False


def test_different_bits_are_counted() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])
    assert four_bit._different_bits(a, b) == 1
    assert four_bit._different_bits(torch.tensor([0, 255], dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)) == 8

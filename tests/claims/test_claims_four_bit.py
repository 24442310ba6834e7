"""What 4-bit layers store and compute in."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit

from peftscope.claims.checks import four_bit
from peftscope.claims.evaluate import evaluate_part
from peftscope.claims.ledger import Part, read_ledger
from peftscope.claims.verdict import Verdict

CLAIMS = {claim.id: claim for claim in read_ledger()}


def part(claim: str, index: int = -1) -> Part:
    return CLAIMS[claim].parts[index]


def verdict(claim: str, index: int = -1) -> Verdict:
    """The verdict on one part; measured on a smaller layer, where it says how large."""
    found = part(claim, index)
    if found.check in ("four_bit.bits_saved", "four_bit.bits_per_weight"):
        found = found.model_copy(update={"with_": found.with_ | {"rows": 2048, "columns": 2048}})
    return evaluate_part(found).verdict


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


def test_the_memory_model_gives_adapters_four_bytes_by_default() -> None:
    from peftscope.methods.qlora import QLoRA

    assert QLoRA().adapter_dtype == "fp32"


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


def test_an_evaluation_between_two_passes_leaves_gradients_as_they_were() -> None:
    def gradient(evaluate: bool) -> torch.Tensor:
        layer = four_bit._layer(64, 64, double_quant=True)
        inputs = four_bit._inputs(64)
        if evaluate:
            layer.eval()(inputs)
        layer.train()(inputs.requires_grad_()).float().square().sum().backward()
        assert inputs.grad is not None
        return inputs.grad

    assert torch.equal(gradient(False), gradient(True))


def test_different_bits_are_counted() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])
    assert four_bit._different_bits(a, b) == 1
    assert four_bit._different_bits(torch.tensor([0, 255], dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)) == 8


def test_constants_in_half_precision_would_refute_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S65") == Verdict.HOLDS
    quantise = functional.quantize_4bit

    def half(*args: Any, **options: Any) -> Any:
        packed, state = quantise(*args, **options)
        state.absmax = state.absmax.half()
        return packed, state

    monkeypatch.setattr(functional, "quantize_4bit", half)
    assert verdict("S65") == Verdict.WRONG
    assert four_bit.bits_per_weight(False, 1024, 1024).value == pytest.approx(4.25, rel=0.005)


def test_double_quantization_that_is_ignored_would_refute_the_claims_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = ("S66", "S67")
    assert [verdict(claim) for claim in claims] == [Verdict.HOLDS] * 2
    quantise = functional.quantize_4bit
    monkeypatch.setattr(
        functional,
        "quantize_4bit",
        lambda *args, **options: quantise(*args, **options | {"compress_statistics": False}),
    )
    assert [verdict(claim) for claim in claims] == [Verdict.WRONG] * 2


def test_4_37_bits_would_need_other_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S68") == Verdict.WRONG
    quantise = functional.quantize_4bit

    def with_more(*args: Any, **options: Any) -> Any:
        packed, state = quantise(*args, **options)
        state.state2.absmax = torch.zeros(int(0.24 * packed.numel() * 2 / 32))
        return packed, state

    monkeypatch.setattr(functional, "quantize_4bit", with_more)
    assert verdict("S68") == Verdict.HOLDS


def test_a_layer_that_quantised_just_in_time_would_support_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S54", 1) == Verdict.WRONG
    multiply = bitsandbytes.matmul_4bit

    def just_in_time(inputs: torch.Tensor, weight: Params4bit, bias: Any = None, quant_state: Any = None) -> Any:
        dense = functional.dequantize_4bit(weight.data, quant_state)
        packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
        return multiply(inputs, packed, bias=bias, quant_state=state)

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", just_in_time)
    assert verdict("S54", 1) == Verdict.HOLDS


def test_adapters_in_the_base_s_type_would_support_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S52") == Verdict.WRONG
    wrap = peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", lambda *args: wrap(*args, autocast_adapter_dtype=False))
    assert verdict("S52") == Verdict.HOLDS


def test_a_layer_that_writes_to_its_weight_would_refute_a_frozen_base(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S56") == Verdict.HOLDS
    forward = Linear4bit.forward

    def writes(layer: Linear4bit, inputs: torch.Tensor) -> torch.Tensor:
        layer.weight.data[0] ^= 1
        return forward(layer, inputs)

    monkeypatch.setattr(Linear4bit, "forward", writes)
    assert verdict("S56") == Verdict.WRONG

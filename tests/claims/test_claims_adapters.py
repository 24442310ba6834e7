"""Checks of adapters and gradients: against hand-computed values, and with the library's behaviour changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import BaseTuner

from peftscope.claims.checks import adapters, gradients
from peftscope.claims.evaluate import PartFinding, evaluate_part
from peftscope.claims.ledger import read_ledger
from peftscope.claims.lora_subjects import (
    backward_steps,
    factor_a,
    factor_b,
    four_bit,
    lora_layer,
    lora_layers,
    lora_model,
    randomise_b,
    update_of,
)
from peftscope.claims.measurement import NotRunError
from peftscope.claims.subjects import tiny_llama, token_ids
from peftscope.claims.verdict import Verdict


def finding(claim_id: str, part: int = -1) -> PartFinding:
    """Returns what is found now about a part of a claim; the last one decides."""
    return evaluate_part({claim.id: claim for claim in read_ledger()}[claim_id].parts[part])


def verdict(claim_id: str, part: int = -1) -> Verdict:
    return finding(claim_id, part).verdict


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


def test_equal_rows_of_a_stay_equal_and_keep_rank_one() -> None:
    model = lora_model(tiny_llama(dtype="float64"), rank=4)
    for layer in lora_layers(model).values():
        factor_a(layer).data.copy_(factor_a(layer).data[:1].repeat(4, 1))
    for _ in backward_steps(model, 3, learning_rate=0.1, optimizer="SGD"):
        pass
    for layer in lora_layers(model).values():
        singular = torch.linalg.svdvals(update_of(layer))
        assert singular[0] > 0
        assert singular[1] < 1e-9 * singular[0]
    assert gradients.rank_from_equal_rows(3, rank=4, equal=True).value == 1
    assert gradients.rank_from_equal_rows(3, rank=4, equal=False).value == 4


def test_dropout_zeroes_the_input_of_a_and_nothing_else() -> None:
    found = adapters.zeros_in_factors(0.3)
    assert found.value == 0
    assert found.evidence["in the input of A"] == pytest.approx(0.3, abs=0.02)
    assert found.evidence["in the input of W₀"] == 0
    assert found.evidence["in the input of B"] == 0


def test_dropout_of_everything_leaves_the_base() -> None:
    layer = lora_layer(16, 16, rank=4, lora_dropout=1.0).train()
    randomise_b(layer)
    x = torch.randn(8, 16)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_training_changes_every_adapter_tensor_and_no_base_tensor() -> None:
    found = gradients.base_tensors_changed(3)
    assert found.value == 0
    assert found.evidence["adapter tensors changed"] == found.evidence["adapter tensors"] == 28


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


def test_adapters_of_a_half_precision_base_are_fp32() -> None:
    """Trap 7: ``autocast_adapter_dtype``."""
    model = lora_model(tiny_llama(dtype="bfloat16"))
    assert {factor_a(layer).dtype for layer in lora_layers(model).values()} == {torch.float32}


def test_a_random_b_changes_the_loss_the_more_the_wider_it_is(toy: Path) -> None:
    found = adapters.loss_jump("toy", spread=0.01)
    jumps = [abs(jump) for jump in found.curves["rise"].values()]
    assert list(found.curves["rise"]) == list(adapters.SPREADS)
    assert jumps == sorted(jumps)
    assert found.value == pytest.approx(0, abs=5e-3)
    assert found.n == len(found.samples) == 8 and found.low < found.value < found.high


def test_a_model_that_was_not_fetched_is_asked_for() -> None:
    with pytest.raises(NotRunError, match="peftscope fetch smollm2-135m"):
        adapters.loss_jump("smollm2-135m", spread=0.577)


# Mutations: the library behaves otherwise, and the verdict follows.


def test_a_library_that_starts_b_at_random_refutes_the_unchanged_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S19") is Verdict.HOLDS
    assert verdict("S22", part=0) is Verdict.HOLDS
    assert verdict("S21", part=0) is Verdict.WRONG

    def random_b(self: Any, adapter_name: str, init_lora_weights: Any) -> None:
        torch.nn.init.normal_(self.lora_B[adapter_name].weight, std=0.1)

    monkeypatch.setattr(peft_layer.LoraLayer, "reset_lora_parameters", random_b)
    assert verdict("S19") is Verdict.WRONG
    assert verdict("S22", part=0) is Verdict.WRONG
    assert verdict("S21", part=0) is Verdict.HOLDS


def test_a_library_that_draws_normal_values_confirms_the_normal_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S20") is Verdict.WRONG
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, **_: torch.nn.init.normal_(tensor, std=0.02))
    assert verdict("S20") is Verdict.HOLDS


def test_a_library_that_ignores_the_scale_refutes_alpha_and_confirms_the_bare_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert verdict("S29") is Verdict.HOLDS
    assert verdict("S18") is Verdict.WRONG
    original = peft_layer.LoraLayer.update_layer

    def unscaled(self: Any, adapter_name: str, *args: Any, **options: Any) -> None:
        original(self, adapter_name, *args, **options)
        self.scaling[adapter_name] = 1.0

    monkeypatch.setattr(peft_layer.LoraLayer, "update_layer", unscaled)
    assert verdict("S29") is Verdict.WRONG
    assert verdict("S33", part=0) is Verdict.WRONG
    assert verdict("S18") is Verdict.HOLDS
    assert verdict("S102") is Verdict.WRONG


def test_a_library_that_drops_the_matrices_confirms_dropout_on_the_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S44") is Verdict.WRONG

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        linear, dropout = torch.nn.functional.linear, self.lora_dropout["default"]
        low = linear(x, dropout(self.lora_A["default"].weight))
        return self.base_layer(x) + linear(low, dropout(self.lora_B["default"].weight)) * self.scaling["default"]

    monkeypatch.setattr(peft_layer.Linear, "forward", forward)
    assert verdict("S44") is Verdict.HOLDS


def test_a_library_that_trains_the_norms_refutes_that_only_adapters_are_updated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert verdict("S53") is Verdict.HOLDS
    monkeypatch.setattr(BaseTuner, "_mark_only_adapters_as_trainable", lambda self, model: None)
    assert verdict("S53") is Verdict.WRONG


def test_a_library_that_stops_gradients_at_4_bit_weights_confirms_the_chapters_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bitsandbytes.nn import Linear4bit

    assert verdict("S55") is Verdict.WRONG
    original = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: original(self, x.detach()))
    assert verdict("S55") is Verdict.HOLDS


def test_a_library_with_another_default_rank_refutes_rank_8(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    assert verdict("S36", part=0) is Verdict.HOLDS
    original = LoraConfig.__init__
    monkeypatch.setattr(LoraConfig, "__init__", lambda self, *a, **k: original(self, *a, **{"r": 16, **k}))
    assert verdict("S36", part=0) is Verdict.WRONG

"""Merging, swapping, combining and resuming: the claims ledger's checks, and what they see when a library changes."""

from __future__ import annotations

import builtins
import math
from functools import cache
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear, Linear4bit, LoraLayer, LoraModel
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM

from peftscope.claims.checks import combining, merging, resuming, snippet
from peftscope.claims.evaluate import evaluate_part
from peftscope.claims.ledger import Claim, Part, read_ledger
from peftscope.claims.lora_subjects import WEIGHT_STD, adapted_llama, logits_of, lora_layers
from peftscope.claims.subjects import BLOCK_LINEAR, tiny_llama
from peftscope.claims.verdict import Verdict

HOLDS, WRONG = Verdict.HOLDS, Verdict.WRONG


@cache
def claims() -> dict[str, Claim]:
    return {claim.id: claim for claim in read_ledger()}


def part_of(claim: str, part: int = -1) -> Part:
    """Returns a part of a claim of the ledger; the last one decides."""
    return claims()[claim].parts[part]


def verdict(claim: str, part: int = -1) -> Verdict:
    return evaluate_part(part_of(claim, part)).verdict


# What the tiny models are


def test_adapters_change_each_target_by_the_asked_share_of_its_norm() -> None:
    for size in (0.1, 0.5):
        for layer in lora_layers(adapted_llama(size=size)).values():
            change = layer.get_delta_weight("first").detach().norm() / layer.base_layer.weight.norm()
            assert float(change) == pytest.approx(size, rel=0.05)
    assert tiny_llama().config.initializer_range == WEIGHT_STD


def test_adapters_do_not_depend_on_what_else_is_in_the_model() -> None:
    alone, among = adapted_llama(("second",)), adapted_llama(("first", "second"))
    among.set_adapter("second")
    assert torch.equal(logits_of(alone), logits_of(among))


# Apart and merged


def test_sum_holds_at_the_output_only_for_the_last_layer() -> None:
    assert merging.model_formula_error(["lm_head"]).value < 1e-4
    found = merging.model_formula_error(list(BLOCK_LINEAR))
    assert found.value > 1
    assert found.curves["measured"][1.0] == 1


def test_added_operations_by_hand() -> None:
    found = merging.extra_flops("llama-2-7b", rank=8, targets="attention", merged=False)
    matrices = 6_476_005_376 + 32_000 * 4096
    assert found.value == pytest.approx(100 * 8_388_608 / matrices, rel=1e-3)
    assert found.evidence["in one adapted square matrix, %"] == pytest.approx(0.39, abs=0.001)
    assert found.evidence["matrix products added by layers that stay adapted"] == 2 * 32 * 4


def test_rounding_leaves_more_of_a_small_change() -> None:
    found = merging.change_left_after_undoing("unmerge_adapter", "bfloat16")
    assert found.curves["left"][1] > 3 * found.curves["left"][10]
    assert found.evidence["weights not restored to the bit, %"] > 1
    assert found.value == found.curves["left"][10]


def test_merging_into_four_bits_and_into_dequantised_weights_are_two_models() -> None:
    found = merging.requantised_divergence_ratio(0.1).evidence
    assert found["merged into bf16, nats"] < found["merged into 4 bits, nats"]
    error = merging.requantisation_error()
    assert error.curves["error"][1] > error.curves["error"][50]


# Combined


def test_one_adapter_with_weight_one_reproduces_itself() -> None:
    assert combining.combination_error("linear", weights=[1], ranks=[4]).value < 1e-6
    assert combining.lorahub_error([1]).value < 1e-6


def test_rslora_combinations_have_the_scale_that_peft_gives_them() -> None:
    found = combining.combination_error("linear", weights=[1], ranks=[4], rank_stabilised=True)
    assert found.value == pytest.approx(math.sqrt(4) - 1, rel=1e-5)


def test_linear_has_cross_terms_and_cat_has_not() -> None:
    for weights in ([1, 1], [0.3, -0.7]):
        assert combining.combination_error("cat", weights, [4, 8]).value < 1e-6
        assert combining.combination_error("linear", weights, [4, 4]).value > 0.5
    assert combining.combination_error("cat", [1, 1], [4, 8]).evidence["rank of the combination"] == 12


def test_svd_cuts_the_sum_back_to_one_adapter_s_rank() -> None:
    found = combining.combination_error("svd", [1, 1], [4, 4])
    assert (found.evidence["rank of the combination"], found.value > 0.1) == (4, True)


def test_lorahub_by_hand() -> None:
    """Random factors are nearly orthogonal: two own products and two cross terms of equal norms."""
    equal, half = combining.lorahub_error([1, 1]), combining.lorahub_error([0.5, 0.5])
    assert equal.value == pytest.approx(1, abs=0.1)
    assert half.value == pytest.approx(math.sqrt(0.5), abs=0.1)
    assert half.evidence["adapters' own products over the sum, norms"] == pytest.approx(0.5)


def test_methods_that_peft_lacks_are_not_counted() -> None:
    assert combining.methods_known(["LORA", "NO_SUCH_METHOD"]).value == 1


# Resumed


def test_resuming_with_less_than_all_is_another_run() -> None:
    differences = [
        resuming.resumed_run_difference(restored).value
        for restored in (["optimizer", "schedule", "rng"], ["optimizer", "schedule"], ["schedule", "rng"])
    ]
    assert differences[0] == 0
    assert min(differences[1:]) > 1
    assert verdict("S79", 2) is WRONG


# Verdicts follow the libraries


def test_merging_follows_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (verdict("S73", 0), verdict("S73")) == (WRONG, HOLDS)
    original = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: original(self, name) / self.scaling[name])
    assert (verdict("S73", 0), verdict("S73")) == (HOLDS, WRONG)


def test_swapping_follows_set_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S72") is HOLDS
    monkeypatch.setattr(peft.PeftModel, "set_adapter", lambda self, name: None)
    assert verdict("S72") is WRONG


def test_overhead_follows_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S74") is HOLDS
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.model)
    assert verdict("S74") is WRONG


def test_undoing_follows_unmerging(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (verdict("S75", 0), verdict("S75"), verdict("S77", 0)) == (WRONG, WRONG, WRONG)
    monkeypatch.setattr(LoraModel, "unmerge_adapter", lambda self: None)
    monkeypatch.setattr(peft.PeftModel, "set_adapter", lambda self, name: None)
    assert (verdict("S75", 0), verdict("S75"), verdict("S77", 0)) == (HOLDS, HOLDS, HOLDS)


def test_undoing_follows_what_was_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S75", 1) is WRONG
    original = Linear.merge

    def twice(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        original(self, safe_merge, adapter_names)
        self.base_layer.weight.data += self.get_delta_weight("first")

    monkeypatch.setattr(Linear, "merge", twice)
    assert verdict("S75", 1) is HOLDS


def test_snippet_follows_its_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (verdict("S76", 0), verdict("S76")) == (HOLDS, WRONG)
    assert snippet.exception_of_snippet([]).value == "NameError"
    monkeypatch.setattr(builtins, "AutoModelForCausalLM", AutoModelForCausalLM, raising=False)
    assert verdict("S76") is HOLDS


def test_the_adapters_file_leads_back_from_a_merged_model() -> None:
    found = merging.distance_after_merging("merge_and_unload")
    assert max(found.evidence["to the base"], found.evidence["to another adapter"]) == found.value < 1e-4


def test_requantising_follows_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (verdict("S78", 1), verdict("S78")) == (HOLDS, HOLDS)

    def into_bf16(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        plain = torch.nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight.data = dequantize_module_weight(self.base_layer) + self.get_delta_weight("first")
        self.base_layer = plain.to(torch.bfloat16).requires_grad_(False)

    monkeypatch.setattr(Linear4bit, "merge", into_bf16)
    assert (verdict("S78", 1), verdict("S78")) == (WRONG, WRONG)


def test_resuming_follows_the_optimizer_state(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (verdict("S79", 1), verdict("S79")) == (HOLDS, HOLDS)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    assert verdict("S79", 1) is WRONG


def test_sums_follow_the_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [verdict("S81", part) for part in (1, 2, 3, 4, 5)] == [HOLDS, WRONG, WRONG, HOLDS, HOLDS]
    original = LoraModel.add_weighted_adapter

    def keeps_the_old_scale(self: Any, adapters: Any, weights: Any, name: str, **kwargs: Any) -> None:
        original(self, adapters, weights, name, **kwargs)
        for layer in self.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling[name] = layer.scaling[adapters[0]]

    monkeypatch.setattr(LoraModel, "add_weighted_adapter", keeps_the_old_scale)
    assert (verdict("S81", 1), verdict("S81")) == (WRONG, WRONG)


def test_lorahub_is_the_sum_where_there_is_nothing_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (verdict("S82", 0), verdict("S82")) == (WRONG, WRONG)
    part = part_of("S82").model_copy(update={"with_": {"weights": [1, 0]}})
    assert evaluate_part(part).verdict is HOLDS


def test_methods_follow_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("S83") is HOLDS
    monkeypatch.delitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PeftType.IA3)
    assert verdict("S83") is WRONG

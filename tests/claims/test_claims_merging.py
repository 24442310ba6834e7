"""Merging, combining and resuming adapters: checks of the claims ledger, against arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from ledger_parts import verdict_of

from peftscope.claims.checks import combining, merging, resuming
from peftscope.claims.lora_subjects import WEIGHT_STD, adapted_llama, logits_of, lora_layers
from peftscope.claims.subjects import tiny_llama
from peftscope.claims.verdict import Verdict

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


# Resumed


def test_resuming_with_less_than_all_is_another_run() -> None:
    differences = [
        resuming.resumed_run_difference(restored).value
        for restored in (["optimizer", "schedule", "rng"], ["optimizer", "schedule"], ["schedule", "rng"])
    ]
    assert differences[0] == 0
    assert min(differences[1:]) > 1
    assert verdict_of("S79", 2) is Verdict.WRONG


def test_the_adapters_file_leads_back_from_a_merged_model() -> None:
    found = merging.distance_after_merging("merge_and_unload")
    assert max(found.evidence["to the base"], found.evidence["to another adapter"]) == found.value < 1e-4

"""Changed worlds: a library that behaves otherwise, or other numbers in the ledger, and the verdict that follows.

Every check of the ledger has one, here or in the test that ``ELSEWHERE`` names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import layer as peft_layer

from peftscope.claims.checks import codes, four_bit, initialisation, memory, quantised_models, timing
from peftscope.claims.evaluate import PartFinding, evaluate_part
from peftscope.claims.ledger import Part, read_ledger

World = Callable[[pytest.MonkeyPatch], None]
CLAIMS = {claim.id: claim for claim in read_ledger()}


def part_with(claim: str, check: str, **given: Any) -> Part:
    """Returns the last part of a claim with this check and these parameters."""
    parts = [p for p in CLAIMS[claim].parts if p.check == check and given.items() <= p.with_.items()]
    assert parts, f"{claim} has no part with {check} and {given}"
    return parts[-1]


def found_with(part: Part, **changed: Any) -> PartFinding:
    return evaluate_part(part.model_copy(update={"with_": {**part.with_, **changed}}))


# Worlds: the libraries behave otherwise.


def scale_by(exponent: float) -> World:
    """PEFT divides alpha by this power of the rank."""

    def world(patch: pytest.MonkeyPatch) -> None:
        original = peft_layer.LoraLayer.update_layer

        def update_layer(self: Any, adapter_name: str, *args: Any, **options: Any) -> None:
            original(self, adapter_name, *args, **options)
            self.scaling[adapter_name] *= self.r[adapter_name] ** (1 - exponent)

        patch.setattr(peft_layer.LoraLayer, "update_layer", update_layer)

    return world


def ignored_alpha(patch: pytest.MonkeyPatch) -> None:
    original = peft_layer.LoraLayer.update_layer

    def update_layer(self: Any, adapter_name: str, *args: Any, **options: Any) -> None:
        original(self, adapter_name, *args, **options)
        self.scaling[adapter_name] = 1.0

    patch.setattr(peft_layer.LoraLayer, "update_layer", update_layer)


def random_start(patch: pytest.MonkeyPatch) -> None:
    """B starts at random, as A does."""

    def reset(self: Any, adapter_name: str, init_lora_weights: Any) -> None:
        torch.nn.init.normal_(self.lora_A[adapter_name].weight, std=0.1)
        torch.nn.init.normal_(self.lora_B[adapter_name].weight, std=0.1)

    patch.setattr(peft_layer.LoraLayer, "reset_lora_parameters", reset)


def start_at_zero_always(patch: pytest.MonkeyPatch) -> None:
    """PEFT sets B to zero even if it is told to leave both factors random."""
    original = peft_layer.LoraLayer.update_layer

    def update_layer(self: Any, adapter_name: str, *args: Any, **options: Any) -> None:
        original(self, adapter_name, *args, **options)
        torch.nn.init.zeros_(self.lora_B[adapter_name].weight)

    patch.setattr(peft_layer.LoraLayer, "update_layer", update_layer)


def output_that_depends_on_b_alone(patch: pytest.MonkeyPatch) -> None:
    original = peft_layer.Linear.forward
    patch.setattr(
        peft_layer.Linear,
        "forward",
        lambda self, x, *args, **kwargs: original(self, x) + self.lora_B["default"].weight.sum(1),
    )


def output_that_depends_on_a_alone(patch: pytest.MonkeyPatch) -> None:
    original = peft_layer.Linear.forward
    patch.setattr(
        peft_layer.Linear,
        "forward",
        lambda self, x, *args, **kwargs: original(self, x) + self.lora_A["default"].weight.sum(),
    )


def resting_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)


def gradient_descent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.optim, "Adam", lambda groups, eps, **_: torch.optim.SGD(groups))


def one_rate(patch: pytest.MonkeyPatch) -> None:
    from peft import optimizers

    create = optimizers.create_loraplus_optimizer
    patch.setattr(
        optimizers,
        "create_loraplus_optimizer",
        lambda *args, loraplus_lr_ratio, **kwargs: create(*args, loraplus_lr_ratio=1, **kwargs),
    )


def states_in_16_bits(patch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim.optimizer import Optimizer8bit

    patch.setattr(Optimizer8bit, "get_state_buffer", lambda self, p, dtype=None: torch.zeros_like(p))


def states_in_32_bits(patch: pytest.MonkeyPatch) -> None:
    """torch keeps its moments in 32 bits."""
    like = torch.zeros_like

    def zeros_like(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        return like(tensor, **{**options, "dtype": torch.float32})

    patch.setattr(torch, "zeros_like", zeros_like)
    patch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, closure=None: self._init_group(self.param_groups[0], [], [], [], [], [], []),
    )


def even_nf4(patch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    patch.setattr(functional, "get_4bit_type", lambda name, device=None, blocksize=64: torch.linspace(-1, 1, 16))


def poor_nf4(patch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    quantise = functional.quantize_4bit
    patch.setattr(functional, "quantize_4bit", lambda values, **options: quantise(values + 0.05, **options))


def large_constants(patch: pytest.MonkeyPatch) -> None:
    """The constants of double quantization come back several times too large."""
    from bitsandbytes import functional

    patch.setitem(functional.name2qmap, "dynamic", torch.linspace(5, 9, 256))


def plain_recipe(patch: pytest.MonkeyPatch) -> None:
    """QLoRA leaves its constants in 32 bits."""
    from peftscope.methods.qlora import QLoRA

    original = QLoRA.quantization
    patch.setattr(QLoRA, "quantization", lambda self: original(self.model_copy(update={"double_quant": False})))
    for cached in (memory._scanned, memory._answered):
        cached.cache_clear()


def sums_that_ignore_their_weights(patch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    original = LoraModel.add_weighted_adapter
    patch.setattr(
        LoraModel,
        "add_weighted_adapter",
        lambda self, names, weights, *args, **kwargs: original(self, names, [1.0] * len(names), *args, **kwargs),
    )


def merging_of_the_first_alone(patch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    original = Linear.merge
    patch.setattr(
        Linear, "merge", lambda self, safe_merge=False, adapter_names=None: original(self, safe_merge, ["first"])
    )


def files_that_lose_b(patch: pytest.MonkeyPatch) -> None:
    original = peft.PeftModel.load_adapter

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        for name, parameter in self.named_parameters():
            if ".lora_B." in name:
                parameter.data.zero_()
        return found

    patch.setattr(peft.PeftModel, "load_adapter", load_adapter)


def adapter_that_stays(patch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    patch.setattr(LoraModel, "merge_and_unload", lambda self, *args, **kwargs: self.model)


def only_queries(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(peft.LoraModel.target_module_mapping, "llama", ["q_proj"])


def wide_default_dropout(patch: pytest.MonkeyPatch) -> None:
    original = peft.LoraConfig.__init__
    patch.setattr(peft.LoraConfig, "__init__", lambda self, *a, **k: original(self, *a, **{"lora_dropout": 0.9, **k}))


def ranks_that_count_rounding(patch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.matrix_rank
    patch.setattr(torch.linalg, "matrix_rank", lambda matrix, **options: original(matrix, **options) + 1)


def least_squares_in_16_bits(patch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.lstsq

    class Rounded:
        def __init__(self, columns: torch.Tensor, matrix: torch.Tensor) -> None:
            self.solution = original(columns, matrix).solution.half().double()

    patch.setattr(torch.linalg, "lstsq", Rounded)


def products_of_4_bit_floats(patch: pytest.MonkeyPatch) -> None:
    original = four_bit._kernels

    def kernels(layer: Any, inputs: torch.Tensor) -> list[tuple[str, list[str]]]:
        return [
            (name, ["bfloat16", "float4_e2m1fn_x2"] if name == "aten::linear" else t)
            for name, t in original(layer, inputs)
        ]

    patch.setattr(four_bit, "_kernels", kernels)


def unpacked_weights(patch: pytest.MonkeyPatch) -> None:
    """bitsandbytes stores two codes in four bytes, and packs them for each product."""
    from bitsandbytes.nn import Linear4bit

    make, forward = four_bit._layer, Linear4bit.forward

    def unpacked(*args: Any, **options: Any) -> Any:
        layer = make(*args, **options)
        layer.weight.data = layer.weight.data.int()
        return layer

    def packing(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        stored, self.weight.data = self.weight.data, self.weight.data.to(torch.uint8)
        output = forward(self, inputs)
        self.weight.data = stored
        return output

    patch.setattr(four_bit, "_layer", unpacked)
    patch.setattr(Linear4bit, "forward", packing)


def useless_qpissa(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(initialisation, "_qpissa", lambda weight, rank, iterations: weight * 0)


def swapped_times(patch: pytest.MonkeyPatch) -> None:
    """The slower of two works is the faster one."""
    original = timing._paired
    patch.setattr(timing, "_paired", lambda above, below, *rest: original(below, above, *rest))


def rates_over_the_width(patch: pytest.MonkeyPatch) -> None:
    """Adam divides the rate of every matrix by its number of inputs."""
    original = torch.optim.Adam

    def adam(groups: Any, **options: Any) -> torch.optim.Adam:
        scaled = [group | {"lr": 64 * group["lr"] / group["params"][0].shape[1]} for group in groups[:1]]
        return original([*scaled, *groups[1:]], **options)

    patch.setattr(torch.optim, "Adam", adam)


def even_levels_for_even_values(patch: pytest.MonkeyPatch) -> None:
    even_nf4(patch)
    patch.setattr(codes, "_matrices", lambda model: [2 * torch.rand(256, 256) - 1 for _ in range(4)])


def nothing_to_fit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(codes, "_fitted", lambda block: codes.CodeBook("nf4"))


def one_iteration_of_loftq(patch: pytest.MonkeyPatch) -> None:
    original = initialisation._own_start
    patch.setattr(initialisation, "_own_start", lambda weight, rank, alpha, _: original(weight, rank, alpha, 1))


def nothing(patch: pytest.MonkeyPatch) -> None:
    """The libraries are as they are; the ledger's numbers differ."""


FLIPS: list[tuple[str, str, dict[str, Any], World, dict[str, Any]]] = [
    ("S29", "adapters.scale", {"alpha": 16}, scale_by(2), {}),
    ("S18", "adapters.formula_error", {"alpha": 16, "with_scale": False}, ignored_alpha, {}),
    ("S102", "scaling.factor_error", {}, scale_by(2), {}),
    ("S31", "scaling.smallest_growth", {}, ignored_alpha, {}),
    ("S101", "scaling.update_slope", {}, scale_by(1.58), {}),
    ("S31", "scaling.trajectory_gap", {"rate_a": 1}, gradient_descent, {}),
    ("S19", "adapters.start_shift", {"variant": "lora"}, random_start, {}),
    ("S24", "adapters.start_shift", {"variant": "random"}, start_at_zero_always, {}),
    ("S25", "adapters.start_shift", {"variant": "swapped"}, output_that_depends_on_b_alone, {}),
    ("S22", "gradients.update_before_training", {}, random_start, {}),
    ("S22", "gradients.share_of_growing_steps", {}, resting_optimizer, {}),
    ("S23", "gradients.gradient_from_zero", {}, output_that_depends_on_a_alone, {}),
    ("S23", "gradients.rank_from_equal_rows", {"equal": True}, random_start, {}),
    ("S84", "variants.loraplus_step_ratio", {}, one_rate, {}),
    ("S3", "memory.optimizer_bytes", {"optimizer": "bitsandbytes.optim.AdamW"}, states_in_16_bits, {}),
    ("S3", "memory.optimizer_bytes", {"optimizer": "torch.optim.AdamW", "dtype": "bfloat16"}, states_in_32_bits, {}),
    ("S46", "memory.smallest_peak_ratio", {}, plain_recipe, {}),
    ("S63", "codes.gaps_that_do_not_widen", {}, even_nf4, {}),
    ("S77", "merging.distance_after_merging", {"way": "merge_and_unload"}, sums_that_ignore_their_weights, {}),
    ("S81", "combining.merged_sum_error", {}, merging_of_the_first_alone, {}),
    ("S74", "merging.extra_flops", {}, adapter_that_stays, {}),
    ("S79", "resuming.reloaded_logit_difference", {}, files_that_lose_b, {}),
    ("S26", "adapters.default_targets", {}, only_queries, {}),
    ("S10", "scaling.product_rank_excess", {}, ranks_that_count_rounding, {}),
    ("S10", "scaling.factorisation_error", {}, least_squares_in_16_bits, {}),
    ("S54", "four_bit.bits_of_the_multiplied_weight", {}, products_of_4_bit_floats, {}),
    ("S54", "four_bit.bits_of_the_stored_weight", {}, unpacked_weights, {}),
    ("P34", "early_training.loss_drop_slope", {"steps": 1, "rank_stabilised": False}, scale_by(0.5), {}),
    ("P35", "early_training.moment_slope", {"where": "output", "starts": 32, "optimizer": "Adam"}, scale_by(2), {}),
    ("P36", "early_training.efficient_rate_slope", {}, rates_over_the_width, {}),
    ("P40", "codes.entropy_of_levels", {"model": "gaussian"}, even_levels_for_even_values, {"block": 32}),
    ("P41", "codes.error_of_fitted_code", {"block": 4096, "model": "gaussian"}, nothing_to_fit, {}),
    # Numbers of the ledger.
    ("P30", "trained_parameters.vera_parameters", {"against_rank": 64}, nothing, {"against_rank": 4}),
    ("P31", "trained_parameters.percent_of_virtual_tokens", {}, nothing, {"tokens": 100}),
    ("P33", "trained_parameters.share_of_biases", {"of": "biases"}, nothing, {"names": ["query"]}),
    ("P37", "memory.ratio_at_peak", {}, nothing, {"run": {"method": "qlora", "rank": 8, "targets": "all-linear"}}),
    ("P40", "codes.spread_of_quotients", {}, nothing, {"block": 64}),
    ("S1", "counts.gigabytes", {}, nothing, {"dtypes": {"weights": "float32"}}),
    ("P24", "counts.lora_checkpoint", {"of": 350.0e9}, nothing, {"layers": 48}),
    ("P24", "counts.quotient", {}, nothing, {"numerator": 2.2e12}),
    ("S12", "counts.factor_values", {}, nothing, {"rank": 4}),
    ("S12", "counts.matrix_values", {}, nothing, {"rows": 2048}),
    ("S13", "counts.full_to_low_rank_ratio", {}, nothing, {"rows": 4080, "columns": 4080}),
    ("S13", "counts.quotient", {}, nothing, {"numerator": 4096 * 4096}),
    ("S58", "counts.lora_gigabytes", {"targets": "attention"}, nothing, {"rank": 48}),
    ("S49", "counts.packed_gigabytes", {}, nothing, {"preset": "llama-65b"}),
    ("S50", "counts.average_bits", {"preset": "llama-65b"}, nothing, {"rest": "float8_e4m3fn"}),
    ("P12", "counts.operations_ratio", {"width": 4096}, nothing, {"width": 576, "rank": 128}),
    ("S4", "memory.at_peak", {"how": "formula"}, nothing, {"run": {"method": "full", "optimizer": "paged_adamw"}}),
    ("S6", "memory.peak", {"how": "formula"}, nothing, {"run": {"method": "lora", "targets": "attention"}}),
    ("S7", "memory.free", {"how": "formula"}, nothing, {"run": {"method": "lora", "targets": "attention"}}),
    (
        "S5",
        "memory.fewest_cards",
        {"regimes": {"32-bit weights under autocast": {"precision": "amp"}}},
        nothing,
        {"headroom": 0.6},
    ),
    ("S42", "memory.smallest_increase", {}, nothing, {"changes": [{"targets": "attention"}, {"targets": "minimal"}]}),
    ("S38", "variants.share_of_directions", {}, nothing, {"rank": 4096}),
    ("S39", "variants.share_of_values", {}, nothing, {"rank": 4096}),
    ("S39", "variants.share_of_training_flops", {"width": 4096}, nothing, {"width": 576}),
    ("S96", "variants.times_fewer_parameters", {"preset": "smollm2-135m"}, nothing, {"rank": 64}),
    ("S14", "adapters.factor_shape", {"factor": "A"}, nothing, {"factor": "B"}),
    ("S33", "adapters.lora_option", {}, nothing, {"name": "alpha"}),
    ("S43", "adapters.targets_found", {"family": "llama"}, nothing, {"family": "gpt2"}),
    ("S26", "scaling.placements_beyond", {}, nothing, {"described": ["q", "k", "v", "o"]}),
    ("S30", "scaling.share_of_settings", {}, nothing, {"low": 1000, "high": 2000}),
    ("S45", "scaling.share_of_settings", {}, wide_default_dropout, {"settings": []}),
    ("S70", "merging.model_formula_error", {}, nothing, {"targets": ["lm_head"]}),
]
QUICKER = {
    "early_training.loss_drop_slope": {"ranks": [4, 32], "seeds": 3},
    "early_training.moment_slope": {"ranks": [4, 32], "seeds": 3, "starts": 4},
    "early_training.efficient_rate_slope": {"widths": [32, 512], "seeds": 3},
    "memory.ratio_at_peak": {"model": "smollm2-135m", "how": "formula"},
    "trained_parameters.percent_of_virtual_tokens": {"models": ["gpt2-medium"]},
    "trained_parameters.vera_parameters": {"preset": "smollm2-135m"},
    "gradients.share_of_growing_steps": {"steps": 5},
    "merging.extra_flops": {"preset": "smollm2-135m"},
    "counts.packed_gigabytes": {"rows": 512, "columns": 512},
    "gradients.gradient_from_zero": {"steps": 2},
    "scaling.smallest_growth": {"steps": 3},
    "scaling.update_slope": {"ranks": [4, 32, 256], "seeds": 3},
    "scaling.trajectory_gap": {"steps": 10},
    "scaling.product_rank_excess": {"shapes": 10},
    "scaling.factorisation_error": {"shapes": 10},
}

ON_RANDOM_WEIGHTS: list[tuple[str, str, dict[str, Any], World, dict[str, Any]]] = [
    ("S64", "codes.error_ratio", {"model": "minilm"}, nothing, {"block": 64}),
    ("P8", "initialisation.intruders_of_random_updates", {}, nothing, {"sizes": [0.001], "size": 0.001}),
    ("P17", "initialisation.qpissa_error_ratio", {"norm": "frobenius"}, useless_qpissa, {}),
    ("S89", "initialisation.loftq_error_ratio", {"rank": 8}, nothing, {"rank": 64, "alpha": 64}),
    ("P42", "initialisation.loftq_error_after", {"over": 1}, one_iteration_of_loftq, {}),
]

ELSEWHERE = {
    "altered_methods.most_saved_by_frozen_a": "test_frozen_factors_and_constant_norms_save_what_they_need_not_keep",
    "altered_methods.saved_by_constant_norm": "test_frozen_factors_and_constant_norms_save_what_they_need_not_keep",
    "curvature.sharpness_ratio": "test_sharpness_is_the_hessians_largest_eigenvalue",
    "directions.amplification": "test_adapters_in_a_common_direction_share_it_and_others_do_not",
    "directions.shared_direction": "test_adapters_in_a_common_direction_share_it_and_others_do_not",
    "adapters.distance_from_normal": "test_a_library_that_draws_normal_values_confirms_the_normal_start",
    "adapters.lora_default": "test_a_library_with_another_default_rank_refutes_rank_8",
    "adapters.loss_jump": "test_a_wide_b_damages_and_a_narrow_one_does_not",
    "adapters.zeros_in_factors": "test_a_library_that_drops_the_matrices_confirms_dropout_on_the_matrices",
    "capacity.bits_per_parameter": "test_the_claim_on_two_bits_follows_the_break",
    "capacity.furthest_ranks": "test_claims_on_ranks_follow_what_they_store",
    "capacity.share_of_full": "test_claims_on_ranks_follow_what_they_store",
    "codes.levels_in_steps": "test_integers_that_are_spaced_otherwise_flip_the_claim_on_them",
    "codes.likeness_of_rows_to_normal": "test_rows_with_heavy_tails_are_found",
    "codes.share_of_weights": "test_rows_with_heavy_tails_are_found",
    "codes.share_with_lower_error": "test_a_worse_nf4_quantiser_would_refute_its_lower_error",
    "combining.combination_error": "test_sums_follow_the_combination",
    "combining.lorahub_error": "test_lorahub_is_the_sum_where_there_is_nothing_to_add",
    "combining.methods_known": "test_methods_follow_the_registry",
    "combining.swaps_exact": "test_swapping_follows_set_adapter",
    "counts.factor_values_deviation": "test_a_bias_in_the_factors_refutes_their_count",
    "counts.lora_parameters": "test_a_library_that_skips_a_target_refutes_the_count_of_parameters",
    "counts.lora_percent": "test_a_library_that_skips_a_target_refutes_the_count_of_parameters",
    "counts.merged_operations": "test_an_adapter_that_stays_after_merging_refutes_free_inference",
    "counts.stored_gigabytes": "test_weights_that_are_not_packed_refute_half_a_byte",
    "forgetting.less_forgotten": "test_what_is_forgotten_is_compared_where_the_same_was_learned",
    "four_bit.bits_of_a_constant": "test_double_quantization_that_is_ignored_would_refute_the_claims_on_it",
    "four_bit.bits_per_weight": "test_4_37_bits_would_need_other_constants",
    "four_bit.bits_saved": "test_double_quantization_that_is_ignored_would_refute_the_claims_on_it",
    "four_bit.changed_base_bits": "test_a_layer_that_writes_to_its_weight_would_refute_a_frozen_base",
    "four_bit.dtype_of_adapters": "test_adapters_in_the_base_s_type_would_support_bf16",
    "four_bit.dtype_of_constants": "test_constants_in_half_precision_would_refute_fp32",
    "four_bit.quantisations_in_a_forward_pass": "test_a_layer_that_quantised_just_in_time_would_support_the_claim",
    "gpu.latency_ratio": "test_runs_of_a_card_reach_every_verdict",
    "gpu.step_ratio": "test_runs_of_a_card_reach_every_verdict",
    "gradients.base_tensors_changed": "test_a_library_that_trains_the_norms_refutes_that_only_adapters_are_updated",
    "gradients.cosine_without_base_path": "test_a_library_that_stops_gradients_at_4_bit_weights",
    "gradients.share_with_gradient": "test_a_library_that_starts_b_at_random_refutes_the_unchanged_start",
    "initialisation.loftq_output_error_ratio": "test_on_real_weights_loftq_helps_a_little_and_pefts_scale_undoes_it",
    "memory.adapter_bytes": "test_adalora_without_its_importance_scores_would_be_as_small_as_claimed",
    "memory.gradients_alive": "test_gradients_that_stay_would_be_as_large_as_the_weights",
    "merging.change_left_after_undoing": "test_undoing_follows_unmerging",
    "merging.merged_structure_differences": "test_overhead_follows_merging",
    "merging.merged_weight_error": "test_merging_follows_the_scale",
    "merging.requantisation_error": "test_requantising_follows_the_storage",
    "merging.requantised_divergence_ratio": "test_requantising_follows_the_storage",
    "overfitting.rise": "test_a_rise_of_the_validation_loss_is_overfitting_where_the_training_loss_falls",
    "overfitting.smaller_gap": "test_less_overfitting_than_full_fine_tuning_is_a_smaller_gap",
    "quantised_models.loss_added_by_double_quantization": "test_rounding_a_model_decides_the_claims_on_it",
    "quantised_models.loss_added_by_rivals": "test_rounding_a_model_decides_the_claims_on_it",
    "quantised_models.shift_added_by_double_quantization": "test_rounding_a_model_decides_the_claims_on_it",
    "quantised_models.shift_added_by_rivals": "test_rounding_a_model_decides_the_claims_on_it",
    "quantised_training.share_of_lora_gain": "test_finer_codes_would_refute_that_4_bit_training_fails",
    "resuming.resumed_run_difference": "test_resuming_follows_the_optimizer_state",
    "scaling.gradient_slope": "test_a_library_that_ignores_the_scale_breaks_the_rank_stabilised_slope",
    "scaling.trained_rank": "test_a_library_with_full_rank_updates_refutes_the_bound",
    "snippet.exception_of_snippet": "test_snippet_follows_its_imports",
    "subspaces.intrinsic_dimension": "test_a_gain_that_comes_late_moves_the_intrinsic_dimension_out_of_its_range",
    "timing.latency_ratio": "test_a_work_that_takes_longer_flips_the_claim_on_its_time",
    "timing.step_ratio": "test_a_work_that_takes_longer_flips_the_claim_on_its_time",
    "training.accuracy_gain": "test_claims_count_answers_in_points",
    "training.closest": "test_claims_show_the_arm_that_comes_closest",
    "training.difference_of_gains": "test_claims_compare_gains_with_gains",
    "training.furthest": "test_a_narrow_difference_outside_the_margin_speaks_louder_than_a_wide_one",
    "training.heldout_gain": "test_claims_measure_shares_of_the_task_gain",
    "training.heldout_gain_on_base": "test_a_destroyed_base_leaves_open_what_a_sound_one_decides",
    "training.learning_rate_ratio": "test_a_ratio_of_best_rates_is_judged_with_its_interval",
    "training.learning_rate_spread": "test_a_spread_of_best_rates_is_told_from_noise",
    "training.rate_correlation": "test_best_rates_that_fall_as_alpha_rises_support_s32_and_others_do_not",
    "training.smallest_rank": "test_claims_find_the_smallest_rank_that_is_enough",
    "training.training_gain": "test_claims_measure_shares_of_the_task_gain",
    "variants.adalora_decompositions": "test_an_adalora_that_scores_by_svd_confirms_s93",
    "variants.adalora_kept_by_size": "test_an_adalora_that_scores_by_size_confirms_the_kind_reading_of_s93",
    "variants.adalora_rank_spread": "test_adalora_without_its_call_prunes_nothing",
    "weights.intruders": "test_intruders_are_compared_by_seed_and_at_one_rate_too",
    "weights.magnitude_with_direction": "test_magnitude_and_direction_are_correlated_over_layers_and_steps",
    "weights.rank_across_parts": "test_rank_grows_with_training_and_is_compared_between_the_parts_of_a_block",
    "weights.rank_growth": "test_rank_grows_with_training_and_is_compared_between_the_parts_of_a_block",
    "weights.rank_with_worth": "test_ranks_are_set_against_a_worth_of_their_own",
    "weights.share_left_after_cut": "test_low_rank_is_asked_of_the_update_and_of_what_a_cut_leaves",
    "weights.update_rank": "test_the_rank_of_an_update_is_told_in_ranks_of_lora",
    "weights.update_size": "test_a_small_adjustment_is_one_whose_norm_is_small",
    "variants.dora_column_norms": "test_a_dora_that_does_not_divide_by_the_norm_refutes_s86",
    "variants.dora_norm_gradient": "test_a_dora_norm_with_a_gradient_flips_the_part_that_says_it_has_none",
}


def flips(part: Part, world: World, changed: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    quick = QUICKER.get(part.check, {})
    before = found_with(part, **quick)
    world(patch)
    after = found_with(part, **{**quick, **changed})
    assert before.found is not None, before.reason
    assert after.found is not None, after.reason
    assert before.verdict != after.verdict, (before.found.value, after.found.value)


@pytest.mark.parametrize(
    ("claim", "check", "given", "world", "changed"), FLIPS, ids=[f"{row[0]}-{row[1].split('.')[1]}" for row in FLIPS]
)
def test_a_changed_world_flips_the_verdict(
    claim: str, check: str, given: dict[str, Any], world: World, changed: dict[str, Any], monkeypatch: Any
) -> None:
    try:
        flips(part_with(claim, check, **given), world, changed, monkeypatch)
    finally:
        for cached in (memory._scanned, memory._answered):
            cached.cache_clear()


@pytest.mark.parametrize(
    ("claim", "check", "given", "world", "changed"), ON_RANDOM_WEIGHTS, ids=[row[0] for row in ON_RANDOM_WEIGHTS]
)
def test_a_changed_world_flips_the_verdict_on_weights(
    claim: str, check: str, given: dict[str, Any], world: World, changed: dict[str, Any], monkeypatch: Any
) -> None:
    """Six normal matrices, whose rows hold whole blocks, stand in for those of a model that has to be fetched."""
    matrices = [(str(s), 0.05 * torch.randn(96, 128, generator=torch.Generator().manual_seed(s))) for s in range(6)]
    for module in (codes, initialisation):
        monkeypatch.setattr(module, "weight_matrices", lambda model: iter(matrices))
    flips(part_with(claim, check, **given), world, changed, monkeypatch)


NF4_AS_A_RIVAL = {"code": "e3m0", "rivals": ["nf4"]}


@pytest.mark.parametrize(
    ("claim", "check", "world", "changed"),
    [
        ("S69", "loss_added_by_double_quantization", large_constants, {}),
        ("S69", "shift_added_by_double_quantization", large_constants, {}),
        ("P14", "loss_added_by_rivals", nothing, NF4_AS_A_RIVAL),
        ("P14", "shift_added_by_rivals", nothing, NF4_AS_A_RIVAL),
    ],
)
def test_rounding_a_model_decides_the_claims_on_it(
    claim: str, check: str, world: World, changed: dict[str, Any], toy: Path, monkeypatch: Any
) -> None:
    def forget() -> None:
        for cached in (quantised_models._losses, quantised_models._shifts):
            cached.cache_clear()

    def afresh(patch: pytest.MonkeyPatch) -> None:
        forget()
        world(patch)

    forget()
    monkeypatch.setattr(quantised_models, "WINDOWS", 8)
    part = part_with(claim, f"quantised_models.{check}")
    flips(part.model_copy(update={"with_": {**part.with_, "model": "toy"}}), afresh, changed, monkeypatch)
    forget()


def test_a_wide_b_damages_and_a_narrow_one_does_not(toy: Path, monkeypatch: Any) -> None:
    part = part_with("S24", "adapters.loss_jump", spread=1.0)
    assert found_with(part, model="toy").verdict != found_with(part, model="toy", spread=0.01).verdict


def test_a_work_that_takes_longer_flips_the_claim_on_its_time(monkeypatch: Any) -> None:
    clock = [0.0]

    def work(seconds: float) -> Callable[[], None]:
        return lambda: clock.append(clock[-1] + seconds)

    naps = {"full": 4.0, "lora": 2.0, "adalora": 2.2}
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    monkeypatch.setattr(timing, "_training_step", lambda model, run: work(naps[run["method"]]))
    monkeypatch.setattr(timing, "_forward", lambda model, run, kind, merge: work(4.0 if merge else 2.0))
    parts = [part_with("P12", "timing.step_ratio"), part_with("S71", "timing.latency_ratio", work="token")]
    before = [found_with(part, pairs=10).verdict for part in parts]
    swapped_times(monkeypatch)
    assert before[0] != found_with(parts[0], pairs=10).verdict
    assert found_with(parts[1], pairs=10).found.low > 1


def test_every_check_of_the_ledger_has_a_changed_world(repository: Path) -> None:
    used = {part.check for claim in CLAIMS.values() for part in claim.parts if part.check}
    here = {row[1] for row in FLIPS + ON_RANDOM_WEIGHTS}
    assert used - here - ELSEWHERE.keys() == set()
    assert ELSEWHERE.keys() - used == set()
    text = "".join(path.read_text() for path in (repository / "tests").rglob("test_*.py"))
    assert [name for name in ELSEWHERE.values() if f"def {name}" not in text] == []

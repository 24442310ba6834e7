"""Changed worlds: a library that behaves otherwise, or other numbers in the ledger, and the verdict that follows.

Every check of the ledger has one, here or in the test that ``ELSEWHERE`` names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import worlds_of_numbers as numbers
import worlds_of_peft as peft
from ledger_parts import changed_part, claims, part_with, published_verdict

from peftscope.claims.checks import codes, initialisation, memory, merging, quantised_models, timing
from peftscope.claims.evaluate import PartFinding, evaluate_part
from peftscope.claims.ledger import Part


def found_with(part: Part, **changed: Any) -> PartFinding:
    return evaluate_part(changed_part(part, **changed))


TORCHS = {"optimizer": "torch.optim.AdamW"}
GRPO = {"checkpointing": True, "loss_path": "response_only"}
PAGED = {"BF16 with 32-bit states": {"optimizer": "paged_adamw"}}

WORLDS: list[tuple[str, str, dict[str, Any], peft.World]] = [
    ("S29", "adapters.scale", {"alpha": 16}, peft.scale_by(2)),
    ("S18", "adapters.formula_error", {"alpha": 16, "with_scale": False}, peft.ignored_alpha),
    ("S102", "scaling.factor_error", {}, peft.scale_by(2)),
    ("S31", "scaling.smallest_growth", {}, peft.ignored_alpha),
    ("S101", "scaling.update_slope", {}, peft.scale_by(1.58)),
    ("S31", "scaling.trajectory_gap", {"rate_a": 1}, numbers.gradient_descent),
    ("S19", "adapters.start_shift", {"variant": "lora"}, peft.random_start),
    ("S24", "adapters.start_shift", {"variant": "random"}, peft.start_at_zero_always),
    ("S25", "adapters.start_shift", {"variant": "swapped"}, peft.output_that_depends_on_b_alone),
    ("S22", "gradients.update_before_training", {}, peft.random_start),
    ("S22", "gradients.share_of_growing_steps", {}, numbers.resting_optimizer),
    ("S23", "gradients.gradient_from_zero", {}, peft.output_that_depends_on_a_alone),
    ("S23", "gradients.rank_from_equal_rows", {"equal": True}, peft.random_start),
    ("S84", "variants.loraplus_step_ratio", {}, peft.one_rate),
    ("S3", "memory.optimizer_bytes", {"optimizer": "bitsandbytes.optim.AdamW"}, numbers.states_in_16_bits),
    ("S3", "memory.optimizer_bytes", TORCHS | {"dtype": "bfloat16"}, numbers.states_in_32_bits),
    ("S46", "memory.smallest_peak_ratio", {}, numbers.plain_recipe),
    ("S63", "codes.gaps_that_do_not_widen", {}, numbers.even_nf4),
    ("S77", "merging.distance_after_merging", {"way": "merge_and_unload"}, peft.sums_that_ignore_their_weights),
    ("S81", "combining.merged_sum_error", {}, peft.merging_of_the_first_alone),
    ("S74", "merging.extra_flops", {}, peft.adapter_that_stays),
    ("S79", "resuming.reloaded_logit_difference", {}, peft.files_that_lose_b),
    ("S10", "scaling.product_rank_excess", {}, numbers.ranks_that_count_rounding),
    ("S10", "scaling.factorisation_error", {}, numbers.least_squares_in_16_bits),
    ("S54", "four_bit.bits_of_the_multiplied_weight", {}, numbers.products_of_4_bit_floats),
    ("P34", "early_training.loss_drop_slope", {"steps": 1, "rank_stabilised": False}, peft.scale_by(0.5)),
    ("P35", "early_training.moment_slope", {"where": "output", "starts": 32, "optimizer": "Adam"}, peft.scale_by(1.5)),
    ("P36", "early_training.efficient_rate_slope", {}, numbers.rates_over_the_width),
    ("P41", "codes.error_of_fitted_code", {"block": 4096, "model": "gaussian"}, numbers.nothing_to_fit),
    ("S20", "adapters.distance_from_normal", {"init": True}, peft.normal_start),
    ("S21", "gradients.share_with_gradient", {"factor": "A", "step": 1}, peft.random_start),
    ("S33", "adapters.scale", {}, peft.ignored_alpha),
    ("S36", "adapters.lora_default", {"name": "r"}, peft.by_default(r=16)),
    ("S44", "adapters.zeros_in_factors", {}, peft.dropped_matrices),
    ("S34", "scaling.trained_rank", {}, peft.updates_of_full_rank),
    ("P9", "scaling.gradient_slope", {"rank_stabilised": True}, peft.ignored_alpha),
    ("P25", "scaling.trajectory_gap", {"rate_b": 8, "epsilon": 1e-30}, numbers.gradient_descent),
    ("S53", "gradients.base_tensors_changed", {}, peft.trained_norms),
    ("S55", "gradients.cosine_without_base_path", {}, numbers.no_gradients_through_4_bits),
    ("S86", "variants.dora_column_norms", {}, peft.dora_norm_without_the_update),
    ("S92", "variants.adalora_rank_spread", {}, peft.adalora_without_its_call),
    ("S93", "variants.adalora_decompositions", {}, peft.adalora_that_scores_by_svd),
    ("S11", "counts.factor_values_deviation", {}, peft.factors_with_a_bias),
    ("S40", "counts.lora_parameters", {"preset": "llama-2-7b"}, peft.skipped_output_projection),
    ("S41", "counts.lora_percent", {"preset": "llama-2-7b"}, peft.skipped_output_projection),
    ("S48", "counts.stored_gigabytes", {"storage": "nf4"}, numbers.unpacked_codes),
    ("P21", "counts.merged_operations", {}, peft.adapter_that_stays),
    ("S95", "memory.adapter_bytes", {"method": "adalora"}, peft.adalora_without_its_call),
    ("S61", "codes.levels_in_steps", {"library": "gguf"}, numbers.cubed_gguf),
    ("S61", "codes.levels_in_steps", {"library": "bitsandbytes"}, numbers.integers_of_16_levels),
    ("S52", "four_bit.dtype_of_adapters", {}, peft.adapters_of_the_bases_type),
    ("S54", "four_bit.quantisations_in_a_forward_pass", {}, numbers.quantised_just_in_time),
    ("S56", "four_bit.changed_base_bits", {}, numbers.layers_that_write_to_their_weights),
    ("S65", "four_bit.dtype_of_constants", {}, numbers.constants_in_half_precision),
    ("S66", "four_bit.bits_of_a_constant", {}, numbers.no_double_quantization),
    ("S67", "four_bit.bits_saved", {}, numbers.no_double_quantization),
    ("S68", "four_bit.bits_per_weight", {"double_quant": True}, numbers.more_constants),
    ("S72", "combining.swaps_exact", {}, peft.adapter_that_is_never_swapped),
    ("S73", "merging.merged_weight_error", {"scaled": True}, peft.unscaled_merging),
    ("S74", "merging.merged_structure_differences", {}, peft.adapter_that_stays),
    ("S75", "merging.change_left_after_undoing", {"way": "unmerge_adapter", "dtype": "float32"}, peft.no_unmerging),
    ("S77", "merging.distance_after_merging", {"way": "merge_adapter"}, peft.no_unmerging),
    ("S78", "merging.requantisation_error", {}, peft.merged_into_16_bits),
    ("S78", "merging.requantised_divergence_ratio", {}, peft.merged_into_16_bits),
    ("S81", "combining.combination_error", {"combination": "cat"}, peft.sums_with_the_old_scale),
    ("S83", "combining.methods_known", {}, peft.no_ia3),
    ("P58", "merging.gain_lost", {"into": "16-bit base"}, numbers.base_on_the_grid),
    ("S76", "snippet.exception_of_snippet", {"also_imported": []}, peft.snippet_with_its_import),
]
"""A claim, a check with some of its parameters, and the world in which the last such part is decided otherwise."""

NUMBERS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("S82", "combining.lorahub_error", {"weights": [1, 1]}, {"weights": [1, 0]}),
    ("P30", "trained_parameters.vera_parameters", {"against_rank": 64}, {"against_rank": 4}),
    ("P31", "trained_parameters.percent_of_virtual_tokens", {}, {"tokens": 100}),
    ("P33", "trained_parameters.share_of_biases", {"of": "biases"}, {"names": ["query"]}),
    ("P37", "memory.ratio_at_peak", {}, {"run": {"method": "qlora", "rank": 8, "targets": "all-linear"}}),
    ("P40", "codes.spread_of_quotients", {}, {"block": 64}),
    ("S1", "counts.gigabytes", {}, {"dtypes": {"weights": "float32"}}),
    ("P24", "counts.lora_checkpoint", {"of": 350000000000.0}, {"layers": 48}),
    ("P37", "counts.quotient", {}, {"numerator": 36}),
    ("S12", "counts.factor_values", {}, {"rank": 4}),
    ("S12", "counts.matrix_values", {}, {"rows": 2048}),
    ("S58", "counts.lora_gigabytes", {"targets": "attention"}, {"rank": 48}),
    ("S50", "counts.average_bits", {}, {"preset": "llama-65b", "rest": "float8_e4m3fn"}),
    ("P60", "counts.operations_ratio", {"width": 4096}, {"rank": 4096}),
    ("S4", "memory.at_peak", {"how": "formula"}, {"run": {"method": "full", "optimizer": "paged_adamw"}}),
    ("S6", "memory.peak", {"how": "formula"}, {"run": {"method": "lora", "targets": "attention"}}),
    ("S9", "memory.free", {"gpu": "rtx4080"}, {"run": {"method": "full"}}),
    ("S5", "memory.fewest_cards", {"regimes": PAGED}, {"headroom": 0.9}),
    ("S42", "memory.smallest_increase", {}, {"changes": [{"targets": "attention"}, {"targets": "minimal"}]}),
    ("S38", "variants.share_of_directions", {}, {"rank": 4096}),
    ("S39", "variants.share_of_values", {}, {"rank": 4096}),
    ("P29", "variants.share_of_training_flops", {}, {"rank": 1024}),
    ("S96", "variants.times_fewer_parameters", {"preset": "smollm2-135m"}, {"rank": 64}),
    ("S14", "adapters.factor_shape", {"factor": "A"}, {"factor": "B"}),
    ("S33", "adapters.lora_option", {}, {"name": "alpha"}),
    ("S43", "adapters.targets_found", {"family": "llama"}, {"family": "gpt2"}),
    ("S26", "scaling.placements_beyond", {}, {"described": ["q", "k", "v", "o"]}),
    ("S30", "scaling.share_of_settings", {}, {"low": 1000, "high": 2000}),
    ("S70", "merging.model_formula_error", {}, {"targets": ["lm_head"]}),
    ("P57", "gradients.share_in_first_gradient", {"factor": "B", "optimizer": "SGD"}, {"steps": 1}),
    ("P67", "memory.share_of_peak", {}, {"run": {"method": "lora", "seq_len": 64}}),
    ("P59", "memory.share_of_peak", {}, {"run": {"method": "full", "batch_size": 16, "seq_len": 512, **GRPO}}),
    ("P61", "published_runs.methods_that_dominate", {"run": "lora"}, {"run": "ia3"}),
]
"""A claim, a check with some of its parameters, and the other numbers with which it is decided otherwise."""

FLIPS = [
    *((*row, {}) for row in WORLDS),
    *((claim, check, given, numbers.nothing, changed) for claim, check, given, changed in NUMBERS),
    ("P40", "codes.entropy_of_levels", {"model": "gaussian"}, numbers.even_levels_for_even_values, {"block": 32}),
    ("S45", "scaling.share_of_settings", {}, peft.by_default(lora_dropout=0.9), {"settings": []}),
]
QUICKER = {
    "adapters.distance_from_normal": {"rank": 16},
    "gradients.base_tensors_changed": {"steps": 5},
    "gradients.cosine_without_base_path": {"steps": 5},
    "scaling.trained_rank": {"ranks": [1, 4], "steps": 4},
    "variants.adalora_decompositions": {"steps": 12},
    "variants.adalora_rank_spread": {"steps": 12},
    "early_training.loss_drop_slope": {"ranks": [4, 32], "seeds": 3},
    "early_training.moment_slope": {"ranks": [4, 32], "seeds": 3, "starts": 4},
    "early_training.efficient_rate_slope": {"widths": [32, 512], "seeds": 3},
    "memory.ratio_at_peak": {"model": "smollm2-135m", "how": "formula"},
    "trained_parameters.percent_of_virtual_tokens": {"models": ["gpt2-medium"]},
    "trained_parameters.vera_parameters": {"preset": "smollm2-135m"},
    "gradients.share_of_growing_steps": {"steps": 5},
    "memory.share_of_peak": {"how": "formula"},
    "merging.extra_flops": {"preset": "smollm2-135m"},
    "merging.gain_lost": {"batches": [64], "steps": 100},
    "gradients.gradient_from_zero": {"steps": 2},
    "scaling.smallest_growth": {"steps": 3},
    "scaling.update_slope": {"ranks": [4, 32, 256], "seeds": 3},
    "scaling.trajectory_gap": {"steps": 10},
    "scaling.product_rank_excess": {"shapes": 10},
    "scaling.factorisation_error": {"shapes": 10},
    "scaling.gradient_slope": {"ranks": [4, 32, 256], "seeds": 5},
    "four_bit.bits_saved": {"rows": 2048, "columns": 2048},
    "four_bit.bits_per_weight": {"rows": 2048, "columns": 2048},
}

ELSE_AT_THIS_SIZE = {"early_training.loss_drop_slope", "early_training.moment_slope", "memory.ratio_at_peak"}
"""Checks that few seeds leave open, or that a smaller model decides otherwise."""

LONG = {"memory.smallest_peak_ratio", "merging.distance_after_merging", "merging.extra_flops"}
LONG |= {"gradients.rank_from_equal_rows", "scaling.smallest_growth", "scaling.update_slope", "merging.gain_lost"}

ON_RANDOM_WEIGHTS: list[tuple[str, str, dict[str, Any], peft.World, dict[str, Any]]] = [
    ("S62", "codes.likeness_of_rows_to_normal", {"model": "minilm"}, numbers.heavy_tails, {}),
    ("S62", "codes.share_of_weights", {"model": "minilm", "deviations": 3}, numbers.heavy_tails, {}),
    ("S64", "codes.share_with_lower_error", {"block": 64}, numbers.poor_nf4, {}),
    ("P8", "initialisation.intruders_of_random_updates", {}, numbers.nothing, {"sizes": [0.001], "size": 0.001}),
    ("P17", "initialisation.qpissa_error_ratio", {"norm": "nuclear"}, numbers.useless_qpissa, {}),
    ("S89", "initialisation.loftq_error_ratio", {"rank": 8}, numbers.nothing, {"rank": 64, "alpha": 64}),
    ("S90", "initialisation.loftq_error_ratio", {"alpha": 16, "iterations": 1}, peft.loftq_with_its_scale, {}),
    ("S90", "initialisation.loftq_error_ratio", {"by": "peftscope"}, numbers.loftq_that_ignores_the_scale, {}),
    ("S90", "initialisation.loftq_output_error_ratio", {}, numbers.loftq_that_doubles_the_error, {}),
    ("P42", "initialisation.loftq_error_after", {"over": 1}, numbers.one_iteration_of_loftq, {}),
]

ELSEWHERE = {
    "test_mutations": "adapters quantised_models timing",
    "test_claims_papers": "altered_methods curvature directions",
    "test_capacity": "capacity",
    "test_claims_weights": "forgetting weights",
    "test_claims_gpu": "gpu",
    "test_claims_overfitting": "overfitting",
    "test_claims_training": "answers subspaces training",
    "test_study": "training",
}
"""Other tests in which changed worlds decide checks otherwise: by their files, the modules of the checks."""


def flips(part: Part, world: peft.World, changed: dict[str, Any], patch: pytest.MonkeyPatch) -> str:
    """Checks that a changed world decides otherwise, and returns the verdict of the world as it is."""
    quick = QUICKER.get(part.check, {})
    before = found_with(part, **quick)
    world(patch)
    after = found_with(part, **{**quick, **changed})
    assert before.found is not None, before.reason
    assert after.found is not None, after.reason
    assert before.verdict != after.verdict, (before.found.value, after.found.value)
    return before.verdict


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("claim", "check", "given", "world", "changed"),
    [pytest.param(*row, marks=pytest.mark.slow if row[1] in LONG else ()) for row in FLIPS],
    ids=[f"{row[0]}-{row[1].split('.')[1]}" for row in FLIPS],
)
def test_a_changed_world_flips_the_published_verdict(
    claim: str, check: str, given: dict[str, Any], world: peft.World, changed: dict[str, Any], monkeypatch: Any
) -> None:
    part = part_with(claim, check, **given)
    try:
        found = flips(part, world, changed, monkeypatch)
        assert found == published_verdict(claim, part) or check in ELSE_AT_THIS_SIZE
    finally:
        for cached in (memory._asked, merging._merged_losses):
            cached.cache_clear()


@pytest.mark.parametrize(
    ("claim", "check", "given", "world", "changed"), ON_RANDOM_WEIGHTS, ids=[row[0] for row in ON_RANDOM_WEIGHTS]
)
def test_a_changed_world_flips_the_verdict_on_weights(
    claim: str, check: str, given: dict[str, Any], world: peft.World, changed: dict[str, Any], monkeypatch: Any
) -> None:
    """Six normal matrices, whose rows hold whole blocks, stand in for those of a model that has to be fetched."""
    matrices = [(str(s), 0.05 * torch.randn(96, 128, generator=torch.Generator().manual_seed(s))) for s in range(6)]
    for module in (codes, initialisation):
        monkeypatch.setattr(module, "weight_matrices", lambda model: iter(matrices))
    monkeypatch.setattr(initialisation, "_answers", lambda model, change: [change(matrix) for _, matrix in matrices])
    flips(part_with(claim, check, **given), world, changed, monkeypatch)


NF4_AS_A_RIVAL = {"code": "e3m0", "rivals": ["nf4"]}


@pytest.mark.parametrize(
    ("claim", "check", "world", "changed"),
    [
        ("S69", "loss_added_by_double_quantization", numbers.large_constants, {}),
        ("S69", "shift_added_by_double_quantization", numbers.large_constants, {}),
        ("P14", "loss_added_by_rivals", numbers.nothing, NF4_AS_A_RIVAL),
        ("P14", "shift_added_by_rivals", numbers.nothing, NF4_AS_A_RIVAL),
    ],
)
def test_rounding_a_model_decides_the_claims_on_it(
    claim: str, check: str, world: peft.World, changed: dict[str, Any], toy: Path, monkeypatch: Any
) -> None:
    def forget() -> None:
        for cached in (quantised_models._losses, quantised_models._shifts):
            cached.cache_clear()

    def afresh(patch: pytest.MonkeyPatch) -> None:
        if world is not numbers.nothing:
            forget()
        world(patch)

    forget()
    monkeypatch.setattr(quantised_models, "WINDOWS", 8)
    part = part_with(claim, f"quantised_models.{check}")
    flips(changed_part(part, model="toy"), afresh, changed, monkeypatch)
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
    monkeypatch.setattr(timing, "_training_step", lambda run: work(naps[run["method"]]))
    monkeypatch.setattr(timing, "_forward", lambda run, kind, merge: work(4.0 if merge else 2.0))
    parts = [part_with("P12", "timing.step_ratio"), part_with("S71", "timing.latency_ratio", work="token")]
    parts.append(part_with("P60", "timing.step_ratio"))
    before = [found_with(part, pairs=10).verdict for part in parts]
    numbers.swapped_times(monkeypatch)
    assert before[0] != found_with(parts[0], pairs=10).verdict
    assert found_with(parts[1], pairs=10).found.low > 1
    assert before[2] != found_with(parts[2], pairs=10).verdict


def test_every_check_of_the_ledger_has_a_changed_world(repository: Path) -> None:
    used = {part.check for claim in claims().values() for part in claim.parts if part.check}
    here = {row[1] for row in FLIPS + ON_RANDOM_WEIGHTS}
    for check in used - here:
        room, _, name = check.partition(".")
        paths = [next((repository / "tests").rglob(f"{file}.py")) for file, rooms in ELSEWHERE.items() if room in rooms]
        names = {name, *(claim.id for claim in claims().values() for part in claim.parts if part.check == check)}
        tests = "".join(path.read_text() for path in paths)
        assert any(f'"{name}"' in tests or f".{name}(" in tests for name in names), check

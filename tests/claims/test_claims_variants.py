"""DoRA, AdaLoRA, LoRA+, LoftQ and PiSSA in the claims ledger: numbers against other ways to them, and mutations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ledger_parts import finding_of

from peftscope.claims.checks import initialisation, variants
from peftscope.claims.lora_subjects import lora_model
from peftscope.claims.subjects import tiny_llama
from peftscope.claims.verdict import Verdict

SCHEDULE = {"steps": 12, "init_rank": 8, "target_rank": 4}


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.Tensor]]:
    """Three Gaussian matrices in the place of a fetched model's."""
    torch.manual_seed(0)
    matrices = [(f"layer.{i}", 0.05 * torch.randn(shape)) for i, shape in enumerate([(96, 96), (128, 64), (64, 128)])]
    monkeypatch.setattr(initialisation, "weight_matrices", lambda model: iter(matrices))
    return matrices


# --- Arithmetic


def test_shares_of_a_square_matrix() -> None:
    directions = variants.share_of_directions(rank=64, rows=4096, columns=4096)
    assert directions.value == 1 / 64
    assert directions.evidence["share of the matrix's values"] == 1 / 32
    assert variants.share_of_values(rank=256, rows=4096, columns=4096).value == 0.125


@pytest.mark.parametrize(("rank", "width", "share"), [(8, 64, 0.9167), (256, 576, 1.5556), (256, 4096, 0.7917)])
def test_flops_are_those_of_the_published_formula(rank: int, width: int, share: float) -> None:
    """Schulman et al. 2025: 2 N² + 6 N R with LoRA, 3 N² without; on narrow layers LoRA costs more."""
    counted = variants.share_of_training_flops(rank=rank, width=width)
    assert counted.value == pytest.approx(counted.evidence["by formula"], rel=1e-12)
    assert counted.value == pytest.approx(share, abs=1e-4)


# --- LoRA+


def test_both_loraplus_optimizers_give_b_the_higher_rate() -> None:
    """Trap 12: PEFT takes the ratio from its user and has no weight decay by default."""
    from types import SimpleNamespace

    from peftscope.methods.lora_plus import LoRAPlus

    assert variants.loraplus_step_ratio(ratio=4).value == pytest.approx(4, rel=1e-3)
    model = lora_model(tiny_llama(), rank=4, alpha=8, seed=0)
    groups = LoRAPlus(lr_ratio=16).optimizer_groups(model, SimpleNamespace(learning_rate=1e-4))  # type: ignore[arg-type]
    assert groups[1]["lr"] / groups[0]["lr"] == pytest.approx(16)
    assert {p.shape[1] for p in groups[1]["params"]} == {4}


# --- DoRA


def test_dora_is_exact_after_a_move() -> None:
    moved = variants.dora_column_norms(rank=4, alpha=8)
    assert moved.n == 14
    assert moved.value < 1e-5
    assert moved.evidence["smallest cosine with the direction of W + sBA"] == pytest.approx(1, abs=1e-5)


def test_the_gradient_check_can_tell_a_constant_norm_from_one_with_a_gradient() -> None:
    """Trap 6: PEFT detaches the norm, as the paper suggests."""
    gradient = variants.dora_norm_gradient(rank=4, alpha=8)
    assert gradient.value < 1e-5
    assert gradient.evidence["distance from the formula whose norm has a gradient"] > 0.05


# --- AdaLoRA


def test_adalora_spends_its_budget_exactly_and_unevenly() -> None:
    spread = variants.adalora_rank_spread(**SCHEDULE)
    assert sum(spread.curves["rank kept"].values()) == 14 * 4
    assert spread.value >= 1


def test_adalora_decomposes_nothing_and_the_counter_would_have_seen_it() -> None:
    judged = finding_of("S93")
    assert judged.verdict is Verdict.WRONG
    assert (counted := judged.found) is not None
    assert counted.value == 0
    assert counted.evidence["for comparison, in PiSSA's initialisation"] == 14
    assert counted.evidence["allocations"] > 1
    assert counted.evidence["triplets pruned"] == 14 * 4


@pytest.mark.parametrize("name", ["linalg.svd", "svd", "linalg.svdvals", "svd_lowrank"])
def test_the_counter_sees_every_way_to_a_decomposition(name: str) -> None:
    function: Any = torch
    for part in name.split("."):
        function = getattr(function, part)
    with variants.OperatorCounter() as counter:
        function(torch.randn(8, 6))
    assert counter.count("svd") == 1


# --- LoftQ and PiSSA


def ratio(by: str, alpha: float, iterations: int) -> float:
    measured = initialisation.loftq_error_ratio("noise", 8, alpha, iterations, by, 0)
    assert isinstance(measured.value, float)
    return measured.value


def test_loftq_of_one_iteration_leaves_what_an_svd_leaves(noise: list[tuple[str, torch.Tensor]]) -> None:
    errors = [weight - initialisation._nf4(weight) for _, weight in noise]
    spectra = [torch.linalg.svdvals(error.double()) for error in errors]
    expected = sorted(float((s[8:].square().sum() / s.square().sum()).sqrt()) for s in spectra)[1]
    assert ratio("peftscope", 16, 1) == pytest.approx(expected, rel=1e-4)
    assert ratio("peft", 8, 1) == pytest.approx(expected, rel=1e-4)


def test_peft_ignores_the_scale(noise: list[tuple[str, torch.Tensor]]) -> None:
    """Trap 1: with alpha = 2 · rank the correction is applied twice, which mirrors the error instead of removing it."""
    assert ratio("peft", 16, 1) == pytest.approx(1, abs=1e-4)
    assert ratio("peft", 16, 5) > 1
    assert ratio("peftscope", 16, 5) == pytest.approx(ratio("peftscope", 8, 5), rel=1e-3)
    assert ratio("peftscope", 16, 5) < ratio("peftscope", 16, 1) < 1


def test_qpissa_of_one_iteration_is_pissa_with_its_base_quantised(noise: list[tuple[str, torch.Tensor]]) -> None:
    from peft import LoraConfig, get_peft_model

    weight = noise[1][1]
    linear = torch.nn.Linear(*weight.T.shape, bias=False)
    linear.weight.data = weight.clone()
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights="pissa")
    layer = get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
    expected = initialisation._nf4(layer.get_base_layer().weight.data) + layer.get_delta_weight("default").detach()
    error = (weight - expected).norm()
    assert (weight - initialisation._qpissa(weight, 8, 1)).norm() == pytest.approx(float(error), rel=1e-2)


def test_small_updates_bring_no_intruders_and_large_ones_of_low_rank_do(noise: list[tuple[str, torch.Tensor]]) -> None:
    found = initialisation.intruders_of_random_updates("noise", 4, [0.001, 5.0], 5.0, 1)
    assert found.curves["low rank"][0.001] == found.curves["full rank"][0.001] == 0
    assert found.evidence["after a low rank update"] == 4

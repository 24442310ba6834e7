"""Values of checks that no verdict of the ledger shows: against arithmetic, and other ways to the same number."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from peftscope.claims.checks import (
    adapters,
    counts,
    initialisation,
    memory,
    scaling,
    timing,
    variants,
)
from peftscope.claims.lora_subjects import WEIGHT_STD, adapted_llama, lora_layers
from peftscope.claims.subjects import tiny_llama
from peftscope.claims.verdict import Rule, Verdict, judge

# Counts and memory.


def test_gigabytes_are_parameters_times_the_bytes_of_their_types() -> None:
    regime = {"weights": "bfloat16", "gradients": "bfloat16", "first": "float32", "second": "float32"}
    assert counts.gigabytes(parameters=7e9, dtypes=regime).value == pytest.approx(84)
    assert counts.gigabytes(parameters="smollm2-135m", dtypes={"w": "float32"}).value == pytest.approx(0.538060032)
    adapters = counts.lora_gigabytes(preset="llama-2-7b", rank=8, targets="attention", dtypes={"a": "bfloat16"})
    assert adapters.value == pytest.approx(2 * 8_388_608 / 1e9)
    assert adapters.evidence["rank that takes 0.5 GB"] == pytest.approx(0.5e9 / (2 * 8_388_608 / 8))


LORA = {"method": "lora", "targets": "attention"}


def test_base_is_two_bytes_a_weight_and_adapters_are_in_32_bits_unless_asked() -> None:
    weights = memory.at_peak(kinds=["weights"], run=LORA, how="formula")
    assert weights.value == pytest.approx(2 * 6_738_415_616 / 1e9, rel=1e-4)
    adapters = memory.at_peak(kinds=["adapters"], run=LORA, how="formula")
    assert adapters.value == pytest.approx(4 * 8_388_608 / 1e9, rel=1e-4)
    narrow = memory.at_peak(kinds=["adapters"], run=LORA | {"adapter_dtype": "base"}, how="formula")
    assert narrow.value == pytest.approx(2 * 8_388_608 / 1e9, rel=1e-4)


# Adapters, ranks and settings.


def test_default_init_is_uniform_and_gaussian_has_the_spread_of_one_over_rank() -> None:
    """Trap 9 of the ledger: a sweep over ranks changes the spread of PEFT's gaussian option."""
    uniform = adapters.distance_from_normal(True, rank=8, inputs=4096)
    assert float(uniform.evidence["distance to the uniform distribution of this spread"]) < 0.01
    assert uniform.evidence["spread × √inputs"] == pytest.approx(1 / math.sqrt(3), rel=0.01)
    assert uniform.evidence["spread at rank 1 over spread at rank 64"] == pytest.approx(1, rel=0.03)
    gaussian = adapters.distance_from_normal("gaussian", rank=8, inputs=4096)
    assert gaussian.evidence["spread × rank"] == pytest.approx(1, rel=0.02)
    assert gaussian.evidence["spread at rank 1 over spread at rank 64"] == pytest.approx(64, rel=0.03)


def test_a_random_b_changes_the_loss_the_more_the_wider_it_is(toy: Path) -> None:
    found = adapters.loss_jump("toy", spread=0.01)
    jumps = [abs(jump) for jump in found.curves["rise"].values()]
    assert list(found.curves["rise"]) == list(adapters.SPREADS)
    assert jumps == sorted(jumps)
    assert found.value == pytest.approx(0, abs=5e-3)
    assert found.n == len(found.samples) == 8 and found.low < found.value < found.high


def test_epsilon_of_zero_gives_no_number() -> None:
    """Trap 22 of the ledger: A has no gradient in the first step, and Adam divides zero by zero."""
    found = scaling.trajectory_gap(1 / 16, 2, 2, 8, epsilon=0, steps=2)
    assert math.isnan(float(found.value))
    assert judge(Rule(at_most=1e-8), found)[0] is Verdict.OPEN


def test_settings_are_counted() -> None:
    """PEFT's own default, 8/8, is a setting like the others; the interval is that of a sample of practice."""
    values = {"a": 8, "c": 2, "d": 0.25}
    settings = [scaling.Setting(name=n, source="a paper, table 1", value=v) for n, v in values.items()]
    found = scaling.share_of_settings(settings, low=1, high=2, default="lora_alpha/r")
    assert (found.value, found.n, found.evidence["PEFT's default (LoraConfig)"]) == (0.5, 4, 1)
    assert 0.1 < found.low < 0.5 < found.high < 0.9


# Layers of 4 bits, and starts that make up for them.


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.Tensor]]:
    """Three Gaussian matrices in the place of a fetched model's."""
    torch.manual_seed(0)
    matrices = [(f"layer.{i}", 0.05 * torch.randn(shape)) for i, shape in enumerate([(96, 96), (128, 64), (64, 128)])]
    monkeypatch.setattr(initialisation, "weight_matrices", lambda model: iter(matrices))
    return matrices


@pytest.mark.parametrize("name", ["linalg.svd", "svd", "linalg.svdvals", "svd_lowrank"])
def test_the_counter_sees_every_way_to_a_decomposition(name: str) -> None:
    function: Any = torch
    for part in name.split("."):
        function = getattr(function, part)
    with variants.OperatorCounter() as counter:
        function(torch.randn(8, 6))
    assert counter.count("svd") == 1


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


# Merging, combining, and times.


def test_adapters_change_each_target_by_the_asked_share_of_its_norm() -> None:
    for size in (0.1, 0.5):
        for layer in lora_layers(adapted_llama(size=size)).values():
            change = layer.get_delta_weight("first").detach().norm() / layer.base_layer.weight.norm()
            assert float(change) == pytest.approx(size, rel=0.05)
    assert tiny_llama().config.initializer_range == WEIGHT_STD


def test_pairs_take_turns_and_their_median_ratio_stands_in_its_interval() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> Any:
        def nap() -> None:
            calls.append(name)
            time.sleep(seconds)

        return nap

    found = timing._paired(work("slow", 0.006), work("quick", 0.002), pairs=6)
    assert calls == ["slow", "quick"] * 2 + ["slow", "quick", "quick", "slow"] * 3
    assert found.n == 6
    assert found.low <= found.value <= found.high
    assert found.value > 1.2

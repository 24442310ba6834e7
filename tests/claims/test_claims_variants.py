"""DoRA, AdaLoRA, LoRA+, LoftQ and PiSSA in the claims ledger: numbers against other ways to them, and mutations."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from peftscope.claims.checks import initialisation, variants
from peftscope.claims.evaluate import PartFinding, evaluate_part
from peftscope.claims.ledger import Part, read_ledger
from peftscope.claims.verdict import Verdict

SCHEDULE = {"steps": 12, "init_rank": 8, "target_rank": 4}


def part_of(claim: str, index: int = -1) -> Part:
    """A part of a claim as it stands in the ledger; the last one decides."""
    return {each.id: each for each in read_ledger()}[claim].parts[index]


def found(claim: str, index: int = -1) -> PartFinding:
    return evaluate_part(part_of(claim, index))


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


def test_parameters_of_the_chapters_example_and_of_the_study() -> None:
    seven = variants.times_fewer_parameters(preset="llama-2-7b", rank=8, targets="attention")
    assert seven.evidence == {"trained": 8_388_608, "model": 6_738_415_616}
    small = variants.times_fewer_parameters(preset="smollm2-135m", rank=8, targets="all-linear")
    assert small.value == pytest.approx(134_515_008 / 2_442_240)


# --- LoRA+


def test_both_loraplus_optimizers_give_b_the_higher_rate() -> None:
    """Trap 12: PEFT takes the ratio from its user and has no weight decay by default."""
    from types import SimpleNamespace

    from peftscope.methods.lora_plus import LoRAPlus

    assert variants.loraplus_step_ratio(ratio=4).value == pytest.approx(4, rel=1e-3)
    model = variants._with_lora(rank=4, alpha=8)
    groups = LoRAPlus(lr_ratio=16).optimizer_groups(model, SimpleNamespace(learning_rate=1e-4))  # type: ignore[arg-type]
    assert groups[1]["lr"] / groups[0]["lr"] == pytest.approx(16)
    assert {p.shape[1] for p in groups[1]["params"]} == {4}


def test_an_optimizer_that_ignores_the_ratio_refutes_s84(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("S84").verdict is Verdict.HOLDS
    from peft import optimizers

    create = optimizers.create_loraplus_optimizer

    def one_rate(*args: Any, loraplus_lr_ratio: float, **kwargs: Any) -> Any:
        return create(*args, loraplus_lr_ratio=1, **kwargs)

    monkeypatch.setattr(optimizers, "create_loraplus_optimizer", one_rate)
    assert found("S84").verdict is Verdict.WRONG


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


def test_a_dora_that_does_not_divide_by_the_norm_refutes_s86(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.dora import DoraLinearLayer

    assert found("S86").verdict is Verdict.HOLDS

    def without_update(self: Any, weight: Any, lora_weight: Any, scaling: Any, adapter_name: Any = None) -> Any:
        return torch.linalg.norm(weight, dim=1)

    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", without_update)
    assert found("S86").verdict is Verdict.WRONG


def test_a_dora_norm_with_a_gradient_flips_the_part_that_says_it_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import dora

    assert found("S86", 0).verdict is Verdict.HOLDS
    source = inspect.getsource(dora.DoraLinearLayer.forward).replace(".detach()", "")
    namespace = dict(vars(dora))
    exec(textwrap.dedent(source), namespace)
    monkeypatch.setattr(dora.DoraLinearLayer, "forward", namespace["forward"])
    assert found("S86", 0).verdict is Verdict.WRONG


# --- AdaLoRA


def test_adalora_spends_its_budget_exactly_and_unevenly() -> None:
    spread = variants.adalora_rank_spread(**SCHEDULE)
    assert sum(spread.curves["rank kept"].values()) == 14 * 4
    assert spread.value >= 1


def test_adalora_without_its_call_prunes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 3: nothing happens unless ``update_and_allocate`` is called in every step."""
    from peft import AdaLoraModel

    assert found("S92").verdict is Verdict.HOLDS
    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", lambda self, step: None)
    assert found("S92").verdict is Verdict.WRONG


def test_adalora_decomposes_nothing_and_the_counter_would_have_seen_it() -> None:
    judged = found("S93")
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
    with variants._operator_counter() as counter:
        function(torch.randn(8, 6))
    assert counter.count("svd") == 1


def test_an_adalora_that_scores_by_svd_confirms_s93(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.adalora.layer import RankAllocator

    score = RankAllocator._element_score

    def with_svd(self: Any, name: str) -> Any:
        torch.linalg.svdvals(self.exp_avg_ipt[name])
        return score(self, name)

    monkeypatch.setattr(RankAllocator, "_element_score", with_svd)
    assert found("S93").verdict is Verdict.HOLDS


def test_an_adalora_that_scores_by_size_confirms_the_kind_reading_of_s93(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.adalora.layer import RankAllocator

    assert found("S93", 0).verdict is Verdict.WRONG

    def by_size(self: Any, name: str) -> Any:
        return self.sizes[name] if ".lora_E." in name else torch.zeros_like(self.sizes[name])

    mask = RankAllocator.mask_to_budget

    def scored(self: Any, model: Any, budget: int) -> Any:
        self.sizes = {name: p.detach().abs() for name, p in model.named_parameters() if ".lora_" in name}
        return mask(self, model, budget)

    monkeypatch.setattr(RankAllocator, "mask_to_budget", scored)
    monkeypatch.setattr(RankAllocator, "_element_score", by_size)
    assert found("S93", 0).verdict is Verdict.HOLDS


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


def test_qpissa_error_ratio_is_of_the_errors_it_reports(noise: list[tuple[str, torch.Tensor]]) -> None:
    found = initialisation.qpissa_error_ratio("noise", 8, 1, "frobenius", 1)
    pissa, loftq = (found.evidence[f"{name} removes of NF4's error"] for name in ("QPiSSA", "LoftQ"))
    assert isinstance(pissa, float)
    assert isinstance(loftq, float)
    assert found.value == pytest.approx((1 - pissa) / (1 - loftq))
    assert found.n == 1


def test_small_updates_bring_no_intruders_and_large_ones_of_low_rank_do(noise: list[tuple[str, torch.Tensor]]) -> None:
    found = initialisation.intruders_of_random_updates("noise", 4, [0.001, 5.0], 5.0, 1)
    assert found.curves["low rank"][0.001] == found.curves["full rank"][0.001] == 0
    assert found.evidence["after a low rank update"] == 4


def test_a_peft_that_keeps_the_scale_confirms_its_loftq(
    noise: list[tuple[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    before = found("S90", 0)
    assert before.verdict is Verdict.WRONG and before.found.low <= before.found.value <= before.found.high
    original = Linear.loftq_init

    def scaled(self: Any, adapter_name: str, config: Any) -> None:
        original(self, adapter_name, config)
        for factor in (self.lora_A, self.lora_B):
            factor[adapter_name].weight.data /= math.sqrt(self.scaling[adapter_name])

    monkeypatch.setattr(Linear, "loftq_init", scaled)
    assert found("S90", 0).verdict is Verdict.HOLDS


def test_a_loftq_that_ignores_the_scale_refutes_s90(
    noise: list[tuple[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftscope.methods import loftq

    assert found("S90", 3).verdict is Verdict.HOLDS
    source = inspect.getsource(loftq.LoftQ._initialise).replace(" / scale**0.5", "")
    namespace = dict(vars(loftq))
    exec(textwrap.dedent(source), namespace)
    monkeypatch.setattr(loftq.LoftQ, "_initialise", namespace["_initialise"])
    assert found("S90", 3).verdict is Verdict.WRONG


def test_weights_that_were_not_fetched_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = found_part({"model": "minilm", "ranks": [8], "rank": 8, "iterations": 1})
    assert outcome.verdict is Verdict.NOT_RUN
    assert "peftscope fetch minilm" in outcome.reason


def found_part(parameters: dict[str, Any]) -> PartFinding:
    check = "initialisation.loftq_output_error_ratio"
    return evaluate_part(
        Part.model_validate({"kind": "numerics", "measures": "x", check: parameters, "rule": {"at_most": 1}})
    )


@pytest.fixture
def fetched(repository: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(repository)
    if not (repository / "resources/models/minilm/model.safetensors").is_file():
        pytest.skip("all-MiniLM-L6-v2 was not fetched")
    yield


@pytest.mark.slow
def test_on_real_weights_loftq_helps_a_little_and_pefts_scale_undoes_it(fetched: None) -> None:
    own = initialisation.loftq_error_ratio("minilm", 8, 16, 1, "peftscope", 4)
    assert 0.9 < float(own.value) < 0.99
    assert initialisation.loftq_error_ratio("minilm", 8, 16, 1, "peft", 4).value == pytest.approx(1, abs=1e-4)
    answers = initialisation.loftq_output_error_ratio("minilm", [64], 64, 1)
    assert float(answers.value) < 1

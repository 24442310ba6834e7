"""Counts of the claims ledger: against hand-computed numbers, and with libraries that behave otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

from peftscope.claims.checks import counts
from peftscope.claims.evaluate import evaluate_part
from peftscope.claims.ledger import Claim, read_ledger
from peftscope.claims.verdict import Verdict


@cache
def claims() -> dict[str, Claim]:
    return {claim.id: claim for claim in read_ledger()}


def verdict(claim_id: str, part: int = -1) -> Verdict:
    return evaluate_part(claims()[claim_id].parts[part]).verdict


def test_ratio_of_a_square_matrix_is_its_width_over_twice_the_rank() -> None:
    found = counts.full_to_low_rank_ratio(rows=4096, columns=4096, rank=8)
    assert found.value == 256
    assert found.evidence == {"full": 16_777_216, "low rank": 65_536}


def test_a_layer_and_its_factors_are_counted_on_modules() -> None:
    assert counts.matrix_values(rows=3, columns=5).value == 15
    assert counts.factor_values(rows=3, columns=5, rank=2).value == 2 * (3 + 5)


def test_a_rank_above_the_crossover_has_more_values_than_the_matrix() -> None:
    # Keys of SmolLM2-135M: 192 × 576 values, 144 is mn/(m + n).
    matrix = counts.matrix_values(rows=192, columns=576).value
    assert counts.factor_values(rows=192, columns=576, rank=144).value == matrix
    found = counts.factor_values_deviation(sizes=[[192, 576, 16], [4096, 4096, 8]])
    assert found.value == 0
    assert found.evidence["smallest rank that saves nothing, 192 × 576"] == 144
    assert found.evidence["smallest rank that saves nothing, 4096 × 4096"] == 2048


@pytest.mark.parametrize(
    ("preset", "rank", "targets", "expected"),
    [
        ("llama-2-7b", 8, "attention", 8_388_608),
        ("llama-2-7b", 8, "all-linear", 19_988_480),
        ("llama-3-8b", 8, "attention", 6_815_744),
        ("mistral-7b", 8, "minimal", 3_407_872),
        ("smollm2-135m", 64, "all-linear", 19_537_920),
    ],
)
def test_lora_parameters_are_those_of_the_published_shapes(preset: str, rank: int, targets: str, expected: int) -> None:
    found = counts.lora_parameters(preset=preset, rank=rank, targets=targets)
    assert found.value == found.evidence["by formula"] == expected


def test_percentage_is_of_the_model_without_its_adapter() -> None:
    found = counts.lora_percent(preset="llama-2-7b", rank=8, targets="attention")
    assert found.evidence["of the model"] == 6_738_415_616
    assert found.value == pytest.approx(100 * 8_388_608 / 6_738_415_616)


def test_gigabytes_are_parameters_times_the_bytes_of_their_types() -> None:
    regime = {"weights": "bfloat16", "gradients": "bfloat16", "first": "float32", "second": "float32"}
    assert counts.gigabytes(parameters=7e9, dtypes=regime).value == pytest.approx(84)
    assert counts.gigabytes(parameters="smollm2-135m", dtypes={"w": "float32"}).value == pytest.approx(0.538060032)
    adapters = counts.lora_gigabytes(preset="llama-2-7b", rank=8, targets="attention", dtypes={"a": "bfloat16"})
    assert adapters.value == pytest.approx(2 * 8_388_608 / 1e9)
    assert adapters.evidence["rank that takes 0.5 GB"] == pytest.approx(0.5e9 / (2 * 8_388_608 / 8))


def test_gpt3_checkpoint_is_two_bytes_a_value_in_the_unit_asked_for() -> None:
    shape = {"layers": 96, "width": 12288, "matrices": 2, "rank": 4}
    found = counts.lora_checkpoint(**shape)
    assert found.evidence["values"] == 18_874_368
    assert found.value == pytest.approx(37.748736)
    assert counts.lora_checkpoint(**shape, unit=2**20).value == 36
    assert counts.lora_checkpoint(**shape, of=350e9).value == pytest.approx(350e9 / 37_748_736)


def test_packed_bytes_of_a_real_layer_agree_with_the_formula() -> None:
    for double_quant, bits in ((True, 4 + 8 / 64 + 32 / 64 / 256), (False, 4.5)):
        found = counts.packed_gigabytes(preset="llama-2-7b", rows=1024, columns=4096, double_quant=double_quant)
        assert found.evidence["bits per weight"] == pytest.approx(bits, rel=5e-3)
        assert found.value == pytest.approx(6_476_005_376 * bits / 8 / 1e9, rel=5e-3)


def test_nf4_is_asked_for_by_name_since_the_default_is_fp4(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    asked, quantize = [], functional.quantize_4bit

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options["quant_type"])
        return quantize(*args, **options)

    monkeypatch.setattr(functional, "quantize_4bit", spy)
    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", spy)
    counts.stored_gigabytes(values=1e9, storage="nf4")
    counts.packed_gigabytes(preset="smollm2-135m", rows=64, columns=64)
    assert asked == ["nf4", "nf4"]


def test_average_bits_count_head_and_embeddings_at_full_width() -> None:
    found = counts.average_bits(preset="smollm2-135m")
    others = 134_515_008 - 106_168_320
    bits = (106_168_320 * (4 + 8 / 64 + 32 / 64 / 256) + 16 * others) / 134_515_008
    assert found.value == pytest.approx(bits)
    assert found.evidence["times smaller than in 16 bits"] == pytest.approx(16 / bits)
    wider = counts.average_bits(preset="smollm2-135m", rest="float32").value
    assert wider == pytest.approx(bits + 16 * others / 134_515_008)


@pytest.mark.parametrize(("width", "rank", "expected"), [(4096, 8, 2 / 3 + 2 * 8 / 4096), (576, 128, 2 / 3 + 2 / 4.5)])
def test_operations_of_lora_exceed_full_fine_tuning_where_the_rank_is_high(
    width: int, rank: int, expected: float
) -> None:
    # 4 N² + 12 N r a token over 6 N²
    found = counts.operations_ratio(method="lora", against="full", width=width, rank=rank)
    assert found.value == pytest.approx(expected)


def test_dora_builds_the_product_of_its_factors_in_every_pass() -> None:
    few = float(counts.operations_ratio(method="dora", against="lora", width=1024, rank=8, tokens=64).value)
    many = float(counts.operations_ratio(method="dora", against="lora", width=1024, rank=8, tokens=4096).value)
    assert few > many > 1


def test_merging_leaves_no_operation_behind() -> None:
    for method in ("lora", "dora"):
        found = counts.merged_operations(method=method)
        assert found.value == 0
        assert found.evidence["parameters more after merging"] == 0
        assert float(found.evidence["before merging, percent more"]) > 0


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_in_the_factors_refutes_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    assert verdict("S11") is Verdict.HOLDS
    monkeypatch.setattr(peft, "LoraConfig", partial(peft.LoraConfig, lora_bias=True))
    assert verdict("S11") is Verdict.WRONG


def test_a_library_that_skips_a_target_refutes_the_count_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    assert verdict("S40") is verdict("S41") is Verdict.HOLDS
    inject = peft.inject_adapter_in_model

    def without_output(config: Any, model: Any) -> Any:
        config.target_modules = set(config.target_modules) - {"o_proj"}
        return inject(config, model)

    monkeypatch.setattr(peft, "inject_adapter_in_model", without_output)
    assert verdict("S40") is verdict("S41") is Verdict.WRONG


def test_weights_that_are_not_packed_refute_half_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    assert verdict("S48") is Verdict.HOLDS
    quantize: Callable[..., Any] = functional.quantize_4bit

    def unpacked(weight: Any, **options: Any) -> Any:
        packed, state = quantize(weight, **options)
        return packed.repeat(2, 1), state

    monkeypatch.setattr(functional, "quantize_4bit", unpacked)
    assert verdict("S48") is Verdict.WRONG


def test_an_adapter_that_stays_after_merging_refutes_free_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    assert verdict("P21") is Verdict.HOLDS
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.model)
    assert verdict("P21") is Verdict.WRONG

"""Counts of the claims ledger: against hand-computed numbers."""

from __future__ import annotations

import pytest

from peftscope.claims.checks import counts


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

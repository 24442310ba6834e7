"""Memory in the claims ledger: against arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from peftscope.claims.checks import memory

LORA = {"method": "lora", "targets": "attention"}
QLORA = {"method": "qlora", "targets": "attention"}


@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        ("torch.optim.AdamW", "bfloat16", 4),
        ("torch.optim.AdamW", "float32", 8),
        ("bitsandbytes.optim.AdamW", "bfloat16", 8),
        ("bitsandbytes.optim.AdamW8bit", "bfloat16", 2 + 2 * 4 / 256),
    ],
)
def test_torch_keeps_states_in_the_type_of_the_weights_and_bitsandbytes_in_its_own(
    optimizer: str, dtype: str, expected: float
) -> None:
    assert memory.optimizer_bytes(optimizer=optimizer, dtype=dtype).value == expected


def test_gradients_that_are_used_at_once_never_add_up() -> None:
    found = memory.gradients_alive(layers=8)
    # Two consecutive ones can be alive, as the hook of the second runs before it is freed.
    assert float(found.value) <= 2 * float(found.evidence["largest parameter"])


def test_adalora_takes_twelve_bytes_more_and_frees_nothing() -> None:
    lora, adalora = memory.adapter_bytes(method="lora"), memory.adapter_bytes(method="adalora")
    assert lora.value == 4 + 4 + 2 * 4
    assert adalora.value == 16 + 3 * 4
    # It did prune to its budget: 4 of 12.
    assert adalora.evidence["rank kept at the end, share"] == pytest.approx(4 / 12)


def test_base_is_two_bytes_a_weight_and_adapters_are_in_32_bits_unless_asked() -> None:
    weights = memory.at_peak(kinds=["weights"], run=LORA, how="formula")
    assert weights.value == pytest.approx(2 * 6_738_415_616 / 1e9, rel=1e-4)
    adapters = memory.at_peak(kinds=["adapters"], run=LORA, how="formula")
    assert adapters.value == pytest.approx(4 * 8_388_608 / 1e9, rel=1e-4)
    narrow = memory.at_peak(kinds=["adapters"], run=LORA | {"adapter_dtype": "base"}, how="formula")
    assert narrow.value == pytest.approx(2 * 8_388_608 / 1e9, rel=1e-4)


def test_kbit_preparation_doubles_what_is_not_quantised() -> None:
    kinds = ["weights", "quantised weights"]
    plain, prepared = (
        float(memory.at_peak(kinds=kinds, run=QLORA | {"kbit_preparation": value}, how="formula").value)
        for value in (False, True)
    )
    others = 6_738_415_616 - 6_476_005_376
    assert plain == pytest.approx((6_476_005_376 * (4 + 8 / 64 + 32 / 64 / 256) / 8 + 2 * others) / 1e9, rel=1e-3)
    assert prepared - plain == pytest.approx(2 * others / 1e9, rel=1e-3)


def test_foreach_takes_a_copy_of_the_states_in_the_step() -> None:
    run = {"method": "full", "checkpointing": True}
    foreach, fused = (
        float(memory.peak(run=run | {"optimizer_implementation": name}, how="formula").value)
        for name in ("foreach", "fused")
    )
    assert foreach - fused == pytest.approx(2 * 6_738_415_616 / 1e9, rel=0.05)


def test_paged_states_count_where_the_card_holds_them() -> None:
    run = {"method": "full", "optimizer": "paged_adamw"}
    found = memory.at_peak(kinds=["optimizer states"], run=run, how="formula")
    assert found.value == pytest.approx(8 * 6_738_415_616 / 1e9, rel=1e-3)


def test_what_is_left_counts_the_reserve_and_the_cuda_context_in_binary_units() -> None:
    found = memory.free(gpu="24GiB", run=LORA, how="formula")
    answer = memory._answer("llama-2-7b", LORA, "formula")
    assert found.value == pytest.approx(24 - answer.peak_device_bytes / 2**30)
    assert float(found.evidence["on the card, GiB"]) > float(found.evidence["peak, GB"]) * 1e9 / 2**30 + 0.4
    assert int(found.evidence["longest sequence"]) > 512


def test_fewer_cards_hold_a_regime_that_takes_less() -> None:
    run = {"method": "full", "seq_len": 2048, "checkpointing": True}
    regimes: dict[str, dict[str, Any]] = {
        "states in 32 bits": {"optimizer": "paged_adamw"},
        "amp": {"precision": "amp"},
    }
    found = memory.fewest_cards(gpu="a100-80gb", regimes=regimes, run=run, headroom=0.1)
    assert found.value == found.evidence["cards, states in 32 bits"] == 2
    assert int(found.evidence["cards, amp"]) >= 2
    tight = memory.fewest_cards(gpu="a100-80gb", regimes=regimes, run=run, headroom=0.7)
    assert int(tight.value) > int(found.value)


@pytest.mark.slow
def test_ratio_is_simulated_where_the_closed_form_has_its_smallest() -> None:
    options: dict[str, Any] = {"checkpointing": True, "seq_len": 256}
    found = memory.smallest_peak_ratio(
        run={"method": "full", **options}, against={**LORA, **options}, batch_sizes=(1, 4), model="smollm2-135m"
    )
    curve = found.curves["ratio"]
    assert found.evidence["at batch size"] == min(curve, key=lambda size: curve[size])
    assert found.value == pytest.approx(min(curve.values()), rel=0.02)

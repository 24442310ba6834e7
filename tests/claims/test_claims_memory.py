"""Memory in the claims ledger: against arithmetic, and with libraries that behave otherwise."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from peftscope.claims.checks import memory
from peftscope.claims.evaluate import evaluate_part
from peftscope.claims.ledger import Claim, read_ledger
from peftscope.claims.verdict import Verdict

LORA = {"method": "lora", "targets": "attention"}
QLORA = {"method": "qlora", "targets": "attention"}


@cache
def claims() -> dict[str, Claim]:
    return {claim.id: claim for claim in read_ledger()}


def verdict(claim_id: str, part: int = -1) -> Verdict:
    return evaluate_part(claims()[claim_id].parts[part]).verdict


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


def test_optimizer_states_in_the_weights_type_refute_eight_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from bitsandbytes.optim.optimizer import Optimizer8bit

    assert (verdict("S3"), verdict("S3", part=-2)) == (Verdict.WRONG, Verdict.HOLDS)
    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", lambda self, p, dtype=None: torch.zeros_like(p))
    assert verdict("S3", part=-2) is Verdict.WRONG


def test_adalora_without_its_importance_scores_would_be_as_small_as_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import AdaLoraModel

    assert verdict("S95") is Verdict.WRONG
    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", lambda self, step: None)
    assert verdict("S95") is Verdict.HOLDS


def test_gradients_that_stay_would_be_as_large_as_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert verdict("S2", part=1) is Verdict.WRONG
    register = torch.nn.Parameter.register_post_accumulate_grad_hook

    def after_all(self: Any, hook: Any) -> Any:
        """Calls the hook, but keeps the gradient."""

        def keeping(parameter: Any) -> None:
            gradient = parameter.grad
            hook(parameter)
            parameter.grad = gradient

        return register(self, keeping)

    monkeypatch.setattr(torch.nn.Parameter, "register_post_accumulate_grad_hook", after_all)
    assert verdict("S2", part=1) is Verdict.HOLDS


@pytest.mark.slow
@pytest.mark.parametrize("claim_id", ["S1", "S5", "S7", "S49", "S57", "S60"])
def test_claims_on_a_7b_model_are_decided(claim_id: str) -> None:
    found = [evaluate_part(part) for part in claims()[claim_id].parts]
    assert found[-1].verdict is not Verdict.NOT_RUN
    assert all(part.found or part.part.waits_for or part.part.kind == "gpu" for part in found)

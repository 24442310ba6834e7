"""Paired times: the order of turns, the ratio, and both checks on a model that is small enough."""

from __future__ import annotations

import time
from typing import Any

import pytest

from peftscope.claims.checks import timing


def test_pairs_take_turns_and_their_median_ratio_stands_in_its_interval() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> Any:
        def nap() -> None:
            calls.append(name)
            time.sleep(seconds)

        return nap

    found = timing._paired(work("slow", 0.006), work("quick", 0.002), pairs=6, model="toy")
    assert calls == ["slow", "quick"] * 2 + ["slow", "quick", "quick", "slow"] * 3
    assert found.n == 6
    assert found.low <= found.value <= found.high
    assert found.value > 1.2
    assert found.evidence["above the line, seconds, median"] > found.evidence["below the line, seconds, median"]


@pytest.mark.parametrize(
    ("run", "against"),
    [
        ({"method": "full"}, {"method": "lora", "targets": "attention"}),
        ({"method": "adalora", "targets": "all-linear"}, {"method": "lora", "targets": "all-linear", "rank": 12}),
    ],
)
def test_steps_of_two_methods_are_timed(run: dict[str, Any], against: dict[str, Any]) -> None:
    found = timing.step_ratio(run | {"seq_len": 16}, against | {"seq_len": 16}, model="toy", pairs=2)
    assert found.n == 2 and 0 < found.low <= found.high


def test_a_timed_step_trains() -> None:
    step = timing._training_step("toy", {"method": "lora", "targets": "attention", "seq_len": 16})
    first = float(step().loss)
    losses = [float(step().loss) for _ in range(30)]
    assert min(losses) < first


@pytest.mark.parametrize("work", ["prompt", "token"])
def test_passes_with_the_adapter_apart_and_merged_are_timed(work: Any) -> None:
    found = timing.latency_ratio({"method": "lora", "seq_len": 16}, work, model="toy", pairs=2)
    assert found.n == 2 and 0 < found.low <= found.high

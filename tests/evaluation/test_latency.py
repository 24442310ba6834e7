"""The latency of an adapter: of the base before, of the adapter apart, and merged."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError

from peftscope.evaluation import latency
from peftscope.execution import way
from peftscope.record import Timing


@pytest.mark.parametrize("method", ["dora", "qlora"])
def test_latency_is_that_of_the_base_the_adapter_and_what_was_merged(
    method: str, toy: Path, make_spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []

    def timed(model: Any, spec: Any) -> dict[str, Timing]:
        layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())

        def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
            cache = options.get("past_key_values")
            seen.append((layers, options["input_ids"].shape[1], cache.get_seq_length() if cache else 0))

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        times = latency.time_passes(model, spec)
        hook.remove()
        return times

    monkeypatch.setattr(way, "time_passes", timed)
    monkeypatch.setitem(latency.REPEATS, "cpu", 5)
    spec = make_spec(method=method, latency_tokens=8, generation_items=0, probe_steps=0)
    record = run_here(spec, tmp_path)
    # Around each of the seven linear layers of both blocks, and around nothing after merging; tokens see the prompt.
    assert set(seen) == {(n, *shape) for n in (0, 14) for shape in ((8, 0), (1, 8))}
    assert [key for key, _ in groupby(n for n, *_ in seen)] == [0, 14, 0]
    assert record.latency is not None and record.seconds.latency > 0
    assert set(record.latency) == {f"{s}_{p}" for s in ("base", "apart", "merged") for p in ("prompt", "token")}
    for timing in record.latency.values():
        assert timing.repeats >= 5
        assert 0 < timing.seconds_lower_quartile <= timing.seconds_median <= timing.seconds_upper_quartile


@pytest.mark.parametrize("method", ["full", "none", "prompt-tuning"])
def test_only_adapters_that_can_be_merged_have_a_latency(method: str, make_spec) -> None:
    spec = make_spec(method=method)
    with pytest.raises(ValidationError, match="compares an adapter that is apart with a merged one"):
        type(spec).model_validate(spec.model_dump() | {"latency_tokens": 8})

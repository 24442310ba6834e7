"""The tables of what fits on a smaller card, and of latency."""

from __future__ import annotations

import pandas as pd
import pytest

from peftscope.analysis.collect import row_of
from peftscope.planning.sweep import expand
from peftscope.record import Memory, PhaseMemory, RunRecord, Timing
from peftscope.report.serving import latencies, limited_runs

GIB = 2**30


@pytest.mark.parametrize(
    ("device", "ended"), [("cuda", ["fits", "does not fit"]), ("cpu", 2 * ["not enforced on a processor"])]
)
def test_a_run_that_was_limited_says_how_it_ended(device: str, ended: list[str]) -> None:
    specs = [spec for spec in expand("gpu-check", device).runs.values() if spec.memory_limit_gib == 23.988]
    took = Memory(train=PhaseMemory(peak_tensor_bytes=12 * GIB, peak_reserved_bytes=13 * GIB))
    statuses = ["ok", "oom" if device == "cuda" else "ok"]
    rows = [
        row_of(spec, RunRecord(run_id="", status=status, spec=spec, memory=took))
        for spec, status in zip(specs, statuses, strict=True)
    ]
    unlimited = next(spec for spec in expand("gpu-check", device).runs.values() if spec.memory_limit_gib is None)
    table = limited_runs(pd.DataFrame([*rows, row_of(unlimited, None)]))
    assert table["outcome"].tolist() == ended
    assert table["limit (GiB)"].tolist() == ["24.0"] * 2 and table["peak reserved, train (GiB)"][0] == "13.00"
    assert table["run"].nunique() == 2
    assert limited_runs(pd.DataFrame([row_of(unlimited, None)])).empty


def test_latency_is_shown_with_the_ratio_that_serving_asks_for() -> None:
    spec = next(spec for spec in expand("gpu-check", "cuda").runs.values() if spec.latency_tokens)
    seconds = {"base": 0.01, "apart": 0.03, "merged": 0.02}
    timed = {
        f"{state}_{name}": Timing(
            repeats=9, seconds_median=value, seconds_lower_quartile=value, seconds_upper_quartile=value
        )
        for state, value in seconds.items()
        for name in ("prompt", "token")
    }
    row = row_of(spec, RunRecord(run_id="", status="ok", spec=spec, latency=timed))
    table = latencies(pd.DataFrame([row, row_of(spec, None)]))
    assert len(table) == 1 and table["token, apart over merged"][0] == "1.500"
    assert table["prompt, base (ms)"][0] == "10" and table["prompts at once"][0] == "1"
    assert latencies(pd.DataFrame([row_of(spec, None)])).empty

"""Claims that a card decides: made-up runs of ``experiments/gpu-check.yaml`` in, verdicts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from conftest import quartiles
from ledger_parts import claims

from peftscope.analysis.collect import row_of
from peftscope.claims.checks import gpu
from peftscope.claims.evaluate import PartFinding, evaluate_part
from peftscope.claims.ledger import Part
from peftscope.claims.verdict import Verdict
from peftscope.planning.experiment import experiment_path, read_experiment
from peftscope.planning.sweep import Resolver, expand
from peftscope.record import RunRecord, Speed, Timing
from peftscope.spec import RunSpec, run_id

GIB = 2**30
LORA: dict[str, Any] = {"method": "lora", "targets": "attention"}
AGAIN = {"checkpointing": True}
WHOLE = {"method": "full", **AGAIN}
EVERYWHERE = {"targets": "all-linear"}
SERVED = {"targets": "all-linear", "latency_tokens": 128, "adapter_dtype": "base"}

Runs = list[RunRecord]


def spec_of(run: dict[str, Any], model: str = "llama-2-7b", device: str = "cuda") -> RunSpec:
    """Returns the spec of a run under the settings of the experiment."""
    path = experiment_path("gpu-check")
    resolver = Resolver(read_experiment(path), path, device)
    return resolver.spec({"model": f"random-{model}", "seed": 0, **run}, "test")


def record_of(spec: RunSpec, **found: Any) -> RunRecord:
    return RunRecord(run_id=run_id(spec), spec=spec, **{"status": "ok", **found})


def write_card(folder: Path, runs: Runs, name: str = "card", **facts: str) -> None:
    """Writes ``runs.csv`` as it would be after the runs ended so on a card."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    provenance = {"hardware": {"gpu": name, "gpu_memory_bytes": 80 * GIB, **facts}}
    made = [run.model_copy(update={"provenance": provenance}) for run in runs]
    rows = [{"run_id": run.run_id, "comparisons": "grid", **row_of(run.spec, run)} for run in made]
    pd.DataFrame(rows).to_csv(target / "runs.csv", index=False)


def part_of(claim: str, number: int = -1) -> Part:
    """Returns one of a claim's parts that a card decides, by default the last."""
    return [part for part in claims()[claim].parts if part.check.startswith("gpu.")][number]


def judged(part: Part, folder: Path) -> PartFinding:
    with patch.object(gpu, "FOLDERS", (str(folder),)):
        return evaluate_part(part)


def of(seconds: tuple[float, ...], step: str = "") -> dict[str, float]:
    return quartiles(*np.quantile(seconds, [0.25, 0.5, 0.75]), of=step)


def steps(*found: tuple[dict[str, Any], tuple[float, ...]]) -> Runs:
    """Returns runs with these options and seconds of their steps."""
    timed = [(run, Speed(timed_steps=len(seconds), **of(seconds, "step_"))) for run, seconds in found]
    return [record_of(spec_of(run), speed=speed) for run, speed in timed]


def latencies(method: str, apart: tuple[float, ...], merged: tuple[float, ...], base: tuple[float, ...]) -> Runs:
    times = {"base": base, "apart": apart, "merged": merged}
    one = {state: Timing(repeats=len(seconds), **of(seconds)) for state, seconds in times.items()}
    timings = {f"{state}_{name}": time for state, time in one.items() for name in ("prompt", "token")}
    runs = [{"method": method, "batch_size": size, **SERVED} for size in (1, 16)]
    return [record_of(spec_of(run), latency=timings) for run in runs]


ONE, SLOWER, ABIT = (1.0, 1.01, 0.99), (2.0, 2.01, 1.99), (1.05, 1.06, 1.04)
WIDE = (0.5, 1.2, 3.0)
SIZES = (1, 4, 16)


def both(run: dict[str, Any], against: dict[str, Any], *times: tuple[float, ...]) -> Runs:
    """Returns two runs at all batch sizes."""
    pairs = zip((run, against), times, strict=True)
    return steps(*(({**options, "batch_size": size}, seconds) for options, seconds in pairs for size in SIZES))


DORA, ADALORA = {"method": "dora", **EVERYWHERE}, {"method": "adalora", **EVERYWHERE}
PLAIN = {"method": "lora", **EVERYWHERE}


@pytest.mark.parametrize(
    ("claim", "number", "runs", "verdict"),
    [
        ("S88", 0, both(DORA, PLAIN, SLOWER, ONE), "wrong"),
        ("S88", 0, both(DORA, PLAIN, WIDE, ONE), "open"),
        ("S88", 0, both(DORA, PLAIN, ONE, SLOWER), "holds"),
        ("P22", 0, both(ADALORA, PLAIN | {"rank": 12}, SLOWER, ONE), "wrong"),
        ("P12", -1, both(WHOLE, LORA | AGAIN, SLOWER, ONE), "holds"),
        ("P12", -1, both(WHOLE, LORA | AGAIN, ONE, SLOWER), "wrong"),
        ("P12", -1, both(WHOLE, LORA | AGAIN, WIDE, ONE), "open"),
        ("S71", -1, latencies("lora", ABIT, ONE, ONE), "holds"),
        ("S71", -1, latencies("lora", SLOWER, ONE, ONE), "wrong"),
        ("S71", -1, latencies("lora", WIDE, ONE, ONE), "open"),
        ("S71", -1, latencies("dora", ABIT, ONE, ONE), "not run"),
    ],
)
def test_runs_of_a_card_reach_every_verdict(claim: str, number: int, runs: Runs, verdict: str, tmp_path: Path) -> None:
    write_card(tmp_path, runs)
    found = judged(part_of(claim, number), tmp_path)
    assert found.verdict == Verdict(verdict), found.reason


def test_a_processors_results_never_decide(tmp_path: Path) -> None:
    runs = both(DORA, PLAIN, SLOWER, ONE)
    settings = [{**options, "batch_size": size} for options in (DORA, PLAIN) for size in SIZES]
    on_cpu = [record_of(spec_of(setting, device="cpu"), speed=runs[0].speed) for setting in settings]
    write_card(tmp_path, on_cpu)
    found = judged(part_of("S88"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and "no run on a CUDA card" in found.reason
    # Nor do the same runs on a card if they failed, or if their memory was limited.
    limited = [record_of(spec_of(setting | {"memory_limit_gib": 40}), speed=runs[0].speed) for setting in settings]
    write_card(tmp_path, [run.model_copy(update={"status": "failed"}) for run in runs] + limited)
    found = judged(part_of("S88"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and "method dora, targets all-linear, batch_size 1" in found.reason


def test_times_of_a_card_without_bf16_never_decide(tmp_path: Path) -> None:
    runs = both(DORA, PLAIN, SLOWER, ONE)
    write_card(tmp_path, runs, "Tesla T4")
    found = judged(part_of("S88"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and "Tesla T4: no bf16 products of its own" in found.reason
    write_card(tmp_path, runs, "Tesla T4", compute_capability="8.0")  # what was measured counts, not a name
    assert judged(part_of("S88"), tmp_path).found is not None
    for name, facts in (("TITAN RTX", {"compute_capability": "7.5"}), ("NVIDIA L4", {"system": "Linux (WSL2)"})):
        write_card(tmp_path, runs, "Tesla T4")
        write_card(tmp_path, runs, name, **facts)
        assert judged(part_of("S88"), tmp_path).verdict == Verdict.NOT_RUN
    write_card(tmp_path, runs, "NVIDIA L4", compute_capability="8.9", system="Linux")
    assert judged(part_of("S88"), tmp_path).found is not None
    write_card(tmp_path, runs, "NVIDIA L4")
    measured = judged(part_of("S88"), tmp_path).found
    assert measured is not None and measured.n == 1 and "T4" not in measured.model


@pytest.mark.parametrize("content", ["", "{", "run_id,device\n1,cuda\n", '"'])
def test_damaged_results_are_a_reason_and_no_traceback(content: str, tmp_path: Path) -> None:
    write_card(tmp_path, [])
    (tmp_path / "card" / "runs.csv").write_text(content)
    found = judged(part_of("S88"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and found.reason


def test_of_several_cards_the_most_extreme_counts_and_all_are_shown(tmp_path: Path) -> None:
    for name, slow in (("fast card", ONE), ("slow card", SLOWER)):
        write_card(tmp_path, both(DORA, PLAIN, slow, ONE), name)
    found = judged(part_of("S88", 0), tmp_path).found
    assert found is not None and found.value == 2 and found.n == 2
    assert "fast card, slow card" in found.model and found.evidence["fast card, batch 1"] == 1


def test_a_batch_that_ran_out_of_memory_gives_no_ratio_and_is_named(tmp_path: Path) -> None:
    runs = both(WHOLE, LORA | AGAIN, SLOWER, ONE)
    (largest,) = [i for i, run in enumerate(runs) if run.spec.method.name == "full" and run.spec.batch_size == 16]
    runs[largest] = record_of(runs[largest].spec, status="oom")
    write_card(tmp_path, runs)
    found = judged(part_of("P12"), tmp_path).found
    assert found is not None and found.evidence["card, batch 16"] == "out of memory" and found.value == 2


def test_what_claims_ask_for_is_what_the_experiment_runs(tmp_path: Path) -> None:
    speed = steps((LORA, ONE))[0].speed
    timings = latencies("lora", ONE, ONE, ONE)[0].latency
    specs = expand("gpu-check", "cuda").runs.values()
    latency = {True: timings, False: None}
    write_card(tmp_path, [record_of(s, speed=speed, latency=latency[s.latency_tokens > 0]) for s in specs])
    checked = [part for claim in claims().values() for part in claim.parts if part.check.startswith("gpu.")]
    assert {part.check for part in checked} == {"gpu.step_ratio", "gpu.latency_ratio"}
    for part in checked:
        found = judged(part, tmp_path)
        assert found.found is not None, (part.measures, found.reason)

"""Claims that a card decides: made-up runs of ``experiments/gpu-check.yaml`` in, verdicts out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from peftscope.analysis.collect import row_of
from peftscope.claims.evaluate import PartFinding, evaluate_part
from peftscope.claims.ledger import Part, read_ledger
from peftscope.claims.verdict import Verdict
from peftscope.planning.experiment import experiment_path, read_experiment
from peftscope.planning.sweep import Resolver, expand
from peftscope.record import Memory, PhaseMemory, RunRecord, Speed, Timing
from peftscope.spec import RunSpec, run_id

GB, GIB = 10**9, 2**30
LORA: dict[str, Any] = {"method": "lora", "targets": "attention"}
AGAIN = {"checkpointing": True}
WHOLE = {"method": "full", **AGAIN}
EVERYWHERE = {"targets": "all-linear"}
SERVED = {"targets": "all-linear", "latency_tokens": 128, "adapter_dtype": "base"}
LIMITS = {"a100-80gb": 72, "rtx4090": 23.988, "rtx4060": 7.996, "rtx3090": 24}

Runs = list[RunRecord]


def spec_of(run: dict[str, Any], model: str = "llama-2-7b", device: str = "cuda") -> RunSpec:
    """Returns the spec of a run under the settings of the experiment."""
    path = experiment_path("gpu-check")
    resolver = Resolver(read_experiment(path), path, device)
    return resolver.spec({"model": f"random-{model}", "seed": 0, **run}, "test")


def record_of(spec: RunSpec, **found: Any) -> RunRecord:
    return RunRecord(run_id=run_id(spec), spec=spec, **{"status": "ok", **found})


def write_card(folder: Path, runs: Runs, name: str = "card", memory: int = 80) -> None:
    """Writes ``runs.csv`` as it would be after the runs ended so on a card with so many GiB."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    provenance = {"hardware": {"gpu": name, "gpu_memory_bytes": memory * GIB}, "card": {"used_bytes": GIB}}
    made = [run.model_copy(update={"provenance": provenance}) for run in runs]
    rows = [{"run_id": run.run_id, "comparisons": "grid", **row_of(run.spec, run)} for run in made]
    pd.DataFrame(rows).to_csv(target / "runs.csv", index=False)


@cache
def parts() -> dict[str, list[Part]]:
    """Returns the parts of claims that a card decides, by claim."""
    return {claim.id: [part for part in claim.parts if part.check.startswith("gpu.")] for claim in read_ledger()}


def part_of(claim_id: str, number: int = -1) -> Part:
    """Returns one of a claim's parts that a card decides, by default the last."""
    return parts()[claim_id][number]


def judged(part: Part, folder: Path) -> PartFinding:
    return evaluate_part(part.model_copy(update={"with_": part.with_ | {"results": (str(folder),)}}))


def held(*outcomes: tuple[dict[str, Any], bool], card: str) -> Runs:
    """Returns runs that were limited to a card's memory; the ones that fit took 5 GiB, and others used one more."""
    took = Memory(train=PhaseMemory(peak_device_bytes=6 * GIB))
    return [
        record_of(spec_of(run | {"memory_limit_gib": LIMITS[card]}), status="ok" if fits else "oom", memory=took)
        for run, fits in outcomes
    ]


def quartiles(seconds: tuple[float, ...]) -> dict[str, float]:
    names = ("lower_quartile", "median", "upper_quartile")
    return dict(zip(names, np.quantile(seconds, [0.25, 0.5, 0.75]).tolist(), strict=True))


def steps(*found: tuple[dict[str, Any], float, tuple[float, ...]], model: str = "llama-2-7b") -> Runs:
    """Returns runs with these options, peaks in GB and seconds of their steps."""
    return [
        record_of(
            spec_of(run, model),
            memory=Memory(train=PhaseMemory(peak_tensor_bytes=int(peak * GB)), resident_tensor_bytes=4 * GB),
            speed=Speed(
                timed_steps=len(seconds),
                tokens_per_second=512 * run.get("batch_size", 1) / seconds[0],
                **{f"step_seconds_{name}": value for name, value in quartiles(seconds).items()},
            ),
        )
        for run, peak, seconds in found
    ]


def latencies(method: str, apart: tuple[float, ...], merged: tuple[float, ...], base: tuple[float, ...]) -> Runs:
    times = {"base": base, "apart": apart, "merged": merged}
    timings = {
        f"{state}_{name}": Timing(
            repeats=len(seconds), **{f"seconds_{which}": value for which, value in quartiles(seconds).items()}
        )
        for state, seconds in times.items()
        for name in ("prompt", "token")
    }
    runs = [{"method": method, "batch_size": size, **SERVED} for size in (1, 16)]
    return [record_of(spec_of(run), latency=timings) for run in runs]


ONE, SLOWER, ABIT = (1.0, 1.01, 0.99), (2.0, 2.01, 1.99), (1.05, 1.06, 1.04)
WIDE = (0.5, 1.2, 3.0)
FULL_2048 = WHOLE | {"seq_len": 2048}
EIGHT_BIT = FULL_2048 | {"optimizer": "adamw_8bit"}
BASE_TYPE = {**LORA, "method": "qlora", "adapter_dtype": "base"}
SIZES = (1, 4, 16)


def both(run: dict[str, Any], against: dict[str, Any], peaks: tuple[float, float], times: Any, **options: Any) -> Runs:
    """Returns two runs at all batch sizes."""
    pairs = zip((run, against), peaks, times, strict=True)
    return steps(*(({**o, "batch_size": size}, peak, t) for o, peak, t in pairs for size in SIZES), **options)


DORA, ADALORA = {"method": "dora", **EVERYWHERE}, {"method": "adalora", **EVERYWHERE}
PLAIN = {"method": "lora", **EVERYWHERE}


@pytest.mark.parametrize(
    ("claim", "number", "runs", "verdict"),
    [
        ("S5", 0, held((FULL_2048, False), (EIGHT_BIT, True), card="a100-80gb"), "wrong"),
        ("S5", 0, held((FULL_2048, False), (EIGHT_BIT, False), card="a100-80gb"), "holds"),
        ("S5", 0, held((FULL_2048, False), card="a100-80gb"), "not run"),
        ("S7", -1, held((LORA, True), card="rtx4090"), "holds"),
        ("S7", -1, held((LORA, False), card="rtx4090"), "wrong"),
        ("S7", -1, held((LORA, True), card="rtx3090"), "not run"),
        ("S60", -1, held((BASE_TYPE, True), card="rtx4060"), "holds"),
        ("S6", 0, steps((LORA, 15, ONE)), "holds"),
        ("S6", 0, steps((LORA, 20, ONE)), "wrong"),
        ("S59", 0, steps(({**LORA, "method": "qlora"}, 6.5, ONE)), "holds"),
        ("S59", 0, steps(({**LORA, "method": "qlora"}, 8, ONE)), "wrong"),
        ("S8", 0, both(WHOLE, LORA | AGAIN, (50, 10), (ONE, ONE)), "holds"),
        ("S8", 0, both(WHOLE, LORA | AGAIN, (30, 10), (ONE, ONE)), "wrong"),
        ("S88", 0, both(DORA, PLAIN, (1, 1), (SLOWER, ONE)), "wrong"),
        ("S88", 0, both(DORA, PLAIN, (1, 1), (WIDE, ONE)), "open"),
        ("S88", 0, both(DORA, PLAIN, (1, 1), (ONE, SLOWER)), "holds"),
        ("S88", 1, both(DORA, PLAIN, (1.3, 1), (ONE, ONE)), "wrong"),
        ("S95", 0, both(ADALORA, PLAIN | {"rank": 12}, (1.01, 1), (ONE, ONE)), "holds"),
        ("P22", 0, both(ADALORA, PLAIN | {"rank": 12}, (1, 1), (SLOWER, ONE)), "wrong"),
        ("P12", -1, both(WHOLE, LORA | AGAIN, (1, 1), (SLOWER, ONE)), "holds"),
        ("P12", -1, both(WHOLE, LORA | AGAIN, (1, 1), (ONE, SLOWER)), "wrong"),
        ("P12", -1, both(WHOLE, LORA | AGAIN, (1, 1), (WIDE, ONE)), "open"),
        ("P12", 0, both(WHOLE, LORA | AGAIN, (1, 1), (SLOWER, ONE)), "holds"),
        ("P12", 0, both(WHOLE, LORA | AGAIN, (1, 1), (ONE, ONE)), "wrong"),
        ("S71", -1, latencies("lora", ABIT, ONE, ONE), "holds"),
        ("S71", -1, latencies("lora", SLOWER, ONE, ONE), "wrong"),
        ("S71", -1, latencies("lora", WIDE, ONE, ONE), "open"),
        ("S74", -1, latencies("lora", SLOWER, (1.0,) * 3, (1.0,) * 3), "holds"),
        ("S74", -1, latencies("lora", ONE, SLOWER, ONE), "wrong"),
        ("P21", -1, latencies("dora", SLOWER, (1.0,) * 3, (1.0,) * 3), "holds"),
        ("P21", -1, latencies("lora", SLOWER, (1.0,) * 3, (1.0,) * 3), "not run"),
    ],
)
def test_runs_of_a_card_reach_every_verdict(claim: str, number: int, runs: Runs, verdict: str, tmp_path: Path) -> None:
    write_card(tmp_path, runs)
    found = judged(part_of(claim, number), tmp_path)
    assert found.verdict == Verdict(verdict), found.reason


def test_growth_from_one_set_of_layers_to_the_next(tmp_path: Path) -> None:
    for sizes, verdict in (((14, 15, 17), Verdict.HOLDS), ((14, 15, 15), Verdict.WRONG)):
        named = zip(("minimal", "attention", "all-linear"), sizes, strict=True)
        write_card(tmp_path, steps(*(({"method": "lora", "targets": t}, gb, ONE) for t, gb in named)))
        found = judged(part_of("S42"), tmp_path)
        assert found.verdict == verdict and found.found is not None
        assert found.found.value == pytest.approx(sizes[2] - sizes[1] if sizes[2] == 15 else 1)


def test_what_the_whole_card_showed_decides_whether_it_fits(tmp_path: Path) -> None:
    spec = spec_of(LORA | {"memory_limit_gib": LIMITS["rtx4090"]})
    for gib, reserved, verdict in (
        (24.5, 20, Verdict.HOLDS),  # of which others used one
        (25.5, 20, Verdict.WRONG),
        (None, 20, Verdict.HOLDS),
        (None, 24.5, Verdict.WRONG),
    ):
        device = None if gib is None else int(gib * GIB)
        peaks = PhaseMemory(peak_device_bytes=device, peak_reserved_bytes=int(reserved * GIB))
        write_card(tmp_path, [record_of(spec, memory=Memory(evaluate=peaks))])
        assert judged(part_of("S7"), tmp_path).verdict == verdict


def test_a_card_with_less_memory_than_the_limit_cannot_say_that_a_run_does_not_fit(tmp_path: Path) -> None:
    for fits, verdict in ((False, Verdict.NOT_RUN), (True, Verdict.HOLDS)):
        write_card(tmp_path, held((LORA, fits), card="rtx4090"), memory=16)
        assert judged(part_of("S7"), tmp_path).verdict == verdict


def test_a_processors_results_never_decide(tmp_path: Path) -> None:
    run = LORA | {"memory_limit_gib": LIMITS["rtx4090"]}
    write_card(tmp_path, [record_of(spec_of(run, device="cpu"))])
    found = judged(part_of("S7"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and "no run on a CUDA card" in found.reason
    # Nor does the same run on a card if it failed, or has another limit.
    write_card(tmp_path, [record_of(spec_of(run), status="failed"), record_of(spec_of(LORA))])
    found = judged(part_of("S7"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and "within 23.988 GiB: method lora, targets attention" in found.reason


def test_without_results_it_says_what_to_run(tmp_path: Path) -> None:
    found = judged(part_of("S7"), tmp_path / "nothing")
    assert found.verdict == Verdict.NOT_RUN and "make gpu-check" in found.reason


@pytest.mark.parametrize("content", ["", "{", "run_id,device\n1,cuda\n", '"'])
def test_damaged_results_are_a_reason_and_no_traceback(content: str, tmp_path: Path) -> None:
    write_card(tmp_path, [])
    (tmp_path / "card" / "runs.csv").write_text(content)
    found = judged(part_of("S7"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and found.reason


def test_of_several_cards_the_most_extreme_counts_and_all_are_shown(tmp_path: Path) -> None:
    for name, slow in (("fast card", ONE), ("slow card", SLOWER)):
        write_card(tmp_path, both(DORA, PLAIN, (1, 1), (slow, ONE)), name)
    found = judged(part_of("S88", 0), tmp_path).found
    assert found is not None and found.value == 2 and found.n == 2
    assert "fast card, slow card" in found.model and found.evidence["fast card, batch 1"] == 1


def test_a_batch_that_ran_out_of_memory_gives_no_ratio_and_is_named(tmp_path: Path) -> None:
    runs = both(WHOLE, LORA | AGAIN, (50, 10), (ONE, ONE))
    (largest,) = [i for i, run in enumerate(runs) if run.spec.method.name == "full" and run.spec.batch_size == 16]
    runs[largest] = record_of(runs[largest].spec, status="oom")
    write_card(tmp_path, runs)
    found = judged(part_of("S8", 0), tmp_path).found
    assert found is not None and found.evidence["card, batch 16"] == "out of memory" and found.value == 5


def test_what_claims_ask_for_is_what_the_experiment_runs(tmp_path: Path) -> None:
    took = Memory(train=PhaseMemory(peak_tensor_bytes=GB, peak_device_bytes=2 * GIB), resident_tensor_bytes=1)
    speed = steps((LORA, 1, ONE))[0].speed
    timings = latencies("lora", ONE, ONE, ONE)[0].latency
    write_card(
        tmp_path,
        [
            record_of(spec, memory=took, speed=speed, latency=timings if spec.latency_tokens else None)
            for spec in expand("gpu-check", "cuda").runs.values()
        ],
    )
    checked = [part for those in parts().values() for part in those]
    assert len(checked) > 20
    for part in checked:
        found = judged(part, tmp_path)
        assert found.found is not None, (part.measures, found.reason)

"""Claims that a card decides: made-up rows of ``make gpu-check`` in, verdicts out."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from peftscope.analysis.cards import KINDS, label_of
from peftscope.claims.evaluate import PartFinding, evaluate_part
from peftscope.claims.ledger import Part, read_ledger
from peftscope.claims.verdict import Verdict
from peftscope.gpu.jobs import card_jobs
from peftscope.gpu.page import write_page
from peftscope.hardware.cards import GPUS

GB, GIB = 10**9, 2**30
LORA: dict[str, Any] = {"method": "lora", "targets": "attention"}
AGAIN = {"checkpointing": True}
WHOLE = {"method": "full", **AGAIN}
EVERYWHERE = {"targets": "all-linear"}
SERVED = {"targets": "all-linear", "seq_len": 128, "adapter_dtype": "base"}

Rows = dict[str, dict[str, Any]]


def write_card(folder: Path, kind: str, rows: Rows, name: str = "card", device: str = "cuda") -> None:
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "card.json").write_text(json.dumps({"device": device, "name": name}))
    filled = {label: {"status": "ok", "device": device, **row} for label, row in rows.items()}
    (target / f"{kind}.json").write_text(json.dumps(filled))


@cache
def parts() -> dict[str, list[Part]]:
    """Returns the parts of claims that a card decides, by claim."""
    return {claim.id: [part for part in claim.parts if part.check.startswith("gpu.")] for claim in read_ledger()}


def part_of(claim_id: str, number: int = -1) -> Part:
    """Returns one of a claim's parts that a card decides, by default the last."""
    return parts()[claim_id][number]


def judged(part: Part, folder: Path) -> PartFinding:
    return evaluate_part(part.model_copy(update={"with_": part.with_ | {"results": str(folder)}}))


def held(*outcomes: tuple[dict[str, Any], bool], card: str, headroom: float = 0) -> Rows:
    return {
        label_of("llama-2-7b", run, card, headroom): {
            "fits": fits,
            "status": "ok" if fits else "out of memory",
            "capacity_bytes": 24 * GIB,
            "measured_device_bytes": 20 * GIB if fits else None,
        }
        for run, fits in outcomes
    }


def steps(*found: tuple[dict[str, Any], float, tuple[float, ...]], model: str = "llama-2-7b") -> Rows:
    """Returns rows of steps: options, peak in GB, seconds."""
    return {
        label_of(model, run): {
            "measured_allocated_bytes": int(peak * GB),
            "resident_bytes": 4 * GB,
            "samples": {"step": seconds},
            "tokens_per_second": 512 * run.get("batch_size", 1) / seconds[0],
        }
        for run, peak, seconds in found
    }


def latencies(method: str, apart: tuple[float, ...], merged: tuple[float, ...], base: tuple[float, ...]) -> Rows:
    times = {"base": base, "apart": apart, "merged": merged}
    samples = {state: {"prompt": list(values), "token": list(values)} for state, values in times.items()}
    runs = [{"method": method, "batch_size": size, **SERVED} for size in (1, 16)]
    return {label_of("llama-2-7b", run): {"samples": samples} for run in runs}


ONE, SLOWER, ABIT = (1.0, 1.01, 0.99), (2.0, 2.01, 1.99), (1.05, 1.06, 1.04)
WIDE = (0.5, 1.2, 3.0)
FULL_2048 = WHOLE | {"seq_len": 2048}
EIGHT_BIT = FULL_2048 | {"optimizer": "adamw_8bit"}
BASE_TYPE = {**LORA, "method": "qlora", "adapter_dtype": "base"}
SIZES = (1, 4, 16)


def both(run: dict[str, Any], against: dict[str, Any], peaks: tuple[float, float], times: Any, **options: Any) -> Rows:
    """Returns the rows of two runs at all batch sizes."""
    pairs = zip((run, against), peaks, times, strict=True)
    return steps(*(({**o, "batch_size": size}, peak, t) for o, peak, t in pairs for size in SIZES), **options)


DORA, ADALORA = {"method": "dora", **EVERYWHERE}, {"method": "adalora", **EVERYWHERE}
PLAIN = {"method": "lora", **EVERYWHERE}


@pytest.mark.parametrize(
    ("claim", "number", "kind", "rows", "verdict"),
    [
        ("S5", 0, "fits", held((FULL_2048, False), (EIGHT_BIT, True), card="a100-80gb", headroom=0.1), "EXACT-WRONG"),
        ("S5", 0, "fits", held((FULL_2048, False), (EIGHT_BIT, False), card="a100-80gb", headroom=0.1), "EXACT"),
        ("S5", 0, "fits", held((FULL_2048, False), card="a100-80gb", headroom=0.1), "NOT-RUN"),
        ("S7", -1, "fits", held((LORA, True), card="rtx4090"), "EXACT"),
        ("S7", -1, "fits", held((LORA, False), card="rtx4090"), "EXACT-WRONG"),
        ("S7", -1, "fits", held((LORA, True), card="rtx3090"), "NOT-RUN"),
        ("S60", -1, "fits", held((BASE_TYPE, True), card="rtx4060"), "EXACT"),
        ("S6", 0, "steps", steps((LORA, 15, ONE)), "EXACT"),
        ("S6", 0, "steps", steps((LORA, 18, ONE)), "EXACT-WRONG"),
        ("S59", 0, "steps", steps(({**LORA, "method": "qlora"}, 6.5, ONE)), "EXACT"),
        ("S59", 0, "steps", steps(({**LORA, "method": "qlora"}, 7.5, ONE)), "EXACT-WRONG"),
        ("S8", 0, "steps", both(WHOLE, LORA | AGAIN, (50, 10), (ONE, ONE)), "EXACT"),
        ("S8", 0, "steps", both(WHOLE, LORA | AGAIN, (30, 10), (ONE, ONE)), "EXACT-WRONG"),
        ("S88", 0, "steps", both(DORA, PLAIN, (1, 1), (SLOWER, ONE)), "REFUTED"),
        ("S88", 0, "steps", both(DORA, PLAIN, (1, 1), (ONE, ONE)), "INCONCLUSIVE"),
        ("S88", 0, "steps", both(DORA, PLAIN, (1, 1), (ONE, SLOWER)), "SUPPORTED"),
        ("S88", 1, "steps", both(DORA, PLAIN, (1.3, 1), (ONE, ONE)), "EXACT-WRONG"),
        ("S95", 0, "steps", both(ADALORA, PLAIN | {"rank": 12}, (1.01, 1), (ONE, ONE)), "EXACT"),
        ("P22", 0, "steps", both(ADALORA, PLAIN | {"rank": 12}, (1, 1), (SLOWER, ONE)), "REFUTED"),
        ("P12", -1, "steps", both(WHOLE, LORA | AGAIN, (1, 1), (SLOWER, ONE)), "SUPPORTED"),
        ("P12", -1, "steps", both(WHOLE, LORA | AGAIN, (1, 1), (ONE, SLOWER)), "REFUTED"),
        ("P12", -1, "steps", both(WHOLE, LORA | AGAIN, (1, 1), (WIDE, ONE)), "INCONCLUSIVE"),
        ("P12", 0, "steps", both(WHOLE, LORA | AGAIN, (1, 1), (SLOWER, ONE)), "SUPPORTED"),
        ("P12", 0, "steps", both(WHOLE, LORA | AGAIN, (1, 1), (ONE, ONE)), "REFUTED"),
        ("S71", -1, "latency", latencies("lora", ABIT, ONE, ONE), "SUPPORTED"),
        ("S71", -1, "latency", latencies("lora", SLOWER, ONE, ONE), "REFUTED"),
        ("S71", -1, "latency", latencies("lora", WIDE, ONE, ONE), "INCONCLUSIVE"),
        ("S74", -1, "latency", latencies("lora", SLOWER, (1.0,) * 3, (1.0,) * 3), "SUPPORTED"),
        ("S74", -1, "latency", latencies("lora", ONE, SLOWER, ONE), "REFUTED"),
        ("P21", -1, "latency", latencies("dora", SLOWER, (1.0,) * 3, (1.0,) * 3), "SUPPORTED"),
        ("P21", -1, "latency", latencies("lora", SLOWER, (1.0,) * 3, (1.0,) * 3), "NOT-RUN"),
    ],
)
def test_rows_of_a_card_reach_every_verdict(
    claim: str, number: int, kind: str, rows: Rows, verdict: str, tmp_path: Path
) -> None:
    write_card(tmp_path, kind, rows)
    found = judged(part_of(claim, number), tmp_path)
    assert found.verdict == Verdict(verdict), found.reason
    # The folder of one card is read as well as one with several: the report of a check judges its own.
    assert judged(part_of(claim, number), tmp_path / "card").verdict == found.verdict


def test_growth_from_one_set_of_layers_to_the_next(tmp_path: Path) -> None:
    for sizes, verdict in (((14, 15, 17), Verdict.EXACT), ((14, 15, 15), Verdict.EXACT_WRONG)):
        named = zip(("minimal", "attention", "all-linear"), sizes, strict=True)
        write_card(tmp_path, "steps", steps(*(({"method": "lora", "targets": t}, gb, ONE) for t, gb in named)))
        found = judged(part_of("S42"), tmp_path)
        assert found.verdict == verdict and found.found is not None
        assert found.found.value == pytest.approx(sizes[2] - sizes[1] if sizes[2] == 15 else 1)


def test_a_processors_results_never_decide(tmp_path: Path) -> None:
    rows = held((LORA, True), card="rtx4090")
    write_card(tmp_path, "fits", rows, device="cpu")
    found = judged(part_of("S7"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and "no card's results" in found.reason
    # Nor does one of its rows that lies in a card's folder.
    (tmp_path / "card" / "card.json").write_text(json.dumps({"device": "cuda", "name": "card"}))
    found = judged(part_of("S7"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and "no card under" in found.reason
    write_card(tmp_path, "fits", rows)
    assert judged(part_of("S7"), tmp_path).verdict == Verdict.EXACT


def test_without_results_it_says_what_to_run(tmp_path: Path) -> None:
    found = judged(part_of("S7"), tmp_path / "nothing")
    assert found.verdict == Verdict.NOT_RUN and "make gpu-check" in found.reason


@pytest.mark.parametrize("content", ["{", "[]", '{"llama": 1}', '{"llama": {}}'])
def test_damaged_results_are_a_reason_and_no_traceback(content: str, tmp_path: Path) -> None:
    write_card(tmp_path, "fits", {})
    (tmp_path / "card" / "fits.json").write_text(content)
    found = judged(part_of("S7"), tmp_path)
    assert found.verdict == Verdict.NOT_RUN and "fits.json" in found.reason


def test_of_several_cards_the_most_extreme_counts_and_all_are_shown(tmp_path: Path) -> None:
    for name, slow in (("fast card", ONE), ("slow card", SLOWER)):
        write_card(tmp_path, "steps", both(DORA, PLAIN, (1, 1), (slow, ONE)), name)
    found = judged(part_of("S88", 0), tmp_path).found
    assert found is not None and found.value == 2 and found.n == 2
    assert "fast card, slow card" in found.model and found.evidence["fast card, batch 1"] == 1


def test_a_batch_that_ran_out_of_memory_gives_no_ratio_and_is_named(tmp_path: Path) -> None:
    rows = both(WHOLE, LORA | AGAIN, (50, 10), (ONE, ONE))
    rows[label_of("llama-2-7b", WHOLE | {"batch_size": 16})] = {"status": "out of memory"}
    write_card(tmp_path, "steps", rows)
    found = judged(part_of("S8", 0), tmp_path).found
    assert found is not None and found.evidence["card, batch 16"] == "out of memory" and found.value == 5


def test_what_claims_ask_for_is_what_a_card_measures(tmp_path: Path) -> None:
    jobs = {job.label for job in card_jobs(GPUS["h200"])}
    for kind in KINDS:
        write_card(tmp_path, kind, {})
    checked = [part for those in parts().values() for part in those]
    assert len(checked) > 20
    for part in checked:
        reason = judged(part, tmp_path).reason
        asked = re.search(r"has measured (.*)", reason)
        assert asked is not None, reason
        assert set(asked.group(1).split(", ")) <= jobs


def test_the_report_of_a_card_shows_what_it_decides_and_what_did_not_run(tmp_path: Path) -> None:
    rows = {
        label: row | {"spec": label, "limit": "rtx4090", "other_processes": 2}
        for label, row in held((LORA, True), card="rtx4090").items()
    }
    write_card(tmp_path, "fits", rows)
    named = {"spec": "another", "model": "m", "method": "dora"}
    write_card(tmp_path, "steps", {"another": named | {"status": "failed: <why>"}})
    facts = {
        "device": "cuda",
        "name": "a <card>",
        "memory_bytes": 80 * GIB,
        "ceilings": {"dtype": "bfloat16", "matmul_flops_per_second": 8e14, "copy_bytes_per_second": 3e12},
        "idle": {"power_watts": 70.5, "sm_clock_mhz": None},
        "loaded": {},
        "other_processes": [{"pid": 7, "used_bytes": None}],
        "cuda": "13.0",
        "versions": {"torch": "2"},
    }
    (tmp_path / "card" / "card.json").write_text(json.dumps(facts))
    waiting = next(job for job in card_jobs(GPUS["h100"]) if job.kind == "latency")
    text = write_page(tmp_path / "card", [(waiting.kind, waiting.label)]).read_text()
    decided = judged(part_of("S7"), tmp_path)
    assert decided.verdict == Verdict.EXACT and text.count("<td>EXACT") == 1
    assert "CPU" not in text and "800 TFLOP/s" in text and "70.5 W" in text and "process 7" in text
    assert "fits, with 2 other processes on the card" in text
    assert "failed: &lt;why&gt;" in text and "a &lt;card&gt;" in text
    assert f"Not measured yet: {waiting.label}." in text

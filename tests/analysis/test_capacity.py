"""Bits stored of random strings, the break beyond which no more is stored, and the claims on it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ledger_parts import changed_part, part_with, write_results

from peftscope.analysis import capacity
from peftscope.analysis.capacity import breaks, fit_break, stored_bits
from peftscope.analysis.study import HELDOUT
from peftscope.claims.evaluate import evaluate_part
from peftscope.claims.verdict import Verdict
from peftscope.layout import results_folder
from peftscope.planning.published import VALIDATION
from peftscope.report.capacity import capacity_answer, write_capacity

BITS, TOKENS = 72.0, 18
"""Of one string, and of its response with what belongs to its form."""
RANKS = {1: 1000, 4: 4000, 16: 16_000}
FULL = 40_000
ALIKE: dict[str, Any] = {"comparisons": "ladder-0-train_items", "status": "ok", "model": "toy", "judged_on": "train"}
ALIKE |= {"learning_rate": 1e-2, "steps": 100, "batch_size": 8, "gradient_accumulation": 1}
Capacity = Callable[[str, int], float]


def row(arm: str, parameters: int, items: int, stored: float, seed: int = 0, **changed: Any) -> dict[str, Any]:
    """Returns a row of runs.csv of a run that stored so many bits of so many strings."""
    code_bits = (items * BITS - stored) / items
    lora = arm != "full fine-tuning"
    return ALIKE | {
        "run_id": f"{arm}-{items}-{seed}",
        "seed": seed,
        "label": "LoRA" if lora else arm,
        "method": "lora" if lora else "full",
        "rank": float(arm.rpartition(" ")[2]) if lora else math.nan,
        "trained_parameters": parameters,
        "train_items": items,
        "judged_items": items,
        "judged_entropy_bits": items * BITS,
        "heldout_tokens": items * TOKENS,
        HELDOUT: code_bits * math.log(2) / TOKENS,
        VALIDATION: 1.2 * BITS * math.log(2) / TOKENS,
        **changed,
    }


def write_runs(
    per_parameter: float, ceiling: Capacity | None = None, sizes: tuple[int, ...] = (4, 16, 64, 256, 1024)
) -> None:
    """Writes runs that store all they are given, up to so many bits for each parameter or to an arm's own ceiling."""
    noise = np.random.default_rng(0)
    rows = []
    for arm, parameters in [*((f"LoRA, rank {rank}", n) for rank, n in RANKS.items()), ("full fine-tuning", FULL)]:
        most = ceiling(arm, parameters) if ceiling else per_parameter * parameters
        for items in sizes:
            for seed in range(3):
                stored = min(items * BITS, most) * (1 - 0.02 * noise.random())
                rows.append(row(arm, parameters, items, stored, seed))
    write_results("capacity", rows)


@pytest.fixture
def here(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(capacity, "DRAWS", 100)
    return own_folder


def test_stored_is_entropy_less_code_length_and_never_less_than_nothing() -> None:
    runs = pd.DataFrame(
        [
            row("LoRA, rank 1", 1000, 10, 500.0),
            row("LoRA, rank 1", 1000, 10, 300.0, learning_rate=1e-3),  # a worse rate of the same run
            row("LoRA, rank 1", 1000, 20, -400.0),
            row("LoRA, rank 1", 1000, 40, 900.0, judged_on="test"),
            row("LoRA, rank 1", math.nan, 80, 0.0, status="diverged", heldout_tokens=math.nan, **{HELDOUT: math.nan}),
        ]
    )
    table = stored_bits(runs).set_index("items")
    assert table["stored"].to_dict() == pytest.approx({10: 500.0, 20: 0.0, 80: 0.0})
    assert table["given"].to_dict() == pytest.approx({10: 720.0, 20: 1440.0, 80: 5760.0})
    assert table.loc[10, "learning_rate"] == 1e-2
    assert table["parameters"].tolist() == [1000] * 3
    # Strings that were not trained on take more than their entropy: nothing of them is stored.
    assert table.loc[10, "fresh_bits"] == pytest.approx(-0.2 * 720)
    assert table["exposures"].to_dict() == pytest.approx({10: 80, 20: 40, 80: 10})


def test_a_break_is_found_with_an_interval_that_covers_it() -> None:
    given = np.repeat([500.0, 1000, 2000, 4000, 8000, 16_000], 2)
    covered = 0
    for seed in range(20):
        noise = 0.03 * np.random.default_rng(seed).standard_normal(len(given))
        found = fit_break(given, 0.9 * np.minimum(given, 3000) + given * noise)
        covered += found["break_low"] <= 3000 <= found["break_high"]
        assert found["is_bounded"] and found["followed_share"] == pytest.approx(0.9, abs=0.1)
    assert covered >= 15


@pytest.mark.parametrize("true", [300.0, 1e6])
def test_sizes_on_one_side_of_a_break_do_not_bound_it(true: float) -> None:
    given = np.repeat([500.0, 1000, 2000, 4000], 2)
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(given))
    assert not fit_break(given, np.minimum(given, true) + given * noise)["is_bounded"]


def test_the_claim_on_two_bits_follows_the_break(here: Path) -> None:
    part = part_with("P5", "capacity.bits_per_parameter", model="toy")
    assert evaluate_part(part).verdict is Verdict.NOT_RUN
    write_runs(2.0)
    about_two = evaluate_part(part)
    assert about_two.verdict is Verdict.HOLDS
    assert about_two.found is not None and about_two.found.value == pytest.approx(2.0, rel=0.05)
    assert about_two.found.n == len(RANKS)
    write_runs(0.3)
    assert evaluate_part(part).verdict is Verdict.WRONG
    for exposures, verdict in ((1, Verdict.WRONG), (10**9, Verdict.OPEN)):
        assert evaluate_part(changed_part(part, least=1, exposures=exposures)).verdict is verdict
    write_runs(2.0, sizes=(4, 8, 12, 16))
    assert "do not enclose the break of LoRA, rank 1" in evaluate_part(part).reason
    write_runs(2.0)
    runs = pd.read_csv(results_folder("capacity") / "runs.csv")
    runs.loc[0, "status"] = "missing"
    runs.to_csv(results_folder("capacity") / "runs.csv", index=False)
    assert "not finished (59 of 60 runs done)" in evaluate_part(part).reason


def test_claims_on_ranks_follow_what_they_store(here: Path) -> None:
    share = "capacity.share_of_full"
    questions = {"S37": (share, {"rank": 16}), "S39": (share, {"rank": 4}), "P16": ("capacity.furthest_ranks", {})}

    def verdicts() -> list[Verdict]:
        return [
            evaluate_part(changed_part(part, **ranks)).verdict
            for name, (check, given) in questions.items()
            for part in [part_with(name, check, **given)]
            for ranks in [{"ranks": [1, 4, 16]} if name == "P16" else {"control": 16}]
        ]

    write_runs(0.0, lambda arm, parameters: 1e9)
    assert verdicts() == [Verdict.HOLDS] * 3
    write_runs(0.0, lambda arm, parameters: 100.0 if arm == "LoRA, rank 4" else 1e9)
    assert verdicts() == [Verdict.HOLDS, Verdict.WRONG, Verdict.WRONG]
    write_runs(1.0)
    assert verdicts() == [Verdict.OPEN, Verdict.OPEN, Verdict.WRONG], "the control stores too little as well"


def test_the_section_of_the_report_names_what_is_not_enclosed(here: Path) -> None:
    write_runs(2.0, lambda arm, parameters: 1e9 if arm == "full fine-tuning" else 2.0 * parameters)
    write_capacity("capacity")
    folder = results_folder("capacity")
    assert ">bits stored<" in (folder / "figures" / "capacity.svg").read_text()
    table = pd.read_csv(folder / "tables" / "capacity.csv").set_index("arm")
    assert table["is_bounded"].to_dict() == {"LoRA, rank 1": True, "LoRA, rank 4": True, "LoRA, rank 16": True} | {
        "full fine-tuning": False
    }
    said = ("1.99 to 2.00 bits", "LoRA, rank 1; LoRA, rank 4; LoRA, rank 16", "99 %", "tried: full fine-tuning")
    assert all(fact in capacity_answer("capacity") for fact in said)
    assert "outside the sizes that were tried" in html.unescape((folder / "tables" / "capacity.html").read_text())
    table = stored_bits(pd.read_csv(folder / "runs.csv"))
    assert breaks(table[table["items"] < 256]).empty, "three sizes fit any break"

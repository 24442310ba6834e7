"""Chooses a study's learning rates by the validation loss of seeds that serve no other purpose. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem
from peftscope.files.atomic import write_json
from peftscope.layout import record_path, tuned_path
from peftscope.planning.experiment import experiment_path
from peftscope.planning.sweep import TUNING, Sweep
from peftscope.record import recover_record

OUT_OF_MEMORY = "memory ran out"


def choose_rates(sweep: Sweep) -> Path:
    """Writes for each arm the rate with the lowest mean validation loss, and all rates that were tried.

    A run that diverged counts as an infinite loss. An arm gets no rate if one of its runs ran out of memory.

    Raises:
        InputError: A record is missing, a run failed, or the best rate of an arm is the lowest or highest of its list.
    """
    arms = {
        comparison.name.removeprefix(TUNING): _tried(sweep, comparison.runs)
        for comparison in sweep.comparisons
        if comparison.name.startswith(TUNING)
    }
    chosen: dict[str, Any] = {}
    problems = []
    keep_ends = sweep.experiment.study is not None and sweep.experiment.study.ends == "keep"
    for arm, tried in arms.items():
        if not tried:
            chosen[arm] = {"learning_rate": None, "reason": OUT_OF_MEMORY, "tried": _runs_of(sweep, arm)}
            continue
        best = min(tried, key=lambda rate: tried[rate]["validation_nll"])
        rates = sorted(tried)
        where = f"{experiment_path(sweep.name)}: study.learning_rates.{arm}"
        if math.isinf(tried[best]["validation_nll"]):
            problems.append(Problem(where, f"training diverged at all {len(rates)}", "add lower ones"))
        elif best in (rates[0], rates[-1]) and not keep_ends:
            end, remedy = ("lowest", "a lower") if best == rates[0] else ("highest", "a higher")
            problems.append(Problem(where, f"the best of {len(rates)} is the {end}, {best:g}", f"add {remedy} one"))
        chosen[arm] = {"learning_rate": best, "tried": [{"learning_rate": r, **_finite(tried[r])} for r in rates]}
    if not problems and not any(entry["learning_rate"] for entry in chosen.values()):
        remedy = f"see `peftscope expand {sweep.name}` for what would fit"
        problems.append(Problem(f"{experiment_path(sweep.name)}: study.arms", "memory ran out in every one", remedy))
    if problems:
        raise InputError(problems)
    write_json(tuned_path(sweep.name), {"arms": chosen})
    return tuned_path(sweep.name)


def _tried(sweep: Sweep, runs: tuple[str, ...]) -> dict[float, dict[str, Any]]:
    """Returns mean validation loss and run ids by learning rate, or nothing if one of the runs ran out of memory."""
    found: dict[float, dict[str, Any]] = {}
    for run in runs:
        path = record_path(run)
        if not path.is_file():
            raise InputError(Problem(str(path), "no record yet", f"make report EXPERIMENT={sweep.name}"))
        record = recover_record(path)
        if record.status == "oom" and record.spec.device == "cuda":
            return {}
        if record.status not in ("ok", "diverged"):
            remedy = "see its train.log; remove its record.json to try again (and state/, if it ran out of memory)"
            raise InputError(Problem(str(path), f"{record.status}: {record.reason}", remedy))
        nll = record.quality.validation_nll
        if nll is None and record.status == "ok":
            where = f"{experiment_path(sweep.name)}: fixed.validation_items"
            raise InputError(Problem(where, "a study chooses by validation loss", "give it a number above 0"))
        entry = found.setdefault(sweep.runs[run].learning_rate, {"losses": [], "run_ids": []})
        entry["losses"].append(math.inf if nll is None else nll)
        entry["run_ids"].append(run)
    return {
        rate: {"validation_nll": sum(e["losses"]) / len(e["losses"]), "run_ids": e["run_ids"]}
        for rate, e in found.items()
    }


def _runs_of(sweep: Sweep, arm: str) -> list[dict[str, Any]]:
    """Returns an entry without a loss for each learning rate of an arm."""
    (runs,) = (c.runs for c in sweep.comparisons if c.name == f"{TUNING}{arm}")
    rates = dict.fromkeys(sweep.runs[run].learning_rate for run in runs)
    return [
        {
            "learning_rate": rate,
            "validation_nll": None,
            "losses": [],
            "run_ids": [run for run in runs if sweep.runs[run].learning_rate == rate],
        }
        for rate in rates
    ]


def _finite(tried: dict[str, Any]) -> dict[str, Any]:
    return {**tried, "validation_nll": tried["validation_nll"] if math.isfinite(tried["validation_nll"]) else None}

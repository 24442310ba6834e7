"""The stages of a study: listed rates, three rates or more, pairs at rates that are given, controls. No torch."""

from __future__ import annotations

from peftscope.planning.cells import ARM, CONTROL, RATES, TUNING
from peftscope.planning.sweep import Sweep

STAGES = {"listed rates": TUNING, "three rates": RATES, "given rates": ARM, "controls": CONTROL}
BESIDE = "beside"


def runs_by_stage(sweep: Sweep) -> dict[str, list[str]]:
    """Returns the runs of each stage of a study, each run once, and those beside all stages."""
    rest = dict.fromkeys(sweep.runs)
    stages: dict[str, list[str]] = {}
    for stage, prefix in STAGES.items():
        named = [run for c in sweep.comparisons if c.name.startswith(prefix) for run in c.runs]
        stages[stage] = [run for run in dict.fromkeys(named) if run in rest]
        for run in stages[stage]:
            del rest[run]
    return {**stages, BESIDE: list(rest)}

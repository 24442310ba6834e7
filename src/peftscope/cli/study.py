"""The lines of `expand` on a study before it runs: its stages, and the differences that its pairs can detect."""

from __future__ import annotations

import math
from collections.abc import Iterator

from peftscope.analysis.compare import Difference
from peftscope.analysis.study import PLANNED, StudyResults
from peftscope.errors import InputError
from peftscope.layout import record_path
from peftscope.planning.cells import ARM, CONTROL, RATES, TUNING
from peftscope.planning.experiment import A_A, Study
from peftscope.planning.sweep import Sweep

STAGES = {"listed rates": TUNING, "three rates": RATES, "given rates": ARM, "controls": CONTROL}


def describe(sweep: Sweep) -> Iterator[str]:
    """Yields the stages of a study with their runs, and its power."""
    study = sweep.experiment.study
    assert study is not None
    stages = [
        f"{stage} {len(runs)} ({sum(record_path(run).is_file() for run in runs)} done)"
        for stage, runs in _runs_by_stage(sweep).items()
        if runs
    ]
    more = "".join(f", {len(study.seeds_of(arm))} of {arm}" for arm in study.more_seeds)
    yield f"Stages: {', '.join(stages)}. {len(study.entrants)} arms, {len(study.seeds)} pairs each{more}."
    again = [group.runs for group in sweep.comparisons if group.name == f"{TUNING}{study.a_a}{A_A}"]
    if study.a_a and again and not any(sweep.runs[run].method.draws_start for run in again[0]):
        yield (
            f"A/A: {study.a_a} draws nothing at its start. Its second entry is the same training at another rate, and "
            "shows the chance of tuning alone. `a_a: null` leaves it out."
        )
    yield _power(sweep, study)


def _runs_by_stage(sweep: Sweep) -> dict[str, list[str]]:
    """Returns the runs of each stage of a study, each run once, and those beside all stages."""
    rest = dict.fromkeys(sweep.runs)
    stages: dict[str, list[str]] = {}
    for stage, prefix in STAGES.items():
        named = [run for c in sweep.comparisons if c.name.startswith(prefix) for run in c.runs]
        stages[stage] = [run for run in dict.fromkeys(named) if run in rest]
        for run in stages[stage]:
            del rest[run]
    return {**stages, "beside": list(rest)}


def _power(sweep: Sweep, study: Study) -> str:
    """Returns what the planned pairs can see, from the A/A pairs of the pilot."""
    pilot = study.pilot or sweep.name
    try:
        results = StudyResults(pilot)
        pairs = results.difference(results.reference + A_A, results.reference)
        gain = results.task_gain
    except InputError as error:
        own = pilot == sweep.name
        return f"Power: not known before {'its own A/A pairs' if own else f'those of its pilot: {error.problems[0]}'}."
    planned = Difference(0.0, pairs.spread, pairs.tuning_error, len(study.seeds), math.nan)
    width = planned.half_width() / gain
    plan = f"the ±{100 * PLANNED:g} % that a study plans for"
    enough = f"within {plan}" if width <= PLANNED else f"more than {plan}: add pairs"
    fixed = sweep.experiment.fixed
    here = f"{fixed.get('model')}, {fixed.get('task')}"
    other = "" if results.subject == here else f" It was measured on {results.subject}: run A/A pairs of your own."
    return (
        f"Power: {pairs.n} A/A pairs of `{pilot}` spread by {pairs.spread:.4f} nats; {len(study.seeds)} pairs then see "
        f"±{100 * width:.1f} % of the task gain of {gain:.3f} nats (95 %), {enough}.{other}"
    )

"""Says what would decide a claim that is open or not run, and what that costs. No torch."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from statistics import fmean
from typing import Any

from peftscope.analysis.study import StudyResults
from peftscope.claims.ledger import Claim, arms_named_in
from peftscope.claims.verdict import UNDECIDED, Verdict
from peftscope.errors import InputError
from peftscope.hardware.cards import find_gpu
from peftscope.planning.cells import ARM, RATES
from peftscope.planning.estimate import estimate_seconds
from peftscope.planning.experiment import experiment_names, experiment_path, read_experiment
from peftscope.planning.forecast import Forecaster
from peftscope.planning.sweep import expand
from peftscope.report.spoken import deciding, on_world
from peftscope.words import listed, quoted, spoken_time

RUNS_AT_ONCE = 2
"""The runs that share a machine in an estimated time: one on each of two cores."""


def what_would_decide(claim: Claim, finding: dict[str, Any]) -> str:
    """Returns what would decide a claim that is open or not run, with its price on two cores; else nothing.

    The entry's own words come first. Otherwise it is what a part waits for, the experiment that has not run, the rates
    that its studies lack (arms that ran at one chosen rate run at three, with the same seeds), or further seeds.
    """
    if finding["verdict"] not in UNDECIDED:
        return ""
    parts = [part for part in deciding(finding) if part["verdict"] in UNDECIDED]
    return claim.decider or "; ".join(dict.fromkeys(filter(None, map(_next_step, parts))))


def _next_step(part: dict[str, Any]) -> str:
    asked = part["with"]
    if not part["check"]:
        return str(part["reason"])
    if part["verdict"] == Verdict.NOT_RUN:
        experiment = "gpu-check" if part["kind"] == "gpu" else asked.get("study") or asked.get("experiment")
        return _whole(experiment) if experiment else str(part["reason"])
    with suppress(InputError):  # a measurement that was stored outlives the tables of its study
        return (_further_runs(part) if "study" in asked else "") or _further_seeds(part)
    return ""


@cache
def _whole(experiment: str) -> str:
    """Returns how to run an experiment, with its runs and the time that they are estimated to take."""
    settings = read_experiment(experiment_path(experiment))
    specs = expand(experiment, "cuda" if settings.card else "cpu", assume_rates=True).runs.values()
    if settings.card:
        forecaster = Forecaster(find_gpu(settings.card))
        return f"`make gpu-check`, {len(specs)} runs, {spoken_time(sum(map(forecaster.seconds, specs)))} of a card"
    at_once = RUNS_AT_ONCE if settings.study else 1
    seconds = sum(estimate_seconds(spec, one_thread=at_once > 1) for spec in specs) / at_once
    return f"`make report EXPERIMENT={experiment}`, {len(specs)} runs, {spoken_time(seconds)}"


def _further_runs(part: dict[str, Any]) -> str:
    """Returns the runs at other rates that a comparison of trained arms lacks, in words; empty if there are none."""
    if not part["check"].startswith("training."):
        return ""
    asked, study = part["with"], StudyResults(part["with"]["study"])
    planned = _at_several_rates(study.subject)
    given = study.settings.given_rates if study.settings else {}
    named = set(arms_named_in(asked)) - set(given)
    left = [arm for arm in study.arms if arm in named and not study.rate(arm).is_tuned]
    arms = [arm for arm in left if arm not in planned or arm in planned[arm].left_out]
    if not arms:
        return ""
    runs = {arm: 2 * len(study.arm_runs(arm)) for arm in arms}
    names = listed([quoted(study.labels[arm]) for arm in arms], last=" and ")
    studies = {planned[arm].name if arm in planned else "" for arm in arms}
    where = f" (`make report EXPERIMENT={studies.pop()}`)" if len(studies) == 1 and "" not in studies else ""
    return f"three rates for {names}{where}: {sum(runs.values())} runs, {_price(study.name, runs)}"


@cache
def _at_several_rates(subject: str) -> dict[str, StudyResults]:
    """Returns the arms that a study of a model and a task runs at several rates, each with that study."""
    found: dict[str, StudyResults] = {}
    for name in experiment_names():
        settings = read_experiment(experiment_path(name)).study
        if settings and settings.centres:
            with suppress(InputError):  # it has not run
                if (study := StudyResults(name)).subject == subject:
                    found |= {arm: study for arm in settings.arms if arm not in found or arm in found[arm].left_out}
    return found


def _further_seeds(part: dict[str, Any]) -> str:
    """Returns the seeds that a comparison of trained arms lacks, as its reason counts them; empty if it does not."""
    pairs = re.search(r"about (\d+) pairs", part["reason"])
    if not pairs or not part["run_ids"]:
        return ""
    study = StudyResults(part["with"]["study"])
    arms = [arm for arm in arms_named_in(part["with"]) if arm in study.arms]
    more = int(pairs[1]) - part["n"]
    world = on_world(part["model"]) if part.get("elsewhere") else ""
    runs = {arm: more * study.rate_runs(arm)["learning_rate"].nunique() for arm in arms}
    return f"{more} further seeds{world}, {_price(study.name, runs)}"


def _price(study: str, runs: dict[str, int]) -> str:
    """Returns the estimated time of so many runs of each arm of a study, in words.

    Recorded times would not do: a run beside tests, or one that was paused, takes a multiple.
    """
    return spoken_time(sum(more * run_seconds(study, arm) for arm, more in runs.items()) / RUNS_AT_ONCE)


@cache
def run_seconds(study: str, arm: str) -> float:
    """Returns the estimated seconds of a run of an arm, the mean over its rates."""
    sweep = expand(study, "cpu", assume_rates=True)
    runs = next(one.runs for one in sweep.comparisons if one.name in (f"{RATES}{arm}", f"{ARM}{arm}"))
    return fmean(estimate_seconds(sweep.runs[run], one_thread=True) for run in runs)

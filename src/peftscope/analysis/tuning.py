"""Chooses at which learning rates the arms of a study run, and which of them is the best. No torch.

The listed rates run on a seed of their own, and the lowest validation loss is the centre. Around it an arm runs at
three rates with the seeds of all arms. If its lowest held-out loss lies at an end of them, one more follows beyond.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftscope.analysis.stats import trimmed_mean
from peftscope.errors import InputError, Problem
from peftscope.files.atomic import write_json
from peftscope.layout import how_to_run, rates_path, record_path, tuned_path
from peftscope.planning.cells import TUNING
from peftscope.planning.experiment import STEP, around, experiment_path, no_study, rounded
from peftscope.planning.sweep import ROUNDS, Sweep, expand, runs_to_choose_from
from peftscope.record import TRY_AGAIN, RunRecord, recover_record
from peftscope.words import grouped

OUT_OF_MEMORY = "memory ran out"


@dataclass(frozen=True)
class Rate:
    """An arm's best learning rate, and what was tried.

    Attributes:
        best: The rate with the lowest held-out loss or, in earlier studies, the one that a local fit chose.
        curve: The mean validation loss by learning rate on the seeds that only tune, ascending; None if training
            diverged. It is empty if the rate was given.
        losses: The held-out loss by learning rate on the seeds of the study, the mean without the best
            and the worst seed.
        regret: The standard error that a choice on other seeds adds to the arm's loss, in nats per token.
    """

    best: float
    curve: dict[float, float | None]
    losses: dict[float, float]
    regret: float = 0.0

    @property
    def is_tuned(self) -> bool:
        """Whether the arm ran at several rates on the seeds of the study."""
        return len(self.losses) > 1

    @property
    def is_at_an_end(self) -> bool:
        """Whether the best of several rates is the lowest or the highest, so that a better one may lie beyond."""
        return self.is_tuned and self.best in (min(self.losses), max(self.losses))


def choose_rates(sweep: Sweep, number: int, *, finished_only: bool = False) -> Path:
    """Writes the rates at which each arm runs or, after the last of ``ROUNDS``, the best of them.

    A run that diverged counts with the loss of the untouched base. An arm gets no rate if one of its runs ran out of
    memory.

    Args:
        number: 0 for three rates around each centre, then one more where the lowest loss lies at an end.
        finished_only: Whether arms with a run that has not ended are left out; it is an error otherwise.

    Raises:
        InputError: The experiment is no study, a record is missing, a run failed, or an arm diverged at all rates.
    """
    study = sweep.experiment.study
    if study is None:
        raise no_study(sweep.name)
    groups = {comparison.name: comparison.runs for comparison in sweep.comparisons}
    from_runs = runs_to_choose_from(sweep, number)
    first = json.loads(rates_path(sweep.name, 0).read_text())["arms"] if number else {}
    centres = {arm: said["rates"][1] for arm, said in first.items() if said["rates"]}
    chosen: dict[str, Any] = {}
    for entrant in study.entrants:
        if entrant.name not in from_runs:
            continue  # it is not tuned, or the experiment excludes all of its runs
        runs = from_runs[entrant.name]
        if finished_only and not _have_ended(runs):
            continue
        listed = groups.get(TUNING + entrant.name, ())
        tried, now = _records(sweep, listed), _records(sweep, runs)
        said: dict[str, Any] = {"chosen_from": list(runs), "tried": _entries(tried)}
        excluded = not runs and bool(number or study.learning_rates[entrant.arm])
        if excluded or any(record.status == "oom" for record in [*now.values(), *tried.values()]):
            said |= {"rates": [], "learning_rate": None, "reason": OUT_OF_MEMORY}
        elif number:
            losses = {rate: trimmed_mean(values) for rate, values in _losses(now, _base_loss(sweep)).items()}
            best = min(losses, key=lambda rate: losses[rate])
            rates = sorted(losses)
            steps = rates.index(best) - rates.index(centres[entrant.name])
            at_end = best in (rates[0], rates[-1]) and number < ROUNDS
            more = [rounded(centres[entrant.name] * STEP ** (steps + math.copysign(1, steps)))] if at_end else []
            said |= {"rates": sorted([*rates, *more]), "learning_rate": best}
        else:
            said |= {"rates": around(study.centres.get(entrant.name) or _centre(sweep, entrant.arm, tried))}
        chosen[entrant.name] = said
    if chosen and not finished_only and not any(said["rates"] for said in chosen.values()):
        remedy = f"see `peftscope expand {sweep.name}` for what would fit"
        raise InputError(Problem(f"{experiment_path(sweep.name)}: study.arms", "memory ran out in every one", remedy))
    path = rates_path(sweep.name, number) if number < ROUNDS else tuned_path(sweep.name)
    write_json(path, {"arms": chosen})
    return path


def choose_next(sweep: Sweep) -> Path:
    """Chooses rates until runs follow from them that have not ended, or until the best ones are known."""
    device = next(iter(sweep.runs.values())).device
    for number in range(ROUNDS + 1):
        path = choose_rates(sweep, number)
        sweep = expand(sweep.name, device)
        if not _have_ended(sweep.runs):
            break
    return path


def choose_for_finished(sweep: Sweep) -> Sweep:
    """Chooses the next rates, or the best one, of arms whose runs have ended, and returns the sweep that follows."""
    bases = [run for run, spec in sweep.runs.items() if spec.method.name == "none"]
    for number in range(ROUNDS + 1):
        ready = not number or (rates_path(sweep.name, number - 1).is_file() and _have_ended(bases))
        if ready and any(map(_have_ended, runs_to_choose_from(sweep, number).values())):
            choose_rates(sweep, number, finished_only=True)
            sweep = expand(sweep.name, next(iter(sweep.runs.values())).device)
    return sweep


def _have_ended(runs: Iterable[str]) -> bool:
    return all(record_path(run).is_file() for run in runs)


def _records(sweep: Sweep, runs: Iterable[str]) -> dict[str, RunRecord]:
    """Returns the records of some runs.

    Raises:
        InputError: One is missing, or a run failed.
    """
    records = {}
    for run in runs:
        path = record_path(run)
        if not path.is_file():
            raise InputError(Problem(str(path), "no record yet", how_to_run(sweep.name)))
        record = records[run] = recover_record(path)
        if record.status not in ("ok", "diverged") and not (record.status == "oom" and record.spec.device == "cuda"):
            raise InputError(Problem(str(path), f"{record.status}: {record.reason}", TRY_AGAIN))
    return records


def _base_loss(sweep: Sweep) -> float:
    """Returns the held-out loss of the untouched base, or of its 4-bit copy if the study has no other."""
    bases = [run for run, spec in sweep.runs.items() if spec.method.name == "none"]
    bases.sort(key=lambda run: sweep.runs[run].method.quantization() is not None)
    loss = next(iter(_records(sweep, bases[:1]).values())).quality.heldout_nll
    return math.inf if loss is None else loss


def _losses(records: dict[str, RunRecord], base_loss: float) -> dict[float, list[float]]:
    """Returns the held-out losses by learning rate, one for each seed."""
    losses: dict[float, list[float]] = {}
    for record in records.values():
        loss = record.quality.heldout_nll if record.status == "ok" else None
        losses.setdefault(record.spec.learning_rate, []).append(base_loss if loss is None else loss)
    return losses


def _centre(sweep: Sweep, arm: str, tried: dict[str, RunRecord]) -> float:
    """Returns the listed rate with the lowest mean validation loss.

    Raises:
        InputError: Training diverged at all of them.
    """
    losses = {entry["learning_rate"]: entry["validation_nll"] for entry in _entries(tried)}
    reached = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not reached:
        where = f"{experiment_path(sweep.name)}: study.learning_rates.{arm}"
        raise InputError(Problem(where, f"training diverged at all {len(losses)}", "add lower ones"))
    return min(reached, key=lambda rate: reached[rate])


def _entries(tried: dict[str, RunRecord]) -> list[dict[str, Any]]:
    """Returns what was tried as JSON content, the rates in ascending order; None stands for a run that diverged."""
    by_rate = grouped((record.spec.learning_rate, record) for record in tried.values())
    entries = []
    for rate, records in sorted(by_rate.items()):
        losses = [record.quality.validation_nll for record in records]
        runs = [record.run_id for record in records]
        mean = mean_or_none(losses)
        entries.append({"learning_rate": rate, "validation_nll": mean, "losses": losses, "run_ids": runs})
    return entries


def mean_or_none(losses: list[float | None]) -> float | None:
    """Returns the mean of losses, or None if one of their runs diverged and has none."""
    reached = [loss for loss in losses if loss is not None]
    return sum(reached) / len(reached) if len(reached) == len(losses) else None

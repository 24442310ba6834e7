"""Chooses a study's learning rates by the validation loss of seeds that serve no other purpose. No torch.

Where a study has fine grids, a parabola over the log of the rate is fitted to the log of the losses around the best
listed rate, with one more constant for the seeds of the fine grid. The rate is where the parabola is lowest. Residuals
of the fit, drawn anew, say how much worse the chosen rate may be than the best: its regret.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftscope.errors import InputError, Problem
from peftscope.files.atomic import write_json
from peftscope.layout import coarse_path, how_to_run, record_path, tuned_path
from peftscope.planning.cells import FINE, TUNING
from peftscope.planning.experiment import FINE_STEP, LARGEST_STEP, Study, experiment_path, no_study, rounded
from peftscope.planning.sweep import Sweep
from peftscope.record import TRY_AGAIN, recover_record

OUT_OF_MEMORY = "memory ran out"
WINDOW = LARGEST_STEP
"""The fit takes the rates within this factor of the best listed one: itself, its neighbours, and the fine grid."""
DRAWS = 1000
"""Bootstrap samples of a fit's residuals."""
SEED = 0


@dataclass(frozen=True)
class Fit:
    """A local fit of an arm's validation loss over its learning rate.

    Attributes:
        learning_rate: Where the fit is lowest, within the fine grid, with two significant digits.
        lowest: The fitted loss there, in nats per token, on the seeds of the fine grid.
        at_half, at_twice: The fitted loss at half and at twice that rate.
        regret: The mean of how much the fitted loss changes with the rate that a fit to redrawn residuals chooses, in
            nats per token.
        regret_rms: The square root of the mean square of it; intervals that rest on the rate grow by it.
        is_convex: Whether the fit has a lowest point. If not, the best rate of the fine grid is chosen.
    """

    learning_rate: float
    lowest: float
    at_half: float
    at_twice: float
    regret: float
    regret_rms: float
    is_convex: bool


def fit_rate(runs: list[tuple[float, float, bool]], centre: float) -> Fit | None:
    """Returns the local fit of losses around a rate; None if there are too few to fit.

    The chosen rate stays within the fine grid and below every rate at which training diverged.

    Args:
        runs: The learning rate of each run, its validation loss, infinite if it diverged, and whether it belongs to
            the fine grid, which has seeds of its own.
        centre: The best listed rate.
    """
    near = [
        (rate / centre, loss, fine)
        for rate, loss, fine in runs
        if 1 / WINDOW <= rate / centre <= WINDOW and math.isfinite(loss)
    ]
    x, y = (np.log([run[i] for run in near]) for i in (0, 1))
    fine = np.array([run[2] for run in near], dtype=float)
    design = np.stack([np.ones_like(x), fine, x, x**2], axis=1)
    freedom = len(near) - design.shape[1]
    if freedom < 1 or fine.sum() < 2 or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    cliff = min((rate for rate, loss, _ in runs if not math.isfinite(loss)), default=math.inf)
    below = max((rate for rate, _, _ in runs if rate < cliff), default=centre)  # the lowest one may have diverged
    edges = -math.log(FINE_STEP), min(math.log(FINE_STEP), math.log(below / centre))
    rates = np.unique(x[fine == 1])

    def lowest_at(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the fits to columns of losses are lowest, and their coefficients.

        A fit without a lowest point gives the fine rate with the lowest mean.
        """
        coefficients = np.linalg.lstsq(design, losses, rcond=None)[0]
        slope, curvature = coefficients[2:]
        vertex = -slope / np.where(curvature > 0, 2 * curvature, np.nan)
        means = np.stack([losses[(fine == 1) & (x == rate)].mean(axis=0) for rate in rates])
        return np.clip(np.where(curvature > 0, vertex, rates[np.argmin(means, axis=0)]), *edges), coefficients

    lowest, (level, seeds, slope, curvature) = lowest_at(y)
    rate = rounded(centre * math.exp(lowest))
    chosen = math.log(rate / centre)

    def loss_at(position: Any) -> Any:
        return np.exp(level + seeds + slope * position + curvature * position**2)

    fitted = design @ np.array([level, seeds, slope, curvature])
    residuals = (y - fitted) * math.sqrt(len(near) / freedom)
    draws = np.random.default_rng(SEED).choice(residuals, (len(near), DRAWS))
    # Each draw is a world in which the rate was chosen by other residuals; the fit says what the choice changes.
    elsewhere, _ = lowest_at(fitted[:, None] + draws)
    costs = np.abs(loss_at(elsewhere) - loss_at(chosen))
    half, here, twice = (float(loss_at(chosen + math.log(factor))) for factor in (0.5, 1, 2))
    regret, root = float(costs.mean()), float(np.sqrt(np.mean(costs**2)))
    return Fit(rate, here, half, twice, regret, root, bool(curvature > 0))


def choose_rates(sweep: Sweep, *, coarse: bool = False) -> Path:
    """Writes each arm's learning rate, and all rates that were tried.

    It is the one with the lowest mean validation loss or, where the study has fine grids, the lowest point of a local
    fit, below every rate at which training diverged. An arm gets no rate if one of its runs ran out of memory.

    Args:
        sweep: The study.
        coarse: Chooses among the listed rates, around which the fine grids lie.

    Raises:
        InputError: The experiment is no study, a record is missing, a run failed, or the best rate of an arm is the
            lowest or highest of its list.
    """
    study = sweep.experiment.study
    if study is None:
        raise no_study(sweep.name)
    runs = {comparison.name: comparison.runs for comparison in sweep.comparisons}
    chosen: dict[str, Any] = {}
    problems: list[Problem] = []
    for entrant in study.entrants:
        if TUNING + entrant.name not in runs:
            continue  # it is not tuned, or the experiment excludes all of its runs
        listed = _tried(sweep, runs[TUNING + entrant.name])
        fine = {} if coarse else _tried(sweep, runs.get(FINE + entrant.name, ()))
        if listed is None or fine is None:
            stages = (TUNING,) if coarse else (TUNING, FINE)
            tried = [entry for stage in stages for entry in _runs_of(sweep, runs.get(stage + entrant.name, ()))]
            chosen[entrant.name] = {"learning_rate": None, "reason": OUT_OF_MEMORY, "tried": tried}
            continue
        best, problem = _best(sweep, study, entrant.arm, listed)
        problems += [problem] if problem else []
        entry: dict[str, Any] = {"learning_rate": best, "tried": _entries(listed)}
        if fine:
            entry = _refined(entry, listed, fine)
        chosen[entrant.name] = entry
    if not problems and not any(entry["learning_rate"] for entry in chosen.values()):
        remedy = f"see `peftscope expand {sweep.name}` for what would fit"
        problems.append(Problem(f"{experiment_path(sweep.name)}: study.arms", "memory ran out in every one", remedy))
    if problems:
        raise InputError(problems)
    path = coarse_path(sweep.name) if coarse else tuned_path(sweep.name)
    write_json(path, {"arms": chosen})
    return path


def choose_next(sweep: Sweep) -> Path:
    """Chooses among the listed rates if a study has fine grids that are still to come, and otherwise each arm's rate.

    They are to come for every arm as long as one has not been chosen from all of its listed rates.

    Raises:
        InputError: See ``choose_rates``.
    """
    study, path = sweep.experiment.study, coarse_path(sweep.name)
    arms = json.loads(path.read_text())["arms"] if path.is_file() else {}
    chosen_from = {TUNING + name: {run for rate in arms[name]["tried"] for run in rate["run_ids"]} for name in arms}
    listed = {group.name: set(group.runs) for group in sweep.comparisons if group.name.startswith(TUNING)}
    is_current = all(chosen_from.get(name) == runs for name, runs in listed.items())
    return choose_rates(sweep, coarse=study is not None and bool(study.fine_seeds) and not is_current)


def _best(sweep: Sweep, study: Study, arm: str, tried: dict[float, dict[str, Any]]) -> tuple[float, Problem | None]:
    """Returns the rate with the lowest mean validation loss, and a problem if it cannot be used."""
    best = min(tried, key=lambda rate: tried[rate]["validation_nll"])
    rates = sorted(tried)
    where = f"{experiment_path(sweep.name)}: study.learning_rates.{arm}"
    if math.isinf(tried[best]["validation_nll"]):
        return best, Problem(where, f"training diverged at all {len(rates)}", "add lower ones")
    if best in (rates[0], rates[-1]) and study.ends == "refuse":
        end, remedy = ("lowest", "a lower") if best == rates[0] else ("highest", "a higher")
        return best, Problem(where, f"the best of {len(rates)} is the {end}, {best:g}", f"add {remedy} one")
    return best, None


def _refined(
    entry: dict[str, Any], listed: dict[float, dict[str, Any]], fine: dict[float, dict[str, Any]]
) -> dict[str, Any]:
    """Returns an arm's entry with the rate that a local fit over listed and fine rates chooses."""
    runs = [
        (rate, loss, stage is fine)
        for stage in (listed, fine)
        for rate, tried in stage.items()
        for loss in tried["losses"]
    ]
    fit = fit_rate(runs, entry["learning_rate"])
    means = {rate: tried["validation_nll"] for rate, tried in fine.items() if math.isfinite(tried["validation_nll"])}
    rate = fit.learning_rate if fit else min(means, key=lambda rate: means[rate], default=entry["learning_rate"])
    # Without a fit, all that is known of the regret is how much the losses of the fine grid spread.
    regret = fit.regret_rms if fit else max(means.values(), default=0.0) - min(means.values(), default=0.0)
    return {
        "learning_rate": rate,
        "coarse": entry["learning_rate"],
        "fit": asdict(fit) if fit else None,
        "regret_rms": regret,
        "tried": [*entry["tried"], *({**tried, "fine": True} for tried in _entries(fine))],
    }


def _tried(sweep: Sweep, runs: tuple[str, ...]) -> dict[float, dict[str, Any]] | None:
    """Returns mean validation loss and run ids by learning rate, or None if one of the runs ran out of memory."""
    tried: dict[float, dict[str, Any]] = {}
    for run in runs:
        path = record_path(run)
        if not path.is_file():
            raise InputError(Problem(str(path), "no record yet", how_to_run(sweep.name)))
        record = recover_record(path)
        if record.status == "oom" and record.spec.device == "cuda":
            return None
        if record.status not in ("ok", "diverged"):
            raise InputError(Problem(str(path), f"{record.status}: {record.reason}", TRY_AGAIN))
        nll = record.quality.validation_nll
        entry = tried.setdefault(sweep.runs[run].learning_rate, {"losses": [], "run_ids": []})
        entry["losses"].append(math.inf if nll is None else nll)
        entry["run_ids"].append(run)
    return {
        rate: {"validation_nll": sum(e["losses"]) / len(e["losses"]), "losses": e["losses"], "run_ids": e["run_ids"]}
        for rate, e in tried.items()
    }


def _entries(tried: dict[float, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what was tried as JSON content, the rates in ascending order; None stands for an infinite loss."""
    return [
        {
            "learning_rate": rate,
            "validation_nll": _finite(tried[rate]["validation_nll"]),
            "losses": [_finite(loss) for loss in tried[rate]["losses"]],
            "run_ids": tried[rate]["run_ids"],
        }
        for rate in sorted(tried)
    ]


def _runs_of(sweep: Sweep, runs: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns an entry without a loss for each learning rate of some runs."""
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


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None

"""The lines of ``peftscope expand`` on an experiment on a card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.table import Table

from peftscope.cli.console import wide_console
from peftscope.errors import InputError, Problem
from peftscope.layout import record_path
from peftscope.words import GIB, grouped, spoken_bytes, spoken_time

if TYPE_CHECKING:
    from peftscope.hardware.cards import Gpu
    from peftscope.planning.forecast import Forecast


def card_of(experiment: str, wish: str | None) -> Gpu | None:
    """Returns the card to forecast for: the one that is asked for, this machine's, or the one in the experiment's file.

    None where there is none of these: the runs are for this machine's processor.
    """
    from peftscope.execution.pace import this_card
    from peftscope.hardware.cards import find_gpu
    from peftscope.hardware.device import detect_device
    from peftscope.planning.experiment import experiment_path, read_experiment

    if wish:
        return find_gpu(wish)
    if detect_device() == "cuda" and (card := this_card()):
        return card
    path = experiment_path(experiment)
    made_for = read_experiment(path).card
    try:
        return find_gpu(made_for) if made_for else None
    except InputError as error:
        raise InputError(Problem(f"{path}: card", p.message, p.remedy) for p in error.problems) from None


def show_forecast(experiment: str, gpu: Gpu | None, *, brief: bool) -> None:
    """Prints what an experiment's runs will take, run by run or method by method, and in all.

    Without a card they are for this machine's processor, which the runs of a study share, one thread each.
    """
    from peftscope.execution.pace import forecast_here
    from peftscope.hardware.device import detect_device
    from peftscope.planning.checks import too_few_items
    from peftscope.planning.disk import disk_bytes
    from peftscope.planning.forecast import Forecaster
    from peftscope.planning.plan import plan_experiment
    from peftscope.planning.sweep import expand

    device = "cuda" if gpu else detect_device()
    plan = plan_experiment(experiment, device)
    sweep = expand(experiment, device, assume_rates=True) if plan.is_study else plan.sweep
    at_once = (os.cpu_count() or 1) if plan.is_study and device == "cpu" else 1
    forecaster = Forecaster(gpu) if gpu else None
    forecast = forecaster.forecast if forecaster else partial(forecast_here, one_thread=at_once > 1)
    to_do = {identity: spec for identity, spec in sweep.runs.items() if not record_path(identity).is_file()}
    forecasts = [forecast(run, spec, chosen=run in plan.sweep.runs) for run, spec in to_do.items()]
    console = wide_console(170)
    console.print(_by_method(forecasts) if brief else _by_run(forecasts))
    on = f" on {gpu.name} ({spoken_bytes(gpu.memory_bytes, 1)})" if gpu else ""
    workers = f"with {at_once} at once" if at_once > 1 else f"on one {device} worker"
    how = "of GPU to go" if gpu else f"to go {workers}"
    console.print(
        f"{experiment}{on}: {len(sweep.runs)} runs, {len(sweep.runs) - len(to_do)} done, "
        f"about {spoken_time(sum(f.seconds for f in forecasts) / at_once)} {how}, {_peaks(forecasts)}.",
        soft_wrap=True,
    )
    lines = [f"Disk: {spoken_bytes(disk_bytes(to_do), 1)} for downloads and results."]
    if missing := [f for f in forecasts if f.fits == "no"]:
        lost = f"{len(missing)} runs will not fit; they end as OOM, which is a row in the tables."
        lines.append(f"{lost} What would fit:")
        lines += [f"  {what}: {advice}" for what, advice in dict.fromkeys((_name(f), f.advice) for f in missing)]
    if forecaster:
        speed = f"Speed: of {forecaster.speed_name} by the model of docs/time.md, or as records of such a card say."
        lines.append(f"{speed} Memory: every sequence of a batch as long as seq_len allows.")
    else:
        lines += too_few_items(sweep.runs)
        if plan.is_study:
            from peftscope.cli.study import describe

            lines += describe(sweep)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _by_run(forecasts: Sequence[Forecast]) -> Table:
    table = Table("run", "method", "learning rate", "steps", "time", "peak (GiB)", "phase", "", box=None)
    for f in forecasts:
        rate = "-" if not f.spec.method.trains else f"{f.spec.learning_rate:g}" if f.chosen else "to be chosen"
        name = f.run_id if f.chosen else f.run_id.rpartition("-")[0]
        peak = "?" if f.peak_device_bytes is None else f"{f.peak_device_bytes / GIB:.1f}"
        steps = str(f.spec.steps) if f.spec.method.trains else "-"
        time = spoken_time(f.seconds)
        table.add_row(name, f.spec.method.label, rate, steps, time, peak, f.binding_phase, _verdict([f]))
    return table


def _by_method(forecasts: Sequence[Forecast]) -> Table:
    table = Table("method", "runs", "time", "peak (GiB)", "", box=None)
    for name, group in grouped((_name(f), f) for f in forecasts).items():
        peak = "?" if all(f.unknown for f in group) else f"{_largest(group) / GIB:.1f}"
        table.add_row(name, str(len(group)), spoken_time(sum(f.seconds for f in group)), peak, _verdict(group))
    return table


def _name(f: Forecast) -> str:
    """Returns the model and method of a run, as far as they tell runs apart that fit from runs that do not."""
    return f"{f.spec.model}, {f.spec.method.full_label()}"


def _verdict(group: Sequence[Forecast]) -> str:
    small = [f for f in group if f.fits == "no"]
    if all(f.fits is None and not f.unknown for f in group):
        return ""
    if not small:
        unknown = ", ".join(dict.fromkeys(f.unknown for f in group if f.unknown))
        tight = any(f.fits == "tight" for f in group)
        return f"not known: {unknown}" if unknown else "tight: cached memory has to be given back" if tight else "fits"
    which = "" if len(small) == len(group) else f" for {len(small)}"
    return f"does not fit{which} (needs {spoken_bytes(_largest(small), 1)})"


def _peaks(forecasts: Sequence[Forecast]) -> str:
    """Returns what is known of the runs' peaks, and of how many nothing is."""
    unknown = sum(bool(f.unknown) for f in forecasts)
    said = [] if forecasts and unknown == len(forecasts) else [f"peak at most {spoken_bytes(_largest(forecasts), 1)}"]
    return ", ".join([*said, f"peak not known of {unknown} (`peftscope memory` simulates it)"] if unknown else said)


def _largest(forecasts: Sequence[Forecast]) -> int:
    return max((f.peak_device_bytes or 0 for f in forecasts), default=0)

"""How the suite grows from 50 to 5,000 finished runs: ``make benchmark-scale`` writes ``docs/scale.md``.

The aims, at the largest size: the workflow finds nothing to do within 10 s; the whole report takes less
than 60 s; none of it takes 2 GiB, and nothing grows faster than the number of runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import psutil
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.synthetic import GRIDS, STUDY, SWEEP, make_study, make_sweep, make_workspace
from peftscope.claims.ledger import read_ledger
from peftscope.hardware.device import processor_name
from peftscope.layout import report_path
from peftscope.report.tables import markdown

PAGE = Path("docs/scale.md")
NO_OP, REPORT, CLAIMS = "workflow with nothing to do", "report, all of it", "claims that read it"
MOST_SECONDS = {NO_OP: 10, REPORT: 60}
MOST_GIB = 2
DESCRIPTIONS = {
    SWEEP: (
        "A sweep",
        "Six methods over ranks, learning rates and seeds, and two ladders. A few runs diverge or fail.",
    ),
    STUDY: (
        "A study",
        "The study `variants-60` with more seeds. Half of the runs are tuning runs.",
    ),
}
STEEPEST = 1.1
"""The power that still counts as linear: one measurement differs from the next by a few percent."""

METER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.call(sys.argv[2:])
seconds = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(sys.argv[1], "w") as file:
    json.dump({"seconds": seconds, "processor_seconds": used.ru_utime + used.ru_stime, "peak_bytes": peak}, file)
sys.exit(status)
"""
"""A small process between this one and what is measured: a child's peak begins at what its parent holds."""

TOUCH = """
import sys
from snakemake.cli import main
from snakemake.executors.touch import Executor
Executor.SLEEPING_TIME = 0
main([*"--touch --forceall --cores 1 --quiet --scheduler greedy --config".split(), f"experiment={sys.argv[1]}"])
"""
"""Snakemake's own way to mark outputs as made, without its pause of a tenth of a second for each."""


@dataclass(frozen=True)
class Cost:
    """What a command took: seconds by the wall and of the processor, and its largest resident size."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Series:
    """One experiment at growing sizes.

    Attributes:
        runs: The number of runs at each size.
        costs: By command, one for each size.
        files: Bytes by what was written, one for each size.
    """

    runs: list[int]
    costs: dict[str, list[Cost]]
    files: dict[str, list[int]]


def measure(command: Sequence[str]) -> tuple[Cost, str]:
    """Returns what a command cost in a fresh process, and what it printed.

    Raises:
        RuntimeError: It failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "cost.json"
        meter = [sys.executable, "-c", METER, str(found), *command]
        environment = os.environ | {"PEFTSCOPE_DEVICE": "cpu"}
        done = subprocess.run(
            meter, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)[:200]}\n{done.stdout[-2000:]}")
        return Cost(**json.loads(found.read_text())), done.stdout


def commands(experiment: str) -> dict[str, list[str]]:
    """Returns what is measured once all runs are finished, by its name, in the order of the workflow."""
    own = {"expand": f"expand {experiment} --brief", "collect": f"collect {experiment}"}
    own |= {REPORT: f"report {experiment}", "check": f"check {experiment}"}
    if experiment == STUDY:
        ids = [claim.id for claim in read_ledger() if any(part.with_.get("study") == STUDY for part in claim.parts)]
        own[CLAIMS] = " ".join(["claims", *(f"--id {name}" for name in ids)])
    found = {name: [sys.executable, "-m", "peftscope", *line.split()] for name, line in own.items()}
    return found | {NO_OP: [sys.executable, "-m", "snakemake", "-n", "--config", f"experiment={experiment}"]}


def mark_as_made(experiment: str) -> None:
    """Leaves what the workflow would have left after making everything, its records of each job included."""
    (Path("results") / experiment / "all-runs-ended-well").touch()
    measure([sys.executable, "-c", TOUCH, experiment])


def measure_experiment(experiment: str) -> dict[str, Cost]:
    """Returns what each command costs in the current workspace, in which the experiment's runs are finished.

    Raises:
        RuntimeError: A command failed, or the workflow found something to do.
    """
    costs = {}
    for name, command in commands(experiment).items():
        print(f"{experiment}: {name}", file=sys.stderr)
        if name == NO_OP:
            mark_as_made(experiment)
        costs[name], said = measure(command)
        if name == NO_OP and "Nothing to be done" not in said:
            raise RuntimeError(f"the workflow found something to do:\n{said[-2000:]}")
    return costs


def measure_sizes(experiment: str, sizes: Sequence[int]) -> Series:
    """Returns what each command costs at each size, in workspaces that are removed again.

    Args:
        experiment: ``sweep`` or the study.
        sizes: About how many runs, ascending.
    """
    repository = Path.cwd()
    found = Series([], {name: [] for name in commands(experiment)}, {})
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="peftscope-scale-") as folder:
            make_workspace(Path(folder), repository)
            print(f"{experiment}: about {size:,} runs", file=sys.stderr)
            with chdir(folder):
                found.runs.append((make_study if experiment == STUDY else make_sweep)(size))
                for name, cost in measure_experiment(experiment).items():
                    found.costs[name].append(cost)
                results = Path("results") / experiment
                for path in (results / "runs.csv", results / "losses.csv", report_path(experiment)):
                    found.files.setdefault(path.name, []).append(path.stat().st_size)
    return found


def exponent(runs: Sequence[int], costs: Sequence[float]) -> float:
    """Returns the power of the number of runs with which a cost grows, from the first to the last.

    >>> exponent([50, 5000], [2.0, 200.0])
    1.0
    """
    return math.log(costs[-1] / costs[0]) / math.log(runs[-1] / runs[0])


def steepest(series: Series) -> tuple[float, str]:
    """Returns the largest power, between the last two sizes, of any command's processor seconds, and the command."""
    return max(
        (exponent(series.runs[-2:], [cost.processor_seconds for cost in costs[-2:]]), name)
        for name, costs in series.costs.items()
    )


def missed_aims(series: Series) -> list[str]:
    """Returns the aims that were missed at the largest size, in words."""
    last = {name: costs[-1] for name, costs in series.costs.items()}
    found = [f"{name} takes {most} s or more" for name, most in MOST_SECONDS.items() if last[name].seconds >= most]
    found += [f"{name} takes {MOST_GIB} GiB or more" for name in last if last[name].peak_bytes >= MOST_GIB << 30]
    power, name = steepest(series)
    return found + ([f"{name} grows with the power {power:.2f} of the runs"] if power > STEEPEST else [])


def render(measured: dict[str, Series], load: float) -> str:
    """Returns the page in Markdown.

    Args:
        measured: What was measured of each experiment.
        load: Processes that wanted a core before it began: they make the seconds by the wall longer.
    """
    cores, memory = psutil.cpu_count(), psutil.virtual_memory().total / 2**30
    parts = [processor_name(), f"{cores} cores", f"{memory:.0f} GiB", f"Python {platform.python_version()}"]
    parts += [f"{package} {version(package)}" for package in ("snakemake", "pandas", "matplotlib")]
    parts.append(f"with a load of {load:.1f} at the start")
    aims = [f"{name} under {most} s" for name, most in MOST_SECONDS.items()]
    aims += [f"everything under {MOST_GIB} GiB", f"no power of the last step above {STEEPEST:g}"]
    sections = []
    for experiment, series in measured.items():
        title, text = DESCRIPTIONS[experiment]
        sections.append({"title": title, "text": text, "missed": missed_aims(series), "tables": _tables(series)})
    environment = Environment(loader=PackageLoader("peftscope.report"), undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("scale.md.j2")
    return page.render(machine=", ".join(parts), aims="; ".join(aims), sections=sections).rstrip() + "\n"


def _tables(series: Series) -> list[str]:
    seconds = [
        [
            name,
            *(f"{c.seconds:.1f} ({c.processor_seconds:.1f})" for c in costs),
            *_powers(series, [c.processor_seconds for c in costs]),
        ]
        for name, costs in series.costs.items()
    ]
    memory = [
        [name, *(f"{c.peak_bytes / 2**20:,.0f}" for c in costs), *_powers(series, [c.peak_bytes for c in costs])]
        for name, costs in series.costs.items()
    ]
    files = [
        [name, *(f"{size / 1e6:.2f}" for size in sizes), *_powers(series, sizes)]
        for name, sizes in series.files.items()
    ]
    columns = [*(f"{runs:,} runs" for runs in series.runs), "power, all", "power, last"]
    tables = {"seconds (of the processor)": seconds, "peak memory (MiB)": memory, "files (MB)": files}
    return [markdown(pd.DataFrame(rows, columns=[what, *columns])).rstrip() for what, rows in tables.items()]


def _powers(series: Series, costs: Sequence[float]) -> list[str]:
    return [f"{exponent(series.runs, costs):.2f}", f"{exponent(series.runs[-2:], costs[-2:]):.2f}"]


def main() -> None:
    """Measures all sizes, prints the page and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(GRIDS), default=sorted(GRIDS))
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if len(set(arguments.sizes)) < 2:
        parser.error("growth needs two sizes or more")
    sizes = sorted(set(arguments.sizes))
    os.environ["PEFTSCOPE_DEVICE"] = "cpu"
    load = os.getloadavg()[0]
    found = {experiment: measure_sizes(experiment, sizes) for experiment in (SWEEP, STUDY)}
    page = render(found, load)
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page)
    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(page))


if __name__ == "__main__":
    main()

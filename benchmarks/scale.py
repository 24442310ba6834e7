"""The time of the commands after the runs with 50 to 5,000 finished runs: ``make benchmark-scale`` prints it.

The aims, at the largest size: the workflow finds nothing to do within 10 s; the whole report takes less
than 60 s; none of it takes 2 GiB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.table import Table

from benchmarks.synthetic import GRIDS, STUDY, SWEEP, make_study, make_sweep, make_workspace
from peftscope.claims.ledger import read_ledger
from peftscope.cli.console import wide_console

NO_OP, REPORT, CLAIMS = "workflow with nothing to do", "report, all of it", "claims that read it"

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
    """The cost of a command: seconds by the wall and of the processor, and its largest resident size."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


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


def main() -> None:
    """Measures all sizes, in workspaces that are removed again, and prints what each command takes."""
    os.environ["PEFTSCOPE_DEVICE"] = "cpu"
    repository = Path.cwd()
    table = Table("experiment", "runs", "command", "seconds (of the processor)", "peak memory (MiB)", box=None)
    for experiment, size in product((SWEEP, STUDY), sorted(GRIDS)):
        with tempfile.TemporaryDirectory(prefix="peftscope-scale-") as folder:
            make_workspace(Path(folder), repository)
            with chdir(folder):
                runs = (make_study if experiment == STUDY else make_sweep)(size)
                for name, cost in measure_experiment(experiment).items():
                    seconds = f"{cost.seconds:.1f} ({cost.processor_seconds:.1f})"
                    table.add_row(experiment, f"{runs:,}", name, seconds, f"{cost.peak_bytes / 2**20:,.0f}")
    wide_console().print(table)


if __name__ == "__main__":
    main()

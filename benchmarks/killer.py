"""Runs an experiment under a killer: ``python -m benchmarks.killer EXPERIMENT [--minutes 10] [--cores 2]``.

Every few minutes one of its jobs, chosen at random, gets SIGKILL. One time in four the whole workflow gets it, and is
started again. At the end the script says how many kills there were, and how many finished runs had to run again.
``peftscope verify EXPERIMENT`` then compares its published runs with undisturbed ones.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

import psutil

from peftscope.layout import record_paths
from peftscope.record import read_record

WHOLE_WORKFLOW = 0.25
"""The share of kills that hit the workflow with all of its jobs."""


def main() -> None:
    """Runs the experiment to its end, and exits with 1 if a finished run was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment")
    parser.add_argument("--minutes", type=float, default=10.0, help="between two kills, on average")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--memory", type=int, default=14_000, help="MB that the jobs share")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, kills, seen = random.Random(options.seed), Counter[str](), dict[str, str]()
    lost = 0
    while True:
        workflow = start(options)
        hit = ""
        while workflow.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                workflow.wait(timeout=60 * chance.expovariate(1 / options.minutes))
            now = begun()
            lost += sum(now.get(run) != began for run, began in seen.items())
            seen = now
            if workflow.poll() is None and (hit := kill_something(workflow, chance)):
                kills[hit] += 1
                print(f"killer: {hit} at {time.strftime('%H:%M:%S')}", flush=True)
        if workflow.returncode >= 0:
            break
    said = {"experiment": options.experiment, "kills": kills, "lost": lost, "finished": workflow.returncode == 0}
    print(json.dumps(said))
    sys.exit(lost > 0 or workflow.returncode)


def start(options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Starts the workflow, as ``make report`` does."""
    subprocess.run([sys.executable, "-m", "peftscope", "unlock"], check=True, capture_output=True)
    places = ["--cores", str(options.cores), "--resources", f"mem_mb={options.memory}"]
    command = [sys.executable, "-m", "snakemake", *places, "--config", f"experiment={options.experiment}"]
    return subprocess.Popen(command)


def begun() -> dict[str, str]:
    """Returns when each finished run of the store began."""
    return {path.parent.name: str(read_record(path).provenance.get("started_at")) for path in record_paths()}


def kill_something(workflow: subprocess.Popen[bytes], chance: random.Random) -> str:
    """Sends SIGKILL to one job of a workflow, or to all of it, and returns which; nothing if it has no job."""
    parent = psutil.Process(workflow.pid)
    processes = parent.children(recursive=True)
    jobs = []
    for process in processes:
        with suppress(psutil.Error):
            if {"peftscope", "run"} <= set(process.cmdline()):
                jobs.append(process)
    whole = chance.random() < WHOLE_WORKFLOW
    for process in [parent, *processes] if whole else [chance.choice(jobs)] if jobs else []:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if whole:
        workflow.wait()
        return "the workflow"
    return "a job" if jobs else ""


if __name__ == "__main__":
    main()

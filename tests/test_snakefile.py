"""The workflow: lint, dry run, a real run to the report, and nothing left to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import python
from snakemake.utils import Paramspace

from peftscope.planning.sweep import expand
from peftscope.sizing.grid import grid

TINY = """
title: Tiny
fixed: {model: toy, steps: 3, batch_size: 4, heldout_items: 8, generation_items: 0, eval_batch_size: 8,
  retention_tokens: 32, untimed_steps: 1}
axes: {method: [lora]}
ladders: [{centre: {method: lora}, axes: {rank: [2, 8]}}]
"""


def snakemake(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return python("-m", "snakemake", "--cores", "2", *arguments, env=environment)


@pytest.fixture
def tiny(write_experiment, repository: Path, toy: Path) -> str:
    """A folder of its own, ready for ``snakemake --config experiment=tiny``."""
    write_experiment("tiny", TINY)
    for name in ("Snakefile", "profiles", "src"):
        Path(name).symlink_to(repository / name)
    Path("resources").symlink_to(toy / "resources")
    # What no experiment changes is made once for all tests.
    memory = toy / "results-memory"
    memory.mkdir(exist_ok=True)
    Path("results").mkdir()
    Path("results/memory").symlink_to(memory)
    return "tiny"


def test_lint_asks_only_for_conda_environments(tiny: str) -> None:
    """The workflow runs in one environment, the project's own; a second one per rule would only drift from it."""
    done = snakemake("--lint")
    lints = {line.strip(" *:") for line in (done.stdout + done.stderr).splitlines() if line.startswith("    * ")}
    assert lints == {"Specify a conda environment or container for each rule."}


SHOW_PREFIX = "\nprint('PREFIX', shell._process_prefix.split()[-1], file=sys.stderr)\n"
MODULE = """
import sys


module suite:
    snakefile:
        "{snakefile}"
    config:
        config


use rule * from suite as suite_*


rule all:
    default_target: True
    input:
        rules.suite_start.input,
"""


def planned(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Returns the number of jobs of each rule that a dry run lists."""
    assert done.returncode == 0, done.stdout + done.stderr
    table = (done.stdout + done.stderr).rpartition("Job stats")[2].partition("Reasons")[0]
    rows = re.findall(r"^ *(\w[\w ]*?) +(\d+) *$", table, re.MULTILINE)
    return {name.replace(" ", "_"): int(count) for name, count in rows if name != "total"}


def test_dry_run_by_the_catalogues_snakefile_and_as_a_module(tiny: str, repository: Path) -> None:
    """The catalogue's Snakefile includes the one at the root. The module is used in a folder that has no sources."""
    config = ("--config", f"experiment={tiny}")
    Path("Snakefile").unlink()
    Path("Snakefile").write_text((repository / "Snakefile").read_text() + SHOW_PREFIX)
    done = snakemake("-n", *config)
    root = planned(done)
    assert root.pop("all") == 1 and root["train"] == 2
    # A job is the child of Snakemake itself, so that it dies with it.
    assert "PREFIX exec" in done.stdout + done.stderr
    Path("src").unlink()
    snakefile = repository / "workflow" / "Snakefile"
    catalogue = planned(snakemake("-n", "--snakefile", str(snakefile), *config))
    assert catalogue.pop("start") == 1 and catalogue == root
    Path("Snakefile").write_text(MODULE.format(snakefile=snakefile) + SHOW_PREFIX)
    done = snakemake("-n", *config)
    module = planned(done)
    assert "PREFIX PEFTSCOPE_DIES_WITH_PARENT=1;" in done.stdout + done.stderr
    assert module.pop("all") == 1 and {name.removeprefix("suite_"): n for name, n in module.items()} == root


@pytest.mark.slow
def test_the_page_is_made_anew_after_any_change_of_what_renders_it(tiny: str, repository: Path) -> None:
    """The sources are a copy of the package's, which Python and the workflow take instead."""
    Path("src").unlink()
    shutil.copytree(repository / "src", "src", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(Path("src").resolve())}
    finished = [f"results/runs/{run}/{name}" for run in expand(tiny).runs for name in ("spec.json", "record.json")]
    finished += [f"results/memory/curves/{point}.csv" for point in Paramspace(grid()).instance_patterns]
    finished += [f"results/memory/{name}.svg" for name in ("grid", "bars")]
    finished += [f"results/{tiny}/{name}" for name in ("runs.csv", "losses.csv", "tables/", "figures/")]
    finished += [f"results/{tiny}/all-runs-ended-well", f"reports/{tiny}/report.html"]
    Path("results/memory").unlink()  # which other tests make
    for name in finished:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).mkdir() if name.endswith("/") else Path(name).write_text("{}")
    config = ("--config", f"experiment={tiny}")
    touched = snakemake("--touch", *config, environment=environment)
    assert touched.returncode == 0, touched.stdout + touched.stderr
    assert "Nothing to be done" in snakemake("-n", *config, environment=environment).stderr
    with Path("src/peftscope/report/rendering.py").open("a") as file:
        file.write("# A change.\n")
    changed = planned(snakemake("-n", *config, environment=environment))
    assert changed == {"memory_figures": 1, "report": 1, "check": 1, "all": 1}


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_and_only_what_changed_is_made_then(tiny: str) -> None:
    path = Path("experiments/tiny.yaml")
    # The third rank is fine; its sequences are too short for any response.
    path.write_text(TINY + "runs: [{method: lora, rank: 3, seq_len: 2}]\n")
    done = snakemake("--config", f"experiment={tiny}")
    assert done.returncode != 0
    assert Path("reports/tiny/report.html").is_file()
    assert "too short for the response" in done.stdout + done.stderr
    assert re.search(r"\d+ of \d+ jobs, about .* left", done.stdout + done.stderr)
    records = {path: path.stat().st_mtime_ns for path in Path("results/runs").glob("*/record.json")}
    assert len(records) == 3

    path.write_text(TINY.replace("[2, 8]", "[4, 8]"))
    changed = snakemake("--config", f"experiment={tiny}")
    assert changed.returncode == 0, changed.stdout + changed.stderr
    assert Path("reports/tiny/report.html").stat().st_size > 100_000
    after = {path: path.stat().st_mtime_ns for path in Path("results/runs").glob("*/record.json")}
    assert {path: when for path, when in after.items() if path in records} == records
    (new,) = after.keys() - records.keys()
    assert "lora-r4" in new.as_posix()


def test_a_lock_is_removed_only_when_nobody_holds_it(tiny: str) -> None:
    lock = Path(".snakemake/locks/0.input.lock")
    lock.parent.mkdir(parents=True)
    lock.touch()
    unlock = [sys.executable, "-m", "peftscope", "unlock"]
    holder = subprocess.Popen([sys.executable, "-c", "input()", "snakemake"], stdin=subprocess.PIPE)
    subprocess.run(unlock, check=True)
    assert lock.is_file()
    holder.communicate(b"\n")
    done = subprocess.run(unlock, check=True, capture_output=True, text=True)
    assert not lock.exists() and "removed" in done.stderr


def test_the_kubernetes_job_asks_for_as_many_cards_as_it_uses(repository: Path) -> None:
    job = yaml.safe_load((repository / "profiles" / "kubernetes" / "job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    # Kubernetes hands out cards only where the request is the limit; memory, so that a neighbour is not killed.
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == environment["GPUS"]
    assert pod["restartPolicy"] == "OnFailure"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    make = ["make", "--dry-run", *container["command"][1:]]
    told = subprocess.check_output(make, cwd=repository, env=os.environ | environment, text=True)
    assert re.search(r'--resources gpu=1 mem_mb=\S+ .* --set-threads train=8 --config experiment="gpu-7b"', told)


def test_rules_that_need_the_network_are_local(repository: Path) -> None:
    text = (repository / "Snakefile").read_text()
    local = set(re.findall(r"\n(?:rule|checkpoint) (\w+):\n(?:    .*\n)*    localrule: True\n", text))
    rules = re.split(r"\n(?:rule|checkpoint) (\w+):", text)[1:]
    bodies = dict(zip(rules[::2], rules[1::2], strict=True))
    asks = r"python -m peftscope (fetch|make-task|make-benchmark) "
    fetching = {rule for rule, body in bodies.items() if re.search(asks, body)}
    assert fetching == {"fetch_model", "make_task", "make_benchmark"} <= local
    assert "train" in bodies and "train" not in local

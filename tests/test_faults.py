"""Faults: what is killed, cut, filled up or run out of memory ends in a clear message, and loses nothing.

``make test-faults`` runs these, and prints a table of the faults. They run for minutes each, one at a time.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import python, wait_for

from peftscope.planning.sweep import expand
from peftscope.record import read_record

pytestmark = pytest.mark.faults

KILLS = 30
SMALL = """
title: Small
fixed: {model: toy, steps: 300, batch_size: 4, heldout_items: 8, generation_items: 0, eval_batch_size: 8,
  retention_tokens: 32, untimed_steps: 1}
axes: {method: [lora, qlora]}
"""
ENDINGS = f"""{SMALL}
runs:
  - {{method: full, learning_rate: 1.0e+30, max_grad_norm: null, precision: fp32}}
  - {{method: lora, batch_size: 300000, steps: 2}}
"""
VARYING = r"_seconds|per_second|matmul_share|resident_bytes|started_at|git_|^step_seconds"
"""Columns of times and of the process's memory, which no two runs have alike."""


class Outcomes(list[tuple[str, int, int]]):
    """Fault, times, and how many finished runs were lost."""

    def add(self, fault: str, times: int, lost: int) -> None:
        self.append((fault, times, lost))
        assert lost == 0, f"{fault}: {lost} finished runs were lost"


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    found = Outcomes()
    yield found
    width = max(len(fault) for fault, *_ in found) if found else 0
    lines = [f"{'fault':{width}}  times  lost", *(f"{fault:{width}}  {n:5}  {lost:4}" for fault, n, lost in found)]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n" + "\n".join(lines))


# Folders in which the workflow runs as in a clone.


def make_folder(folder: Path, repository: Path, toy: Path, texts: dict[str, str]) -> Path:
    folder.mkdir()
    shutil.copytree(repository / "experiments", folder / "experiments")
    for name, text in texts.items():
        (folder / "experiments" / f"{name}.yaml").write_text(text)
    for name in ("Snakefile", "profiles", "src"):
        (folder / name).symlink_to(repository / name)
    shutil.copytree(toy / "resources", folder / "resources")
    return folder


def start(folder: Path, name: str, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """Starts the workflow, as ``make report`` does; the small experiments end with their tables."""
    subprocess.run([sys.executable, "-m", "peftscope", "unlock"], cwd=folder, check=True, capture_output=True)
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", f"experiment={name}"]
    command += [] if name == "smoke" else ["--until", "report"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, preexec_fn=limit, **pipes)


def finish(folder: Path, name: str, limit: Callable[[], None] | None = None, fails: bool = False) -> str:
    """Runs the workflow to its end, and returns what it said; if it must fail, then without a traceback of ours."""
    workflow = start(folder, name, limit)
    said, _ = workflow.communicate(timeout=600)
    assert bool(workflow.returncode) == fails, said[-4000:]
    assert not (fails and "Traceback" in said), said[-4000:]
    return said


def tables(folder: Path, name: str) -> dict[str, str]:
    """The experiment's tables without their times and the process's memory."""
    paths = [*(folder / "results" / name).glob("*.csv"), *(folder / "results" / name / "tables").glob("*.csv")]
    tables = {path.name: pd.read_csv(path) for path in sorted(paths)}
    return {name: table.loc[:, ~table.columns.str.contains(VARYING)].to_csv() for name, table in tables.items()}


def finished(folder: Path, name: str) -> dict[str, str]:
    """When each run that is finished began, by its id; from the copy that outlives a job."""
    found = {}
    for path in (folder / "results" / "runs").glob("*/state/record.json"):
        found[path.parts[-3]] = read_record(path).provenance["started_at"]
    return found


def lost(before: dict[str, str], after: dict[str, str]) -> int:
    return sum(after.get(run) != began for run, began in before.items())


@pytest.fixture(scope="session")
def undisturbed(repository: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the small experiment ran without a fault."""
    folder = make_folder(tmp_path_factory.mktemp("faults") / "undisturbed", repository, toy, {"small": SMALL})
    finish(folder, "small")
    return folder


@pytest.fixture
def folder(repository: Path, toy: Path, tmp_path: Path) -> Path:
    """A folder in which nothing ran yet."""
    return make_folder(tmp_path / "own", repository, toy, {"small": SMALL, "endings": ENDINGS})


@pytest.fixture
def done(undisturbed: Path, tmp_path: Path) -> Path:
    """A folder in which the small experiment is finished."""
    subprocess.run(["cp", "-a", str(undisturbed), str(tmp_path / "done")], check=True)
    return tmp_path / "done"


# Signals.


def workers(workflow: subprocess.Popen[str]) -> list[psutil.Process]:
    """Returns the processes of a workflow's jobs."""
    with suppress(psutil.Error):
        return [p for p in psutil.Process(workflow.pid).children(recursive=True) if "peftscope" in p.cmdline()]
    return []


def kill_one_of_its_jobs(workflow: subprocess.Popen[str], chance: random.Random) -> None:
    if found := workers(workflow):
        with suppress(psutil.Error):
            chance.choice(found).kill()


def kill_the_workflow(workflow: subprocess.Popen[str], chance: random.Random) -> None:
    jobs = workers(workflow)
    workflow.kill()
    workflow.communicate()
    assert not psutil.wait_procs(jobs, timeout=30)[1], "jobs went on without their workflow"


def kill_everything(workflow: subprocess.Popen[str], chance: random.Random) -> None:
    with suppress(psutil.Error):
        everything = [psutil.Process(workflow.pid), *psutil.Process(workflow.pid).children(recursive=True)]
        for process in everything:
            with suppress(psutil.Error):
                process.kill()
    workflow.communicate()


def test_sigkill_at_random_moments(repository, toy, tmp_path, outcomes: Outcomes, capsys) -> None:
    reference = None
    chance = random.Random(20261125)
    kills = {kill_one_of_its_jobs: 0, kill_the_workflow: 0, kill_everything: 0}
    again = 0
    for attempt in range(KILLS):  # a folder more whenever one is finished before the kills are spent
        place = make_folder(tmp_path / f"killed-{attempt}", repository, toy, {})
        seen: dict[str, str] = {}
        workflow = start(place, "smoke")
        while sum(kills.values()) < KILLS:
            with suppress(subprocess.TimeoutExpired):
                workflow.communicate(timeout=chance.uniform(1, 10))
            if workflow.poll() == 0:
                break
            if workflow.poll() is None:
                kill = chance.choice(list(kills))
                kill(workflow, chance)
                kills[kill] += 1
                with capsys.disabled():
                    print(f"\r{sum(kills.values())} of {KILLS} kills", end="", flush=True)
            if workflow.poll() is not None:
                again += lost(seen, finished(place, "smoke"))
                seen |= finished(place, "smoke")
                workflow = start(place, "smoke")
        workflow.communicate(timeout=600)
        if workflow.returncode:
            finish(place, "smoke")
        again += lost(seen, finished(place, "smoke"))
        reference = reference or undisturbed_smoke(repository, toy, tmp_path, place)
        assert tables(place, "smoke") == tables(reference, "smoke")
        assert not list(place.glob("results/runs/*/state/checkpoint*"))
        if sum(kills.values()) == KILLS:
            break
    for kill, times in kills.items():
        outcomes.add(f"SIGKILL: {kill.__name__.replace('_', ' ')}", times, again)


def undisturbed_smoke(repository: Path, toy: Path, tmp_path: Path, other: Path) -> Path:
    """Returns a folder in which smoke ran without a fault; with the other one's figures of memory."""
    folder = make_folder(tmp_path / "reference", repository, toy, {})
    subprocess.run(["cp", "-a", "--parents", "results/memory", str(folder)], cwd=other, check=True)
    finish(folder, "smoke")
    return folder


@pytest.mark.parametrize("whom", ["the workflow", "its job"])
def test_sigterm(whom: str, folder: Path, undisturbed: Path, outcomes: Outcomes) -> None:
    seen: dict[str, str] = {}
    times = again = 0
    workflow = start(folder, "small")
    for _ in range(3):
        wait_for(partial(busy_or_over, workflow))
        if workflow.poll() is not None:
            break
        for process in [psutil.Process(workflow.pid)] if whom == "the workflow" else workers(workflow)[:1]:
            process.send_signal(signal.SIGTERM)
            times += 1
        if whom == "the workflow":
            said, _ = workflow.communicate(timeout=120)
            assert "Traceback" not in said
            workflow = start(folder, "small")
        else:
            time.sleep(2)
        again += lost(seen, finished(folder, "small"))
        seen |= finished(folder, "small")
    said, _ = workflow.communicate(timeout=600)
    if workflow.returncode:  # a job that was stopped twice
        finish(folder, "small")
    assert tables(folder, "small") == tables(undisturbed, "small")
    outcomes.add(f"SIGTERM to {whom}", times, again + lost(seen, finished(folder, "small")))


def busy_or_over(workflow: subprocess.Popen[str]) -> bool:
    return any(p.cpu_times().user > 3 for p in workers(workflow)) or workflow.poll() is not None


# Disks.


def fixed_file_size(limit_bytes: int) -> Callable[[], None]:
    """A limit on the size of files acts like a quota, and needs no rights."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))


@pytest.mark.parametrize(
    ("what", "limit_bytes"), [("the record", 3_000), ("the adapter", 30_000), ("checkpoints", 100_000)]
)
def test_a_disk_that_takes_no_more(
    what: str, limit_bytes: int, folder: Path, undisturbed: Path, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    identity, spec = next(iter(expand("small").runs.items()))
    place = Path("results/runs") / identity
    command = "-m", "peftscope", "run", json.dumps(spec.canonical()), "--output", place
    more = "--checkpoint-seconds", "1", "--threads", "2"
    stopped = python(*command, *more, preexec_fn=fixed_file_size(limit_bytes))
    assert "File too large" in stopped.stderr
    assert "Traceback" not in stopped.stderr, stopped.stderr
    if what == "checkpoints":  # the run does without
        assert stopped.returncode == 0, stopped.stderr
        assert "no checkpoint at step" in stopped.stderr
    else:
        assert stopped.returncode != 0
        assert "free some space and start again" in stopped.stderr
        assert not (place / "record.json").exists()
    finish(folder, "small")
    assert tables(folder, "small") == tables(undisturbed, "small")
    outcomes.add(f"no room for {what}", 1, 0)


def test_a_folder_that_cannot_be_written(done: Path, undisturbed: Path, outcomes: Outcomes) -> None:
    before = tables(done, "small")
    if os.geteuid() == 0:  # whom permissions do not stop
        subprocess.run(["mount", "--bind", str(done), str(done)], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(done)], check=True)
    else:
        done.chmod(0o555)
    try:
        said = python("-m", "snakemake", "--cores", "2", "--config", "experiment=small", cwd=done)
        assert said.returncode != 0
        assert "cannot be written" in said.stderr
        assert "Traceback" not in said.stderr
        own = python("-m", "peftscope", "report", "small", cwd=done)
        assert own.returncode != 0
        assert "get permission to write to this folder" in own.stderr
        assert "Traceback" not in own.stderr
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", str(done)], check=True)
        else:
            done.chmod(0o755)
    assert "Job stats" not in finish(done, "small")  # there is nothing to do
    assert tables(done, "small") == before
    outcomes.add("a folder that cannot be written", 1, 0)


# Files that were damaged.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, change])
def test_damaged_records(damage: Callable[[Path], None], done: Path, undisturbed: Path, outcomes: Outcomes) -> None:
    seen = finished(done, "small")
    for record in done.glob("results/runs/*/record.json"):
        damage(record)
    (done / "results/small/runs.csv").unlink()
    finish(done, "small")
    assert tables(done, "small") == tables(undisturbed, "small")
    assert len(list(done.glob("results/runs/*/record.damaged"))) == len(seen)
    outcomes.add(f"records, {damage.__name__}", len(seen), lost(seen, finished(done, "small")))


def test_damaged_records_and_their_copies(done: Path, undisturbed: Path, outcomes: Outcomes) -> None:
    seen = finished(done, "small")
    one = min(seen)
    for path in (done / "results/runs" / one).rglob("record.json"):
        change(path)
    (done / "results/small/runs.csv").unlink()
    said = finish(done, "small", fails=True)
    assert "damaged, moved to record.damaged" in " ".join(said.split())
    finish(done, "small")
    assert tables(done, "small") == tables(undisturbed, "small")
    del seen[one]
    outcomes.add("a record and its copy", 1, lost(seen, finished(done, "small")))


# Memory, and losses that are no numbers.


def test_runs_that_cannot_end_well_do_not_stop_the_others(folder: Path, undisturbed: Path, outcomes: Outcomes) -> None:
    limit = 14 * 2**30
    finish(folder, "endings", lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    runs = pd.read_csv(folder / "results/endings/runs.csv").set_index("run_id")
    assert sorted(runs["status"]) == ["diverged", "ok", "ok", "oom"]
    good = runs[runs["status"] == "ok"]
    reference = pd.read_csv(undisturbed / "results/small/runs.csv").set_index("run_id").loc[good.index]
    shared = [c for c in reference.dropna(axis=1, how="all").columns if not re.search(VARYING, c)]
    pd.testing.assert_frame_equal(good[shared], reference[shared], check_dtype=False, check_exact=True)
    subprocess.run([sys.executable, "-m", "peftscope", "report", "endings"], cwd=folder, check=True)
    assert "OOM" in (folder / "reports/endings/report.html").read_text()
    outcomes.add("out of memory (ulimit -v)", 1, 0)
    outcomes.add("a loss that is no number", 1, 0)


def test_the_kernel_kills_for_memory(folder: Path, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    group = memory_group(2 * 2**30)
    if group is None:
        outcomes.add("out of memory (cgroup: not permitted here)", 0, 0)
        return
    monkeypatch.chdir(folder)
    (spec,) = (spec for spec in expand("endings").runs.values() if spec.batch_size == 300_000)
    command = [sys.executable, "-m", "peftscope", "run", json.dumps(spec.canonical()), "--output", "run"]

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        again = subprocess.run([*command, "--attempts-left", "1"], preexec_fn=enter, capture_output=True, text=True)
        assert again.returncode == 137, again.stderr
        assert not Path("run/record.json").exists()
        last = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, check=True)
        assert "most likely because the host ran out of memory" in last.stderr
        assert read_record(Path("run/record.json")).status == "oom"
    finally:
        group.rmdir()
    outcomes.add("out of memory (cgroup, killed by the kernel)", 2, 0)


def memory_group(limit_bytes: int) -> Path | None:
    """Returns a new cgroup with that limit, None where we may not make one."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / "peftscope-test"
        with suppress(OSError):
            group.mkdir(exist_ok=True)
            if (group / limit).is_file():
                (group / limit).write_text(str(limit_bytes))
                return group
            group.rmdir()
    return None


# Time.

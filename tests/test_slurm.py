"""A real Slurm on this machine: controller, node and munge, and the smoke pipeline run by it.

``make test-slurm`` has these. They need Debian's slurm-wlm and munge, and rights to start them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import conftest
import pandas as pd
import pytest

from peftscope.record import read_record

pytestmark = pytest.mark.slurm

ETC = Path("/etc/slurm")
CARDS = 2
MEMORY_MB = 12_000
TRIES = 5
"""How often a running job is stopped, at most, until one was met before it ended by itself."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


wait_for = partial(conftest.wait_for, seconds=900)


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Starts the three daemons, and stops them after the tests."""
    folder = tmp_path_factory.mktemp("slurm")
    # munge trusts a path only if nobody else could write there.
    for part in (folder, *folder.parents[:-2]):
        part.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    values = {"host": host, "user": user, "folder": folder, "memory": MEMORY_MB, "cards": CARDS}
    conf = Path(__file__).with_name("slurm.conf").read_text().format(port=free_port(), node_port=free_port(), **values)
    # In its usual place: Snakemake's jobs do not inherit SLURM_CONF.
    found = ETC / "slurm.conf"
    assert not found.exists() or "ClusterName=peftscope" in found.read_text(), f"{ETC} describes another cluster"
    ETC.mkdir(exist_ok=True)
    (ETC / "slurm.conf").write_text(conf)
    (ETC / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    cards = [folder / f"card{index}" for index in range(CARDS)]
    for card in cards:
        os.mknod(card, 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # Slurm wants a device; this one is another /dev/null
    (ETC / "gres.conf").write_text("".join(f"Name=gpu File={card}\n" for card in cards))
    files = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
    ]
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *files],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", host],
    ]
    running = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}.out").open("w") as out:
                path = shutil.which(command[0], path=os.environ["PATH"] + ":/usr/sbin")
                assert path, f"{command[0]} is not installed: make test-slurm does it"
                running.append(subprocess.Popen([path, *command[1:]], stdout=out, stderr=out))
            time.sleep(1)
        wait_for(
            lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout, "the node", 60
        )
        yield folder
    finally:
        subprocess.run(["scancel", f"--user={user}"], check=False)
        time.sleep(2)
        for daemon in reversed(running):
            daemon.terminate()
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for name in ("slurm.conf", "cgroup.conf", "gres.conf"):
            (ETC / name).unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A folder in which the workflow runs as in a clone; its training jobs are long enough to be stopped."""
    place = tmp_path_factory.mktemp("clone") / "peftscope"
    place.mkdir()
    for name in ("experiments", "profiles"):
        shutil.copytree(repository / name, place / name)
    for name in ("Snakefile", "src"):
        (place / name).symlink_to(repository / name)
    smoke = place / "experiments" / "smoke.yaml"
    smoke.write_text(smoke.read_text().replace("  steps: 6\n", "  steps: 2000\n"))
    profile = place / "profiles" / "slurm" / "profile.yaml"
    text = profile.read_text()
    # This machine's sizes in the place of a cluster's; nothing else of the profile is changed.
    for old, new in {"train=8": "train=1", "cores: 1000": "cores: 2", "=300": "=1", "checks: 20": "checks: 5"}.items():
        assert old in text
        text = text.replace(old, new)
    # In the profile, for on the command line it would take the place of the others. No cards are found here.
    profile.write_text(text.replace("latency-wait: 60", "latency-wait: 5") + "  - train:gpu=1\n")
    return place


def trainings(state: str = "RUNNING") -> list[str]:
    """Returns the ids of the training jobs that are in that state."""
    lines = slurm("squeue", "--noheader", f"--states={state}", "--format=%i %k").splitlines()
    return [line.split()[0] for line in lines if "rule_train" in line]


def has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("results/runs/*/state/checkpoint-*.pt"))


def test_slurm_hands_out_its_cards(cluster: Path) -> None:
    assert slurm("srun", "--gpus=1", "printenv", "CUDA_VISIBLE_DEVICES").strip() == "0"
    assert slurm("srun", "--gpus=2", "printenv", "CUDA_VISIBLE_DEVICES").strip() == "0,1"


def test_the_smoke_pipeline_survives_scancel_and_preemption(
    cluster: Path, folder: Path, request: pytest.FixtureRequest
) -> None:
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", "profiles/slurm"]
    command += ["--config", "experiment=smoke"]
    with (folder / "workflow.log").open("w") as log:
        workflow = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    request.addfinalizer(workflow.kill)

    def said() -> str:
        return (folder / "workflow.log").read_text()

    def training() -> list[str]:
        assert workflow.poll() is None, said()[-4000:]
        return trainings() if has_checkpoint(folder) else []

    def cancel(job: str) -> Callable[[], bool]:
        """Cancels a job, and returns a function that says whether it has left the queue."""
        slurm("scancel", job)
        return lambda: job not in slurm("squeue", "--noheader", "--format=%i").split()

    def preempt(_: str) -> Callable[[], bool]:
        """Submits an urgent job, and returns a function that says whether it is over."""
        urgent = slurm(
            "sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"
        )
        return lambda: not slurm("squeue", "--noheader", f"--job={urgent.strip()}", "--states=PD,R")

    for interrupt in (cancel, preempt):
        for _ in range(TRIES):  # a job may end by itself just before
            is_over = interrupt(wait_for(training, "a training job with a checkpoint")[0])
            wait_for(lambda over=is_over: stopped(folder) or over(), f"the end of {interrupt.__name__}")
            with suppress(AssertionError):
                wait_for(lambda: stopped(folder), "word of the job that was stopped", seconds=5)
                break
        else:
            raise AssertionError(f"{interrupt.__name__} met no job in {TRIES} tries")
        wait_for(is_over, f"the end of {interrupt.__name__}")
        wait_for(lambda: went_on(folder), "its next attempt")

    workflow.wait(timeout=1500)
    assert workflow.returncode == 0, said()[-6000:]
    runs = pd.read_csv(folder / "results/smoke/runs.csv")
    assert set(runs["status"]) == {"ok"}
    assert (folder / "reports/smoke/report.html").stat().st_size > 100_000
    for record in map(read_record, folder.glob("results/runs/*/record.json")):
        assert record.provenance["environment"]["CUDA_VISIBLE_DEVICES"] in ("0", "1")
        assert record.provenance["environment"]["SLURM_JOB_ID"]


def went_on(folder: Path) -> bool:
    """Whether no run is stopped any more, and one has gone on from a checkpoint."""
    logs = [path.read_text() for path in folder.glob("results/runs/*/train.log")]
    return not stopped(folder) and any("resumed after step" in log for log in logs)


def stopped(folder: Path) -> int:
    """How many runs said that they were stopped by a signal."""
    found = list(folder.glob("results/runs/*/interrupted.json"))
    return sum(read_record(path).reason == f"stopped by {signal.SIGTERM.name}" for path in found)

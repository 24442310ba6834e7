"""A workspace of its own: the repository's experiment files, fetched toy model and made tasks, nothing of a user's."""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from peftscope import methods

os.environ["PEFTSCOPE_DEVICE"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.fsync = lambda _: None  # no test cuts the power, and tests write thousands of records
sys.modules["kernels"] = None  # as in every command: tests call what is below them
methods.METHOD_FILES = Path(os.devnull)  # tests ask what is true of the suite's own methods, not of a user's

REPOSITORY = Path(__file__).parent.parent
Command = Callable[..., tuple[int, str, str]]
COMPILING_SECONDS = 0.006
"""Processor seconds that compiling ``argparse`` takes on the machines on which bounds of seconds were set."""


def pytest_collection_finish() -> None:
    """Leaves the libraries' objects, which are never garbage, out of every later collection."""
    gc.freeze()


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("experiments", "src", "Snakefile", "profiles"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.fixture
def slowness() -> float:
    """How many times slower than the machines that bounds of seconds were set on this one is now; 1 for a faster one.

    Machines that tests run on differ threefold, and from minute to minute: their neighbours take caches and cores.
    """
    source = inspect.getsource(argparse)

    def processor_seconds() -> float:
        began = time.process_time()
        compile(source, "argparse.py", "exec")
        return time.process_time() - began

    return max(1.0, min(processor_seconds() for _ in range(7)) / COMPILING_SECONDS)


@pytest.fixture(autouse=True)
def in_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(workspace)
    forget_files()
    yield
    forget_files()  # for fixtures of the session, which come before those of the next test


def forget_files() -> None:
    """Forgets what was read of models.yaml and tasks.yaml, which the next test may have others of."""
    from peftscope.data import tasks
    from peftscope.models import catalog
    from peftscope.planning import estimate

    for cached in (tasks._tasks, tasks._scoring, catalog._catalog, estimate._item_tokens):
        cached.cache_clear()


@pytest.fixture(scope="session")
def toy(workspace: Path) -> Path:
    """The workspace with the toy model and the sums in it."""
    from peftscope.data.tasks import make_task
    from peftscope.models.fetch import fetch_model

    with chdir(workspace):
        fetch_model("toy")
        make_task("two-digit-sums")
    return workspace


def is_shown(lines: list[str], said: list[str]) -> bool:
    """Returns whether an output has these lines, in their order, and nothing between but where three dots stand."""
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in lines)
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in said)) is not None


@pytest.fixture
def peftscope(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process: (exit code, stdout, stderr). A traceback is an error of the test."""
    from peftscope.cli.main import main

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peftscope", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def refusal(peftscope: Command) -> Callable[..., str]:
    """Runs a command that must be refused in one line, and returns that line."""

    def run(*arguments: str) -> str:
        code, output, message = peftscope(*arguments)
        assert (code, output) == (2, "")
        assert len(message.splitlines()) == 1
        return message

    return run


def fast_if(fast: bool, *values: Any) -> Any:
    """Returns a row of a test that is a slow one under other conditions."""
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)


def python(*words: Any, check: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a Python of its own, and returns what it said."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=check, **options)


IN_ONE_PROCESS = """
import sys, time
from peftscope.cli.main import main
from peftscope.execution import sweep
from peftscope.execution.phases import Phases
from peftscope.execution.run import execute

def run_here(spec, folder, *options, deadline):
    return execute(spec, folder, Phases(spec.device, time.perf_counter()), alone=False).status

sweep.run_apart = run_here
for command in sys.argv[1:]:
    sys.argv = ["peftscope", *command.split()]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def in_one_process(*commands: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Gives commands, with a sweep's runs in their process: to import torch for each would take most of the time."""
    return python("-W", "ignore", "-c", IN_ONE_PROCESS, *commands, **options)


def command(spec: Any, folder: Path, *options: str) -> list[str]:
    """Returns the words that make a run with a thread for each of its processes."""
    words = "-m", "peftscope", "run", json.dumps(spec.canonical()), "--output", folder, "--threads", spec.shards
    return [sys.executable, *map(str, words), "--keep-weights", "all", *options]


def quartiles(*values: float, of: str = "") -> dict[str, float]:
    """Returns the fields of a record's times whose median and quartiles these are, or all of which are one value."""
    lower, median, upper = values if len(values) == 3 else values * 3
    return {f"{of}seconds_lower_quartile": lower, f"{of}seconds_median": median, f"{of}seconds_upper_quartile": upper}


def wait_for(condition: Callable[[], Any], what: str = "it", seconds: float = 120) -> Any:
    """Returns what a condition gives once it gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(psutil.Error):
            if found := condition():
                return found
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


TOKENISED: dict[Any, Any] = {}


def tokenised(items: Any, tokenizer: Any, seq_len: int) -> Any:
    """Does what ``tokenise`` does, which takes a third of a run on the toy, once for each model and items."""
    from peftscope.data.batching import tokenise

    key = (*items, tokenizer.name_or_path, seq_len)
    if key not in TOKENISED:
        TOKENISED[key] = tokenise(items, tokenizer, seq_len)
    return list(TOKENISED[key])


def run_here(spec: Any, folder: Path, **options: Any) -> Any:
    """Makes a run in this process, and returns the record that it wrote; the same items are tokenised once."""
    from peftscope.execution import way
    from peftscope.execution.phases import Phases
    from peftscope.execution.run import execute
    from peftscope.record import read_record

    way.tokenise = tokenised
    execute(spec, folder, Phases(spec.device, time.perf_counter()), **options)
    return read_record(folder / "record.json")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes that share the tests, for what one of them makes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def unpredicted(toy: Path) -> Path:
    """The workspace with the toy model, where no memory was predicted before."""
    from peftscope.layout import PREDICTIONS_FOLDER

    shutil.rmtree(toy / PREDICTIONS_FOLDER, ignore_errors=True)
    return toy


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., Any]:
    """Specs of short runs on the toy model; keywords override."""
    from peftscope.planning.experiment import Experiment
    from peftscope.planning.resolve import Resolver

    def make(**values: Any) -> Any:
        short = {"model": "toy", "task": "two-digit-sums", "seed": 0, "steps": 6, "batch_size": 8, "untimed_steps": 1}
        short |= {"heldout_items": 16, "generation_items": 4, "eval_batch_size": 8, "retention_tokens": 64}
        device = values.pop("device", "cpu")
        return Resolver(Experiment(), Path("test.yaml"), device).spec({**short, **values}, "test.yaml")

    return make


@pytest.fixture
def write_experiment(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Writes an experiment file beside copies of the repository's, and makes that folder the current one."""

    def write(name: str, text: str) -> Path:
        folder = tmp_path / "own"
        if not folder.exists():
            shutil.copytree(REPOSITORY / "experiments", folder / "experiments")
        monkeypatch.chdir(folder)
        path = Path("experiments") / f"{name}.yaml"
        path.write_text(text)
        forget_files()
        return path

    return write


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository as the current folder."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of the experiment files, as the current one."""
    shutil.copytree(REPOSITORY / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own(toy: Path, write_experiment: Callable[[str, str], Path]) -> Callable[[str, str], Path]:
    """A folder with the toy model and its data, as the current one; writes experiment files into it."""
    write_experiment("mine", "fixed: {model: toy}\n")
    shutil.copytree(toy / "resources", "resources")
    return write_experiment


@pytest.fixture(scope="session")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium: apt-get install chromium")


@contextmanager
def launched(chromium: str, *arguments: str) -> Iterator[Any]:
    """A browser, headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", *arguments]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def calculator() -> Path:
    """The calculator's page, built once for the browser."""
    from calculator.build import PAGE, main

    main()  # fails for a page that is too large
    return PAGE


def pretending(**card: Any) -> dict[str, str]:
    """Returns the environment in which a process has the pretended card, with these fields of its own."""
    folder = REPOSITORY / "tests" / "pretended"
    own = {"PYTHONPATH": str(folder), "PRETENDED_CARD": json.dumps(card), "PEFTSCOPE_DEVICE": "cuda"}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1"}

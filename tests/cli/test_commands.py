"""Every command that the documents show in a block of shell works, as far as it can be tried cheaply."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, Command, is_shown

from peftscope import __version__
from peftscope.cli.console import with_progress
from peftscope.models.presets import PRESETS

DOCUMENTS = ["README.md", "experiments/README.md", *sorted(f"docs/{p.name}" for p in REPOSITORY.glob("docs/*.md"))]

TREATMENTS = {
    # A file that is there, and what is published: whole, in the repository.
    r"peftscope memory --config examples/.*": "here",
    r"peftscope compare variants:dora variants:lora.*": "here",
    # A trainer's file, or a data set, of the reader's own.
    r"peftscope memory (\S+ )?--(config|data) .*": "help",
    # A data set of the reader's own.
    r"peftscope advise .*--data .*": "help",
    # Whole: an answer within seconds.
    r"peftscope (advise|memory|fit|cheapest|models|why|oom|expand|doctor|claims --id|table) ?.*": "whole",
    # These train, measure or need what was trained: their options are read, and nothing more.
    r"(python -m )?peftscope (run|sweep|merge|report|new-study|claims --(kind|reuse))( .*)?": "help",
    # Runs and files of the reader's own; what it says of them is tested with those of tests.
    r"peftscope compare .*": "help",
    # A server runs until it is stopped.
    r"python -m http\.server .*": "help",
    r"hf auth login": "help",
    # Says what it would do.
    r"make (setup|test|report|publish|claims|gpu-first|gpu-check|scorecard|peft-comparison|site)( [A-Z]+=\S+)*": "dry",
    r"snakemake --cores all": "dry",
    # The same of another experiment.
    r"snakemake --cores all --config experiment=\S+": "files",
    # Has nothing to report on before the first run, and says so once its options are right.
    r"snakemake --cores all --report report\.zip": "nothing yet",
    # The shell's own.
    r"source \S*activate": "shell",
    # Other machines' programs, and tests: the files that they name are there.
    r"(sudo apt-get|git clone|kubectl|pytest|pip install) .*": "files",
}
"""How a command is tried, by a pattern of all of it."""

SLOW = {"advise", "memory", "fit", "cheapest", "why", "oom", "expand", "doctor", "claims", "compare", "snakemake", "-m"}
"""Programs, or their commands, that take over ten seconds together."""


def commands() -> list[str]:
    """Returns the commands of all documents without comments, once each, but for those whose output is shown."""
    found: dict[str, None] = {}
    for name in DOCUMENTS:
        for block in re.findall(r"^```sh\n(.*?)^```", (REPOSITORY / name).read_text(), re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\\\n|\.venv/bin/", "", block).replace("python3 ", "python ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found[shlex.join(words)] = None
    return [command for command in found if command not in map(shlex.join, map(shlex.split, printed()))]


def printed() -> dict[str, list[str]]:
    """Returns the outputs that documents print, by command.

    Left out are ``new-study``, which has its own test, and the table of the study that it wrote, which takes hours.
    """
    found = {}
    for name in DOCUMENTS:
        text = (REPOSITORY / name).read_text()
        for command, lines in re.findall(r"^```console\n\$ ([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            found[command] = lines.splitlines()
    elsewhere = re.compile(r" new-study |^peftscope table \S+-study-")
    return {command: lines for command, lines in found.items() if not elsewhere.search(command)}


def plain(command: str) -> tuple[dict[str, str], list[str]]:
    """Returns a command's environment and words."""
    words, environment = shlex.split(command), {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    return environment, words


def treatment(command: str) -> str:
    """Returns how a command is tried.

    Raises:
        LookupError: The table does not say.
    """
    text = " ".join(plain(command)[1])
    for pattern, how in TREATMENTS.items():
        if re.fullmatch(pattern, text):
            return how
    raise LookupError(f"no treatment for `{command}`: add it to the table")


@pytest.fixture
def run(peftscope: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], Path], tuple[int, str, str]]:
    """Runs a program, ours in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "160")

    def one(words: list[str], folder: Path) -> tuple[int, str, str]:
        if words[0] == "peftscope":
            return peftscope(*words[1:])
        programs = {
            "snakemake": [sys.executable, "-m", "snakemake"],
            "python": [sys.executable],
            "hf": [str(Path(sys.executable).with_name("hf"))],
        }
        command = [*programs.get(words[0], words[:1]), *words[1:]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return one


def test_a_command_that_nobody_thought_of_is_found() -> None:
    with pytest.raises(LookupError, match="add it to the table"):
        treatment("make coffee")


@pytest.mark.parametrize(
    "command", [c if SLOW.isdisjoint(plain(c)[1]) else pytest.param(c, marks=pytest.mark.slow) for c in commands()]
)
def test_command(command: str, workspace: Path, repository: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    how = treatment(command)
    environment, words = plain(command)
    if how == "shell":
        return
    if how == "files":
        named = [word for word in words if (repository / word.split("/")[0]).is_dir() and "/" in word]
        assert all((repository / word).is_file() for word in named), named
        return
    if "path/to/config.json" in words:
        config = PRESETS["smollm2-135m"][1].model_copy(update={"num_layers": 2}).to_config()
        (workspace / "config.json").write_text(json.dumps(config))
        words[words.index("path/to/config.json")] = "config.json"
    shutil.copytree(repository / "examples", workspace / "examples", dirs_exist_ok=True)
    # A dry run of make writes nothing; the others run where nothing is a user's.
    folder = repository if words[0] == "make" else workspace
    if how == "here":
        monkeypatch.chdir(repository)
    more = {"help": ["--help"], "dry": ["-n"]}.get(how, [])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, *said = run([words[0], *more, *words[1:]] if words[0] in ("make", "snakemake") else words + more, folder)
    if how == "nothing yet":
        assert "marked for report but does not exist" in "".join(said), said
    else:
        assert code == 0, said


def test_an_output_is_shown_with_dots_for_what_is_left_out() -> None:
    said = ["one", "two", "three", "four"]
    assert is_shown(["one", "...", "three", "..."], said)
    assert is_shown(["...", "four"], said)
    assert not is_shown(["one", "three", "four"], said)
    assert not is_shown(["one", "...", "two", "three"], said)
    assert not is_shown(["...", "five"], said)


@pytest.mark.slow
@pytest.mark.parametrize("command", printed())
def test_a_command_prints_what_the_document_says(command: str, workspace: Path, run, monkeypatch) -> None:
    if re.match("peftscope (claims --published|table) ", command):
        monkeypatch.chdir(REPOSITORY)  # what is published
    page = (REPOSITORY / "docs/memory.md").read_text()
    files = re.findall(r"as `(\S+?)`[^\n]*\n\n```yaml\n(.*?)```", page, re.DOTALL)
    for name, content in files:
        (workspace / name).write_text(content)
    _, output, message = run(shlex.split(command), workspace)
    assert is_shown(printed()[command], [line.rstrip() for line in output.splitlines()]), output + message


def test_it_says_its_version(peftscope: Command) -> None:
    assert peftscope("--version")[:2] == (0, f"peftscope {__version__}\n")


def test_a_study_is_a_table_for_a_paper_a_page_and_a_program(peftscope: Command, in_repository: None) -> None:
    latex, markdown, csv = (peftscope("table", "dora-norm", form)[1] for form in ("--latex", "--markdown", "--csv"))
    assert r"DoRA & LoRA & n = 8 & +1.7 {[}$-$1.5, +4.8] & 4.3 & +3.7 {[}$-$0.0, +7.5] * & not told apart \\" in latex
    assert r"\caption{How far each arm is ahead of LoRA" in latex and "task gain, with 95 \\% intervals" in latex
    assert "Each arm ran at one rate." in latex
    assert "| DoRA | LoRA | n = 8 | +1.7 [−1.5, +4.8] | 4.3 | +3.7 [−0.0, +7.5] * | not told apart |" in markdown
    assert csv == Path("results/published/dora-norm/tables/contrasts.csv").read_text()
    code, _, errors = peftscope("table", "dora-norm", "--csv", "--latex")
    assert code == 2 and "--latex: does not go with --csv" in errors


# What commands say while they work.


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys) -> None:
    seconds = iter([0, 10, 40, 50])
    monkeypatch.setattr("peftscope.cli.console.time.monotonic", lambda: next(seconds))
    assert list(with_progress("abc", 3, "measuring")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "measuring: 2 of 3, about 20 s left\n"

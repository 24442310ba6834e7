"""What is installed: commands that need no extra, extras that are enough, and wheels that hold what they need.

A bare environment is a new one with links to some of this machine's packages, so that no test needs a network.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

from peftscope.errors import OPTIONAL

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LIGHT = {"pydantic", "pydantic_core", "rich", "typer", "yaml"}
MODULES = {"nvidia-ml-py": "pynvml", "snakemake-logger-plugin-rich": "snakemake", "pyyaml": "yaml"}
"""The modules of distributions that are not called after them."""
REQUIRED_BY_THOSE = {"huggingface_hub", "markupsafe", "matplotlib", "numpy", "tokenizers", "tqdm"}
"""What our requirements require and our code imports."""
LARGEST_WHEEL, LARGEST_INSTALL = 6_000_000, 30_000_000

ALL_LIGHT = [
    "memory llama-2-7b --explain",
    "fit --gpu 24GiB qwen2.5-0.5b --methods lora",
    "why llama-2-7b qlora lora",
    "models",
    "claims --published",
    "advise --model llama-3-8b --gpu rtx4090 --examples 500",
    "expand quick --gpu rtx4090 --brief",
    "expand quick",
    "schema",
    "claims --id S64",
]
NEEDING = {
    "memory org/name": "model: the config.json of 'org/name' is on the hub, and huggingface_hub is not installed",
    "memory llama-2-7b --simulate": "[simulate]",
    "memory gpt2.json": "model: no closed form: model_type 'gpt2' is not one of ",
    "fetch toy": "[train]",
    "make-task two-digit-sums": "[train]",
    "doctor": "[train]",
    "expand sums": "[train]",
    "expand gpu-7b --gpu a100": "[train]",
    "table sums": "[report]",
    "verify quick": "[train]",
    "claims --write": "[all]",
    "records quick": "[report]",
    "restore quick": "[report]",
    "collect quick": "[report]",
    "compare a b": "[report]",
    "report quick": "[report]",
    "unlock": "[workflow]",
}
"""What a message ends with or says, by the command."""

IN_ONE_PROCESS = """
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from peftscope.cli.main import main

for words in {commands}:
    sys.argv = ["peftscope", *words.split()]
    said, printed = StringIO(), StringIO()
    with redirect_stderr(said), redirect_stdout(printed):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    print(repr([words, code, said.getvalue()]))
print(repr(sorted({optional} & set(sys.modules))))
"""

Bare = Callable[..., Path]


def requirements_of(extras: set[str]) -> list[Requirement]:
    """Returns what pyproject.toml asks for without extras and with some, these of its own opened."""
    found = list(map(Requirement, PROJECT["dependencies"]))
    for name in extras:
        for one in map(Requirement, PROJECT["optional-dependencies"][name]):
            found += requirements_of(one.extras) if one.name == "peftscope" else [one]
    return found


def distributions(requirements: list[Requirement]) -> set[str]:
    """Returns the distributions that an installation of requirements has, as far as this machine has them."""
    wanted, seen = list(requirements), set()
    found: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            requires = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(re.sub(r"[-_.]+", "-", requirement.name).lower())
        names = requirement.extras or {""}
        for one in map(Requirement, requires):
            if one.marker is None or any(one.marker.evaluate({"extra": name}) for name in names):
                wanted.append(one)
    return found


def entries(distribution: str) -> set[Path]:
    """Returns the files and folders in site-packages that belong to a distribution."""
    root = Path(str(metadata.distribution(distribution).locate_file("")))
    tops = {file.parts[0] for file in metadata.files(distribution) or []} - {"..", "__pycache__"}
    return {root / top for top in tops}


@pytest.fixture
def bare(tmp_path: Path) -> Bare:
    """Makes an environment with what some extras install beside peftscope itself, and returns its Python."""

    def make(*extras: str, beside: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / "-".join(("bare", *extras, *beside))
        venv.create(folder, symlinks=True)
        (site,) = folder.glob("lib/python*/site-packages")
        for distribution in distributions(requirements_of(set(extras)) + list(map(Requirement, beside))):
            for entry in entries(distribution):
                if not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)
        return folder / "bin" / "python"

    return make


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "gpt2.json").write_text('{"model_type": "gpt2"}')
    return folder


def run(python: Path | str, *words: str | Path, folder: Path, source: bool = False) -> str:
    """Returns what a program prints; its exit code must be 0."""
    environment = {"PATH": "/usr/bin:/bin", "PEFTSCOPE_DEVICE": "cpu"}
    environment |= {"PYTHONPATH": str(REPOSITORY / "src")} if source else {}
    done = subprocess.run([python, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def outcomes(python: Path, commands: list[str], folder: Path) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """Returns the exit code and stderr of each command, and the optional packages that were imported."""
    code = IN_ONE_PROCESS.format(commands=commands, optional=set(OPTIONAL))
    *lines, last = run(python, "-c", code, folder=folder, source=True).splitlines()
    ended = {words: (code, said) for words, code, said in map(ast.literal_eval, lines)}
    return ended, ast.literal_eval(last)


def imported_packages() -> set[str]:
    """Returns the packages of others that the source imports anywhere."""
    pattern = re.compile(r"^ *(?:from (\w+)[\w.]* import |import (\w+))", re.MULTILINE)
    sources = (path.read_text() for path in (REPOSITORY / "src/peftscope").rglob("*.py"))
    found = {first or second for source in sources for first, second in pattern.findall(source)}
    return found - sys.stdlib_module_names - {"peftscope", "kernels"}


class TestExtras:
    def test_every_package_is_light_or_known_to_be_optional(self) -> None:
        assert imported_packages() <= LIGHT | OPTIONAL

    def test_all_has_what_is_optional(self) -> None:
        names = {MODULES.get(one.name, one.name.replace("-", "_")) for one in requirements_of({"all"})}
        assert names - LIGHT == OPTIONAL - REQUIRED_BY_THOSE

    def test_versions_are_the_same_in_every_extra(self) -> None:
        said: dict[str, set[str]] = {}
        for one in requirements_of(PROJECT["optional-dependencies"].keys()):
            said.setdefault(one.name, set()).add(str(one.specifier))
        assert [name for name, versions in said.items() if len(versions) > 1] == []

    def test_the_page_lists_them(self) -> None:
        page = (REPOSITORY / "docs/install.md").read_text()
        listed = set(re.findall(r"^\| `peftscope(?:\[(\w+)\])?`", page, re.MULTILINE))
        assert listed == {"", *PROJECT["optional-dependencies"]} - {"dev", "docs", "slurm", "trl"}


class TestLightInstall:
    def test_the_calculator_and_what_is_published_need_no_extra(self, bare: Bare, elsewhere: Path) -> None:
        ended, imported = outcomes(bare(), ALL_LIGHT, elsewhere)
        assert {words: said for words, (code, said) in ended.items() if code} == {}
        assert imported == []

    def test_the_same_commands_leave_out_what_is_installed(self, elsewhere: Path) -> None:
        ended, imported = outcomes(Path(sys.executable), ALL_LIGHT[:2], elsewhere)
        assert {code for code, _ in ended.values()} == {0}
        assert imported == []

    def test_what_needs_an_extra_names_it_in_one_sentence(self, bare: Bare, elsewhere: Path) -> None:
        ended, _ = outcomes(bare(), list(NEEDING), elsewhere)
        for words, wanted in NEEDING.items():
            code, said = ended[words]
            assert code == 2 and said.count("\n") == 1, said
            said = said.removesuffix("\n")
            assert said.endswith(f"pip install '{REPOSITORY}{wanted}'") or said.startswith(wanted), (words, said)

    def test_the_api_names_the_extra(self, bare: Bare, elsewhere: Path) -> None:
        calls = {
            "load_results('quick')": "pandas: needed here, and not installed -> pip install '[report]'",
            "memory('llama-2-7b', simulate=True)": "pip install '[simulate]'",
            "run({'model': 'toy', 'method': 'lora'}, 'run')": "pip install '[train]'",
        }
        code = "import peftscope\nassert peftscope.memory('llama-2-7b').peak_allocated_bytes > 2**30\n"
        code += "".join(f"try: peftscope.{call}\nexcept peftscope.InputError as e: print(e)\n" for call in calls)
        lines = run(bare(), "-c", code, folder=elsewhere, source=True).splitlines()
        assert len(lines) == len(calls)
        ends = [end.replace("'[", f"'{REPOSITORY}[") for end in calls.values()]
        assert all(line.endswith(end) for line, end in zip(lines, ends, strict=True)), lines


def test_reports_extra_reads_results(bare: Bare, elsewhere: Path) -> None:
    code = "import peftscope; runs = peftscope.load_results('quick'); print(len(runs), runs.attrs['source'])"
    rows, source = run(bare("report"), "-c", code, folder=elsewhere, source=True).split()
    assert int(rows) > 10 and source == (REPOSITORY / "results/published/quick/runs.csv").as_posix()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that a build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("src", "experiments", "results/published"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def build(tree: Path, what: str, target: Path) -> Path:
    """Returns a wheel or a source distribution of a tree, made as pip makes it."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(target)!r}))"
    target.mkdir(exist_ok=True)
    return target / run(sys.executable, "-c", code, folder=tree).splitlines()[-1]


def pip(python: Path, *words: str | Path) -> None:
    install = ("install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, *install, *words, folder=python.parent)


@pytest.mark.slow
class TestWheel:
    def test_it_is_small_and_enough_in_another_folder(self, tree: Path, bare: Bare, elsewhere: Path, tmp_path) -> None:
        stale = tree / "build/lib/peftscope/gone.py"
        stale.parent.mkdir(parents=True)
        stale.touch()
        wheel = build(tree, "wheel", tmp_path / "wheels")
        assert wheel.stat().st_size < LARGEST_WHEEL
        with zipfile.ZipFile(wheel) as archive:
            files = {entry.filename: entry.file_size for entry in archive.infolist()}
        ours = {path.relative_to(tree / "src").as_posix() for path in (tree / "src/peftscope").rglob("*.*")}
        shipped = {name.removeprefix("peftscope/shipped/") for name in files if "/shipped/" in name}
        assert ours <= files.keys() and "peftscope/gone.py" not in files
        wanted = {"experiments/studies/base.yaml", "experiments/tasks/filler.yaml", "results/published/claims.json"}
        assert wanted <= shipped and not any(name.endswith((".png", ".svg")) for name in shipped)
        # A source distribution gives the same wheel.
        archive = build(tree, "sdist", tmp_path / "sdists")
        shutil.unpack_archive(archive, tmp_path, filter="data")
        again = build(tmp_path / archive.name.removesuffix(".tar.gz"), "wheel", tmp_path / "again")
        with zipfile.ZipFile(again) as other:
            assert {entry.filename: entry.file_size for entry in other.infolist()}.keys() == files.keys()

        python = bare()
        pip(python, wheel)
        linked = {link for link in python.parent.parent.glob("lib/python*/site-packages/*") if link.is_symlink()}
        sizes = (file.stat().st_size for link in linked for file in link.rglob("*.*") if file.suffix != ".pyc")
        assert sum(sizes) + sum(files.values()) < LARGEST_INSTALL
        program = python.with_name("peftscope")
        answer = json.loads(run(program, "memory", "llama-2-7b", "--json", folder=elsewhere))
        assert answer["peak_allocated_bytes"] > 2**30
        assert "yes" in run(program, "fit", "--gpu", "24GiB", "qwen2.5-0.5b", folder=elsewhere)
        assert "llama-2-7b" in run(program, "models", folder=elsewhere)
        assert "S64" in run(program, "claims", "--published", "--id", "S64", folder=elsewhere)
        assert "21 runs" in run(program, "expand", "quick", "--gpu", "rtx4090", "--brief", folder=elsewhere)

    def test_an_editable_install_reads_the_folders_at_the_root(self, tree: Path, bare: Bare, elsewhere: Path) -> None:
        python = bare(beside=("setuptools",))
        pip(python, "--editable", tree)
        shutil.copy(tree / "experiments/quick.yaml", tree / "experiments/mine.yaml")
        program = python.with_name("peftscope")
        assert "21 runs" in run(program, "expand", "mine", "--gpu", "rtx4090", "--brief", folder=elsewhere)
        assert "S64" in run(program, "claims", "--published", "--id", "S64", folder=elsewhere)
        assert not (tree / "src/peftscope/shipped").exists()

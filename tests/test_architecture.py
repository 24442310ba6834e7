"""The house rules that a reader relies on: imports, versions and pages."""

from __future__ import annotations

import re
import subprocess
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml
from conftest import python

from benchmarks.architecture import PAGE, describe_room, draw_layers, read_layers, render
from benchmarks.page import write_blocks

# Each stands for what it imports.
NO_TORCH = [
    "api",
    "sizing.fit",
    "cli.show",
    "sizing.grid",
    "sizing.page",
    "sizing.trainers",
    "planning.forecast",
    "execution.job",
    "analysis.collect",
    "analysis.study",
    "analysis.cards",
    "execution.sweep",
    "report.advice.advise",
    "report.memory",
    "report.page",
    "report.publish",
    "report.study",
    "cli.main",
]


def test_planning_and_reporting_never_load_torch() -> None:
    modules = ", ".join(f"peftscope.{name}" for name in NO_TORCH)
    assert python("-c", f"import sys, {modules}; print('torch' in sys.modules)", check=True).stdout.strip() == "False"


def test_no_files_import_each_other_but_for_the_list_of_methods() -> None:
    graph = grimp.build_graph("peftscope", cache_dir=None)

    def sort() -> None:
        TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}).prepare()

    with pytest.raises(CycleError):
        sort()  # the list holds every method, and a method knows the spec that holds it
    assert "peftscope.methods.lora" in graph.find_modules_directly_imported_by("peftscope.methods")
    graph.remove_module("peftscope.methods")
    sort()


def test_snakefile_holds_rules_only(repository: Path) -> None:
    text = (repository / "Snakefile").read_text()
    assert not re.search(r"\b(def|lambda)\b", text)
    assert "script:" not in text
    assert "run:" not in text


def requirements(project: dict[str, Any]) -> set[str]:
    """Returns what runs and tests need: all extras but those of Slurm and TRL, which stand apart, and of the site."""
    extras = project["optional-dependencies"]
    found = {*project["dependencies"], *(one for name in {*extras} - {"slurm", "docs", "trl"} for one in extras[name])}
    return {requirement for requirement in found if not requirement.startswith("peftscope[")}


def test_conda_environment_has_the_same_versions(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((repository / "environment.yml").read_text())
    assert environment["dependencies"][0] == f"python{project['requires-python']}"
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert set(pip) == requirements(project)
    assert len(pip) == len(set(pip))


def test_the_lock_pins_every_dependency_with_hashes_and_leaves_torch_a_range(repository: Path) -> None:
    text = (repository / "requirements.lock").read_text()
    assert "+cpu" not in text and "://" not in text
    entries = re.split(r"\n(?=\S)", text.replace("\\\n", " ").strip())
    assert all(re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    pinned = {re.split(r"[=<>]", entry)[0].lower().replace("_", "-").replace(".", "-") for entry in entries}
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (torch,) = [requirement for requirement in requirements(project) if requirement.startswith("torch")]
    makefile = (repository / "Makefile").read_text()
    # The tables of kernels were read in one version, so that newer ones wait until somebody reads them again.
    read_in = re.search(r"torch 2\.(\d+)", (repository / "src/peftscope/memory/kernels.py").read_text())[1]
    assert f"TORCH := {torch.removesuffix('3')}2.{int(read_in) + 1}\n" in makefile
    for requirement in requirements(project) - {torch}:
        assert re.split(r"[=<>]", requirement)[0].lower().replace("_", "-") in pinned, requirement
    assert not pinned & {"torch", "triton"}
    # What may run a build of its own is named, and still part of the lock.
    assert set(re.search(r"SOURCE_ONLY := (\S+)", makefile)[1].split(",")) <= pinned


def test_the_page_on_architecture_shows_the_import_contract_and_the_rooms(repository: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text((repository / PAGE).read_text())
    write_blocks(render(repository), page)
    assert page.read_text() == (repository / PAGE).read_text(), "run: python -m benchmarks.architecture"
    layers = read_layers(repository / "pyproject.toml")
    assert draw_layers(layers) in page.read_text()
    assert draw_layers([*layers[1:], layers[0]]) not in page.read_text()
    with pytest.raises(ValueError, match="has no block tables"):
        write_blocks({"tables": "nothing"}, page)


def test_every_room_is_in_the_contract_and_says_what_it_is_for(repository: Path) -> None:
    source = repository / "src"
    rooms = {room for layer in read_layers(repository / "pyproject.toml") for room in layer}
    modules = {path.parent.name for path in source.glob("peftscope/*/__init__.py")}
    modules |= {path.stem for path in source.glob("peftscope/*.py") if not path.stem.startswith("__")}
    assert rooms == modules
    for room in rooms:
        assert describe_room(room, source).endswith("."), room


@pytest.mark.parametrize("folder", ["results", "reports"])
def test_working_outputs_are_ignored_and_published_ones_are_not(folder: str, repository: Path) -> None:
    def ignored(path: str) -> bool:
        command = ["git", "-C", str(repository), "check-ignore", "--quiet", "--no-index", path]
        return subprocess.run(command, check=False).returncode == 0

    assert ignored(f"{folder}/quick/x.csv")
    assert not ignored(f"{folder}/published/quick/x.csv")

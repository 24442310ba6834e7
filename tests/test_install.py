"""What is installed: light commands without an extra, each extra enough for its own, wheels with all that they need."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

from peftscope.errors import OPTIONAL

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LIGHT = {"annotated_doc", "pydantic", "rich", "typer", "yaml"}
NAMES = {"nvidia-ml-py": "pynvml", "snakemake-logger-plugin-rich": "snakemake_logger_plugin_rich"}
"""The modules of distributions with another name."""
FOUND_WITH = {"huggingface_hub", "markupsafe", "matplotlib", "numpy", "tqdm"}
"""What our requirements require, and we import."""
LARGEST_WHEEL, LARGEST_LIGHT = 5_000_000, 30_000_000

Install = Callable[[str], Path]
"""Returns a folder that has what an extra installs, and nothing else."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(extra: str = "") -> set[str]:
    """Returns the distributions that an extra installs, as far as this machine has them."""
    wanted = [Requirement(f"peftscope[{extra}]")]
    found: set[str] = set()
    seen: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if requirement.name == "peftscope":
            own = [*PROJECT["dependencies"]]
            own += [one for name in requirement.extras if name for one in PROJECT["optional-dependencies"][name]]
            wanted += map(Requirement, own)
            continue
        try:
            requires = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(normal(requirement.name))
        wanted += [
            one
            for one in map(Requirement, requires)
            if one.marker is None or any(one.marker.evaluate({"extra": name}) for name in requirement.extras or {""})
        ]
    return found


def entries(distribution: str) -> set[Path]:
    """Returns the files and folders of a distribution in site-packages."""
    files = metadata.files(distribution) or []
    tops = {file.parts[0]: Path(str(file.locate())).resolve() for file in files if file.parts[0] not in ("..", "__pycache__")}
    site = {top: path for top, path in tops.items()}
    return {next(parent for parent in (path, *path.parents) if parent.name == top) for top, path in site.items()}


@pytest.fixture
def install(tmp_path: Path) -> Install:
    def link(extra: str) -> Path:
        folder = tmp_path / f"with {extra or 'nothing'}"
        folder.mkdir()
        for distribution in distributions(extra):
            for entry in entries(distribution):
                if not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)
        return folder

    return link

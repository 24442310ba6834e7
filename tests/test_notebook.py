"""``examples/gpu_first.ipynb``, cell by cell, in a bare clone and on the pretended card."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FEWEST_BYTES = 100


@pytest.mark.slow
def test_the_notebook_of_a_borrowed_card_runs_on_a_pretended_one(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE", "pretended")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PEFTSCOPE_DEVICE")
    shown: list[str] = []
    ipython = ModuleType("IPython.display")
    ipython.__dict__.update(HTML=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    cells = json.loads((repository / "examples" / "gpu_first.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    said = [_execute("".join(cell["source"]), names, repository) for cell in cells if cell["cell_type"] == "code"]
    clone, setup, runs, tables = said
    assert not clone and Path.cwd() == tmp_path / "peftscope"
    assert "torch" in setup and runs.count("ok after") == 10 and "report.html" in runs
    assert not tables and len(shown) > 1 and min(map(len, shown)) > FEWEST_BYTES
    page = Path("reports/gpu-first-toy/report.html").read_text()
    assert "What agreed" in page and "the 3 repeats of toy, LoRA" in page and "pretended NVIDIA A100" in page
    words = [".venv/bin/peftscope", "publish", "gpu-first-toy"]
    refused = subprocess.run(words, env=os.environ | {"PEFTSCOPE_DEVICE": "cuda"}, capture_output=True, text=True)
    assert refused.returncode == 2 and "its card is a pretended one" in refused.stderr


def _execute(source: str, names: dict[str, Any], repository: Path) -> str:
    """Runs a cell as a notebook does, and returns what its commands said. The clone is of this repository."""
    said, plain = "", []
    for line in source.splitlines():
        if line.startswith("%cd "):
            os.chdir(line.removeprefix("%cd "))
            # The environment is there; a clone's files are younger than it.
            Path(".venv").symlink_to(repository / ".venv")
            for name in ("requirements.lock", "pyproject.toml"):
                os.utime(name, (0, 0))
        elif line.startswith("!python3 -m pip"):
            continue
        elif line.startswith("!"):
            exec("\n".join(plain), names)
            plain = []
            command = line[1:].replace("{REPOSITORY}", repository.as_uri())
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
            assert "Traceback" not in done.stderr, done.stderr
            said += done.stdout + done.stderr
        else:
            plain.append(line)
    exec("\n".join(plain), names)
    return said

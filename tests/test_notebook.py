"""``examples/gpu_check.ipynb``, cell by cell, with a processor in place of a card."""

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
def test_the_notebook_of_a_borrowed_card_runs_on_a_processor(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "peftscope" / "src"))
    shown: list[str] = []
    ipython = ModuleType("IPython.display")
    ipython.__dict__.update(HTML=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    cells = json.loads((repository / "examples" / "gpu_check.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    said = [_execute("".join(cell["source"]), names, repository) for cell in cells if cell["cell_type"] == "code"]
    clone, setup, check, tables = said
    assert not clone and Path.cwd() == tmp_path / "peftscope"
    assert "torch" in setup and check.count("ok after") == 2 and "report.html" in check
    assert not tables and len(shown) > 1 and min(map(len, shown)) > FEWEST_BYTES


def _leave_two_runs() -> None:
    experiment = Path("experiments/gpu-check-cpu.yaml")
    others = ("full", "dora", "adalora", "qlora", "batch_size: 4", "memory_limit_gib")
    kept = [line for line in experiment.read_text().splitlines() if not any(other in line for other in others)]
    experiment.write_text("\n".join(kept))


def _execute(source: str, names: dict[str, Any], repository: Path) -> str:
    """Runs a cell as a notebook does, and returns what its commands said. The clone is of this repository."""
    said, plain = "", []
    for line in source.splitlines():
        if line.startswith("%cd "):
            os.chdir(line.removeprefix("%cd "))
            _leave_two_runs()
            # The environment is there; a clone's files are younger than it.
            Path(".venv").symlink_to(repository / ".venv")
            for name in ("requirements.lock", "pyproject.toml"):
                os.utime(name, (0, 0))
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

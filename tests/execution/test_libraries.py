"""Other libraries: quiet, offline and without a hub's code while peftscope works, and as they were after it."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import warnings
from pathlib import Path

import pytest
from conftest import python
from huggingface_hub import constants
from tqdm import tqdm

from peftscope.execution.libraries import offline, quiet_libraries
from peftscope.files.hub import without_hub_kernels


def talk() -> None:
    warnings.warn("of the next version", FutureWarning, stacklevel=1)
    logging.getLogger("some_library").warning("a warning")
    logging.getLogger("some_library").error("an error")
    for _ in tqdm(range(3), desc="a bar", disable=False):
        pass


def test_libraries_are_quiet_but_for_errors(capsys, caplog: pytest.LogCaptureFixture) -> None:

    def state() -> tuple[object, ...]:
        bars = vars(tqdm)["__init__"], tqdm.monitor_interval
        return list(warnings.filters), bars, logging.root.manager.disable

    before = state()
    with quiet_libraries():
        talk()
    assert [record.message for record in caplog.records] == ["an error"]
    assert capsys.readouterr().err == ""
    assert state() == before
    caplog.clear()
    with pytest.warns(FutureWarning, match="of the next version"):
        talk()
    assert [record.message for record in caplog.records] == ["a warning", "an error"]
    assert "a bar: 100%" in capsys.readouterr().err


def test_warnings_that_were_asked_for_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with quiet_libraries(), pytest.warns(FutureWarning):
        talk()


def test_libraries_are_offline_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ZeroDivisionError), offline():
        assert constants.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"
        raise ZeroDivisionError
    assert not constants.is_offline_mode() and "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with offline():
        assert not constants.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize("found", [{}, {"kernels": sys}], ids=["not imported", "imported"])
def test_the_kernels_package_is_barred_only_inside(found: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ZeroDivisionError), without_hub_kernels():
        with pytest.raises(ImportError, match="kernels"):
            import kernels  # noqa: F401
        raise ZeroDivisionError
    assert {name: sys.modules[name] for name in sys.modules if name == "kernels"} == found


@pytest.mark.parametrize(
    "arguments",
    ["make-task two-digit-sums", pytest.param("memory toy --method qlora --simulate", marks=pytest.mark.slow)],
)
def test_a_command_says_only_what_is_its_own(arguments: str, tmp_path: Path) -> None:
    done = python("-m", "peftscope", *arguments.split(), check=True, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.count("\n") >= 1
    for word in ("Warning", "Failed to load", "kernels-community", "it/s]", "%|"):
        assert word not in done.stdout


@pytest.mark.slow
def test_a_run_imports_nothing_that_it_does_not_need(toy: Path, make_spec, tmp_path: Path) -> None:
    fields = make_spec(method="lora", steps=2, generation_items=0, retention_tokens=0, probe_steps=0).canonical()
    words = "-X", "importtime", "-m", "peftscope", "run", json.dumps(fields), "--output", tmp_path
    done = python(*words, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    needless = {"lm_eval", "datasets", "pandas", "sklearn", "matplotlib", "pyarrow", "snakemake", "bitsandbytes.nn"}
    assert "peft" in imported and not imported & needless


FAULTS = """
import resource, sys
from peftscope.execution.process import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_freed_memory_is_used_again() -> None:
    faults = {name: list(map(int, python("-c", FAULTS, name, check=True).stdout.split())) for name in ("kept", "not")}
    assert faults["kept"][1] < faults["kept"][0] / 100, faults
    assert faults["not"][1] > faults["not"][0] / 2, faults

"""The way of a run through the package: which module calls which, from ``execute`` to the record.

A profile function sees every call of a run. Counted are the calls that a module's own code makes to another module, and
each pair of caller and callee counts once, however often it calls. Two kinds of call are left out, because they call a
room back that asked for it: calls of a function made inside another one (a lambda, a closure, a finaliser), and calls
that a library makes (torch's hooks and dispatch modes). In the order in which the pairs first occur they are the way of
the run, and a pair that leads to a module where the run was before is a return. The bounds are what was measured; a
change that needs more of them should say why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

MODULES = 47
"""Modules that a run of LoRA passes through, the log and what the prediction assumes included."""

RETURNS = 57
"""Times that a run comes back to a module where it was: the task says what it is judged on, and how it is scored; the
spec says whether autocast is on, and whether the output is kept; a source asks whether its texts are characters."""

UPWARDS = {
    # The loss is no module of torch, whose hooks would name its blocks: the simulator puts itself around it.
    "peftscope.training.step -> peftscope.memory.simulate: _Owners._named_loss"
}
"""Calls from a room into one above it."""


def follow(work: Callable[[], object]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Returns the modules that a call passes, and the distinct (caller, callee, function) between them, in order."""
    modules: dict[str, None] = {}
    calls: dict[tuple[str, str, str], None] = {}

    def own_module(frame: FrameType | None) -> str:
        name = frame.f_globals.get("__name__", "") if frame else ""
        return name if name.startswith("peftscope.") else ""

    def note(frame: FrameType, event: str, _: Any) -> None:
        callee, code = own_module(frame), frame.f_code
        # What dataclasses write has no file.
        if event != "call" or not callee or "<locals>" in code.co_qualname or code.co_filename == "<string>":
            return
        modules[callee] = None
        caller = own_module(frame.f_back)
        if caller and caller != callee:
            calls[caller, callee, code.co_qualname] = None

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return list(modules), list(calls)


def rooms(repository: Path) -> dict[str, int]:
    """Returns how far up each room is, by import-linter's contract."""
    contracts = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return {room.strip(): height for height, layer in enumerate(reversed(layers)) for room in layer.split("|")}


@pytest.mark.slow
def test_a_run_goes_down_and_seldom_comes_back(unpredicted, make_spec, repository, tmp_path) -> None:
    spec = make_spec(method="lora", steps=2)
    command = [sys.executable, __file__, json.dumps(spec.canonical()), str(tmp_path / "run")]
    # On every processor the same way: replaced kernels call back into their module.
    environment = {**os.environ, "PEFTSCOPE_BF16": "native"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    modules, calls = json.loads((tmp_path / "way.json").read_text())
    assert json.loads((tmp_path / "run/record.json").read_text())["status"] == "ok"

    height = {name: rooms(repository)[".".join(name.split(".")[:2])] for name in modules}
    upwards = {
        f"{caller} -> {callee}: {function}" for caller, callee, function in calls if height[callee] > height[caller]
    }
    assert upwards == UPWARDS
    pairs = dict.fromkeys((caller, callee) for caller, callee, _ in calls)
    seen: set[str] = set()
    returns = []
    for caller, callee in pairs:
        if callee in seen:
            returns.append(f"{caller} -> {callee}")
        seen |= {caller, callee}
    assert len(modules) <= MODULES, "\n".join(sorted(modules))
    assert len(returns) <= RETURNS, "\n".join(returns)


if __name__ == "__main__":
    from peftscope.execution.phases import Phases
    from peftscope.execution.run import execute
    from peftscope.spec import RunSpec

    asked, folder = RunSpec.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2])
    way = follow(lambda: execute(asked, folder, Phases(asked.device, 0.0)))
    folder.with_name("way.json").write_text(json.dumps(way))

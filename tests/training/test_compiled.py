"""Runs whose decoder layers torch.compile compiles: the same losses, and evaluations as ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import fast_if, run_here
from test_methods import batches_of
from torch._dynamo.utils import counters

from peftscope.errors import InputError
from peftscope.hardware.device import find_compiler
from peftscope.methods import METHODS
from peftscope.planning.checks import check_compiler
from peftscope.planning.plan import plan_experiment
from peftscope.spec import RunSpec
from peftscope.training import build
from peftscope.training.build import build_model, compiled_layers
from peftscope.training.load import load_base
from peftscope.training.step import make_optimizer, train_step

# Of torch's own tracing, which looks at every tensor and function that a layer is given.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traces and differentiates graphs as ever, and runs them as they are: no compiler is called."""
    monkeypatch.setattr(build, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("method", "checkpointing"), [("qlora", False), ("lora", True)])
@pytest.mark.slow
def test_compiled_layers_learn_the_same(
    method: str, checkpointing: bool, toy: Path, make_spec, tmp_path: Path, without_kernels: None
) -> None:
    options = {} if METHODS[method]().quantization() else {"precision": "fp32"}
    spec = make_spec(method=method, checkpointing=checkpointing, generation_items=0, **options)
    plain = run_here(spec, tmp_path / "plain")
    assert not counters["stats"]
    compiled = run_here(spec.model_copy(update={"compile": True}), tmp_path / "compiled")
    assert compiled.status == "ok", compiled.reason
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled.train_nll == pytest.approx(plain.train_nll, abs=1e-5 if options else 0.02)
    assert compiled.quality.heldout_nll == pytest.approx(plain.quality.heldout_nll, abs=1e-5 if options else 0.02)
    assert compiled.memory.predicted.train_peak_tensor_bytes is None
    assert compiled.memory.train.peak_tensor_bytes is None
    assert compiled.memory.evaluate.peak_tensor_bytes == plain.memory.evaluate.peak_tensor_bytes


@pytest.mark.parametrize("name", ["dora", fast_if(False, "lora")])
def test_with_checkpointing_a_method_is_compiled_or_refused(name: str, toy, make_spec, without_kernels: None) -> None:
    spec = make_spec(method=name, checkpointing=True, precision="bf16")
    compiled = spec.model_copy(update={"compile": True})  # which checks nothing
    trained = build_model(load_base(spec), spec)
    with compiled_layers(trained.model.train(), compiled):
        train_step(trained, batches_of(spec, 1), make_optimizer(trained.model, spec), spec, step=0)
    if counters["stats"]["unique_graphs"]:
        assert RunSpec.model_validate(compiled.model_dump()) == compiled
    else:
        with pytest.raises(InputError, match=f"compile does nothing with checkpointing and {name}"):
            make_spec(method=name, checkpointing=True, precision="bf16", compile=True)


def test_evaluation_is_not_compiled(toy: Path, make_spec, tmp_path: Path, without_kernels: None) -> None:
    run_here(make_spec(method="none", compile=True, generation_items=0), tmp_path)
    assert not counters["stats"]


@pytest.mark.slow
def test_with_real_kernels(toy: Path, make_spec, tmp_path: Path) -> None:
    spec = make_spec(method="lora", precision="fp32", generation_items=0)
    compiled = spec.model_copy(update={"compile": True})
    if find_compiler("cpu") is None:
        assert check_compiler({"run": compiled})
        return
    torch._dynamo.reset()
    plain, found = run_here(spec, tmp_path / "plain"), run_here(compiled, tmp_path / "compiled")
    assert found.status == "ok", found.reason
    assert found.train_nll == pytest.approx(plain.train_nll, abs=1e-4)


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_machine_without_a_compiler_says_so_before_any_job(
    device: str, variable: str, write_experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_experiment("mine", "fixed: {model: toy, compile: true}\nseeds: [0]\nruns: [{method: lora}]\n")
    compiler = tmp_path / "own-compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PEFTSCOPE_DEVICE", device)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match=f"compile: torch.compile finds no compiler for {device} -> .*{variable}"):
        plan_experiment("mine")
    monkeypatch.setenv(variable, "own-compiler")
    assert plan_experiment("mine").run_ids

"""Simulated and real steps take the same memory, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_methods import TRAINED, batches_of
from transformers import AutoConfig

from peftscope.data.tasks import make_task
from peftscope.memory.simulate import simulate
from peftscope.models.catalog import model_folder
from peftscope.models.fetch import fetch_model
from peftscope.models.load import load_base
from peftscope.spec import RunSpec
from peftscope.training.build import build_model
from peftscope.training.probe import probe_training


def both(spec: RunSpec) -> tuple[dict[str, int], dict[str, int]]:
    (batch,) = batches_of(spec, 1)
    assert batch.attention_mask.min() == 0  # padded, so that the real run needs its masks as well
    model, loss_function = build_model(load_base(spec), spec)
    tracked = probe_training(model, batch, spec, loss_function)
    config = AutoConfig.from_pretrained(model_folder(spec.model))
    trace, _ = simulate(spec, config, [batch] * spec.probe_steps)
    return {phase: peak.size for phase, peak in trace.peaks().items()}, tracked


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("amp", marks=pytest.mark.slow)])
def test_every_method(name: str, precision: str, toy: Path, make_spec) -> None:
    if precision == "amp" and name in ("qlora", "loftq"):
        pytest.skip("4-bit bases compute in bf16")
    simulated, tracked = both(make_spec(method=name, precision=precision))
    assert simulated == tracked
    assert min(tracked.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_path": "hf"},
        {"loss_path": "hf", "attention": "eager"},
        {"checkpointing": True},
        {"optimizer_implementation": "fused"},
        {"optimizer_implementation": "single"},
        {"optimizer": "sgd"},
        {"gradient_accumulation": 2},
        {"packing": True},
        {"packing": True, "attention": "eager"},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "paged_adamw"},
        {"optimizer": "paged_adamw_8bit"},
        {"dropout": 0.1},
        {"adapter_dtype": "base"},
        {"max_grad_norm": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_every_setting(name: str, settings: dict[str, Any], toy: Path, make_spec) -> None:
    simulated, tracked = both(make_spec(method=name, **settings))
    assert simulated == tracked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "qlora"])
def test_the_real_model(name: str, workspace: Path, make_spec) -> None:
    fetch_model("smollm2-135m")
    make_task("two-digit-sums")
    simulated, tracked = both(
        make_spec(method=name, model="smollm2-135m", precision="amp" if name == "full" else "bf16")
    )
    assert simulated == tracked

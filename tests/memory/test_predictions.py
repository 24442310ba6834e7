"""Predicted memory is simulated once for runs that take the same, and again after any change that could matter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import batches_of

from peftscope.data.batching import Batch
from peftscope.layout import PREDICTIONS_FOLDER
from peftscope.memory import predict
from peftscope.memory.predict import predict_or_nothing
from peftscope.record import PredictedMemory
from peftscope.spec import RunSpec


@pytest.fixture
def simulated(unpredicted: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """The runs that were simulated, in this order."""
    simulate, runs = predict.simulate, []

    def noted(spec: RunSpec, *arguments: Any) -> Any:
        runs.append(spec)
        return simulate(spec, *arguments)

    monkeypatch.setattr(predict, "simulate", noted)
    return runs


def predicted(spec: RunSpec) -> PredictedMemory:
    (batch,) = batches_of(spec, 1)
    return predict_or_nothing(spec, batch, batch)


def test_what_changes_no_shape_is_not_simulated_again(simulated: list[RunSpec], make_spec: Callable[..., Any]) -> None:
    first = predicted(make_spec(method="lora"))
    assert predicted(make_spec(method="lora", seed=1, learning_rate=1e-3, steps=9, schedule="cosine")) == first
    assert predicted(make_spec(method="lora", alpha=4)) == first
    assert len(simulated) == 1
    for number, changed in enumerate(({"rank": 4}, {"probe_steps": 1}), 2):
        predicted(make_spec(**{"method": "lora", **changed}))
        assert len(simulated) == number
    assert predicted(make_spec(method="lora", rank=4)) != first


def test_batches_of_other_shapes_are(simulated: list[RunSpec], make_spec: Callable[..., Any]) -> None:
    spec = make_spec(method="lora")
    (batch,) = batches_of(spec, 1)
    smaller = Batch(**{name: v[:2] if torch.is_tensor(v) and v.ndim == 2 else v for name, v in vars(batch).items()})
    pairs = ((batch, batch), (smaller, batch), (batch, smaller), (None, batch))
    found = {repr(predict_or_nothing(spec, training, heldout)) for training, heldout in pairs}
    assert len(simulated) == len(found) == 4


def test_a_damaged_file_is_written_again(simulated: list[RunSpec], make_spec: Callable[..., Any]) -> None:
    first = predicted(make_spec(method="lora"))
    (file,) = PREDICTIONS_FOLDER.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    assert predicted(make_spec(method="lora")) == first
    assert file.read_bytes() == whole and len(simulated) == 2


def test_no_prediction_outlives_a_change_of_the_code(
    simulated: list[RunSpec], make_spec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulations() -> int:
        predict._code.cache_clear()
        predicted(make_spec(method="lora"))
        return len(simulated)

    copy = tmp_path / "peftscope"
    shutil.copytree(predict.PACKAGE, copy)
    monkeypatch.setattr(predict, "PACKAGE", copy)
    assert simulations() == simulations() == 1
    for name, number in (("report/page.py", 1), ("training/step.py", 2), ("spec.py", 3)):
        (copy / name).write_text((copy / name).read_text() + "\n")
        assert simulations() == number, name
    monkeypatch.setattr(predict, "library_versions", lambda: "torch 9.9")
    assert simulations() == 4
    predict._code.cache_clear()

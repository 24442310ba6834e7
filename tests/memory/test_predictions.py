"""Predicted memory is simulated once for runs that take the same; a card's allocator stands in for the tracker."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_methods import batches_of

from peftscope.data.batching import Batch, tokenise, training_batches
from peftscope.data.tasks import read_split
from peftscope.hardware.cards import CUBLAS_BYTES, CUBLAS_HOPPER_BYTES, GIB, GPUS
from peftscope.layout import PREDICTIONS_FOLDER
from peftscope.memory import predict
from peftscope.memory.predict import found_card, predict_or_nothing
from peftscope.memory.probe import probe_training
from peftscope.record import PredictedMemory
from peftscope.spec import RunSpec
from peftscope.training.build import build_model
from peftscope.training.load import load_base, load_tokenizer


@pytest.fixture
def simulated(unpredicted: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """The runs that were simulated, in this order."""
    simulate, runs = predict.simulate, []

    def noted(spec: RunSpec, *arguments: Any, **options: Any) -> Any:
        runs.append(spec)
        return simulate(spec, *arguments, **options)

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_no_prediction_outlives_a_change_of_the_code(
    simulated: list[RunSpec], make_spec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulations() -> int:
        predict.code_digest.cache_clear()
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
    predict.code_digest.cache_clear()


# What stands in on a card for the byte tracker: the allocator's own peaks, and what is known of the card.


def test_peaks_of_the_allocator_stand_in_for_the_tracker(toy: Path, make_spec, monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    sizes = iter([0, 5, 9, 7, 0, 6, 8, 4])  # at the begin of: forward, backward, optimizer, nothing, twice
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(sizes))
    between = iter([2, 3])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(between))
    spec = make_spec(method="lora")
    trained = build_model(load_base(spec), spec)
    examples = tokenise(read_split(spec.task, "train"), load_tokenizer(spec), spec.seq_len)
    batch = next(training_batches(examples, seed=0, batch_size=2, pad_token_id=0))
    # The tensors stay on the processor: only the peaks are asked of a card.
    peaks, resident = probe_training(trained, batch, spec.model_copy(update={"device": "cuda"}))
    assert peaks == {"forward": 6, "backward": 9, "optimizer": 7}
    assert resident == 3 and len(resets) == 8


@pytest.mark.parametrize(
    ("name", "capability", "memory", "cublas"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 79 * GIB, CUBLAS_HOPPER_BYTES),
        ("NVIDIA GeForce RTX 4090", (8, 9), 23 * GIB, CUBLAS_BYTES),
        ("NVIDIA L4", (8, 9), 22 * GIB, CUBLAS_BYTES),
        ("NVIDIA B300", (10, 3), 268 * GIB, CUBLAS_HOPPER_BYTES),
        ("TITAN RTX", (7, 5), 24 * GIB, CUBLAS_BYTES),
    ],
)
def test_the_card_is_known_or_described(
    name: str, capability: tuple[int, int], memory: int, cublas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    properties = SimpleNamespace(name=name, major=major, minor=minor, total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    card = found_card()
    assert (card.name, card.memory_bytes, card.cublas_bytes) == (name, memory, cublas)
    assert card.context_bytes == (GPUS["l4"].context_bytes if name == "NVIDIA L4" else None)
    assert card.before_ampere == (major < 8)
    monkeypatch.setattr(torch.backends.cuda, "cublas_workspace_size", lambda: 2**25)
    assert found_card().cublas_bytes == 2**25

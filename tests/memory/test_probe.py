"""What stands in on a card for the byte tracker: the allocator's own peaks, and what is known of the card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peftscope.data.batching import tokenise, training_batches
from peftscope.data.tasks import read_split
from peftscope.hardware.cards import CUBLAS_HOPPER_BYTES, GPUS
from peftscope.memory.predict import found_card
from peftscope.memory.probe import probe_training
from peftscope.training.build import build_model
from peftscope.training.load import load_base, load_tokenizer


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
    ("name", "major", "cublas"),
    [
        ("NVIDIA H100 80GB HBM3", 9, CUBLAS_HOPPER_BYTES),
        ("NVIDIA GeForce RTX 4090", 8, GPUS["rtx4090"].cublas_bytes),
        ("NVIDIA L4", 8, GPUS["l4"].cublas_bytes),
        ("Something New", 9, CUBLAS_HOPPER_BYTES),
    ],
)
def test_the_card_is_known_or_described(name: str, major: int, cublas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name=name, major=major, total_memory=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    card = found_card()
    assert (card.name, card.memory_bytes, card.cublas_bytes) == (name, 7, cublas)
    assert card.context_bytes == (GPUS["l4"].context_bytes if name == "NVIDIA L4" else None)

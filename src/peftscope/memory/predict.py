"""Predicts the memory of a run by simulation, with the batches that the run will use."""

from __future__ import annotations

import hashlib
import inspect
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from peftscope.data.batching import Batch
from peftscope.files.atomic import write_json
from peftscope.hardware.bf16 import chosen_way
from peftscope.hardware.cards import CONTEXT_BYTES, Gpu, measured_card
from peftscope.layout import PREDICTIONS_FOLDER
from peftscope.memory.allocator import reserved_bytes
from peftscope.memory.assumptions import library_versions
from peftscope.memory.beside import Beside
from peftscope.memory.depths import layers_are_alike, phases_by_depth
from peftscope.memory.empty import empty_model
from peftscope.memory.simulate import simulate
from peftscope.memory.trace import Trace
from peftscope.models.catalog import model_folder
from peftscope.record import PredictedMemory
from peftscope.spec import RunSpec, memory_key

PACKAGE = Path(__file__).parents[1]
ROOMS = ("data", "evaluation", "hardware", "memory", "methods", "models", "training", "spec.py")
"""The parts of this package whose code decides a prediction."""


def predict_or_nothing(spec: RunSpec, widest: Batch | None, widest_heldout: Batch) -> PredictedMemory:
    """Returns the predicted peaks. If the simulation fails, they are empty, because the model can still be trained.

    Runs that take the same memory are simulated once: neither a seed nor a learning rate changes a shape.
    """
    if why_not_simulated(spec):
        return PredictedMemory()
    try:
        file = PREDICTIONS_FOLDER / f"{_key(spec, widest, widest_heldout)}.json"
        with suppress(OSError, ValueError):  # there is none yet, or it is damaged
            return PredictedMemory.model_validate_json(file.read_bytes())
        predicted = predict(spec, widest, widest_heldout)
        with suppress(OSError):
            write_json(file, predicted.model_dump())
        return predicted
    except Exception:
        traceback.print_exc()
        return PredictedMemory()


def _key(spec: RunSpec, *batches: Batch | None) -> str:
    """Returns a hash of all that a prediction depends on: the run, shapes of batches, model, card and code.

    Whether a batch has padding counts as well, because without any, attention gets no mask.
    """
    shapes = [
        ([(n, v.shape) for n, v in vars(b).items() if torch.is_tensor(v)], bool((b.attention_mask == 0).any()))
        for b in batches
        if b
    ]
    config = (model_folder(spec.model, spec.revision) / "config.json").read_bytes()
    method = Path(inspect.getfile(type(spec.method))).read_bytes()  # which may be of another package
    card = found_card() if spec.device == "cuda" else None
    run = memory_key(spec), spec.probe_steps, [b is None for b in batches], shapes
    parts = run, config, method, card, chosen_way(), code_digest()
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@cache
def code_digest(parts: tuple[str, ...] = ROOMS) -> str:
    """Returns a hash of the libraries' versions and of the code in these parts of this package."""
    digest = hashlib.sha256(library_versions().encode())
    for part in parts:
        for path in sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / part]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def why_not_simulated(spec: RunSpec) -> str:
    """Returns why the simulator cannot predict a run of this kind; empty if it can."""
    if spec.shards > 1:
        return "the simulator knows a single process"
    if spec.compile:
        return "the simulator does not know what compiled layers keep"
    return spec.method.why_not_simulated()


def predict(spec: RunSpec, widest: Batch | None, widest_heldout: Batch) -> PredictedMemory:
    """Returns the predicted peaks of a run, whose base model must have been fetched, from its widest batches.

    ``widest`` is None if nothing is trained.
    """
    card = found_card() if spec.device == "cuda" else None
    folder = model_folder(spec.model, spec.revision)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # As many steps as the probe takes. Optimizer states are allocated in the first, so the second is a typical step.
    steps = spec.probe_steps if spec.device == "cpu" and spec.probe_steps else 2
    batches = [widest] * steps if widest is not None else []

    def simulate_at(config: Any) -> tuple[Trace | None, Trace | None]:
        cublas, before_ampere = (card.cublas_bytes, card.before_ampere) if card else (0, False)
        return simulate(spec, config, batches, widest_heldout, cublas, before_ampere=before_ampere)

    # What a card reserves follows from the order of all blocks, and that from the whole model.
    shallow = card is None and layers_are_alike(empty_model(spec, config, Beside()).model, config)
    peaks = phases_by_depth(config, simulate_at) if shallow else None
    training = None
    if peaks is None:
        training, evaluation = simulate_at(config)
        assert training and evaluation
        both = [*training.peaks(paged=card is None).items(), *evaluation.peaks().items()]
        peaks = {phase: peak.size for phase, peak in both}
    parts = {f"{phase}_peak_tensor_bytes": peaks.get(phase) for phase in ("forward", "backward", "optimizer")}
    predicted = PredictedMemory(
        **parts,
        train_peak_tensor_bytes=max((size for size in parts.values() if size), default=None),
        evaluate_peak_tensor_bytes=peaks["evaluate"],
    )
    if card and batches and training:
        reserved = reserved_bytes(training)
        predicted.train_peak_reserved_bytes = reserved
        predicted.train_peak_device_bytes = reserved + (card.context_bytes or CONTEXT_BYTES) + training.paged_bytes()
    return predicted


def found_card() -> Gpu:
    """Returns the first CUDA card: its own memory, capability and workspace, and the context of its type."""
    properties: Any = torch.cuda.get_device_properties(0)
    name, memory, capability = properties.name, properties.total_memory, properties.major + properties.minor / 10
    workspace = None
    with suppress(AttributeError, RuntimeError):  # before torch 2.13 it could not be asked
        workspace = torch.backends.cuda.cublas_workspace_size()
    card = measured_card(name, memory, capability)
    return replace(card, name=name, memory_bytes=memory, capability=capability, workspace_bytes=workspace)

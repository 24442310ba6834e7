"""Builds the model that a spec describes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from peftscope.spec import RunSpec
from peftscope.training.step import CausalLoss, TrainedModel

COMPILER = "inductor"
"""The backend of torch.compile that turns graphs into kernels: torch's own."""


def seed_everything(seed: int) -> None:
    """Seeds every generator that initialisation and dropout draw from."""
    random.seed(seed)
    torch.manual_seed(seed)


def build_model(base: Any, spec: RunSpec) -> TrainedModel:
    """Returns the model to train: a loaded base with the spec's method applied."""
    seed_everything(spec.seed if spec.init_seed is None else spec.init_seed)
    return apply_method(base, spec, spec.method.build)


@contextmanager
def compiled_layers(model: Any, spec: RunSpec) -> Iterator[None]:
    """Compiles each decoder layer inside this context, if the spec asks for it.

    The code around the layers takes little time and differs from method to method, so it is not compiled. Nor is
    evaluation, so that differences between scores never come from kernels.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    try:
        for layer in layers if spec.compile else []:
            layer.compile(backend=COMPILER)
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def apply_method(base: Any, spec: RunSpec, build: Callable[[Any, RunSpec], Any]) -> TrainedModel:
    """Returns the model that ``build`` makes from a base, with the loss and the checkpointing of the spec."""
    loss_function = CausalLoss()
    base.loss_function = loss_function
    base.requires_grad_(False)
    model = build(base, spec)
    if spec.checkpointing:
        # Reentrant checkpointing would give adapters no gradient, because the frozen embeddings' output needs none.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return TrainedModel(model, loss_function)


def count_parameters(model: Any) -> tuple[int, int]:
    """Returns the number of values that require gradients, and of all values of a model."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # A 4-bit parameter packs two values per byte. Its quantisation state has the real shape.
    total = sum((getattr(p, "quant_state", None) or p).shape.numel() for p in model.parameters())
    return trainable, total

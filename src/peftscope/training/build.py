"""Building the model that a spec describes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from peftscope.spec import RunSpec
from peftscope.training.step import CausalLoss


def seed_everything(seed: int) -> None:
    """Seeds every generator that initialisation and dropout draw from."""
    random.seed(seed)
    torch.manual_seed(seed)


def build_model(base: Any, spec: RunSpec) -> tuple[Any, CausalLoss]:
    """Applies the spec's method to a loaded base.

    Returns:
        The model to train, and the loss function inside it.
    """
    seed_everything(spec.seed if spec.init_seed is None else spec.init_seed)
    return apply_method(base, spec, spec.method.build)


def apply_method(base: Any, spec: RunSpec, build: Callable[[Any, RunSpec], Any]) -> tuple[Any, CausalLoss]:
    """Returns what ``build`` makes of a base, with everything else that the spec asks of a model, and its loss."""
    loss_function = CausalLoss()
    base.loss_function = loss_function
    base.requires_grad_(False)
    model = build(base, spec)
    if spec.checkpointing:
        # Reentrant checkpointing would give adapters no gradient, because the frozen embeddings' output needs none.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model, loss_function

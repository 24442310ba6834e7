"""The memory of methods that this package lacks: DoRA with its norm in the base's precision, and LoRA with A frozen.

Both are simulated with one part of DoRA or LoRA replaced. A run is given as in ``checks.memory``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from peftscope.claims.checks.memory import GB, MODEL, Run, _allocated, _question
from peftscope.claims.measurement import Measurement


def saved_by_constant_norm(run: Run, model: str = MODEL) -> Measurement:
    """Returns the share of the peak of DoRA that is saved if its norm is a constant in the backward pass.

    Source: Liu et al. 2024, arXiv 2402.09353, section 4.3.

    Args:
        run: The options of the run.
        model: The base model.
    """
    with _dora_norm(constant=False):
        followed = _peak_bytes(model, run)
    with _dora_norm(constant=True):
        constant = _peak_bytes(model, run)
    evidence = {
        "peak with a gradient through the norm, GB": followed / GB,
        "peak with a constant norm, GB": constant / GB,
    }
    return Measurement(1 - constant / followed, evidence=evidence, model=model)


def most_saved_by_frozen_a(run: Run, batch_sizes: tuple[int, ...], model: str = MODEL) -> Measurement:
    """Returns the largest ratio of the peaks of LoRA and of LoRA with A frozen over some batch sizes.

    Source: Zhang et al. 2023, LoRA-FA, arXiv 2308.03303.

    Args:
        run: The options of the run.
        batch_sizes: The batch sizes.
        model: The base model.
    """
    ratios: dict[float, float] = {}
    evidence: dict[str, float] = {}
    for size in batch_sizes:
        both = _peak_bytes(model, {**run, "batch_size": size})
        with _frozen_a():
            frozen = _peak_bytes(model, {**run, "batch_size": size})
        ratios[float(size)] = both / frozen
        evidence |= {f"LoRA, batch {size}, GB": both / GB, f"A frozen, batch {size}, GB": frozen / GB}
    axes = ("sequences in a batch", "peak of LoRA over that with A frozen")
    return Measurement(max(ratios.values()), evidence=evidence, curves={"ratio": ratios}, axes=axes, model=model)


def _peak_bytes(model: str, run: Run) -> int:
    from peftscope.memory.simulate import peaks_by_simulation

    return _allocated(peaks_by_simulation(_question(model, run), evaluation=False))


@contextmanager
def _dora_norm(constant: bool) -> Iterator[None]:
    """Replaces PEFT's forward pass of DoRA by the paper's equation 5, with or without a gradient through the norm.

    The norm has the base's precision, where PEFT's and that of the method's ``norm_gradient`` have the adapter's.
    """
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer

    def forward(
        self: Any, x: Any, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, base_result: Any, **_: Any
    ) -> Any:
        update = (lora_B.weight @ lora_A.weight).to(base_layer.weight.dtype)
        norm = torch.linalg.norm(base_layer.weight + scaling * update, dim=1)
        factor = (self.weight / (norm.detach() if constant else norm)).view(1, -1)
        return (factor - 1) * base_result + factor * lora_B(lora_A(x)) * scaling

    with patch.object(DoraLinearLayer, "forward", forward):
        yield


@contextmanager
def _frozen_a() -> Iterator[None]:
    """Makes simulations freeze the factor A of every adapter."""
    from peftscope.memory import simulate

    build = simulate.apply_method

    def frozen(*args: Any) -> Any:
        trained = build(*args)
        for name, parameter in trained.model.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
        return trained

    with patch.object(simulate, "apply_method", frozen):
        yield

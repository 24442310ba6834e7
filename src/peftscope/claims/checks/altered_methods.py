"""The memory of methods that this package lacks: DoRA with its norm in the base's precision, and LoRA with A frozen.

Both are simulated as methods that extend DoRA or LoRA. A run is given as in ``checks.memory``.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer

from peftscope.claims.checks.memory import GB, MODEL, Run, _allocated, _question
from peftscope.claims.measurement import Measurement
from peftscope.memory.simulate import peaks_by_simulation
from peftscope.methods.dora import DoRA
from peftscope.methods.fields import Method
from peftscope.methods.lora import LoRA
from peftscope.spec import RunSpec
from peftscope.training.load import DTYPES


def saved_by_constant_norm(run: Run, model: str = MODEL) -> Measurement:
    """Returns the share of the peak of DoRA that is saved if its norm is a constant in the backward pass.

    Source: Liu et al. 2024, arXiv 2402.09353, section 4.3.
    """
    followed = _peak_bytes(model, {**run, "norm_gradient": True}, _DoRANormInBasePrecision)
    constant = _peak_bytes(model, {**run, "norm_gradient": False}, _DoRANormInBasePrecision)
    evidence = {
        "peak with a gradient through the norm, GB": followed / GB,
        "peak with a constant norm, GB": constant / GB,
    }
    return Measurement(1 - constant / followed, evidence=evidence, model=model)


def most_saved_by_frozen_a(run: Run, batch_sizes: tuple[int, ...], model: str = MODEL) -> Measurement:
    """Returns the largest ratio of the peaks of LoRA and of LoRA with A frozen over some batch sizes.

    Source: Zhang et al. 2023, LoRA-FA, arXiv 2308.03303.
    """
    ratios: dict[float, float] = {}
    evidence: dict[str, float] = {}
    for size in batch_sizes:
        both = _peak_bytes(model, {**run, "batch_size": size})
        frozen = _peak_bytes(model, {**run, "batch_size": size}, _LoRAWithAFrozen)
        ratios[float(size)] = both / frozen
        evidence |= {f"LoRA, batch {size}, GB": both / GB, f"A frozen, batch {size}, GB": frozen / GB}
    axes = ("sequences in a batch", "peak of LoRA over that with A frozen")
    return Measurement(max(ratios.values()), evidence=evidence, curves={"ratio": ratios}, axes=axes, model=model)


def _peak_bytes(model: str, run: Run, altered: type[Method] | None = None) -> int:
    """Returns the simulated peak of a run, with another class in place of its method's if one is given."""
    question = _question(model, run)
    if altered:
        method = altered(**question.spec.method.model_dump())
        question = replace(question, spec=question.spec.model_copy(update={"method": method}))
    return _allocated(peaks_by_simulation(question, evaluation=False))


class _DoRANormInBasePrecision(DoRA):
    """DoRA by the paper's equation 5: its norm has the base's precision, where PEFT's has the adapter's."""

    def build(self, model: Any, spec: RunSpec) -> Any:
        def forward(
            layer: Any, x: Any, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, base_result: Any, **_: Any
        ) -> Any:
            update = (lora_B.weight @ lora_A.weight).to(base_layer.weight.dtype)
            norm = torch.linalg.norm(base_layer.weight + scaling * update, dim=1)
            factor = (layer.weight / (norm if self.norm_gradient else norm.detach())).view(1, -1)
            return (factor - 1) * base_result + factor * lora_B(lora_A(x)) * scaling

        wrapped = super().build(model, spec)
        for module in wrapped.modules():
            if isinstance(module, DoraLinearLayer):
                module.forward = MethodType(forward, module)
        return wrapped


class _LoRAWithAFrozen(LoRA):
    """LoRA that trains B alone."""

    def build(self, model: Any, spec: RunSpec) -> Any:
        wrapped = super().build(model, spec)
        for name, parameter in wrapped.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
                if self.adapter_dtype == "base":  # as a simulation does with what is trained
                    parameter.data = parameter.data.to(DTYPES[spec.precision])
        return wrapped

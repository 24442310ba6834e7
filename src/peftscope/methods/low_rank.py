"""The fields, the parameter count and the PEFT configuration that LoRA and its variants share."""

from __future__ import annotations

from typing import Any, ClassVar

from peftscope.methods.fields import (
    SIMULATED,
    AdapterDtype,
    Alpha,
    ClosedForm,
    ComputeDtype,
    DoubleQuant,
    Dropout,
    Method,
    Quantization,
    QuantType,
    Rank,
    RunSpec,
    Targets,
    adapted_modules,
    target_modules,
    with_adapter,
)
from peftscope.models.shapes import ModelShape


def decompositions(shape: ModelShape, targets: str | tuple[str, ...]) -> float:
    """Returns the number of 4096 x 4096 matrices that take as long to decompose as all targets together.

    The time of a decomposition grows with the third power of the smaller width.
    """
    narrow = [min(layer.inputs, layer.outputs) for layer in shape.linear_layers(target_modules(targets))]
    return float(sum((width / 4096) ** 3 for width in narrow))


def wrap_with_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    targets: str | tuple[str, ...],
    dropout: float,
    adapter_dtype: str,
    **options: Any,
) -> Any:
    """Returns ``model`` with a LoRA layer on every target. ``options`` are passed to PEFT's ``LoraConfig``."""
    options |= {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none"}
    return with_adapter(model, "LoraConfig", adapter_dtype, target_modules=adapted_modules(model, targets), **options)


class LowRank(Method):
    """The common base of LoRA and its variants. It is no method itself; each of them has its own name."""

    closed_form: ClassVar[ClosedForm | None] = ClosedForm()

    name: str
    rank: Rank = 8
    alpha: Alpha = 16
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0
    adapter_dtype: AdapterDtype = "fp32"

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns rank * (in + out), summed over the targets. Source: Hu et al. 2021, section 4.2."""
        layers = shape.linear_layers(target_modules(self.targets))
        return sum(self.rank * (layer.inputs + layer.outputs) for layer in layers)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA."""
        return self.wrap(model)

    def wrap(self, model: Any, **options: Any) -> Any:
        """Returns ``model`` with a LoRA layer on every target. ``options`` are passed to PEFT's ``LoraConfig``."""
        fields = {name: getattr(self, name) for name in LowRank.model_fields if name != "name"}
        return wrap_with_lora(model, **fields, **options)


class LowRankOnFewBits(LowRank):
    """The common base of variants whose weights are stored in 4 bits, or simulated in fewer."""

    quant_type: QuantType = "nf4"
    double_quant: DoubleQuant = True
    compute_dtype: ComputeDtype = "bf16"

    def quantization(self) -> Quantization | None:
        """Returns the storage of the base, or None if its code is simulated."""
        if self.quant_type in SIMULATED:
            return None
        return Quantization(**self.model_dump(include={*Quantization.model_fields}))

"""QLoRA: LoRA on a base whose linear layers are stored in 4 bits and dequantised for each product.

Source: Dettmers et al. 2023, arXiv 2305.14314: NF4, double quantisation, products in bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

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
    Targets,
)
from peftscope.methods.low_rank import low_rank_parameters, wrap_with_lora

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec


class QLoRA(Method):
    """LoRA on a 4-bit base."""

    label: ClassVar[str] = "QLoRA"
    closed_form: ClassVar[ClosedForm] = ClosedForm()

    name: Literal["qlora"] = "qlora"
    rank: Rank = 8
    alpha: Alpha = 16
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0
    adapter_dtype: AdapterDtype = "fp32"
    quant_type: QuantType = "nf4"
    double_quant: DoubleQuant = True
    compute_dtype: ComputeDtype = "bf16"
    kbit_preparation: Annotated[
        bool,
        Field(description="cast all weights that are not quantised to fp32 (peft.prepare_model_for_kbit_training)"),
    ] = False

    def quantization(self) -> Quantization | None:
        """Returns the storage of the base, or None if its code is simulated."""
        if self.quant_type in SIMULATED:
            return None
        return Quantization(
            quant_type=self.quant_type, double_quant=self.double_quant, compute_dtype=self.compute_dtype
        )

    def rounding(self) -> str | None:
        """Returns the code if it is simulated."""
        return self.quant_type if self.quant_type in SIMULATED else None

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the same count as LoRA."""
        return low_rank_parameters(shape, self.targets, self.rank)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the 4-bit base wrapped with PEFT's LoRA."""
        if self.kbit_preparation:
            from peft import prepare_model_for_kbit_training

            # The spec decides on checkpointing, for every method alike.
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return wrap_with_lora(
            model,
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            dropout=self.dropout,
            adapter_dtype=self.adapter_dtype,
        )

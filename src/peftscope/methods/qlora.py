"""QLoRA: LoRA on a base whose linear layers are stored in 4 bits and dequantised for each product.

Source: Dettmers et al. 2023, arXiv 2305.14314: NF4, double quantisation, products in bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

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


def _spelled(value: bool | str) -> str:
    return {True: "peft", False: "none"}[value] if isinstance(value, bool) else value


KbitPreparation = Annotated[
    Literal["none", "peft", "trl"],
    BeforeValidator(_spelled, json_schema_input_type=Literal["none", "peft", "trl"] | bool),
    Field(
        description="peft: cast all weights that are not quantised to fp32 (prepare_model_for_kbit_training); trl: "
        "then cast embeddings and head back to bf16, so that norms and biases stay in fp32; true means peft"
    ),
]


def _cast_back(model: Any) -> None:
    """Casts embeddings and head to bf16 and norms to fp32, as TRL up to 0.24 does in peft_module_casting_to_bf16.

    Source: trl 0.24.0, trl/models/utils.py, lines 503 to 510.
    """
    import torch

    for name, module in model.named_modules():
        if "norm" in name:
            module.to(torch.float32)
        elif any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")) and hasattr(module, "weight"):
            module.to(torch.bfloat16)


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
    kbit_preparation: KbitPreparation = "none"

    def canonical(self) -> dict[str, Any]:
        """Returns the fields for a run's id, which spells PEFT's preparation as it did when there was no other."""
        fields = super().canonical()
        return fields | {"kbit_preparation": True} if self.kbit_preparation == "peft" else fields

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
        if self.kbit_preparation != "none":
            from peft import prepare_model_for_kbit_training

            # The spec decides on checkpointing, for every method alike.
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if self.kbit_preparation == "trl":
            _cast_back(model)
        return wrap_with_lora(
            model,
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            dropout=self.dropout,
            adapter_dtype=self.adapter_dtype,
        )

"""QLoRA: LoRA on a base whose linear layers are stored in 4 bits and dequantised for each product.

Source: Dettmers et al. 2023, arXiv 2305.14314: NF4, double quantisation, products in bf16.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from peftscope.methods.fields import RunSpec
from peftscope.methods.low_rank import LowRankOnFewBits


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


class QLoRA(LowRankOnFewBits):
    """LoRA on a 4-bit base."""

    label: ClassVar[str] = "QLoRA"

    name: Literal["qlora"] = "qlora"
    kbit_preparation: KbitPreparation = "none"

    def canonical(self) -> dict[str, Any]:
        """Returns the fields for a run's id, which spells PEFT's preparation as it did when there was no other."""
        fields = super().canonical()
        return fields | {"kbit_preparation": True} if self.kbit_preparation == "peft" else fields

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the 4-bit base wrapped with PEFT's LoRA."""
        if self.kbit_preparation != "none":
            from peft import prepare_model_for_kbit_training

            # The spec decides on checkpointing, for every method alike.
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if self.kbit_preparation == "trl":
            _cast_back(model)
        return self.wrap(model)

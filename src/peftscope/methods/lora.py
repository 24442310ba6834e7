"""LoRA: a frozen weight plus a trained update of low rank, W + (alpha/rank) B A.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftscope.methods.fields import RunSpec
from peftscope.methods.low_rank import LowRank


class LoRA(LowRank):
    """Low-rank adaptation. Unless ``start`` says otherwise, B starts at zero, and the first step starts from the base.

    A factor that is not zero is drawn as torch draws a linear layer: uniform between plus and minus one over the root
    of its inputs, which for B are the rank. If both are drawn, the base is not compensated for their product: the model
    starts elsewhere, and the adapter fits the base as it is.

    Source: Hayou et al. 2024, arXiv 2406.08447, for A = 0 with B drawn.
    """

    label: ClassVar[str] = "LoRA"
    plain_update: ClassVar[bool] = True
    continues: ClassVar[bool] = True

    name: Literal["lora"] = "lora"
    start: Annotated[
        Literal["b-zero", "a-zero", "both-random"],
        Field(description="the factor that is zero before the first step; with both random the base is left at once"),
    ] = "b-zero"

    def id_parts(self) -> list[str]:
        """Returns rank, alpha and targets, and the start if it is not the usual one."""
        return super().id_parts() + [self.start] * (self.start != "b-zero")

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA, whose factors have their start."""
        # Without its own initialisation PEFT leaves both factors as torch has drawn them.
        wrapped = self.wrap(model, init_lora_weights=self.start == "b-zero")
        if self.start == "a-zero":
            for name, parameter in wrapped.named_parameters():
                if ".lora_A." in name:
                    parameter.data.zero_()
        return wrapped

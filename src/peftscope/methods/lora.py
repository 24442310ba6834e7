"""LoRA: a frozen weight plus a trained update of low rank, W + (alpha/rank) B A.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftscope.methods.fields import AdapterDtype, Alpha, ClosedForm, Dropout, Method, Rank, Targets
from peftscope.methods.low_rank import low_rank_parameters, wrap_with_lora

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec


class LoRA(Method):
    """Low-rank adaptation. Unless ``start`` says otherwise, B starts at zero, and the first step starts from the base.

    A factor that is not zero is drawn as torch draws a linear layer: uniform between plus and minus one over the root
    of its inputs, which for B are the rank. If both are drawn, the base is not compensated for their product: the model
    starts elsewhere, and the adapter fits the base as it is.

    Source: Hayou et al. 2024, arXiv 2406.08447, for A = 0 with B drawn.
    """

    label: ClassVar[str] = "LoRA"
    plain_update: ClassVar[bool] = True
    continues: ClassVar[bool] = True
    closed_form: ClassVar[ClosedForm] = ClosedForm()

    name: Literal["lora"] = "lora"
    rank: Rank = 8
    alpha: Alpha = 16
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0
    adapter_dtype: AdapterDtype = "fp32"
    start: Annotated[
        Literal["b-zero", "a-zero", "both-random"],
        Field(description="the factor that is zero before the first step; with both random the base is left at once"),
    ] = "b-zero"

    def starts_at_base(self) -> bool:
        """Returns whether one of the factors is zero at the start."""
        return self.start != "both-random"

    def id_parts(self) -> list[str]:
        """Returns rank, alpha and targets, and the start if it is not the usual one."""
        return super().id_parts() + [self.start] * (self.start != "b-zero")

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns rank * (in + out), summed over the targets."""
        return low_rank_parameters(shape, self.targets, self.rank)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA, whose factors have their start."""
        # Without its own initialisation PEFT leaves both factors as torch has drawn them.
        options = self.model_dump(exclude={"name", "start"})
        wrapped = wrap_with_lora(model, **options, init_lora_weights=self.start == "b-zero")
        if self.start == "a-zero":
            for name, parameter in wrapped.named_parameters():
                if ".lora_A." in name:
                    parameter.data.zero_()
        return wrapped

"""LoRA: a frozen weight plus a trained update of low rank, W + (alpha/rank) B A.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftscope.methods.fields import AdapterDtype, Alpha, ClosedForm, Dropout, Method, Rank, Targets
from peftscope.methods.low_rank import low_rank_parameters, wrap_with_lora

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec


class LoRA(Method):
    """Low-rank adaptation. B starts at zero, so the first step starts from the base."""

    label: ClassVar[str] = "LoRA"
    closed_form: ClassVar[ClosedForm] = ClosedForm()

    name: Literal["lora"] = "lora"
    rank: Rank = 8
    alpha: Alpha = 16
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0
    adapter_dtype: AdapterDtype = "fp32"

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns rank * (in + out), summed over the targets."""
        return low_rank_parameters(shape, self.targets, self.rank)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA."""
        return wrap_with_lora(model, **self.model_dump(exclude={"name"}))

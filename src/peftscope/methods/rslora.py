"""rsLoRA: LoRA with the scale alpha/sqrt(rank), so that updates do not shrink as the rank grows.

Source: Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftscope.methods.fields import AdapterDtype, Alpha, ClosedForm, Dropout, Method, Rank, Targets
from peftscope.methods.low_rank import low_rank_parameters, wrap_with_lora

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec


class RsLoRA(Method):
    """LoRA with a rank-stabilised scale."""

    label: ClassVar[str] = "rsLoRA"
    plain_update: ClassVar[bool] = True
    continues: ClassVar[bool] = True
    closed_form: ClassVar[ClosedForm] = ClosedForm()

    name: Literal["rslora"] = "rslora"
    rank: Rank = 8
    alpha: Alpha = 16
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0
    adapter_dtype: AdapterDtype = "fp32"

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the same count as LoRA."""
        return low_rank_parameters(shape, self.targets, self.rank)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA and ``use_rslora=True``."""
        return wrap_with_lora(model, **self.model_dump(exclude={"name"}), use_rslora=True)

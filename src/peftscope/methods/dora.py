"""DoRA: the direction of a weight gets a low-rank update, and its magnitudes are trained separately.

Source: Liu et al. 2024, arXiv 2402.09353, equation 5, with the norm detached as in section 4.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftscope.methods.fields import AdapterDtype, Alpha, ClosedForm, Dropout, Method, Rank, Targets, target_modules
from peftscope.methods.low_rank import low_rank_parameters, wrap_with_lora

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec


class DoRA(Method):
    """Weight-decomposed low-rank adaptation."""

    label: ClassVar[str] = "DoRA"
    plain_update: ClassVar[bool] = True
    continues: ClassVar[bool] = True
    closed_form: ClassVar[ClosedForm] = ClosedForm(layer="decomposed")
    compiles_recomputation: ClassVar[bool] = False

    name: Literal["dora"] = "dora"
    rank: Rank = 8
    alpha: Alpha = 16
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0
    adapter_dtype: AdapterDtype = "fp32"

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns LoRA's count plus one magnitude for each output of each target."""
        magnitudes = sum(layer.outputs for layer in shape.linear_layers(target_modules(self.targets)))
        return low_rank_parameters(shape, self.targets, self.rank) + magnitudes

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA and ``use_dora=True``."""
        return wrap_with_lora(model, **self.model_dump(exclude={"name"}), use_dora=True)

"""PiSSA: LoRA that starts from the principal singular vectors of W and freezes the rest.

Source: Meng et al. 2024, arXiv 2404.02948. The frozen weight becomes W minus the principal part, which is rounded
to the base's dtype: in bf16 the first step starts close to the base, in fp32 on it. A saved adapter repeats the
decomposition when PEFT loads it onto the original base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftscope.methods.fields import AdapterDtype, Alpha, Dropout, Method, Rank, Targets
from peftscope.methods.low_rank import low_rank_parameters, wrap_with_lora

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec


class PiSSA(Method):
    """LoRA initialised by a singular value decomposition of each target."""

    label: ClassVar[str] = "PiSSA"

    name: Literal["pissa"] = "pissa"
    rank: Rank = 8
    alpha: Alpha = 8
    targets: Targets = "all-linear"
    dropout: Dropout = 0.0
    adapter_dtype: AdapterDtype = "fp32"

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the same count as LoRA."""
        return low_rank_parameters(shape, self.targets, self.rank)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA, ``init_lora_weights="pissa"`` (exact SVD)."""
        return wrap_with_lora(model, **self.model_dump(exclude={"name"}), init_lora_weights="pissa")

    def build_empty(self, model: Any, spec: RunSpec) -> Any:
        """Returns plain LoRA: the decomposition leaves the same tensors."""
        return wrap_with_lora(model, **self.model_dump(exclude={"name"}))

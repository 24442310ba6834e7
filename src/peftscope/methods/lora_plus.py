"""LoRA+: LoRA with a higher learning rate for B than for A.

Source: Hayou et al. 2024, arXiv 2402.12354, which also proposes the default ratio of 16.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftscope.files.content import NUMBER
from peftscope.methods.fields import ClosedForm, RunSpec
from peftscope.methods.low_rank import LowRank


class LoRAPlus(LowRank):
    """LoRA with two learning rates. ``learning_rate`` is the rate of A."""

    label: ClassVar[str] = "LoRA+"
    plain_update: ClassVar[bool] = True
    continues: ClassVar[bool] = True
    closed_form: ClassVar[ClosedForm] = ClosedForm(own_group="lora_B")

    name: Literal["lora-plus"] = "lora-plus"
    lr_ratio: Annotated[float, Field(ge=1, description="learning rate of B over that of A"), NUMBER] = 16.0

    def optimizer_groups(self, model: Any, spec: RunSpec) -> list[dict[str, Any]]:
        """Returns two groups: A with the learning rate, and B with ``lr_ratio`` times that rate."""
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in trained if ".lora_B." not in name], "lr": spec.learning_rate},
            {"params": [p for name, p in trained if ".lora_B." in name], "lr": spec.learning_rate * self.lr_ratio},
        ]

"""rsLoRA: LoRA with the scale alpha/sqrt(rank), so that updates do not shrink as the rank grows.

Source: Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peftscope.methods.fields import RunSpec
from peftscope.methods.low_rank import LowRank


class RsLoRA(LowRank):
    """LoRA with a rank-stabilised scale."""

    label: ClassVar[str] = "rsLoRA"
    plain_update: ClassVar[bool] = True
    continues: ClassVar[bool] = True

    name: Literal["rslora"] = "rslora"

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA and ``use_rslora=True``."""
        return self.wrap(model, use_rslora=True)

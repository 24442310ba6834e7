"""Full fine-tuning: all weights are trained.

In pure bf16, most AdamW updates are smaller than the spacing of the weights and are lost in rounding. Comparisons of
quality therefore use ``precision: amp`` or ``fp32`` (fp32 master weights), and ``bf16`` serves for memory and speed.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peftscope.methods.fields import ClosedForm, Method, RunSpec
from peftscope.models.shapes import ModelShape


class Full(Method):
    """Training of all weights, without an adapter."""

    label: ClassVar[str] = "full fine-tuning"
    closed_form: ClassVar[ClosedForm] = ClosedForm()
    draws_start: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    trains_base: ClassVar[bool] = True

    name: Literal["full"] = "full"

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the number of all weights. Tied weights count once."""
        return shape.parameters

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base with every weight trainable."""
        return model.requires_grad_(True)

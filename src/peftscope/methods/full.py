"""Full fine-tuning: every weight is trained.

In pure bf16 most AdamW updates are smaller than the spacing of the weights and round away, so quality comparisons
use ``precision: amp`` or ``fp32`` (fp32 master weights); ``bf16`` is an arm of its own, for memory and speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftscope.methods.fields import ClosedForm, Method

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec


class Full(Method):
    """All weights, no adapter."""

    label: ClassVar[str] = "full fine-tuning"
    closed_form: ClassVar[ClosedForm] = ClosedForm()
    draws_start: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    trains_base: ClassVar[bool] = True

    name: Literal["full"] = "full"

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the size of the model, tied weights once."""
        return shape.parameters

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base with every weight trainable."""
        return model.requires_grad_(True)

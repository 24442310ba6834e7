"""The untouched base, or its 4-bit copy: evaluated once, never trained; the row that every table starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftscope.methods.fields import ClosedForm, Method, Quantization

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec


class Untouched(Method):
    """The base model as it was loaded."""

    trains: ClassVar[bool] = False
    label: ClassVar[str] = "base"
    closed_form: ClassVar[ClosedForm] = ClosedForm()
    mergeable: ClassVar[bool] = False

    name: Literal["none"] = "none"
    base_weights: Literal["full", "nf4"] = "full"

    def quantization(self) -> Quantization | None:
        """Returns NF4 with double quantization for the base's 4-bit copy."""
        return Quantization() if self.base_weights == "nf4" else None

    def full_label(self) -> str:
        """Returns the label, which says where the base is its 4-bit copy."""
        return self.label if self.base_weights == "full" else f"{self.label} in {self.base_weights.upper()}"

    def id_parts(self) -> list[str]:
        """Returns how the base is stored."""
        return [self.base_weights]

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns 0."""
        return 0

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the frozen base."""
        return model.requires_grad_(False)

"""The untouched base, or its 4-bit copy. It is evaluated and never trained, and is the first row of every table."""

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
        """Returns NF4 with double quantisation for the 4-bit copy, and None for the base itself."""
        return Quantization() if self.base_weights == "nf4" else None

    def full_label(self) -> str:
        """Returns the label, which names the 4-bit copy as such."""
        return self.label if self.base_weights == "full" else f"{self.label} in {self.base_weights.upper()}"

    def id_parts(self) -> list[str]:
        """Returns the storage of the base."""
        return [self.base_weights]

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns 0, because nothing is trained."""
        return 0

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the frozen base."""
        return model.requires_grad_(False)

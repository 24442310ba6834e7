"""The untouched base, or a copy of few bits. It is evaluated and never trained, and is the first row of every table."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peftscope.methods.fields import SIMULATED, ClosedForm, Method, RunSpec
from peftscope.models.shapes import ModelShape


class Untouched(Method):
    """The base model as it was loaded."""

    trains: ClassVar[bool] = False
    label: ClassVar[str] = "base"
    closed_form: ClassVar[ClosedForm] = ClosedForm()
    mergeable: ClassVar[bool] = False

    name: Literal["none"] = "none"
    base_weights: Literal["full", "nf4", "nf3", "nf2"] = "full"

    def full_label(self) -> str:
        """Returns the label, which names a copy of few bits as such."""
        if self.base_weights == "full":
            return self.label
        return f"{self.label} in {self.base_weights.upper()}" + " (simulated)" * (self.base_weights in SIMULATED)

    def id_parts(self) -> list[str]:
        """Returns the storage of the base."""
        return [self.base_weights]

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns 0, because nothing is trained."""
        return 0

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the frozen base."""
        return model.requires_grad_(False)

"""Full fine-tuning: all weights are trained.

In pure bf16, most AdamW updates are smaller than the spacing of the weights and are lost in rounding. Comparisons of
quality therefore use ``precision: amp`` or ``fp32`` (fp32 master weights), and ``bf16`` serves for memory and speed.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

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
    embeddings: Annotated[
        Literal["trained", "frozen"], Field(description="trained, or frozen with the output layer, as LoRA leaves them")
    ] = "trained"

    def full_label(self) -> str:
        """Returns the label, which says if the embeddings are frozen."""
        return self.label + ", frozen embeddings" * (self.embeddings == "frozen")

    def id_parts(self) -> list[str]:
        """Returns what is frozen."""
        return ["frozen-embeddings"] * (self.embeddings == "frozen")

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the number of weights that are trained. Tied weights count once."""
        return shape.parameters - (shape.embedding_parameters if self.embeddings == "frozen" else 0)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base with its weights trainable."""
        model.requires_grad_(True)
        if self.embeddings == "frozen":
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.requires_grad_(False)
        return model

"""Low-bit weights that are trained directly: after every step they are rounded again to the grid of their code.

The linear weights are trained and nothing else, so that no full-precision weight can learn in their place. The
rounding is simulated: weights keep the base's dtype. Each block's constant is computed anew, and the grid follows it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftscope.methods.fields import Method, RunSpec, target_modules
from peftscope.models.rounding import linear_layers, round_linear_weights
from peftscope.models.shapes import ModelShape


class Rounded(Method):
    """Training of weights that are rounded after every step."""

    label: ClassVar[str] = "rounded weights"
    draws_start: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    trains_base: ClassVar[bool] = True
    supports_shards: ClassVar[bool] = False

    name: Literal["rounded"] = "rounded"
    quant_type: Annotated[Literal["nf4", "nf3", "nf2"], Field(description="code book of the weights, simulated")] = (
        "nf4"
    )

    def id_parts(self) -> list[str]:
        """Returns the code."""
        return [self.quant_type]

    def rounding(self) -> str:
        """Returns the code."""
        return self.quant_type

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the number of weights in all linear layers."""
        return sum(layer.weights for layer in shape.linear_layers(target_modules("all-linear")))

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the rounded base with its linear weights trainable."""
        for layer in linear_layers(model):
            layer.weight.requires_grad_(True)
        return model

    def after_optimizer_step(self, model: Any, step: int) -> None:
        """Rounds the weights again."""
        round_linear_weights(model, self.quant_type)

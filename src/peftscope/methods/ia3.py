"""IA3: trained vectors rescale the keys, the values and the inner activations of the feed-forward block.

Source: Liu et al. 2022, arXiv 2205.05638.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from peftscope.methods.fields import (
    AdapterDtype,
    ClosedForm,
    Method,
    RunSpec,
    Targets,
    target_modules,
    with_adapter,
    with_fused,
)
from peftscope.models.shapes import ModelShape

RESCALED_INPUTS = ["down_proj"]
RESCALED = with_fused(["k_proj", "v_proj"]) + RESCALED_INPUTS

Feedforward = Annotated[
    tuple[str, ...] | None,
    AfterValidator(lambda names: names and tuple(sorted(set(names)))),
    Field(description="targets whose input is rescaled, not their output; null: down, if it is a target"),
]


class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations."""

    label: ClassVar[str] = "IA³"
    draws_start: ClassVar[bool] = False
    closed_form: ClassVar[ClosedForm] = ClosedForm(layer="rescaled")

    name: Literal["ia3"] = "ia3"
    adapter_dtype: AdapterDtype = "fp32"
    targets: Annotated[Targets | None, Field(description="as LoRA's; null: k, v and down, as in the paper")] = None
    feedforward: Feedforward = None

    @model_validator(mode="after")
    def _feedforward_is_targeted(self) -> IA3:
        missing = set(self.feedforward or ()) - set(self.targets_of())
        if missing:
            raise ValueError(f"feedforward names modules that are not targets: {', '.join(sorted(missing))}")
        return self

    def targets_of(self) -> list[str]:
        """Returns the rescaled modules."""
        return RESCALED if self.targets is None else target_modules(self.targets)

    def rescales_input(self, module: str) -> bool:
        """Returns whether the input of a module is rescaled instead of its output."""
        return module in (RESCALED_INPUTS if self.feedforward is None else self.feedforward)

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns one value per output of each target, or per input if the input is rescaled."""
        return sum(
            layer.inputs if self.rescales_input(layer.name) else layer.outputs
            for layer in shape.linear_layers(self.targets_of())
        )

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's IA3."""
        targets = self.targets_of()
        rescaled = [name for name in targets if self.rescales_input(name)]
        options = {"target_modules": targets, "feedforward_modules": rescaled}
        return with_adapter(model, "IA3Config", self.adapter_dtype, **options)

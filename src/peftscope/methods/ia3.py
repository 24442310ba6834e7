"""IA3: trained vectors rescale keys, values and the inner activations of the feed-forward block.

Source: Liu et al. 2022, arXiv 2205.05638.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftscope.methods.fields import AdapterDtype, ClosedForm, Method, with_fused

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec

RESCALED_OUTPUTS = with_fused(["k_proj", "v_proj"])
RESCALED_INPUTS = ["down_proj"]


class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations."""

    label: ClassVar[str] = "IA³"
    draws_start: ClassVar[bool] = False
    closed_form: ClassVar[ClosedForm] = ClosedForm(layer="rescaled", rescaled_inputs=tuple(RESCALED_INPUTS))

    name: Literal["ia3"] = "ia3"
    adapter_dtype: AdapterDtype = "fp32"

    def targets_of(self) -> list[str]:
        """Returns the rescaled modules."""
        return RESCALED_OUTPUTS + RESCALED_INPUTS

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns one value per output of k and v and per input of down."""
        return sum(layer.outputs for layer in shape.linear_layers(RESCALED_OUTPUTS)) + sum(
            layer.inputs for layer in shape.linear_layers(RESCALED_INPUTS)
        )

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's IA3."""
        from peft import IA3Config, TaskType, get_peft_model

        config = IA3Config(
            task_type=TaskType.CAUSAL_LM, target_modules=self.targets_of(), feedforward_modules=RESCALED_INPUTS
        )
        return get_peft_model(model, config, autocast_adapter_dtype=self.adapter_dtype == "fp32")

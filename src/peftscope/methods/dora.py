"""DoRA: the direction of a weight gets a low-rank update, and its magnitudes are trained separately.

Source: Liu et al. 2024, arXiv 2402.09353, equation 5; its section 4.3 detaches the norm, as PEFT does.
"""

from __future__ import annotations

from types import MethodType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftscope.methods.fields import ClosedForm, RunSpec, target_modules
from peftscope.methods.low_rank import LowRank
from peftscope.models.shapes import ModelShape


class DoRA(LowRank):
    """Weight-decomposed low-rank adaptation."""

    label: ClassVar[str] = "DoRA"
    plain_update: ClassVar[bool] = True
    continues: ClassVar[bool] = True
    closed_form: ClassVar[ClosedForm] = ClosedForm(layer="decomposed")
    compiles_recomputation: ClassVar[bool] = False

    name: Literal["dora"] = "dora"
    norm_gradient: Annotated[
        bool, Field(description="follow DoRA's norm of the updated weight in the backward pass; PEFT holds it constant")
    ] = False

    def id_parts(self) -> list[str]:
        """Returns rank, alpha and targets, and whether the norm has a gradient."""
        return super().id_parts() + ["norm-gradient"] * self.norm_gradient

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns LoRA's count plus one magnitude for each output of each target."""
        magnitudes = sum(layer.outputs for layer in shape.linear_layers(target_modules(self.targets)))
        return super().trainable_parameters(shape) + magnitudes

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA and ``use_dora=True``, whose norm is a constant or not."""
        from peft.tuners.lora.dora import DoraLinearLayer

        wrapped = self.wrap(model, use_dora=True)
        for module in wrapped.modules() if self.norm_gradient else ():
            if isinstance(module, DoraLinearLayer):
                module.forward = MethodType(_forward_with_norm_gradient, module)
        return wrapped


def _forward_with_norm_gradient(
    layer: Any, x: Any, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, base_result: Any = None, **_: Any
) -> Any:
    """Returns what PEFT's ``DoraLinearLayer.forward`` returns, to the last bit, with a gradient through the norm.

    PEFT computes B A as B(A(I)), so that the backward pass would keep an identity matrix for every layer. B(Aᵀ) has the
    same values without one.
    """
    from peft.utils.other import transpose
    from torch.nn.functional import linear

    update = lora_B(lora_A.weight.T.contiguous()).T.to(x.dtype)
    weight = base_layer.weight.to(x.dtype)
    norm = layer.get_weight_norm(weight=weight, lora_weight=update, scaling=scaling)
    factor = (layer.weight / norm).view(1, -1)
    low_rank = lora_B(lora_A(x))
    if base_result is None:  # with dropout, the base's output for x is still to be computed
        base_result = linear(x, transpose(weight, layer.fan_in_fan_out))
    elif base_layer.bias is not None:
        base_result = base_result - base_layer.bias
    return (factor - 1) * base_result + factor * low_rank * scaling

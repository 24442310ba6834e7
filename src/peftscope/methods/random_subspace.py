"""Training in a random subspace: θ = θ₀ + P z, with a fixed random P and ``dimension`` trained values z.

The change of each matrix is B(z) A, which is linear in z because A is fixed: A has ``rank`` random directions of the
inputs, and each value of B is one value of z with a random sign. The values of all B are dealt out over z at random and
evenly, so that every value of z changes every part of the model. The columns of P are about 1 long and, but for chance,
orthogonal. A step then costs what a step of LoRA costs. A P without structure would need the gradient of every weight.

Source: Aghajanyan et al. 2020, arXiv 2012.13255, equation 1, who train all weights, embeddings too, with the Fastfood
transform for P; the fixed A is that of LoRA-FA (Zhang et al. 2023, arXiv 2308.03303).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftscope.errors import InputError, Problem
from peftscope.files.content import Count
from peftscope.methods.fields import Method, Rank, RunSpec, Targets
from peftscope.methods.low_rank import wrap_with_lora
from peftscope.models.shapes import ModelShape

if TYPE_CHECKING:
    import torch


class RandomSubspace(Method):
    """Training of the coordinates of a random subspace. The seed draws the subspace; all coordinates start at zero."""

    label: ClassVar[str] = "random subspace"
    supports_shards: ClassVar[bool] = False

    name: Literal["random-subspace"] = "random-subspace"
    dimension: Annotated[Count, Field(description="trained values, which all matrices share")] = 1000
    rank: Rank = 8
    targets: Targets = "all-linear"

    def id_parts(self) -> list[str]:
        """Returns the dimension, then the rank and the targets."""
        return [f"d{self.dimension}", *super().id_parts()]

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the dimension."""
        return self.dimension

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base with PEFT's LoRA layers, whose A is fixed and whose B follows from the coordinates.

        Raises:
            InputError: There are fewer values in all B than dimensions.
        """
        import torch

        wrapped = wrap_with_lora(
            model, rank=self.rank, alpha=self.rank, targets=self.targets, dropout=0.0, adapter_dtype="fp32"
        )
        layers = _layers(wrapped)
        sizes = [layer.lora_B["default"].weight.numel() for layer in layers.values()]
        total = sum(sizes)
        if self.dimension > total:
            raise InputError(
                Problem(f"dimension={self.dimension}", f"all B together have {total} values", "raise the rank")
            )
        dealt = (torch.randperm(total) % self.dimension).int().split(sizes)
        signs = (torch.randint(2, (total,)) * 2.0 - 1).split(sizes)
        # A's rows have a mean square norm of 1/3, and total/dimension of them make a column of P.
        length = (3 * self.dimension / total) ** 0.5
        device = next(iter(layers.values())).lora_B["default"].weight.device
        coordinates = torch.nn.Parameter(torch.zeros(self.dimension, device=device))
        fixed, projected = _modules()
        for layer, index, sign in zip(layers.values(), dealt, signs, strict=True):
            layer.lora_A["default"] = fixed(layer.lora_A["default"].weight.data)
            layer.lora_B["default"] = projected(
                coordinates, index.to(device), length * sign.to(device), layer.lora_B["default"].weight.shape
            )
        return wrapped

    def save(self, model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Writes A and B as a LoRA adapter in PEFT's format. The coordinates themselves stay behind."""
        factors = {
            f"base_model.model.{name}.{letter}.default.weight": getattr(layer, letter)["default"].weight.detach()
            for name, layer in _layers(model).items()
            for letter in ("lora_A", "lora_B")
        }
        super().save(model, folder, factors)

    def metrics(self, model: Any) -> dict[str, float]:
        """Returns the norm of the coordinates, which is about that of the change of all weights."""
        (coordinates,) = (p for p in model.parameters() if p.requires_grad)
        return {"coordinates_norm": float(coordinates.detach().norm())}


def _layers(wrapped: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in wrapped.base_model.model.named_modules() if isinstance(module, LoraLayer)}


@cache
def _modules() -> tuple[type[torch.nn.Module], type[torch.nn.Module]]:
    """Returns the modules that stand in PEFT's layers for A, which is not trained, and for B."""
    import torch

    class Fixed(torch.nn.Module):
        weight: torch.Tensor

        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("weight", weight, persistent=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(inputs, self.weight)

    class Projected(torch.nn.Module):
        index: torch.Tensor
        sign: torch.Tensor

        def __init__(
            self, coordinates: torch.nn.Parameter, index: torch.Tensor, sign: torch.Tensor, shape: torch.Size
        ) -> None:
            super().__init__()
            self.coordinates = coordinates
            self.shape = shape
            self.register_buffer("index", index, persistent=False)
            self.register_buffer("sign", sign, persistent=False)

        @property
        def weight(self) -> torch.Tensor:
            # The gradient of index_select adds up in one order on a CPU, so that runs repeat to the last digit.
            return (self.coordinates.index_select(0, self.index) * self.sign).view(self.shape)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(inputs, self.weight)

    return Fixed, Projected

"""LoftQ: QLoRA with adapters that initially approximate the base's quantisation error.

Source: Li et al. 2023, arXiv 2310.08659, algorithm 1: quantise W - s B A, set A and B to the best rank-r approximation
of the error, and repeat. PEFT's own initialisation needs CUDA and omits the scale s = alpha/rank. This one includes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from peftscope.files.content import Count
from peftscope.methods.fields import RunSpec
from peftscope.methods.low_rank import LowRankOnFewBits, decompositions
from peftscope.models.rounding import rounded
from peftscope.models.shapes import LinearLayer, ModelShape

if TYPE_CHECKING:
    import torch

ITERATION_SECONDS = 0.5
"""The seconds of one iteration on a matrix of 4096 x 4096 on a card: a guess."""


class LoftQ(LowRankOnFewBits):
    """LoRA-fine-tuning-aware quantisation."""

    label: ClassVar[str] = "LoftQ"
    memory_assumptions: ClassVar[tuple[str, ...]] = ("the load peak of LoftQ comes from a formula, not a simulation",)
    has_own_base: ClassVar[bool] = True
    draws_start: ClassVar[bool] = False

    name: Literal["loftq"] = "loftq"
    iterations: Annotated[Count, Field(description="alternations of quantising and approximating")] = 5

    def loading_temporary(self, largest: LinearLayer) -> tuple[int, str]:
        """Returns the bytes of the initialisation in 32 bits: four matrices and a Gram matrix."""
        square = min(largest.inputs, largest.outputs)
        return 4 * (4 * largest.weights + square * square), "LoftQ's initialisation of the largest target"

    def initialisation_seconds(self, shape: ModelShape) -> float:
        """Returns the seconds of all iterations over all targets."""
        return ITERATION_SECONDS * self.iterations * decompositions(shape, self.targets)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the 4-bit base wrapped with LoRA, both initialised by LoftQ.

        Raises:
            RuntimeError: The quantisation error of a layer did not shrink.
        """
        from peft.tuners.lora import LoraLayer

        folder = Path(model.config._name_or_path)
        wrapped = self.build_empty(model, spec)
        ratios = []
        for name, layer in wrapped.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                ratio = self._initialise(layer, float_weight(folder, f"{name}.weight"))
                if not ratio < 1:
                    raise RuntimeError(f"LoftQ left {ratio:.3f} of the quantisation error of {name}; it must shrink")
                ratios.append(ratio)
        wrapped.loftq_error_ratio = sum(ratios) / len(ratios)
        return wrapped

    def build_empty(self, model: Any, spec: RunSpec) -> Any:
        """Returns the 4-bit base wrapped with LoRA, which has the same tensors before and after the initialisation."""
        return self.wrap(model)

    def _initialise(self, layer: Any, weight: torch.Tensor) -> float:
        """Sets a layer's quantised weight, A and B. Returns ‖W - (Q + sBA)‖ / ‖W - quantised(W)‖ (Frobenius norms)."""
        import torch

        base = layer.get_base_layer()
        scale = layer.scaling["default"]
        weight = weight.to(base.weight.device, torch.float32)

        def quantised(values: torch.Tensor) -> tuple[torch.nn.Parameter, torch.Tensor]:
            if code := self.rounding():
                simulated = rounded(values.to(base.weight.dtype), code)
                return torch.nn.Parameter(simulated, requires_grad=False), simulated.float()
            from bitsandbytes.functional import dequantize_4bit
            from bitsandbytes.nn import Params4bit

            packed = Params4bit(
                values.to(base.compute_dtype),
                requires_grad=False,
                compress_statistics=self.double_quant,
                quant_type=self.quant_type,
                quant_storage=torch.uint8,
                module=base,
            ).to(values.device)
            return packed, dequantize_4bit(packed.data, packed.quant_state).to(torch.float32)

        plain_error = torch.linalg.norm(weight - quantised(weight)[1])
        update = torch.zeros_like(weight)
        for _ in range(self.iterations):
            packed, dequantised = quantised(weight - update)
            left, right = best_rank_approximation(weight - dequantised, self.rank)
            update = left @ right
        base.weight = packed
        with torch.no_grad():
            a, b = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
            a.copy_(right / scale**0.5)
            b.copy_(left / scale**0.5)
            reached = dequantised + scale * (b.float() @ a.float())
        return float(torch.linalg.norm(weight - reached) / plain_error)

    def metrics(self, model: Any) -> dict[str, float]:
        """Returns the share of the quantisation error that remains, as a mean over layers."""
        return {"loftq_error_ratio": model.loftq_error_ratio}


def float_weight(folder: Path, name: str) -> torch.Tensor:
    """Returns a tensor of a fetched model in full precision, by its name in the checkpoint; no other one is loaded."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.is_file() else "model.safetensors"
    with safe_open(folder / file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def best_rank_approximation(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns L (out x rank) and R (rank x in) with equal norms, whose product is the closest matrix of this rank.

    The singular vectors come from the smaller Gram matrix, in a fifth of the time of a full SVD at 576 x 1536. The
    product is the projection of ``matrix`` onto them, so rounding errors in the vectors have a second-order effect.
    """
    import torch

    if matrix.shape[0] > matrix.shape[1]:
        right, left = best_rank_approximation(matrix.T, rank)
        return left.T, right.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
    projected = vectors.T @ matrix
    root = projected.norm(dim=1).clamp_min(torch.finfo(matrix.dtype).tiny).sqrt()
    return vectors * root, projected / root[:, None]

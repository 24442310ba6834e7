"""PiSSA: LoRA that trains the principal singular vectors of W and freezes the rest of W.

Source: Meng et al. 2024, arXiv 2404.02948. The frozen weight is W minus its principal part, rounded to the base's
dtype; over a base in bf16 PEFT rounds the factors as well, after it has taken them off. So the first step starts
exactly from the base in fp32, and close to it in bf16. When PEFT loads a saved adapter onto the original base, it
repeats the decomposition.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peftscope.methods.fields import Alpha, RunSpec
from peftscope.methods.low_rank import LowRank, decompositions
from peftscope.models.shapes import LinearLayer, ModelShape

DECOMPOSITION_SECONDS = 5.0
"""The seconds of decomposing one matrix of 4096 x 4096 on a card: a guess."""


class PiSSA(LowRank):
    """LoRA initialised by a singular value decomposition of each target."""

    label: ClassVar[str] = "PiSSA"
    draws_start: ClassVar[bool] = False
    memory_assumptions: ClassVar[tuple[str, ...]] = ("the load peak of PiSSA comes from a formula, not a simulation",)

    name: Literal["pissa"] = "pissa"
    alpha: Alpha = 8

    def loading_temporary(self, largest: LinearLayer) -> tuple[int, str]:
        """Returns the bytes of the decomposition in 32 bits: three matrices and both sets of singular vectors."""
        square = min(largest.inputs, largest.outputs)
        size = 4 * (3 * largest.weights + square * (largest.inputs + largest.outputs))
        return size, "singular value decomposition of the largest target"

    def initialisation_seconds(self, shape: ModelShape) -> float:
        """Returns the seconds of a singular value decomposition of each target."""
        return DECOMPOSITION_SECONDS * decompositions(shape, self.targets)

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's LoRA and ``init_lora_weights="pissa"``, an exact SVD."""
        return self.wrap(model, init_lora_weights="pissa")

    def build_empty(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with plain LoRA, which has the same tensors."""
        return self.wrap(model)

"""Prefix tuning: trained keys and values precede the prompt in every layer.

Source: Li and Liang 2021, arXiv 2101.00190, without the reparametrisation network.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peftscope.methods.fields import Prepended, RunSpec, with_adapter
from peftscope.models.shapes import ModelShape


class PrefixTuning(Prepended):
    """Training of entries in the key-value cache."""

    label: ClassVar[str] = "prefix tuning"
    supports_checkpointing: ClassVar[bool] = False
    mask_free_attention: ClassVar[bool] = False

    name: Literal["prefix-tuning"] = "prefix-tuning"

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the values of a key and a value for each virtual token, layer and key-value head."""
        return self.virtual_tokens * shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's prefix tuning."""
        return with_adapter(model, "PrefixTuningConfig", num_virtual_tokens=self.virtual_tokens)

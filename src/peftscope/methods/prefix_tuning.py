"""Prefix tuning: trained keys and values precede the prompt in every layer.

Source: Li and Liang 2021, arXiv 2101.00190, without the reparametrisation network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftscope.methods.fields import ClosedForm, Method, VirtualTokens

if TYPE_CHECKING:
    from peftscope.models.shapes import ModelShape
    from peftscope.spec import RunSpec


class PrefixTuning(Method):
    """Training of entries in the key-value cache."""

    label: ClassVar[str] = "prefix tuning"
    closed_form: ClassVar[ClosedForm] = ClosedForm()
    supports_checkpointing: ClassVar[bool] = False
    generates_from_cache: ClassVar[bool] = False
    supports_packing: ClassVar[bool] = False
    supports_shards: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    mask_free_attention: ClassVar[bool] = False

    name: Literal["prefix-tuning"] = "prefix-tuning"
    virtual_tokens: VirtualTokens = 8

    def starts_at_base(self) -> bool:
        """Returns False: the virtual tokens change the outputs at once."""
        return False

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the values of a key and a value for each virtual token, layer and key-value head."""
        return self.virtual_tokens * shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's prefix tuning."""
        from peft import PrefixTuningConfig, TaskType, get_peft_model

        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=self.virtual_tokens)
        return get_peft_model(model, config)

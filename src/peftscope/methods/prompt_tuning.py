"""Prompt tuning: trained embeddings precede the prompt, and nothing else changes.

Source: Lester et al. 2021, arXiv 2104.08691.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peftscope.methods.fields import Prepended, RunSpec, with_adapter
from peftscope.models.shapes import ModelShape


class PromptTuning(Prepended):
    """Training of input embeddings."""

    label: ClassVar[str] = "prompt tuning"

    name: Literal["prompt-tuning"] = "prompt-tuning"

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Returns the values of one embedding per virtual token."""
        return self.virtual_tokens * shape.hidden_size

    def logit_offset(self) -> int:
        """Returns the number of virtual tokens, because they are part of the sequence."""
        return self.virtual_tokens

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with PEFT's prompt tuning. The embeddings start as samples from the vocabulary."""
        options: dict[str, Any] = {"num_virtual_tokens": self.virtual_tokens, "prompt_tuning_init": "SAMPLE_VOCAB"}
        return with_adapter(model, "PromptTuningConfig", **options)

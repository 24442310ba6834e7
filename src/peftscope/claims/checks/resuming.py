"""Training that resumes from a saved adapter."""

from __future__ import annotations

import tempfile

from peft import PeftModel

from peftscope.claims.lora_subjects import adapted_llama, logits_of
from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import TINY, tiny_llama


def reloaded_logit_difference() -> Measurement:
    """Returns the largest difference of logits between a trained adapter and the same adapter saved and reloaded."""
    model = adapted_llama()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(tiny_llama(), f"{folder}/first", is_trainable=True).eval()
    evidence = {"change of the logits by the adapter": float((logits_of(model) - logits_of(tiny_llama())).abs().max())}
    return Measurement(float((logits_of(model) - logits_of(loaded)).abs().max()), evidence=evidence, model=TINY)

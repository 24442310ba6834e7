"""The chapter's code for merging, executed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import transformers
from peft import LoraConfig, get_peft_model

from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import tiny_llama

NO_EXCEPTION = "no exception"

_SNIPPET = """
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter)
model.merge_and_unload().save_pretrained(merged)
"""
"""The chapter's code, with names in place of its hub ids and folders. It has no other import."""


def exception_of_snippet(also_imported: Sequence[str]) -> Measurement:
    """Returns the name of the exception that the snippet raises.

    Args:
        also_imported: The names that are imported from transformers before it.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = {name: f"{folder}/{name}" for name in ("base", "adapter", "merged")}
        tiny_llama().save_pretrained(names["base"])
        model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
        model.save_pretrained(names["adapter"], save_embedding_layers=False)
        namespace = names | {name: getattr(transformers, name) for name in also_imported}
        try:
            exec(_SNIPPET, namespace)
        except Exception as error:
            return Measurement(type(error).__name__, evidence={"message": str(error)})
        return Measurement(NO_EXCEPTION)

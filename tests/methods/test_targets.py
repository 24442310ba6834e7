"""Which modules a preset means in models of different families."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3_5TextConfig

from peftscope.methods.fields import TARGET_PRESETS, adapted_modules


def test_all_linear_is_every_linear_layer_but_the_output() -> None:
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1))
        hybrid = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(num_hidden_layers=4))
    assert adapted_modules(llama, "all-linear") == sorted(TARGET_PRESETS["all-linear"])
    extra = set(adapted_modules(hybrid, "all-linear")) - set(TARGET_PRESETS["all-linear"])
    assert extra == {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
    assert adapted_modules(hybrid, ("q_proj",)) == ["q_proj"]

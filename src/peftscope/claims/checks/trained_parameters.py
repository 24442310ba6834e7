"""How many parameters the methods besides LoRA train, counted on modules without values."""

from __future__ import annotations

from typing import Any, Literal

import peft
import torch
import transformers
from peft import LoraConfig, VeraConfig, get_peft_model

from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import BLOCK_LINEAR, meta_model
from peftscope.models.presets import PRESETS

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-large": (
        "bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "t5-1.1-xl": ("t5", {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "d_kv": 64}),
    "t5-1.1-xxl": ("t5", {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64}),
}
"""The type and the sizes of models that papers use and that are no preset of the memory calculator."""
AUTO_CLASSES = {"bert": "AutoModel", "gpt2": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}
T5_1_1 = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VIRTUAL_TOKENS = {"prompt-tuning": "PromptTuningConfig", "prefix-tuning": "PrefixTuningConfig"}


def percent_of_virtual_tokens(
    method: Literal["prompt-tuning", "prefix-tuning"], models: list[str], tokens: int
) -> Measurement:
    """Returns the percent of a model's parameters that PEFT trains for virtual tokens, on the model with the most.

    Args:
        method: Prompt tuning learns the embeddings of the tokens, prefix tuning their keys and values in every layer.
        models: Names of ``CONFIGS``, or presets of the memory calculator.
        tokens: The number of virtual tokens.
    """
    shares = {}
    for name in models:
        model = _model(name)
        total = sum(parameter.numel() for parameter in model.parameters())
        task = "SEQ_2_SEQ_LM" if name.startswith("t5") else "CAUSAL_LM"
        options = {"num_virtual_tokens": tokens, "num_transformer_submodules": 1, "task_type": task}
        adapted = peft.get_peft_model(model, getattr(peft, VIRTUAL_TOKENS[method])(**options))
        shares[name] = 100 * adapted.get_nb_trainable_parameters()[0] / total
    return Measurement(max(shares.values()), n=len(models), evidence=shares, model=", ".join(models))


def vera_parameters(preset: str, rank: int, against_rank: int = 0) -> Measurement:
    """Returns how many parameters PEFT trains for VeRA on all linear layers of the blocks.

    Args:
        preset: The model.
        rank: The rank of the random matrices that all layers share.
        against_rank: If it is not 0, the value is how many times more LoRA of this rank trains on the same layers.
    """

    def count(config: Any) -> int:
        return int(get_peft_model(meta_model(preset), config).get_nb_trainable_parameters()[0])

    vera = count(VeraConfig(r=rank, target_modules=list(BLOCK_LINEAR)))
    if not against_rank:
        return Measurement(vera, model=preset)
    lora = count(LoraConfig(r=against_rank, target_modules=list(BLOCK_LINEAR)))
    return Measurement(lora / vera, model=preset, evidence={"VeRA trains": vera, "LoRA trains": lora})


def share_of_biases(model: str, names: list[str], of: Literal["model", "biases"] = "model") -> Measurement:
    """Returns the biases in modules with these names (all without any), as a share of the model or of all its biases.

    A share of the model is in percent.
    """
    built = _model(model)
    biases = {name: p.numel() for name, p in built.named_parameters() if name.endswith(".bias")}
    chosen = sum(n for name, n in biases.items() if not names or any(part in name for part in names))
    total = sum(parameter.numel() for parameter in built.parameters())
    evidence = {"chosen biases": chosen, "all biases": sum(biases.values()), "parameters": total}
    share = 100 * chosen / total if of == "model" else chosen / sum(biases.values())
    return Measurement(share, evidence=evidence, model=model)


def _model(name: str) -> Any:
    """Returns a model on ``meta``."""
    if name in PRESETS:
        return meta_model(name)
    kind, sizes = CONFIGS[name]
    config = transformers.AutoConfig.for_model(kind, **sizes, **(T5_1_1 if kind == "t5" else {}))
    with torch.device("meta"):
        return getattr(transformers, AUTO_CLASSES[kind]).from_config(config)

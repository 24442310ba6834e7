"""A run as the check on a card makes it: a model of the right shape with random weights, random tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from peftscope.data.batching import Batch, Example, collate
from peftscope.memory.question import Question
from peftscope.training.load import DTYPES, bitsandbytes_config, disable_weight_repacking, training_attention

WEIGHT_STD = 0.02
"""The standard deviation of random weights, as in transformers: the loss stays finite, and no size depends on it."""


def random_base(question: Question, device: str) -> Any:
    """Returns what ``load_base`` returns, with random weights; a 4-bit model is quantised layer by layer."""
    spec = question.spec
    quantization = spec.method.quantization()
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config_of(question), dtype=DTYPES[spec.precision], attn_implementation=training_attention(spec)
        )
    quantizer = AutoHfQuantizer.from_config(bitsandbytes_config(quantization)) if quantization else None
    if quantizer:
        quantizer.preprocess_model(model=base, device_map={"": device})
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            _quantise_random(module, device)
        else:
            module.to_empty(device=device, recurse=False)
    base.init_weights()
    if quantizer:
        quantizer.postprocess_model(base)
        disable_weight_repacking(base)
    base.config.use_cache = False
    return base


def _quantise_random(layer: Any, device: str) -> None:
    """Gives a 4-bit layer on ``meta`` random weights, as transformers gives it those of a checkpoint."""
    from bitsandbytes.nn import Params4bit

    empty = layer.weight
    weight = torch.empty(empty.shape, dtype=torch.bfloat16, device=device).normal_(std=WEIGHT_STD)
    layer.weight = Params4bit(weight, requires_grad=False, **vars(empty)).to(device)
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(torch.zeros(layer.bias.shape, dtype=torch.bfloat16, device=device), False)
    layer._is_hf_initialized = True


def random_batch(question: Question, rows: int) -> Batch:
    """Returns a batch of random tokens, every row of the question's length with its number of response tokens.

    One position is padding: without any, transformers leaves out the mask that padded batches have.
    """
    spec, vocabulary = question.spec, question.model.config["vocab_size"]
    tokens = torch.randint(vocabulary, (rows, spec.seq_len)).tolist()
    prompt = spec.seq_len - question.responses
    batch = collate([Example(tuple(row), prompt) for row in tokens], pad_token_id=0)
    batch.attention_mask[0, -1] = 0
    return batch


def config_of(question: Question) -> Any:
    """Returns transformers' configuration of a question's model."""
    fields = dict(question.model.config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)

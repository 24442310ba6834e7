"""Asks accelerate, in its own environment: questions come on stdin as JSON, bytes go to stdout."""

import json
import sys

import torch
from accelerate import init_empty_weights
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from transformers import AutoConfig, AutoModel

PARTS = {"float16": 2, "int4": 8}
"""By how much accelerate's command divides the size in fp32."""


def estimate(config: dict, dtype: str, trains_base: bool) -> int:
    """Returns the bytes of `accelerate estimate-memory`: of training with Adam, or of the weights under an adapter.

    The command itself asks a hub about the model, so that the functions behind it are called as it calls them.
    """
    fields = dict(config)
    family = fields.pop("model_type")
    with init_empty_weights():
        model = AutoModel.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)
    size, _ = calculate_maximum_sizes(model)
    return max(estimate_training_usage(size, dtype).values()) if trains_base else size // PARTS[dtype]


print(json.dumps({name: estimate(**question) for name, question in json.load(sys.stdin).items()}))

"""Tries a method from a file before a study of it is written: it is built, and takes two steps on the toy model."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peftscope.data.batching import Example, collate
from peftscope.errors import InputError, Problem
from peftscope.methods.fields import Method
from peftscope.methods.from_file import line_in
from peftscope.models.catalog import find_model
from peftscope.models.fetch import fetch_model
from peftscope.spec import RunSpec
from peftscope.training.build import apply_method, build_model, count_parameters
from peftscope.training.load import load_base
from peftscope.training.step import make_optimizer, train_step

TOY = "toy"
STEPS = 2
EXAMPLES = (Example(tuple(range(10, 22)), 6), Example(tuple(range(30, 39)), 5))


def try_method(file: Path, method: Method) -> RunSpec:
    """Builds a method on the toy model and takes two steps with it, and returns the spec of this training.

    Raises:
        InputError: It fails; the error names the line of the file.
    """
    fetch_model(TOY)
    fields = {name: value for name, value in method.run_defaults.items() if name in RunSpec.model_fields}
    spec = RunSpec.model_validate({"model": TOY, "task": TOY, "method": {"name": "lora"}, "device": "cpu", **fields})
    spec, doing = spec.model_copy(update={"method": method}), "build"
    try:
        trained = build_model(load_base(spec), spec)
        trained.model.train()
        doing = "a step of training"
        if not count_parameters(trained.model)[0]:
            raise InputError(Problem(str(file), "leaves nothing to train", "set requires_grad of what is trained"))
        optimizer = make_optimizer(trained.model, spec)
        batches = [collate(EXAMPLES, 0)]
        losses = [train_step(trained, batches, optimizer, spec, step).loss.item() for step in range(STEPS)]
    except InputError:
        raise
    except Exception as error:  # any method may fail in its own way, and the user needs one line
        message = f"{doing} on the toy model fails: {type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(Problem(line_in(file, error), message, "repair it; see docs/your-method.md")) from None
    if not all(map(math.isfinite, losses)):
        remedy = "lower its rate" if math.isfinite(losses[0]) else "look at its start: the first loss precedes any step"
        raise InputError(Problem(str(file), f"the loss of two steps on the toy model is {losses}", remedy))
    return spec


def trained_values(spec: RunSpec, model: str) -> tuple[int, int] | None:
    """Returns how many values a method trains of a model, and of how many; None if only the weights say it."""
    if shape := find_model(model).shape:
        with suppress(Exception), torch.device("meta"):
            base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.to_config()))
            return count_parameters(apply_method(base, spec, spec.method.build_empty).model)
    return None

"""Questions about memory from the files that trainers read. No torch.

``read_config`` recognises the trainer by its keys, and reads the file by the trainer's table in ``trainers.py``.
A reading lists what it understood, what it ignored, what it assumed, and what the calculator does not model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem, close_match, raise_any, shown
from peftscope.hardware.cards import Gpu
from peftscope.memory.base import Model, describe_model
from peftscope.memory.beside import JOBS
from peftscope.memory.question import METHOD_OPTIONS, SCALED_LOGITS, Question, ask
from peftscope.methods import METHODS
from peftscope.models.shapes import ModelShape, module_path
from peftscope.sizing.jobs import ANSWERED, job_of, read_job
from peftscope.sizing.reading import Reading, flatten, read_content, read_rows, spoken
from peftscope.sizing.trainers import recognise

STAND_INS: dict[str, tuple[Any, Any, str]] = {
    "loss": ("cut-cross-entropy", "liger", "Liger's loss, over chunks of logits"),
    "offload_activations": (True, False, "what recomputation keeps on the card"),
}
"""Values that the closed form alone knows, and what stands in for each in a simulation."""
IA3_FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3")
LORA_DEFAULTS = (*IA3_FAMILIES, "mixtral", "llama4")
"""Families for which PEFT 0.21's LoRA takes q_proj and v_proj by default. Source: ``peft/utils/constants.py``."""
IA3_DEFAULTS = dict.fromkeys(IA3_FAMILIES, "q_proj") | {"llama": "k_proj", "mistral": "k_proj"}
"""The module that PEFT 0.21's IA3 rescales beside v_proj and down_proj by default, by family. Source: the same."""


def _interpolated(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with each ``${key}`` replaced by the value of that key, as OmegaConf does."""
    named = {key: re.fullmatch(r"\$\{([\w.]+)\}", value) for key, value in values.items() if isinstance(value, str)}
    return values | {key: values.get(match[1], values[key]) for key, match in named.items() if match}


def read_config(
    path: Path, given: Mapping[str, Any], model: str | None = None, changes: Mapping[str, Any] | None = None
) -> Reading:
    """Returns what a trainer's file says. Its ``problems`` are raised by ``question_of``.

    Args:
        path: The file, YAML or JSON.
        given: The options of the command line; None: not given.
        model: The name of the base on the command line, which replaces the file's.
        changes: Values that replace those of the file; keys of nested mappings are joined by dots.

    Raises:
        InputError: The file or one that it names cannot be read, it belongs to no known trainer, or it asks for a job
            that is not modelled.
    """
    if (method := given.get("method") or "lora") not in METHODS:
        raise InputError(Problem("method", f"unknown method (got {method!r})", close_match(method, METHODS)))
    content = read_content(path)
    if not isinstance(content, dict):
        raise InputError(Problem(str(path), "must be a mapping of keys to values", "give a trainer's file"))
    trainer, rows = recognise(path, content)
    reading = Reading(path, trainer, _interpolated(flatten(content)) | {**(changes or {})}, given)
    asked = given.get("job")
    reading.job, key = (asked, "") if asked in ANSWERED else job_of(trainer, path, reading.values)
    if reading.job not in ANSWERED:
        remedy = f"give a file for {', '.join(JOBS)}"
        raise InputError(Problem(f"{path}: {key}", f"asks for {reading.job}, which is not modelled", remedy))
    reading.find(key)
    reading.options["job"] = ANSWERED[reading.job]
    read_rows(reading, rows)
    read_job(reading)
    if model is not None:
        reading.model = model
        reading.keys["model"] = "model"
    if reading.model is None:
        say = f"peftscope memory MODEL --config {path}"
        reading.problems.append(Problem(str(path), "names no base model", f"give it: {say}"))
    _check_method(reading)
    return reading


def _check_method(reading: Reading) -> None:
    """Keeps only the options that belong to the method of the command line, if it names one."""
    method = reading.given.get("method")
    if method in METHODS:
        fields = METHODS[method].model_fields
        reading.options = {k: v for k, v in reading.options.items() if k not in METHOD_OPTIONS or k in fields}
        if "targets" not in fields:
            reading.options.pop("modules_to_save", None)
        reading.options["method"] = method


def question_of(
    reading: Reading, *, responses: int | None = None, gpu: Gpu | None = None, gpus: int | None
) -> Question:
    """Returns the question that a file asks, with the options of the command line in place of its own.

    Raises:
        InputError: A value is wrong or missing, the model is unknown, or the file asks for what is not modelled.
    """
    cards = gpus if gpus is not None else reading.cards
    if cards is None and reading.sharded:
        where, what = f"{reading.path}: {reading.sharded}", "shards over cards, and the file does not say how many"
        reading.problems.append(Problem(where, what, "give --gpus"))
    raise_any(reading.problems)
    model = _model_of(reading)
    _default_targets(reading, model)
    model = _with_positions(reading, model)
    family = model.config["model_type"]
    if family in SCALED_LOGITS and reading.given.get("loss") is None and "loss" in reading.keys:
        del reading.options["loss"]
        why = f"its fused loss is not modelled for {family}, which changes its logits; the answer is an upper bound"
        reading.not_modelled.append(f"{reading.keys['loss']}: {why}")
    for option, (value, other, what) in STAND_INS.items() if model.shape is None else ():
        if reading.given.get(option) is None and reading.options.get(option) == value:
            reading.options[option] = other
            line = f"{reading.keys[option]}: a model that is simulated has {what}; the answer is an upper bound"
            reading.not_modelled.append(line)
    raise_any(reading.problems)
    if cards is None:
        cards = 1
        reading.assumed.append(
            "gpus=1: the file shards nothing; copies on more cards (DDP) take the same, plus buckets; "
            "times are those of one card"
        )
    elif reading.whole and not reading.sharded:
        if cards > 1:
            reading.assumed.append(
                f"each of the {cards} cards has all weights, as {reading.whole} says; times are those of one card"
            )
        cards = 1
    elif gpus is None and not reading.sharded:
        cards = 1  # each card holds a copy
    replaced = {name: value for name, value in reading.given.items() if value is not None}
    if replaced.get("checkpointing") is False:
        reading.options.pop("offload_activations", None)  # of what would be recomputed
    reading.understood += [
        f"--{name.replace('_', '-')} {spoken(value)} replaces {reading.keys[name]}"
        for name, value in replaced.items()
        if name in reading.keys
    ]
    kept = reading.responses if responses is None else responses
    try:
        return ask(model, {**reading.options, **replaced}, responses=kept, gpu=gpu, gpus=cards)
    except InputError as error:
        raise InputError(_with_key(reading, problem) for problem in error.problems) from None


def _with_key(reading: Reading, problem: Problem) -> Problem:
    """Returns the problem with the file and the key that the option was read from."""
    option = problem.where.split(".")[0]
    if reading.given.get(option) is not None:
        return problem
    key, flag = reading.keys.get(option), option.replace("_", "-")
    if key is None:
        return replace(problem, where=f"{reading.path}: {problem.where}")
    remedy = problem.remedy or f"correct it, or give --{flag}"
    return replace(problem, where=f"{reading.path}: {key} ({option})", remedy=remedy)


def _model_of(reading: Reading) -> Model:
    name, key = reading.model or "", reading.keys.get("model", "model")
    local = reading.path.parent / name
    try:
        if key != "model" and os.path.exists(local):
            return describe_model(str(local))
        model = describe_model(name)
    except InputError as error:
        remedy = f"or give a preset or a config.json first: peftscope memory MODEL --config {reading.path}"
        problems: Iterable[Problem] = (
            replace(p, where=p.where.replace("model", f"{reading.path}: {key}", 1), remedy=f"{p.remedy}; {remedy}")
            for p in error.problems
        )
        raise InputError(problems if key != "model" else error.problems) from None
    if reading.trainer == "torchtune" and model.shape and model.shape.family == "phi3":
        shape = ModelShape.model_validate({**model.shape.model_dump(), "family": "llama"})
        model = replace(model, shape=shape, config=shape.to_config())
        reading.assumed.append("phi3: torchtune has layers apart that transformers fuses, and no window")
    if same := model.variant_of:
        reading.assumed.append(f"model={same}: {key} {name} is a variant of it by its name, with the same shape")
    return model


def _with_positions(reading: Reading, model: Model) -> Model:
    """Returns the model with as many positions as the file asks for: rotary ones have no end."""
    asked, limit = reading.options.get("seq_len"), model.max_seq_len
    if model.shape is None or limit is None or not isinstance(asked, int) or asked <= limit:
        return model
    line = f"seq_len={asked}: the model has {limit} positions; what lies beyond costs quality, which is not modelled"
    reading.assumed.append(line)
    return replace(model, config=model.config | {"max_position_embeddings": asked})


def _read_pattern(reading: Reading, model: Model) -> None:
    """Sets the modules whose whole name a pattern matches, as PEFT does."""
    shape, key, root = model.shape, reading.keys["targets"], "model.language_model." if model.vision else "model."
    paths = [module_path(i, layer.name) for i in range(shape.num_layers) for layer in shape.block] if shape else []
    try:
        found = [path for path in paths if re.fullmatch(reading.pattern, root + path)]
    except re.error:
        found = []
    names = {path.rpartition(".")[2] for path in found}
    whole = shape is not None and len(shape.linear_layers([*names])) == len(found)
    reading.options["targets"] = sorted(names) if whole else found
    if not found:
        reading.refuse(key, f"a pattern of no known module (got {shown(reading.pattern)})", "list the modules")


def _default_targets(reading: Reading, model: Model) -> None:
    """Sets PEFT's own targets if the file leaves them to PEFT, which decides by the family of the model."""
    method = reading.options["method"]
    takes_targets = "targets" in METHODS[method].model_fields
    if takes_targets and reading.pattern and reading.given.get("targets") is None:
        _read_pattern(reading, model)
    if not takes_targets or "targets" in reading.options or reading.given.get("targets") is not None:
        return
    family, source = model.config["model_type"], "PEFT 0.21's default for this family, peft/utils/constants.py"
    if method == "ia3" and family in IA3_DEFAULTS:
        reading.assume("targets", (IA3_DEFAULTS[family], "v_proj", "down_proj"), source)
    elif method != "ia3" and family in LORA_DEFAULTS:
        reading.assume("targets", "minimal", f"q_proj and v_proj, {source}")
    else:
        what = f"names no target modules, and PEFT has no default for {family}"
        reading.need("targets", what)

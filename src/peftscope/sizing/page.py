"""The questions of the calculator's page, as JSON: the fields of its form, answers, what fits, and why. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache, wraps
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from peftscope.errors import InputError
from peftscope.hardware.cards import GPUS, find_gpu
from peftscope.memory.answer import Peaks, answer_of, peaks_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.formula.step import without_collector
from peftscope.memory.question import DEFAULTS, OPTIONS, Beside, Question, ask, preset_or_modules
from peftscope.memory.trace import KINDS, by_kind
from peftscope.methods import METHODS
from peftscope.methods.fields import TARGET_PRESETS
from peftscope.models.presets import PRESETS
from peftscope.sizing.duration import Schedule, duration, time_json
from peftscope.sizing.fit import fit_methods, known_methods
from peftscope.sizing.why import compare
from peftscope.spec import RunSpec

PASTED = Path("config.json")
"""Where a config.json that was pasted into the page lies, and what its model is called."""

LISTS = {
    "targets": list(TARGET_PRESETS),
    "feedforward": list(TARGET_PRESETS),
    "modules_to_save": ["embed_tokens", "lm_head", "embed_tokens,lm_head"],
}
"""Options that take a list of modules, and what the form proposes for each."""


def form() -> dict[str, Any]:
    """Returns what the form offers: models, methods and cards by name, and a field for each option of a run."""
    methods = {name: METHODS[name] for name in known_methods(None)}
    owners: dict[str, list[type[BaseModel]]] = {**{name: [own] for name, own in methods.items()}, "": [RunSpec, Beside]}
    return {
        "models": {name: preset.parameters for name, preset in PRESETS.items()},
        "methods": {name: method.label for name, method in methods.items()},
        "cards": {name: gpu.name for name, gpu in GPUS.items()},
        "fields": [field for name in OPTIONS if (field := _field(name, owners))],
        "kinds": KINDS,
    }


def _field(name: str, owners: dict[str, list[type[BaseModel]]]) -> dict[str, Any] | None:
    """Returns the form's field for an option, with its default by method; the run's own has the method ''.

    None means that no method of the form has the option.
    """
    found = {
        owner: model.model_fields[name]
        for owner, models in owners.items()
        for model in models
        if name in model.model_fields
    }
    if not found:
        return None
    first = next(iter(found.values()))
    annotation, kind, choices = first.annotation, "text", []
    if NoneType in get_args(annotation):
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is Literal:
        kind, choices = "choice", list(get_args(annotation))
    elif annotation is bool:
        kind = "switch"
    elif annotation in (int, float):
        kind = "whole" if annotation is int else "number"
    elif name in LISTS:
        choices = LISTS[name]
    defaults = {owner: DEFAULTS.get(name, field.default) for owner, field in found.items()}
    defaults = {owner: None if default == () else default for owner, default in defaults.items()}
    if name == "eval_batch_size":  # follows the batch size
        defaults = dict.fromkeys(defaults)
    return {"name": name, "kind": kind, "choices": choices, "help": first.description or "", "defaults": defaults}


def _told(reply: Callable[..., Any]) -> Callable[..., str]:
    """Returns a function that gives the reply as JSON, and what is wrong with the input as a list of problems."""

    @wraps(reply)
    def told(*settings: str) -> str:
        try:
            with without_collector():
                return json.dumps(reply(*settings))
        except InputError as error:
            return _problems(error)

    return told


def _problems(error: InputError) -> str:
    return json.dumps({"problems": [asdict(problem) for problem in error.problems]})


def _read(settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what settings say as options of ``ask``, and the rest: ``model``, ``gpu``, ``schedule``, ..."""
    options = json.loads(settings)
    rest = {name: options.pop(name, None) for name in ("model", "config", "gpu", "gpus", "response_len")}
    rest["schedule"] = Schedule(**{name: options.pop(name, None) for name in Schedule.__dataclass_fields__})
    for name in LISTS:
        if name in options:
            options[name] = preset_or_modules(options[name])
    if rest["config"] is not None:
        PASTED.write_text(rest["config"], encoding="utf-8")
        rest["model"] = str(PASTED)
    rest["gpu"] = find_gpu(rest["gpu"]) if rest["gpu"] else None
    rest["gpus"] = 1 if rest["gpus"] is None else rest["gpus"]
    return options, rest


@lru_cache(maxsize=4)
def _run(settings: str) -> tuple[Question, Peaks]:
    options, rest = _read(settings)
    question = ask(
        describe_model(rest["model"]), options, responses=rest["response_len"], gpu=rest["gpu"], gpus=rest["gpus"]
    )
    return question, peaks_by_formula(question)


@_told
def answer(settings: str) -> dict[str, Any]:
    """Returns the answer to a setting, with what is alive at the peak of each phase, and what the card can hold.

    Args:
        settings: The options of ``peftscope memory`` by name, as JSON; ``config`` is the text of a config.json.
    """
    question, peaks = _run(settings)
    found = answer_of(question, peaks, "formula").to_json()
    alive = {phase: by_kind(peaks.alive(phase)) for phase in peaks.phases}
    card = None
    if question.gpu:
        fits = question.gpu.fits(peaks.least_bytes, peaks.device_bytes)
        card = {"name": question.gpu.name, "usable_bytes": question.gpu.usable_bytes, "fits": fits}
    time = time_json(duration(question, _read(settings)[1]["schedule"]))
    return {**found, "modules": {}, "alive": alive, "card": card, **time}


@_told
def why(first: str, second: str) -> dict[str, Any]:
    """Returns why the first setting takes more or less at its peak than the second."""
    found = compare(_run(first), _run(second))
    return {**asdict(found), "notable_bytes": found.notable_bytes}


def fits(settings: str) -> Iterator[str]:
    """Yields for each method whether it fits on the setting's card, with the largest sizes and advice."""
    told = False
    try:
        options, rest = _read(settings)
        options.pop("method", None)
        if rest["gpu"] is None:
            return
        model = describe_model(rest["model"])
        for fit in fit_methods([model], known_methods(None), options, rest["gpu"], rest["gpus"], rest["schedule"]):
            told = True
            yield json.dumps({**fit.to_json(), "label": METHODS[fit.method].label})
    except InputError as error:
        if not told:  # else the rows of the methods say it
            yield _problems(error)

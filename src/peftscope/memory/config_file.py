"""Questions about memory from the files that trainers read. No torch.

``read_config`` recognises the trainer by its keys. ``trainers.py`` says what each key means. A reading lists what it
understood, what it ignored, what it assumed, and what the calculator does not model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem, shown
from peftscope.files.content import parse_json, read_text, read_yaml
from peftscope.hardware.cards import Gpu
from peftscope.memory.question import METHOD_OPTIONS, SCALED_LOGITS, Model, Question, ask, describe_model
from peftscope.methods import METHODS
from peftscope.models.presets import PRESETS

SWITCHES = ("checkpointing", "packing", "double_quant")
"""Options whose values are true or false."""

LORA_DEFAULTS = ("llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3")
"""Families for which PEFT 0.21's LoRA takes q_proj and v_proj by default. Source: ``peft/utils/constants.py``."""
IA3_DEFAULTS = dict.fromkeys(LORA_DEFAULTS, "q_proj") | {"llama": "k_proj", "mistral": "k_proj"}
"""The module that PEFT 0.21's IA3 rescales beside v_proj and down_proj by default, by family. Source: the same."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of a ``config.json`` that a mixture of experts has."""
EXPERTS_NAME = re.compile(r"mixtral|moe|\d+x\d+b|-a\d+(\.\d+)?b", re.IGNORECASE)
"""Names that mixtures of experts have: Mixtral-8x7B, Qwen3-30B-A3B."""
WHOLE = ("deepspeed",)
"""Keys whose nested mappings are read as a whole: they may also name a file."""
VARIANT = re.compile(r"^meta-|-(instruct|chat|it|hf|base|2507)(?=-|$)|[^a-z0-9]")
"""The parts of a model's name that do not change its shape."""


@dataclass
class Reading:
    """A file of a trainer, and what was read from it so far.

    Attributes:
        path: The file.
        trainer: The trainer, with the version whose defaults apply.
        values: The content; keys of nested mappings are joined by dots, and numbers that are text are numbers.
        given: The options of the command line, which replace those of the file.
        options: The options of the question that follow from the file.
        model: The name of the base, if the file or the command line names one.
        cards: The number of cards, if a companion file says it.
        sharded: The key that says that weights are sharded over the cards.
        whole: The key that says that each card has all weights.
        keys: The key that each option was read from.
        understood: What was understood, one line for each key.
        assumed: What the file does not say, with the source of each default.
        not_modelled: Keys that change memory in a way that the calculator does not model.
        problems: What a person has to fix.
        used: The keys that were read.
    """

    path: Path
    trainer: str
    values: dict[str, Any]
    given: Mapping[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    cards: int | None = None
    sharded: str = ""
    whole: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    understood: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    not_modelled: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def get(self, *keys: str) -> Any:
        """Returns the value of the first of these keys that has one, or None, and counts the key as understood."""
        for key in keys:
            if key in self.values:
                if key not in self.used:
                    self.used.add(key)
                    self.understood.append(f"{key}: {spoken(self.values[key])}")
                if self.values[key] is not None:
                    return self.values[key]
        return None

    def take(
        self,
        option: str,
        *keys: str,
        default: Any = None,
        source: str = "",
        convert: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        """Gives an option the value of the first of these keys, or the trainer's default, which counts as assumed."""
        value = self.get(*keys)
        if value is None:
            if default is not None:
                self.assume(option, default, source)
            return
        key = next(key for key in keys if self.values.get(key) is not None)
        if isinstance(value, bool) != (option in SWITCHES):
            kind = "true or false" if option in SWITCHES else "a value"
            self.refuse(key, f"must be {kind} (got {shown(value)})")
            return
        self.options[option] = convert(value)
        self.keys[option] = key
        line = f"{key}: {spoken(value)}"
        self.understood[self.understood.index(line)] = f"{line} ({option})"

    def assume(self, option: str, value: Any, source: str) -> None:
        """Gives an option a value that the file does not say."""
        self.options[option] = value
        if self.given.get(option) is None:
            self.assumed.append(f"{option}={spoken(value)}: {source}")

    def need(self, option: str, what: str) -> None:
        """Notes a problem if neither the file nor the command line gives an option."""
        if option not in self.options and self.given.get(option) is None:
            self.problems.append(Problem(str(self.path), what, f"give --{option.replace('_', '-')}"))

    def refuse(self, key: str, message: str, remedy: str = "") -> None:
        """Notes a problem with the value of a key."""
        self.used.add(key)
        self.problems.append(Problem(f"{self.path}: {key}", message, remedy))

    def refuse_any(self, keys: Mapping[str, str]) -> None:
        """Refuses each of these keys that is switched on; the values say what the key asks for."""
        for key, what in keys.items():
            if self.values.get(key) not in (None, False, 0, "", "none", [], {}):
                self.refuse(key, f"{what} is not modelled (got {shown(self.values[key])})", "leave it out")
            elif key in self.values:
                self.get(key)

    def overstates(self, key: str, what: str) -> None:
        """Notes a key that saves memory in a way that is not modelled, if it is switched on."""
        if self.get(key) not in (None, False, "none", [], {}):
            self.not_modelled.append(f"{key}: {what}; without it the peak is higher, so the answer is an upper bound")

    def companion(self, key: str) -> Any:
        """Returns the content of the file that a key names relative to this file, or None.

        Raises:
            InputError: The file does not exist or cannot be read.
        """
        value = self.get(key)
        if not isinstance(value, str):
            return value
        path = self.path.parent / value
        if not _exists(path):
            problem = Problem(f"{self.path}: {key}", f"no such file: {path}", "put it there, or remove the key")
            raise InputError(problem)
        self.understood.append(f"{key}: read {path}")
        return parse_json(read_text(path), str(path)) if path.suffix == ".json" else read_yaml(path)

    @property
    def ignored(self) -> list[str]:
        """The keys that nothing was read from, in the order of the file."""
        return [key for key in self.values if key not in self.used]

    def to_json(self) -> dict[str, Any]:
        """Returns the lists as JSON content. The keys are stable."""
        return {
            "file": str(self.path),
            "trainer": self.trainer,
            "understood": self.understood,
            "ignored": self.ignored,
            "assumed": self.assumed,
            "not_modelled": self.not_modelled,
        }


def spoken(value: Any) -> str:
    """Returns a value as YAML writes it on one line, shortened.

    >>> spoken(True), spoken(None), spoken(["q_proj", "v_proj"])
    ('true', 'null', 'q_proj, v_proj')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return ", ".join(value)[:200]
    return value[:200] if isinstance(value, str) else shown(value)


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings, with keys joined by dots, and with text that is a number as a number.

    >>> flatten({"model": {"lora_rank": "8"}, "lr": "2e-5"})
    {'model.lora_rank': 8, 'lr': 2e-05}
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value and key not in WHOLE:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if re.fullmatch(r"\s*[-+]?\d+\s*", value):
        return int(value)
    return float(value) if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value) else value


def _interpolated(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with each ``${key}`` replaced by the value of that key, as OmegaConf does."""
    named = {key: re.fullmatch(r"\$\{([\w.]+)\}", value) for key, value in values.items() if isinstance(value, str)}
    return values | {key: values.get(match[1], values[key]) for key, match in named.items() if match}


def read_config(path: Path, given: Mapping[str, Any], model: str | None = None) -> Reading:
    """Returns what a trainer's file says. Its ``problems`` are raised by ``question_of``.

    Args:
        path: The file, YAML or JSON.
        given: The options of the command line; None: not given.
        model: The name of the base on the command line, which replaces the file's.

    Raises:
        InputError: The file or one that it names cannot be read, or it belongs to no known trainer.
    """
    from peftscope.memory.trainers import recognise

    content = parse_json(read_text(path), str(path)) if path.suffix == ".json" else read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(Problem(str(path), "must be a mapping of keys to values", "give a trainer's file"))
    trainer, read = recognise(path, content)
    reading = Reading(path, trainer, _interpolated(flatten(content)), given)
    read(reading)
    if model is not None:
        reading.model = model
        reading.keys["model"] = "model"
    if reading.model is None:
        say = f"peftscope memory MODEL --config {path}"
        reading.problems.append(Problem(str(path), "names no base model", f"give it: {say}"))
    elif EXPERTS_NAME.search(reading.model):
        _refuse_experts(reading)
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


def _refuse_experts(reading: Reading) -> None:
    key = reading.keys.get("model", "model")
    reading.refuse(key, f"a mixture of experts is not modelled (got {shown(reading.model)})", "use a dense model")


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
    if reading.problems:
        raise InputError(reading.problems)
    model = _model_of(reading)
    if any(model.config.get(key) for key in EXPERTS):
        _refuse_experts(reading)
    _default_targets(reading, model)
    family = model.config["model_type"]
    if family in SCALED_LOGITS and reading.given.get("loss") is None and reading.options.pop("loss", None):
        why = f"its fused loss is not modelled for {family}, which changes its logits; the answer is an upper bound"
        reading.not_modelled.append(f"{reading.keys['loss']}: {why}")
    if reading.problems:
        raise InputError(reading.problems)
    if cards is None:
        cards = 1
        reading.assumed.append(
            "gpus=1: the file shards nothing; copies on more cards (DDP) take the same, plus buckets"
        )
    elif reading.whole and not reading.sharded:
        if cards > 1:
            reading.assumed.append(f"each of the {cards} cards has all weights, as {reading.whole} says")
        cards = 1
    elif gpus is None and not reading.sharded:
        cards = 1  # each card holds a copy
    replaced = {name: value for name, value in reading.given.items() if value is not None}
    reading.understood += [
        f"--{name.replace('_', '-')} {spoken(value)} replaces {reading.keys[name]}"
        for name, value in replaced.items()
        if name in reading.keys
    ]
    try:
        return ask(model, {**reading.options, **replaced}, responses=responses, gpu=gpu, gpus=cards)
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
        if key != "model" and _exists(local):
            return describe_model(str(local))
        same = None if _is_preset(name) or key == "model" else _same_shape(name)
        if same is None:
            return describe_model(name)
        reading.assumed.append(f"model={same}: {key} {name} is a variant of it by its name, with the same shape")
        return replace(describe_model(same), name=name)
    except InputError as error:
        remedy = f"or give a preset or a config.json first: peftscope memory MODEL --config {reading.path}"
        problems: Iterable[Problem] = (
            replace(p, where=f"{reading.path}: {key}", remedy=f"{p.remedy}; {remedy}") for p in error.problems
        )
        raise InputError(problems if key != "model" else error.problems) from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long for a path
        return False


def _is_preset(name: str) -> bool:
    return name.lower() in PRESETS or name.lower() in {preset[0].lower() for preset in PRESETS.values()}


def _same_shape(name: str) -> str | None:
    """Returns the preset whose name, or whose hub id without its owner, differs only by the kind of tuning."""
    bare = _bare(name)
    return next((name for name, preset in PRESETS.items() if bare in (_bare(name), _bare(preset[0]))), None)


def _bare(name: str) -> str:
    """Returns the part of a model's name that decides its shape.

    >>> _bare("NousResearch/Meta-Llama-3-8B-Instruct"), _bare("llama3_8b")
    ('llama38b', 'llama38b')
    """
    return VARIANT.sub("", name.rstrip("/").split("/")[-1].lower().replace("_", "-"))


def _default_targets(reading: Reading, model: Model) -> None:
    """Sets PEFT's own targets if the file leaves them to PEFT, which decides by the family of the model."""
    method = reading.options["method"]
    takes_targets = "targets" in METHODS[method].model_fields
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

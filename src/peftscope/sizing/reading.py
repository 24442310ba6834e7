"""The content of a trainer's file: rows with the meaning of keys, and the lists that an answer shows. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem, shown
from peftscope.files.content import parse_json, read_text, read_yaml
from peftscope.memory.question import METHOD_OPTIONS
from peftscope.methods import METHODS

SWITCHES = ("checkpointing", "packing", "double_quant")
"""Options whose values are true or false."""
OFF: tuple[Any, ...] = (None, False, 0, "", "no", "none", [], {})
"""Values that switch a key off."""
OWN = object()
"""Stands for the value of the option itself, in the keys with which a remedy changes it."""
WHOLE = ("deepspeed",)
"""Keys whose nested mappings are read as a whole: they may also name a file."""
MAY_CHANGE = re.compile(
    r"fp8.*|.*(context|tensor|expert|sequence|pipeline)_(model_)?parallel.*|dp_replicate_size|ulysses.*|use_[ed]a?ft.*"
    r"|.*tiled_mlp.*|.*offload.*|quantize_moe_experts|(torch_)?compile|use_(kt|kernels)|.*_kernels?|flash_attn_fuse_.*"
    r"|freeze_.*|(image|video|audio)_.*|(.*\.)?(use_)?vllm.*"
)
"""Keys that may change what a step holds. Others that nothing is read from are harmless: paths, data, logs, rates."""


@dataclass
class Reading:
    """A file of a trainer, and what was read from it so far.

    Attributes:
        path: The file.
        trainer: The trainer, with the version whose defaults apply.
        values: The content; keys of nested mappings are joined by dots, and numbers that are text are numbers.
        given: The options of the command line, which replace those of the file.
        options: The options of the question that follow from the file.
        job: The job that the file asks for.
        model: The name of the base, if the file or the command line names one.
        cards: The number of cards, if a companion file says it.
        sharded: The key that says that weights are sharded over the cards.
        by_deepspeed: Whether it is DeepSpeed that shards them.
        whole: The key that says that each card has all weights.
        keys: The key that each option was read from.
        understood: What was understood, one line for each key.
        assumed: What the file does not say, with the source of each default.
        not_modelled: Keys that change memory in a way that the calculator does not model.
        problems: What a person has to fix.
        used: The keys that were read.
        pattern: A pattern of target modules, which the shape of the model turns into their names.
        responses: The positions of a sequence that carry a loss, if the file says so.
    """

    path: Path
    trainer: str
    values: dict[str, Any]
    given: Mapping[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    job: str = "supervised"
    model: str | None = None
    cards: int | None = None
    sharded: str = ""
    by_deepspeed: bool = False
    whole: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    understood: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    not_modelled: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    pattern: str = ""
    responses: int | None = None

    def find(self, *keys: str) -> str | None:
        """Returns the first of these keys that has a value, or None, and counts it as understood."""
        for key in keys:
            if key in self.values:
                if key not in self.used:
                    self.used.add(key)
                    self.understood.append(f"{key}: {spoken(self.values[key])}")
                if self.values[key] is not None:
                    return key
        return None

    def get(self, *keys: str) -> Any:
        """Returns the value of the first of these keys that has one, or None, and counts the key as understood."""
        key = self.find(*keys)
        return None if key is None else self.values[key]

    def is_on(self, *keys: str) -> bool:
        """Returns whether one of these keys is switched on, and counts all as understood."""
        values = [self.get(key) for key in keys]
        return any(value not in OFF for value in values)

    def set(self, option: str, value: Any, key: str) -> None:
        """Gives an option the value that a key says."""
        self.options[option], self.keys[option] = value, key

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

    def companion(self, key: str) -> Any:
        """Returns the content of the file that a key names relative to this file, or None.

        Raises:
            InputError: The file does not exist or cannot be read.
        """
        value = self.get(key)
        if not isinstance(value, str):
            return value
        path = beside(self.path, value)
        if not os.path.exists(path):
            problem = Problem(f"{self.path}: {key}", f"no such file: {path}", "put it there, or remove the key")
            raise InputError(problem)
        self.understood.append(f"{key}: read {path}")
        return read_content(path)

    @property
    def ignored(self) -> list[str]:
        """The keys that nothing was read from and that change no memory, in the order of the file."""
        return [key for key in self.values if key not in {*self.used, *self.may_change_memory}]

    @property
    def may_change_memory(self) -> list[str]:
        """The keys that are switched on, that nothing was read from, and that may change what a step holds."""
        unread = [key for key, value in self.values.items() if key not in self.used and value not in OFF]
        return [key for key in unread if MAY_CHANGE.fullmatch(key)]

    def to_json(self) -> dict[str, Any]:
        """Returns the lists as JSON content. The keys are stable."""
        names = ("understood", "ignored", "may_change_memory", "assumed", "not_modelled")
        lists = {name: getattr(self, name) for name in names}
        return {"file": str(self.path), "trainer": self.trainer, "job": self.job, **lists}


def take(reading: Reading, row: Row) -> None:
    """Gives the option the value of the row's key, or the trainer's default, which counts as assumed."""
    key = reading.find(*row.keys)
    value = None if key is None else reading.values[key]
    word = str(value).lower()
    if key is None or row.words.get(word, word) is None:
        if row.source:
            reading.assume(row.option, row.default, row.source)
        elif row.default is not None:
            reading.options[row.option] = row.default
    elif row.words and word not in row.words:
        if reading.given.get(row.option) is None:
            flag = f", or give --{row.option.replace('_', '-')}" if row.option else ""
            reading.refuse(key, f"not modelled (got {shown(value)})", f"use {', '.join(row.words)}{flag}")
        reading.options.setdefault(row.option, row.default)
    elif row.words:
        reading.set(row.option, row.words[word], key)
    elif isinstance(value, bool) != (row.option in SWITCHES):
        kind = "true or false" if row.option in SWITCHES else "a value"
        reading.refuse(key, f"must be {kind} (got {shown(value)})")
    else:
        reading.set(row.option, value, key)
        line = f"{key}: {spoken(value)}"
        reading.understood[reading.understood.index(line)] = f"{line} ({row.option})"


@dataclass(frozen=True)
class Row:
    """The meaning of a key of a trainer's file.

    Attributes:
        option: The option of the question that it sets. A row is left out if the file's method has no such option.
        key: The key; older names of it, or other keys that decide with it, follow after spaces.
        default: The trainer's default, if it has one.
        source: Where its documentation or its code says so. A default without a source is no assumption.
        read: The function that reads the key.
        words: The option for each value, in lower case; None stands for the default. Other values are refused.
        need: What a person reads who has to give the option, because neither the file nor the trainer does.
        only_with: The keys of which one has to be switched on.
    """

    option: str
    key: str = ""
    default: Any = None
    source: str = ""
    read: Callable[[Reading, Row], None] = take
    words: Mapping[str, Any] = field(default_factory=dict)
    need: str = ""
    only_with: str = ""

    @property
    def keys(self) -> list[str]:
        """The key, and the other names of it or the keys that decide with it."""
        return self.key.split()


def read_rows(reading: Reading, rows: Iterable[Row]) -> None:
    """Reads a trainer's table from top to bottom; the rows above the method's hold for every method."""
    for row in rows:
        method = reading.options.get("method")
        if method and row.option in METHOD_OPTIONS and row.option not in METHODS[method].model_fields:
            continue
        if row.only_with and not reading.is_on(*row.only_with.split()):
            continue
        row.read(reading, row)
        if row.need:
            reading.need(row.option, row.need)


def read_content(path: Path) -> Any:
    """Returns the content of a file, JSON by its suffix, or else YAML.

    Raises:
        InputError: The file cannot be read.
    """
    return parse_json(read_text(path), str(path)) if path.suffix == ".json" else read_yaml(path)


def beside(path: Path, name: str) -> Path:
    """Returns the file that a file names, relative to its folder or to one above, as trainers start at a root."""
    places = [folder / name for folder in (path.parent, *path.absolute().parent.parents)]
    return next((place for place in places if os.path.exists(place)), places[0])


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

"""The sources of a task's items, and reading or making them. No torch."""

from __future__ import annotations

import json
import math
import os
import random
import re
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from peftscope.errors import InputError, Problem, shown
from peftscope.files.content import REVISION_PATTERN, Count, CountOrZero, HubId, Strict, read_lines
from peftscope.files.hub import load_rows
from peftscope.files.limits import check_characters
from peftscope.files.manifest import file_sha256
from peftscope.files.wheel import WheelFile, unpacked
from peftscope.layout import TASKS_FILE, TASKS_FOLDER

_LINE = 'a line is {"prompt": ..., "response": ...}'


class EnumerateSource(Strict):
    """A small domain, of which every item is used."""

    kind: Literal["enumerate"]
    what: Literal["two_digit_sums"]

    def items(self, name: str, facts: dict[str, str]) -> Iterator[Item]:
        """Yields every sum."""
        for left in range(10, 100):
            for right in range(10, 100):
                yield Item(f"{left} + {right} =", str(left + right))


class ReasoningGymSource(Strict):
    """A reasoning-gym generator. Neighbouring seeds give the same items, so one seed makes the whole pool."""

    kind: Literal["reasoning_gym"]
    dataset: str
    size: Annotated[Count, Field(le=1_000_000)]
    seed: CountOrZero
    options: dict[str, Any] = {}

    def items(self, name: str, facts: dict[str, str]) -> Iterator[Item]:
        """Yields what the generator makes."""
        import reasoning_gym

        try:
            dataset = reasoning_gym.create_dataset(self.dataset, size=self.size, seed=self.seed, **self.options)
            for entry in dataset:
                yield make_item(f"{entry['question'].strip()}\nAnswer:", entry["answer"])
        except Exception as error:  # generators refuse options with different errors, some of them only at an item
            raise InputError(Problem(f"{TASKS_FILE}: {name}.source", f"reasoning-gym refuses it: {error}")) from None


class JsonlSource(Strict):
    """A file with one JSON object per line, which has ``prompt`` and ``response``."""

    kind: Literal["jsonl"]
    path: Path

    def is_there(self) -> bool:
        """Returns whether the file exists."""
        return os.path.isfile(self.path)  # noqa: PTH113  (Path.is_file raises if the name is too long for a file)

    def items(self, name: str, facts: dict[str, str]) -> Iterator[Item]:
        """Yields the items of the file, and then adds its checksum to ``facts``, for the task's manifest."""
        if not self.is_there():
            raise InputError(Problem(f"{TASKS_FILE}: {name}.source.path", f"no such file: {self.path}"))
        yield from read_items(self.path)
        facts["file_sha256"] = file_sha256(self.path)


class FillerSource(Strict):
    """Random letters for runs that only measure memory and speed. The prompts are long enough to fill any sequence."""

    kind: Literal["filler"]
    prompt_characters: Count
    response_characters: Count
    size: Count = 1000
    seed: int = 0

    def items(self, name: str, facts: dict[str, str]) -> Iterator[Item]:
        """Yields the letters."""
        letters = random.Random(self.seed)
        for _ in range(self.size):
            prompt, response = (
                "".join(letters.choices(string.ascii_lowercase + "  ", k=length))
                for length in (self.prompt_characters, self.response_characters)
            )
            yield Item(prompt, response)


class RandomStringsSource(Strict):
    """Pairs of random strings, of which a model can know nothing but what it was trained on.

    Letters and digits alternate. Tokenizers that read words and single digits give each symbol a token of its own, and
    so do tokenizers of bytes.
    """

    kind: Literal["random_strings"]
    prompt_symbols: Count
    response_symbols: Count
    size: Annotated[Count, Field(le=1_000_000)]
    seed: CountOrZero

    @property
    def entropy_bits(self) -> float:
        """The entropy of a response, which is the sum of those of its symbols.

        >>> strings = {"kind": "random_strings", "prompt_symbols": 6, "response_symbols": 2, "size": 9, "seed": 0}
        >>> round(RandomStringsSource.model_validate(strings).entropy_bits, 3)
        9.022
        """
        return sum(math.log2(len(_ALPHABETS[place % 2])) for place in range(self.response_symbols))

    def items(self, name: str, facts: dict[str, str]) -> Iterator[Item]:
        """Yields the pairs."""
        draws = random.Random(self.seed)
        for _ in range(self.size):
            prompt, response = (
                "".join(draws.choice(_ALPHABETS[place % 2]) for place in range(length))
                for length in (self.prompt_symbols, self.response_symbols)
            )
            yield Item(prompt, response)


_ALPHABETS = string.ascii_letters, string.digits


class HubDataSource(Strict):
    """A data set of a Hugging Face hub.

    Attributes:
        prompt: The column with the question.
        response: The column with the answer.
        group: A column. Rows with the same value in it go into the same split.
        template: The text that asks the question; ``{prompt}`` stands for it.
        longest: The most characters of question and answer together; longer rows are left out.
        size: The number of rows that are kept, as a fair sample; None keeps all.
    """

    kind: Literal["hub"]
    dataset: HubId
    config: str | None = None
    revision: Annotated[str | None, Field(pattern=REVISION_PATTERN)] = None
    split: str = "train"
    prompt: str
    response: str
    group: str | None = None
    template: Annotated[str, Field(pattern=r"\{prompt\}")] = "{prompt}"
    longest: Count | None = None
    size: Count | None = None

    def items(self, name: str, facts: dict[str, str]) -> Iterator[Item]:
        """Yields the rows that are short enough; ``facts``, for the task's manifest, get where they are from."""
        rows, where_from = load_rows(self.dataset, self.config, self.split, self.revision)
        columns = [column for column in (self.prompt, self.response, self.group) if column]
        missing = [column for column in columns if column not in rows.column_names]
        if missing:
            remedy = f"it has {', '.join(rows.column_names)}"
            raise InputError(Problem(f"{TASKS_FILE}: {name}.source", f"no such column: {', '.join(missing)}", remedy))
        facts.update(where_from)
        for number, row in enumerate(rows, 1):
            try:
                item = make_item(row[self.prompt], row[self.response])
            except ValueError as error:
                raise InputError(Problem(f"{TASKS_FILE}: {name}.source", f"row {number}: {error}")) from None
            prompt = item.prompt.strip()
            if self.longest is None or len(self.template) + len(prompt) + len(item.response) <= self.longest:
                group = str(row[self.group]) if self.group else ""
                yield Item(self.template.replace("{prompt}", prompt), item.response, group)


class WheelDataSource(WheelFile):
    """A word list inside a PyPI wheel, read as data. The wheel's own code is never imported.

    Attributes:
        reads: What the lines of the file are: ``pronunciations``, as CMU's dictionary has them, are a word and its
            phones. The digits of stress are left out, and so are words with other characters than letters and second
            pronunciations.
        template: The text that asks for one; ``{prompt}`` stands for the word.
    """

    kind: Literal["wheel"]
    reads: Literal["pronunciations"]
    template: Annotated[str, Field(pattern=r"\{prompt\}")] = "{prompt}"

    def items(self, name: str, facts: dict[str, str]) -> Iterator[Item]:
        """Yields the words."""
        where = f"{TASKS_FILE}: {name}"
        TASKS_FOLDER.mkdir(parents=True, exist_ok=True)
        with unpacked(self, TASKS_FOLDER, f"task {name}", where) as path:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except ValueError:
                raise InputError(Problem(f"{where}.source.file", f"{self.file} is not text")) from None
            notice = path.with_name("LICENSE")
            if notice.is_file():
                facts["notice"] = text = notice.read_text(encoding="utf-8", errors="replace")
                print(f"task {name}: {text.partition(chr(10))[0]} See manifest.json.", file=sys.stderr)
            for number, line in enumerate(lines, 1):
                found = _PRONUNCIATION.fullmatch(line)
                if found is None:
                    message = f"line {number} is no word with its phones (got {shown(line)})"
                    raise InputError(Problem(f"{where}.source.file", message, "is it the file that it is taken for?"))
                if _WORD.fullmatch(found["word"]):
                    phones = " ".join(phone.rstrip("012") for phone in found["phones"].split())
                    yield make_item(self.template.replace("{prompt}", found["word"]), phones)


Source = (
    WheelDataSource
    | EnumerateSource
    | ReasoningGymSource
    | JsonlSource
    | FillerSource
    | RandomStringsSource
    | HubDataSource
)


@dataclass(frozen=True)
class Item:
    """A prompt and its correct response. Items of one group belong to the same split."""

    prompt: str
    response: str
    group: str = field(default="", compare=False)


def read_items(path: Path) -> Iterator[Item]:
    """Returns the items of a file with one JSON object per line, which has ``prompt`` and ``response``.

    Raises:
        InputError: Some lines are not items. The error comes after the last line and lists them.
    """
    return read_lines(path, _item_of_line, _LINE)


def _item_of_line(line: str) -> Item:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"not an object (got {shown(content)})")
    missing = [name for name in ("prompt", "response") if name not in content]
    if missing:
        raise ValueError(f"no `{missing[0]}`")
    return make_item(content["prompt"], content["response"])


def make_item(prompt: Any, response: Any) -> Item:
    """Returns an item. Numbers become text, and white space around the response is removed.

    Raises:
        ValueError: The prompt or the response is not text, is empty, or contains half a surrogate pair.
    """
    for name, value in (("prompt", prompt), ("response", response)):
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"`{name}` must be text (got {shown(value)})")
        if not str(value).strip():
            raise ValueError(f"`{name}` is empty")
        check_characters(str(value))
    return Item(str(prompt), str(response).strip())


_PRONUNCIATION = re.compile(r"(?P<word>\S+)(?P<phones>( [A-Z]{1,2}[0-2]?)+)\s*(#.*)?")
"""A line of CMU's dictionary; second pronunciations have a number in brackets behind the word."""
_WORD = re.compile("[a-z]+")

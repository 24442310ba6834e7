"""Tasks: each is made once as a pool of items, de-duplicated by prompt and split by the prompt's hash. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftscope.data.scoring import lm_eval_file, read_scoring
from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.files.content import REVISION_PATTERN, Count, CountOrZero, HubId, Name, check_characters, read_yaml
from peftscope.files.hub import load_rows, tell_if_moved
from peftscope.files.manifest import file_sha256, is_source_of, read_manifest
from peftscope.files.problems import dotted, problems_of
from peftscope.files.resource import Resource
from peftscope.layout import TASKS_FILE, TASKS_FOLDER, shipped

USUAL_TOKENS = 64
"""The tokens that estimates expect of an item before its task was made."""
SPLITS = ("train", "validation", "test")
SHOWN_LINES = 20
"""The most broken lines of a file that one message lists."""
_LINE = 'a line is {"prompt": ..., "response": ...}'


class EnumerateSource(BaseModel):
    """A small domain, of which every item is used."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["enumerate"]
    what: Literal["two_digit_sums"]


class ReasoningGymSource(BaseModel):
    """A reasoning-gym generator. Neighbouring seeds give the same items, so one seed makes the whole pool."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["reasoning_gym"]
    dataset: str
    size: Annotated[Count, Field(le=1_000_000)]
    seed: CountOrZero
    options: dict[str, Any] = {}


class JsonlSource(BaseModel):
    """A file with one JSON object per line, which has ``prompt`` and ``response``."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["jsonl"]
    path: Path

    def is_there(self) -> bool:
        """Returns whether the file exists."""
        try:
            return self.path.is_file()
        except OSError:  # the name is too long for a file
            return False


class FillerSource(BaseModel):
    """Random letters for runs that only measure memory and speed. The prompts are long enough to fill any sequence."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["filler"]
    prompt_characters: Count
    response_characters: Count
    size: Count = 1000
    seed: int = 0


class RandomStringsSource(BaseModel):
    """Pairs of random strings, of which a model can know nothing but what it was trained on.

    Letters and digits alternate. Tokenizers that read words and single digits give each symbol a token of its own, and
    so do tokenizers of bytes.

    Attributes:
        prompt_symbols: The symbols of the string that asks for another.
        response_symbols: The symbols of the string that it asks for.
        size: The number of pairs.
        seed: The seed of the draws.
    """

    model_config = ConfigDict(extra="forbid")

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


_ALPHABETS = string.ascii_letters, string.digits


class HubDataSource(BaseModel):
    """A data set of a Hugging Face hub.

    Attributes:
        prompt: The column with the question.
        response: The column with the answer.
        group: A column. Rows with the same value in it go into the same split.
        template: The text that asks the question; ``{prompt}`` stands for it.
        longest: The most characters of question and answer together; longer rows are left out.
        size: The number of rows that are kept, as a fair sample; None keeps all.
    """

    model_config = ConfigDict(extra="forbid")

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


class TaskEntry(BaseModel):
    """One task of tasks.yaml."""

    model_config = ConfigDict(extra="forbid")

    source: Annotated[
        EnumerateSource | ReasoningGymSource | JsonlSource | FillerSource | RandomStringsSource | HubDataSource,
        Field(discriminator="kind"),
    ]
    judged_on: Annotated[
        Literal["test", "train"],
        Field(description="the items of the held-out loss: test items, or those that the run trained on"),
    ] = "test"
    licence: str = "unknown"
    tokens: Annotated[
        Count | None, Field(description="tokens of a usual item, for estimates before the task is made")
    ] = None


class _Tasks(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tasks: dict[Name, TaskEntry]


@dataclass(frozen=True)
class Item:
    """A prompt and its correct response. Items of one group belong to the same split."""

    prompt: str
    response: str
    group: str = field(default="", compare=False)


@lru_cache
def _tasks() -> dict[str, TaskEntry]:
    path = shipped(TASKS_FILE)
    try:
        return _Tasks(tasks=read_yaml(path)).tasks
    except ValidationError as error:
        fields = set(TaskEntry.model_fields)
        raise InputError(problems_of(error, lambda loc: f"{path}: {dotted(loc[1:])}", fields)) from None


_scoring = lru_cache(read_scoring)


def find_task(name: str, where: str = "task") -> TaskEntry:
    """Returns the entry of a task.

    Raises:
        InputError: The task is unknown, or has no lm-eval file that says how it is asked.
    """
    entry = _tasks().get(name)
    if entry is None:
        raise InputError(Problem(where, f"unknown task (got {shown(name)})", close_match(name, _tasks())))
    if not lm_eval_file(name).is_file():
        raise InputError(Problem(where, f"task {name} has no lm-eval file", f"write {lm_eval_file(name)}"))
    _scoring(name)
    return entry


def task_folder(name: str) -> Path:
    """Returns the folder of a task's splits."""
    return TASKS_FOLDER / name


def split_of(prompt: str) -> str:
    """Returns the split of a prompt. The prompt's hash alone decides it: 80 % train, 10 % validation, 10 % test.

    >>> split_of("12 + 34 =") == split_of("12 + 34 =")
    True
    """
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def make_task(name: str) -> Path:
    """Makes a task's three splits if they are missing, and returns their folder.

    Raises:
        InputError: The source cannot be read or changed since the splits were made, or a split would be empty.
    """
    entry = find_task(name)
    resource = task_resource(name)
    if problem := source_change(name):
        raise InputError(problem)
    if resource.is_there() and isinstance(entry.source, HubDataSource):
        manifest = read_manifest(resource.folder) or {}
        tell_if_moved(manifest, entry.source.dataset, entry.source.revision, "dataset", resource.folder)
    return resource.fetch()


def source_change(name: str) -> Problem | None:
    """Returns a problem if a task's entry, or the file that it names, is not what its splits were made from."""
    folder, source = task_folder(name), find_task(name).source
    manifest = read_manifest(folder)  # a damaged one is put right by the run that meets it
    remedy = f"give the new one a name of its own, or remove {folder} and the results that came from it"
    if not manifest:
        return None
    if not is_source_of(manifest, source):
        return Problem(f"{TASKS_FILE}: {name}.source", "changed since the task was made", remedy)
    made_from = manifest.get("file_sha256")
    if made_from and isinstance(source, JsonlSource) and source.is_there() and file_sha256(source.path) != made_from:
        return Problem(str(source.path), f"changed since the task {name} was made from it", remedy)
    return None


def task_resource(name: str) -> Resource:
    """Returns the folder of a task's splits, made or not."""
    return Resource(task_folder(name), partial(_fill, name), ".jsonl")


def _fill(name: str, target: Path) -> dict[str, Any]:
    """Writes a task's splits into a folder, and returns where they are from and how many items they have."""
    entry = find_task(name)
    pool: dict[str, Item] = {}
    read = 0
    facts: dict[str, str] = {}
    if isinstance(entry.source, HubDataSource):
        found = _hub(name, entry.source, facts)
    else:
        found = _READERS[type(entry.source)](name, entry.source)
    for item in found:
        read += 1
        pool.setdefault(item.prompt, item)
    if isinstance(entry.source, JsonlSource):
        facts["file_sha256"] = file_sha256(entry.source.path)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    # Sorting by hash makes the first items of a split a fair sample of it.
    ordered = sorted(pool.values(), key=lambda item: hashlib.sha256(item.prompt.encode()).digest()[8:])
    for item in ordered[: entry.source.size if isinstance(entry.source, HubDataSource) else None]:
        splits[split_of(item.group or item.prompt)].append(item)
    empty = [split for split, items in splits.items() if not items]
    if empty:
        raise InputError(
            Problem(f"task {name}", f"{len(pool)} different prompts leave {', '.join(empty)} empty", "use more items")
        )
    for split, items in splits.items():
        lines = [json.dumps({"prompt": i.prompt, "response": i.response}, ensure_ascii=False) for i in items]
        (target / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "name": name,
        "source": entry.source.model_dump(mode="json"),
        "licence": entry.licence,
        **facts,
        "items": {split: len(items) for split, items in splits.items()},
        "duplicates_dropped": read - len(pool),
    }


def read_split(name: str, split: str) -> list[Item]:
    """Returns the items of a split."""
    return list(read_items(task_folder(name) / f"{split}.jsonl"))


def read_items(path: Path) -> Iterator[Item]:
    """Yields the items of a file with one JSON object per line, which has ``prompt`` and ``response``.

    Raises:
        InputError: Some lines are not items. The error comes after the last line and lists them.
    """
    problems = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip():
                        yield _item_of_line(line)
                except (ValueError, RecursionError) as error:
                    problems.append(Problem(f"{path}: line {number}", str(error), _LINE))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(Problem(str(path), f"cannot be read: {error}")) from None
    if len(problems) > SHOWN_LINES:
        rest = Problem(str(path), f"{len(problems) - SHOWN_LINES:,} more lines are not items")
        problems = [*problems[:SHOWN_LINES], rest]
    if problems:
        raise InputError(problems)


def _item_of_line(line: bytes) -> Item:
    content = json.loads(line.decode())
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


def item_tokens(name: str) -> float:
    """Returns the tokens of a usual item: a third of its characters if the task was made, else what its entry says."""
    path = task_folder(name) / "test.jsonl"
    if path.is_file():
        items = read_split(name, "test")[:500]
        return sum(len(item.prompt) + len(item.response) for item in items) / len(items) / 3 + 2
    return find_task(name).tokens or USUAL_TOKENS


def draw_items(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """Returns as many training items as a run uses, drawn by its seed; None returns all.

    A smaller draw of the same seed is part of a larger one.

    Raises:
        InputError: There are fewer items.
    """
    if count is None:
        return list(items)
    if count > len(items):
        raise InputError(Problem("train_items", f"the task has {len(items):,} training items (got {count:,})"))
    order = list(range(len(items)))
    random.Random(f"{seed}/items").shuffle(order)
    return [items[index] for index in order[:count]]


def shuffle_responses(items: Sequence[Item], seed: int) -> list[Item]:
    """Returns the prompts with shuffled responses, from which only the form of the task can be learned."""
    responses = [item.response for item in items]
    random.Random(f"{seed}/shuffled").shuffle(responses)
    return [Item(item.prompt, response) for item, response in zip(items, responses, strict=True)]


def _two_digit_sums(name: str, source: EnumerateSource) -> Iterator[Item]:
    for left in range(10, 100):
        for right in range(10, 100):
            yield Item(f"{left} + {right} =", str(left + right))


def _reasoning_gym(name: str, source: ReasoningGymSource) -> Iterator[Item]:
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(source.dataset, size=source.size, seed=source.seed, **source.options)
        for entry in dataset:
            yield make_item(f"{entry['question'].strip()}\nAnswer:", entry["answer"])
    except Exception as error:  # generators refuse options with different errors, some of them only at an item
        raise InputError(Problem(f"{TASKS_FILE}: {name}.source", f"reasoning-gym refuses it: {error}")) from None


def _jsonl(name: str, source: JsonlSource) -> Iterator[Item]:
    if not source.is_there():
        raise InputError(Problem(f"{TASKS_FILE}: {name}.source.path", f"no such file: {source.path}"))
    yield from read_items(source.path)


def _filler(name: str, source: FillerSource) -> Iterator[Item]:
    letters = random.Random(source.seed)
    for _ in range(source.size):
        prompt, response = (
            "".join(letters.choices(string.ascii_lowercase + "  ", k=length))
            for length in (source.prompt_characters, source.response_characters)
        )
        yield Item(prompt, response)


def _random_strings(name: str, source: RandomStringsSource) -> Iterator[Item]:
    draws = random.Random(source.seed)
    for _ in range(source.size):
        prompt, response = (
            "".join(draws.choice(_ALPHABETS[place % 2]) for place in range(length))
            for length in (source.prompt_symbols, source.response_symbols)
        )
        yield Item(prompt, response)


def _hub(name: str, source: HubDataSource, facts: dict[str, str]) -> Iterator[Item]:
    """Yields the items of a hub's data set, and adds its source to ``facts``."""
    found = load_rows(source.dataset, source.config, source.split, source.revision)
    columns = [column for column in (source.prompt, source.response, source.group) if column]
    missing = [column for column in columns if column not in found.rows.column_names]
    if missing:
        remedy = f"it has {', '.join(found.rows.column_names)}"
        raise InputError(Problem(f"{TASKS_FILE}: {name}.source", f"no such column: {', '.join(missing)}", remedy))
    facts.update(found.facts)
    for number, row in enumerate(found.rows, 1):
        try:
            item = make_item(row[source.prompt], row[source.response])
        except ValueError as error:
            raise InputError(Problem(f"{TASKS_FILE}: {name}.source", f"row {number}: {error}")) from None
        prompt = item.prompt.strip()
        if source.longest is None or len(source.template) + len(prompt) + len(item.response) <= source.longest:
            group = str(row[source.group]) if source.group else ""
            yield Item(source.template.replace("{prompt}", prompt), item.response, group)


_READERS: dict[type, Any] = {
    EnumerateSource: _two_digit_sums,
    ReasoningGymSource: _reasoning_gym,
    JsonlSource: _jsonl,
    FillerSource: _filler,
    RandomStringsSource: _random_strings,
}

"""Tasks: one pool each, made once, de-duplicated by prompt and split by a hash of the prompt. No torch."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import string
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from peftscope.errors import InputError, Problem, close_match
from peftscope.experiment import EXPERIMENTS, problems_of, read_yaml
from peftscope.hub import load_rows, tell_if_moved
from peftscope.record import write_json

TASKS_FILE = EXPERIMENTS / "tasks.yaml"
TASKS_FOLDER = Path("resources/tasks")
USUAL_TOKENS = 64
"""Of an item of which nothing is known yet."""
SPLITS = ("train", "validation", "test")


class EnumerateSource(BaseModel):
    """Every item of a small domain."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["enumerate"]
    what: Literal["two_digit_sums"]


class ReasoningGymSource(BaseModel):
    """Items of a reasoning-gym generator. Neighbouring seeds give the same items, so there is one seed for the pool."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["reasoning_gym"]
    dataset: str
    size: PositiveInt
    seed: int
    options: dict[str, Any] = {}


class JsonlSource(BaseModel):
    """A file of one JSON object a line, with ``prompt`` and ``response``."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["jsonl"]
    path: Path


class FillerSource(BaseModel):
    """Random letters, for runs that measure memory and speed alone: a prompt so long that it fills any sequence."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["filler"]
    prompt_characters: PositiveInt
    response_characters: PositiveInt
    size: PositiveInt = 1000
    seed: int = 0


class HubDataSource(BaseModel):
    """A data set of a Hugging Face hub.

    Attributes:
        prompt: The column of the question.
        response: The column of the answer.
        group: A column that rows about the same thing share: they go into the same split.
        template: How the question is asked.
        longest: Characters of question and answer together; longer rows are left out.
        size: Rows that are kept, a fair sample; None: all.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    prompt: str
    response: str
    group: str | None = None
    template: Annotated[str, Field(pattern=r"\{prompt\}")] = "{prompt}"
    longest: PositiveInt | None = None
    size: PositiveInt | None = None


class TaskEntry(BaseModel):
    """One task of tasks.yaml."""

    model_config = ConfigDict(extra="forbid")

    source: Annotated[
        EnumerateSource | ReasoningGymSource | JsonlSource | FillerSource | HubDataSource, Field(discriminator="kind")
    ]
    licence: str = "unknown"
    tokens: Annotated[PositiveInt | None, Field(description="of a usual item; for estimates before it is made")] = None


class _Tasks(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tasks: dict[str, TaskEntry]


@dataclass(frozen=True)
class Item:
    """One prompt and the response that is wanted; items of one group belong to the same split."""

    prompt: str
    response: str
    group: str = field(default="", compare=False)


@lru_cache
def _tasks() -> dict[str, TaskEntry]:
    try:
        return _Tasks(tasks=read_yaml(TASKS_FILE)).tasks
    except ValidationError as error:
        fields = set(TaskEntry.model_fields)
        raise InputError(
            problems_of(error, lambda loc: f"{TASKS_FILE}: {'.'.join(map(str, loc[1:]))}", fields)
        ) from None


def find_task(name: str, where: str = "task") -> TaskEntry:
    """Returns the entry of a task.

    Raises:
        InputError: There is none, or no lm-eval file beside it.
    """
    entry = _tasks().get(name)
    if entry is None:
        raise InputError(Problem(where, f"unknown task (got {name!r})", close_match(name, _tasks())))
    if not lm_eval_file(name).is_file():
        raise InputError(Problem(where, f"task {name} has no lm-eval file", f"write {lm_eval_file(name)}"))
    return entry


def lm_eval_file(name: str) -> Path:
    """Returns the path of a task's lm-eval file."""
    return EXPERIMENTS / "tasks" / f"{name}.yaml"


def task_folder(name: str) -> Path:
    """Returns the folder that holds a task's splits after they were made."""
    return TASKS_FOLDER / name


def split_of(prompt: str) -> str:
    """Returns the split that a prompt belongs to, whatever pool it stands in: 80, 10 and 10 % by hash.

    >>> split_of("12 + 34 =") == split_of("12 + 34 =")
    True
    """
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def make_task(name: str) -> Path:
    """Makes a task's three splits if they are not there, and returns their folder.

    Raises:
        InputError: The source cannot be read, or a split would be empty.
    """
    folder = task_folder(name)
    entry = find_task(name)
    if (folder / "manifest.json").is_file():
        if isinstance(entry.source, HubDataSource):
            manifest = json.loads((folder / "manifest.json").read_text())
            tell_if_moved(manifest, entry.source.dataset, entry.source.revision, "dataset", folder)
        return folder
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
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    # Sorted by hash, so that the first items of a split are a fair sample of it.
    ordered = sorted(pool.values(), key=lambda item: hashlib.sha256(item.prompt.encode()).digest()[8:])
    for item in ordered[: entry.source.size if isinstance(entry.source, HubDataSource) else None]:
        splits[split_of(item.group or item.prompt)].append(item)
    empty = [split for split, items in splits.items() if not items]
    if empty:
        raise InputError(
            Problem(f"task {name}", f"{len(pool)} different prompts leave {', '.join(empty)} empty", "use more items")
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
        target = Path(temporary) / "task"
        target.mkdir()
        for split, items in splits.items():
            lines = [json.dumps({"prompt": i.prompt, "response": i.response}, ensure_ascii=False) for i in items]
            (target / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        manifest = {
            "name": name,
            "source": entry.source.model_dump(mode="json"),
            "licence": entry.licence,
            **facts,
            "items": {split: len(items) for split, items in splits.items()},
            "duplicates_dropped": read - len(pool),
            "sha256": {s: hashlib.sha256((target / f"{s}.jsonl").read_bytes()).hexdigest() for s in SPLITS},
        }
        write_json(target / "manifest.json", manifest)
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)
    return folder


def read_split(name: str, split: str) -> list[Item]:
    """Returns the items of a split that was made."""
    path = task_folder(name) / f"{split}.jsonl"
    return [Item(**json.loads(line)) for line in path.read_text().split("\n") if line]


def item_tokens(name: str) -> float:
    """Returns the tokens of a usual item: three characters each where it was made, else what its entry says."""
    path = task_folder(name) / "test.jsonl"
    if path.is_file():
        items = read_split(name, "test")[:500]
        return sum(len(item.prompt) + len(item.response) for item in items) / len(items) / 3 + 2
    return find_task(name).tokens or USUAL_TOKENS


def shuffle_responses(items: Sequence[Item], seed: int) -> list[Item]:
    """Returns the prompts with each other's responses: nothing about the task is left to learn but its form."""
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
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(Problem(f"{TASKS_FILE}: {name}.source", f"reasoning-gym refuses it: {error}")) from None
    for entry in dataset:
        yield Item(f"{entry['question'].strip()}\nAnswer:", str(entry["answer"]).strip())


def _jsonl(name: str, source: JsonlSource) -> Iterator[Item]:
    try:
        lines = source.path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem(f"{TASKS_FILE}: {name}.source.path", f"cannot read {source.path}: {error}")) from None
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            yield Item(str(record["prompt"]), str(record["response"]).strip())
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            problems.append(
                Problem(f"{source.path}: line {number}", f"{error!r}", 'a line is {"prompt": ..., "response": ...}')
            )
    if problems:
        raise InputError(problems)


def _filler(name: str, source: FillerSource) -> Iterator[Item]:
    letters = random.Random(source.seed)
    for _ in range(source.size):
        prompt, response = (
            "".join(letters.choices(string.ascii_lowercase + "  ", k=length))
            for length in (source.prompt_characters, source.response_characters)
        )
        yield Item(prompt, response)


def _hub(name: str, source: HubDataSource, facts: dict[str, str]) -> Iterator[Item]:
    """Yields a hub's items; ``facts`` learns where they came from."""
    found = load_rows(source.dataset, source.config, source.split, source.revision)
    columns = [column for column in (source.prompt, source.response, source.group) if column]
    missing = [column for column in columns if column not in found.rows.column_names]
    if missing:
        remedy = f"it has {', '.join(found.rows.column_names)}"
        raise InputError(Problem(f"{TASKS_FILE}: {name}.source", f"no such column: {', '.join(missing)}", remedy))
    facts.update(found.facts)
    for row in found.rows:
        prompt, response = str(row[source.prompt]).strip(), str(row[source.response]).strip()
        if source.longest is None or len(source.template) + len(prompt) + len(response) <= source.longest:
            group = str(row[source.group]) if source.group else ""
            yield Item(source.template.replace("{prompt}", prompt), response, group)


_READERS: dict[type, Any] = {
    EnumerateSource: _two_digit_sums,
    ReasoningGymSource: _reasoning_gym,
    JsonlSource: _jsonl,
    FillerSource: _filler,
}

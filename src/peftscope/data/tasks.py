"""Tasks: each is made once as a pool of items, de-duplicated by prompt and split by the prompt's hash. No torch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from peftscope.data.scoring import lm_eval_file, read_scoring
from peftscope.data.sources import HubDataSource, Item, JsonlSource, Source, read_items
from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.files.content import Count, Name, Strict, read_yaml
from peftscope.files.manifest import file_sha256, how_to_change, is_source_of, read_manifest
from peftscope.files.problems import validated
from peftscope.files.resource import Resource
from peftscope.layout import TASKS_FILE, TASKS_FOLDER, shipped, why_not_read

USUAL_TOKENS = 64
"""The tokens that estimates expect of an item before its task was made."""
SPLITS = ("train", "validation", "test")


class TaskEntry(Strict):
    """One task of tasks.yaml."""

    source: Annotated[Source, Field(discriminator="kind")]
    judged_on: Annotated[
        Literal["test", "train"],
        Field(description="the items of the held-out loss: test items, or those that the run trained on"),
    ] = "test"
    symbols: Annotated[
        str, Field(description="what answers are lists of, with spaces between; they are compared one by one as well")
    ] = ""
    licence: str = "unknown"
    tokens: Annotated[Count | None, Field(description="tokens of a usual item, for estimates")] = None
    most_tokens: Annotated[Count | None, Field(description="tokens of its longest item, for the memory of jobs")] = None


@lru_cache
def _tasks() -> dict[str, TaskEntry]:
    path = shipped(TASKS_FILE)
    return validated(dict[Name, TaskEntry], read_yaml(path), path, TaskEntry.model_fields)


_scoring = lru_cache(read_scoring)


def find_task(name: str, where: str = "task") -> TaskEntry:
    """Returns the entry of a task.

    Raises:
        InputError: The task is unknown, or has no lm-eval file that says how it is asked.
    """
    entry = _tasks().get(name)
    if entry is None:
        remedy = close_match(name, _tasks()) + why_not_read(TASKS_FILE)
        raise InputError(Problem(where, f"unknown task (got {shown(name)})", remedy))
    if not lm_eval_file(name).is_file():
        raise InputError(Problem(where, f"task {name} has no lm-eval file", f"write {lm_eval_file(name)}"))
    _scoring(name)
    return entry


def symbols_of(name: str) -> str:
    """Returns what the answers of a task are lists of; empty if they are no lists, or if the task is not known here."""
    entry = _tasks().get(name)
    return entry.symbols if entry else ""


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
    if problem := source_change(name):
        raise InputError(problem)
    return task_resource(name).fetch()


def source_change(name: str) -> Problem | None:
    """Returns a problem if a task's entry, or the file that it names, is not what its splits were made from."""
    folder, source = task_folder(name), find_task(name).source
    manifest = read_manifest(folder)  # a damaged one is put right by the run that meets it
    if not manifest:
        return None
    if not is_source_of(manifest, source):
        return Problem(f"{TASKS_FILE}: {name}.source", "changed since the task was made", how_to_change(folder))
    made_from = manifest.get("file_sha256")
    if made_from and isinstance(source, JsonlSource) and source.is_there() and file_sha256(source.path) != made_from:
        return Problem(str(source.path), f"changed since the task {name} was made from it", how_to_change(folder))
    return None


def task_resource(name: str) -> Resource:
    """Returns the folder of a task's splits, made or not."""
    return Resource(task_folder(name), partial(_fill, name), ".jsonl")


def _fill(name: str, target: Path) -> dict[str, Any]:
    """Writes a task's splits into a folder, and returns where they are from and how many items they have."""
    entry = find_task(name)
    facts: dict[str, str] = {}
    read = list(entry.source.items(name, facts))
    pool = {item.prompt: item for item in reversed(read)}  # of the same prompt, the first one counts
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
        "duplicates_dropped": len(read) - len(pool),
    }


def read_split(name: str, split: str) -> list[Item]:
    """Returns the items of a split."""
    return list(read_items(task_folder(name) / f"{split}.jsonl"))


def item_tokens(name: str) -> float:
    """Returns the tokens of a usual item: what the task's entry says, else a third of its characters if it was made.

    Raises:
        InputError: There is no such task.
    """
    known = find_task(name).tokens
    if known or not (task_folder(name) / "test.jsonl").is_file():
        return known or USUAL_TOKENS
    items = read_split(name, "test")[:500]
    return sum(len(item.prompt) + len(item.response) for item in items) / len(items) / 3 + 2


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

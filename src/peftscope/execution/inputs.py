"""Checks what a run reads, its base model and its data, and restores what is damaged. No torch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from peftscope.data.benchmarks import benchmark_folder, make_benchmark
from peftscope.data.tasks import make_task, task_folder
from peftscope.errors import InputError, Problem
from peftscope.files.lock import locked
from peftscope.files.manifest import damaged_files, read_manifest
from peftscope.models.catalog import model_folder
from peftscope.models.fetch import fetch_model
from peftscope.spec import RunSpec

FETCH_SECONDS = 24 * 3600
"""The seconds that a job waits while another one fetches the model that both need."""


def verify_inputs(spec: RunSpec) -> None:
    """Compares a run's model, data and benchmarks with their checksums; quarantines what is damaged and refetches it.

    Raises:
        InputError: A folder cannot be fetched again, or its new content differs.
    """
    for folder, fetch, suffix in _inputs(spec):
        _verify(folder, fetch, suffix)


def fetch_inputs(spec: RunSpec) -> None:
    """Fetches or makes those of a run's model, data and benchmarks that are not there.

    Raises:
        InputError: One of them cannot be fetched.
    """
    for folder, fetch, _ in _inputs(spec):
        if not (folder / "manifest.json").is_file():
            with _alone(folder, "is fetching it"):
                fetch()


def _inputs(spec: RunSpec) -> list[tuple[Path, Callable[[], Path], str]]:
    """Returns the folder of each input, the function that fetches it, and the suffix of the files with checksums."""
    return [
        (model_folder(spec.model, spec.revision), partial(fetch_model, spec.model, spec.revision), ""),
        (task_folder(spec.task), partial(make_task, spec.task), ".jsonl"),
        *((benchmark_folder(name), partial(make_benchmark, name), ".parquet") for name in spec.benchmarks),
    ]


def _alone(folder: Path, does: str) -> AbstractContextManager[None]:
    """Returns a context that one process at a time can be in."""
    return locked(folder.with_name(f".{folder.name}.lock"), does, FETCH_SECONDS)


def _verify(folder: Path, fetch: Callable[[], Path], suffix: str) -> None:
    if not _damages(folder, suffix):
        return
    with _alone(folder, "is restoring it"):
        found = _damages(folder, suffix)  # another job may have restored it in the meantime
        if not found:
            return
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
        print(f"{folder}: {', '.join(found)} damaged or missing; the folder was moved to {aside}", file=sys.stderr)
        fetch()
        now, then = _digests(folder, suffix), _digests(aside, suffix)
        # If the file was damaged, the manifest has its checksum; if the manifest was, the file itself has.
        other = [name for name in damaged_files(aside, now) if then and then.get(name) != now[name]]
        if other:
            message = f"fetched again, {', '.join(other)} is not what it was, so its results would mix with older ones"
            raise InputError(Problem(str(folder), message, "keep the older results elsewhere and start afresh"))
        print(f"{folder}: fetched again, the same as before", file=sys.stderr)


def _digests(folder: Path, suffix: str) -> dict[str, str]:
    """Returns checksums by file name; those of tasks and benchmarks name splits instead of files."""
    manifest = read_manifest(folder)
    return {f"{name}{suffix}": digest for name, digest in manifest["sha256"].items()} if manifest else {}


def _damages(folder: Path, suffix: str) -> list[str]:
    """Returns the files that are missing or differ from their checksums."""
    digests = _digests(folder, suffix)
    return damaged_files(folder, digests) if digests else ["manifest.json"]

"""What a run reads, its base model and its data: as they were fetched or made, or put right. No torch."""

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
"""How long a job waits while another one fetches the model that both need."""


def verify_inputs(spec: RunSpec) -> None:
    """Compares a run's model, data and benchmarks with their checksums; a damaged folder is set aside and had again.

    Raises:
        InputError: It cannot be had again, or came back different.
    """
    for folder, have_again, suffix in _inputs(spec):
        _verify(folder, have_again, suffix)


def fetch_inputs(spec: RunSpec) -> None:
    """Fetches or makes those of a run's model, data and benchmarks that are not there.

    Raises:
        InputError: One cannot be had.
    """
    for folder, have, _ in _inputs(spec):
        if not (folder / "manifest.json").is_file():
            with _alone(folder, "fetches it at the moment"):
                have()


def _inputs(spec: RunSpec) -> list[tuple[Path, Callable[[], Path], str]]:
    """Returns the folder of each, what puts it there, and how the files end that its checksums are of."""
    return [
        (model_folder(spec.model, spec.revision), partial(fetch_model, spec.model, spec.revision), ""),
        (task_folder(spec.task), partial(make_task, spec.task), ".jsonl"),
        *((benchmark_folder(name), partial(make_benchmark, name), ".parquet") for name in spec.benchmarks),
    ]


def _alone(folder: Path, does: str) -> AbstractContextManager[None]:
    """Returns a context that one process at a time is in."""
    return locked(folder.with_name(f".{folder.name}.lock"), does, FETCH_SECONDS)


def _verify(folder: Path, have_again: Callable[[], Path], suffix: str) -> None:
    if not _damages(folder, suffix):
        return
    with _alone(folder, "puts it right at the moment"):
        found = _damages(folder, suffix)  # another job may have put it right in the meantime
        if not found:
            return
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
        print(f"{folder}: {', '.join(found)} damaged or missing, set aside as {aside}", file=sys.stderr)
        have_again()
        now, then = _digests(folder, suffix), _digests(aside, suffix)
        # Whichever was damaged, the file or the manifest, the other one says what the file was.
        other = [name for name in damaged_files(aside, now) if then and then.get(name) != now[name]]
        if other:
            message = f"had again, {', '.join(other)} is not what it was, so its results would mix with older ones"
            raise InputError(Problem(str(folder), message, "keep the older results elsewhere and start afresh"))
        print(f"{folder}: had again, the same as before", file=sys.stderr)


def _digests(folder: Path, suffix: str) -> dict[str, str]:
    """Returns checksums by file name; those of tasks and benchmarks name splits instead of files."""
    manifest = read_manifest(folder)
    return {f"{name}{suffix}": digest for name, digest in manifest["sha256"].items()} if manifest else {}


def _damages(folder: Path, suffix: str) -> list[str]:
    """Returns which files are missing or not what their checksums say."""
    digests = _digests(folder, suffix)
    return damaged_files(folder, digests) if digests else ["manifest.json"]

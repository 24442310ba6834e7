"""Builds the calculator's page in ``site/calculator/``: ``make site``.

The page runs the package's own closed form in Pyodide. Pyodide, pydantic and what pydantic needs are fetched with npm
and pip, at the versions and with the checksums of ``package-lock.json`` and ``requirements.txt``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from peftscope.sizing.page import form

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
FETCHED, PAGE = HERE.parent / "resources" / "calculator", HERE.parent / "site" / "calculator"

LARGEST_BYTES = 10_000_000
"""The most that a visitor may have to load, compressed."""
PINS = ("package.json", "package-lock.json", "requirements.txt")
STATIC = ("index.html", "style.css", "page.js", "worker.js")
RUNTIME = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "pyodide-lock.json")
ROOMS = ("files", "hardware", "memory", "methods", "models", "sizing")
ROOMS += ("__init__.py", "errors.py", "layout.py", "spec.py", "words.py")
"""The parts of the package that the closed form needs."""
UNUSED = ("pydantic/v1/", "pydantic/mypy.py", ".dist-info/", ".pyi")
"""Parts of names of files that the page never reads."""
WHEELS = "--no-deps --require-hashes --only-binary :all: --platform pyemscripten_2026_0_wasm32 --implementation cp"


def main() -> None:
    """Fetches what is not there yet, builds the page, and says what a visitor loads."""
    if missing := [name for name in ("node", "npm") if not shutil.which(name)]:
        sys.exit(f"make site needs {' and '.join(missing)}: apt-get install nodejs npm")
    fetch()
    build()
    size = compressed_bytes()
    print(f"{PAGE}: {size / 1e6:.1f} MB compressed; look at it with: python -m http.server -d {PAGE}")
    if size > LARGEST_BYTES:
        sys.exit(f"over the {LARGEST_BYTES / 1e6:.0f} MB that a visitor may have to load")


def fetch() -> None:
    """Fetches Pyodide and the wheels, unless those of the same pins are there.

    Raises:
        subprocess.CalledProcessError: A registry does not answer, or a checksum differs.
    """
    pins = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in PINS)).hexdigest()
    stamp = FETCHED / "pins"
    if stamp.is_file() and stamp.read_text() == pins:
        return
    shutil.rmtree(FETCHED, ignore_errors=True)
    FETCHED.mkdir(parents=True)
    for name in PINS[:2]:
        shutil.copy(HERE / name, FETCHED)
    subprocess.run(
        ["npm", "ci", "--loglevel=error", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=FETCHED, check=True
    )
    pip = [sys.executable, "-m", "pip", "download", "--quiet", *WHEELS.split(), "--python-version", "3.14"]
    subprocess.run([*pip, "--abi", "cp314", "-r", HERE / "requirements.txt", "-d", FETCHED], check=True)
    stamp.write_text(pins)


def build() -> None:
    """Writes the page, its form, and the archives of Python code, in which what an answer imports is compiled."""
    shutil.rmtree(PAGE, ignore_errors=True)
    (PAGE / "pyodide").mkdir(parents=True)
    for name in STATIC:
        shutil.copy(HERE / name, PAGE)
    pyodide = FETCHED / "node_modules" / "pyodide"
    for name in RUNTIME:
        shutil.copyfile(pyodide / name, PAGE / "pyodide" / name)
    (PAGE / "form.json").write_text(json.dumps(form()))
    archive = FETCHED / "python.zip"
    with zipfile.ZipFile(archive, "w") as python:
        for name, content in _modules():
            python.writestr(name, content)
    subprocess.run(["node", HERE / "compile.mjs", pyodide, archive, PAGE], check=True)


def _modules() -> Iterator[tuple[str, bytes]]:
    """Yields the path and the content of every file of Python code that the page has, but for the standard library."""
    for wheel in sorted(FETCHED.glob("*.whl")):
        with zipfile.ZipFile(wheel) as files:
            for name in files.namelist():
                if not any(part in name for part in UNUSED):
                    yield name, files.read(name)
    package = SOURCE / "peftscope"
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".json", ".csv") and path.relative_to(package).parts[0] in ROOMS:
            yield path.relative_to(SOURCE).as_posix(), path.read_bytes()


def compressed_bytes() -> int:
    """Returns the bytes of all files of the page, each compressed as a server does it."""
    return sum(len(gzip.compress(path.read_bytes())) for path in PAGE.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()

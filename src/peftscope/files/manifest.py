"""Checksums of files, and the manifests that list them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError


def file_sha256(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_files(folder: Path, sha256: dict[str, str]) -> list[str]:
    """Returns the names of a folder's files that are missing or differ from their checksums."""
    found = {name: file_sha256(folder / name) for name in sha256 if (folder / name).is_file()}
    return [name for name, digest in sha256.items() if found.get(name) != digest]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a model's or a task's folder, or None if it is missing or damaged."""
    try:
        content = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(content, dict) and isinstance(content.get("sha256"), dict)
    return content if whole else None


def is_source_of(manifest: dict[str, Any], source: BaseModel) -> bool:
    """Returns whether a manifest's source is this one; fields that it does not name have their defaults."""
    try:
        return type(source).model_validate(manifest.get("source")) == source
    except ValidationError:
        return False


def how_to_change(folder: Path) -> str:
    """Returns what to do about a source that changed. Runs carry its name only, so that old and new ones would mix."""
    return f"give the new one a name of its own, or remove {folder} and the results that came from it"

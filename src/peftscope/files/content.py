"""Strict reading of the YAML and JSON that people write: every file gives plain values or an error. No torch.

Plain values are text, whole numbers of 64 bits, floats, booleans, null, lists, and mappings with text as keys.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from peftscope.errors import InputError, Problem, raise_any, shown
from peftscope.files.limits import DEEPEST, LARGEST_INTEGER, LONGEST_NUMBER, check_plain

LARGEST_COUNT = 2**31 - 1
"""The largest count or seed of a run: beyond it torch, NumPy or a file format overflows."""


def _not_a_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")  # pydantic would take true for 1
    return value


NUMBER = BeforeValidator(_not_a_truth_value)
"""Refuses true and false. It stands last, so that a field's bounds stay in the JSON schema."""
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT), NUMBER]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT), NUMBER]

LONGEST_NAME = 96
_NAME = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}"
"""A name that is safe in paths and on command lines."""
HUB_ID_PATTERN = f"{_NAME}(/{_NAME})?"
_INNER_PART = r"\.?[A-Za-z0-9_-][A-Za-z0-9._-]*"

Name = Annotated[str, Field(pattern=f"^{_NAME}$")]
HubId = Annotated[str, Field(pattern=f"^{HUB_ID_PATTERN}$")]
"""A hub's id of a model or a data set: ``name`` or ``org/name``."""
InnerPath = Annotated[str, Field(pattern=f"^{_INNER_PART}(/{_INNER_PART})*$")]
"""A relative path that stays inside its folder."""


class Strict(BaseModel):
    """The content of files that people write, read once: a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SHOWN_LINES = 20
"""The most broken lines of a file that one message lists."""
LARGEST_BYTES = 1_000_000
"""The largest file that is read: three times the ledger of claims, and up to twenty seconds of PyYAML."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping that a YAML file holds.

    Raises:
        InputError: The file cannot be read, is not YAML, repeats a key, is not a mapping, or has values that are not
            plain.
    """
    from peftscope.files.strict_yaml import parse_yaml  # PyYAML takes 10 ms to import, and most commands read no YAML

    return parse_yaml(read_text(path), str(path))


def read_text(path: Path, largest_bytes: int = LARGEST_BYTES) -> str:
    """Returns the text of a UTF-8 file.

    Raises:
        InputError: The file does not exist, is not a regular file, is too large, or is not UTF-8.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(Problem(str(path), "not a file"))
        if found.st_size > largest_bytes:
            raise InputError(Problem(str(path), f"{found.st_size:,} bytes are more than the {largest_bytes:,} allowed"))
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(Problem(str(path), "no such file")) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise InputError(Problem(str(path), f"cannot be read: {error}")) from None


def read_lines(path: Path, read: Callable[[str], Any], remedy: str) -> Iterator[Any]:
    """Yields what is read from each line of a UTF-8 file that is not blank.

    Raises:
        InputError: The file cannot be read, or ``read`` raised ValueError for some lines. This error comes after the
            last line and lists them.
    """
    problems = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if text := line.decode().strip():
                        yield read(text)
                except (ValueError, RecursionError) as error:
                    problems.append(Problem(f"{path}: line {number}", str(error), remedy))
    except FileNotFoundError:
        raise InputError(Problem(str(path), "no such file", "give the path of a file that exists")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(Problem(str(path), f"cannot be read: {error}")) from None
    if len(problems) > SHOWN_LINES:
        rest = Problem(str(path), f"{len(problems) - SHOWN_LINES:,} more lines are not items")
        problems = [*problems[:SHOWN_LINES], rest]
    raise_any(problems)


def parse_json(text: str, where: str) -> Any:
    """Returns the plain values that a JSON text holds.

    Raises:
        InputError: The text is not JSON, repeats a key, or has values that are not plain.
    """
    try:
        content = json.loads(text, parse_int=_whole_number, object_pairs_hook=_unrepeated)
        check_plain(content)
    except RecursionError:
        raise InputError(Problem(where, f"nested deeper than {DEEPEST} levels")) from None
    except ValueError as error:
        raise InputError(Problem(where, f"not valid JSON: {error}")) from None
    return content


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER or abs(int(digits)) > LARGEST_INTEGER:
        raise ValueError(f"a whole number of more than 64 bits ({shown(digits)})")
    return int(digits)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key `{twice}` appears twice")
    return found


BENCHMARK_PATTERN = r"[A-Za-z0-9_-]+"
REVISION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}$"
"""A revision becomes part of a folder's name and of a command line."""

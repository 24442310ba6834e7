"""The limits of what is read from files, which YAML and JSON share. No torch."""

from __future__ import annotations

import re
from typing import Any

DEEPEST = 20
"""The deepest nesting of a file; no file of the suite has more than seven levels."""
LARGEST_SIZE = 500_000
"""The most values and keys of a file with its aliases expanded: a few lines can expand to a billion values."""
LARGEST_INTEGER = 2**63 - 1
LONGEST_NUMBER = 100


def check_plain(content: Any) -> None:
    """Raises RecursionError for content nested too deeply, and ValueError if it is too large or not all text."""
    size, left = 0, [(content, 0)]
    while left:
        value, level = left.pop()
        size += 1
        if level > DEEPEST:
            raise RecursionError
        if size > LARGEST_SIZE:
            raise ValueError(f"more than {LARGEST_SIZE:,} values with its aliases expanded")
        if isinstance(value, str):
            check_characters(value)
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        left += [(part, level + 1) for part in parts] if isinstance(parts, list) else []


def check_characters(text: str) -> None:
    """Raises ValueError for half a surrogate pair, which UTF-8 cannot encode and tokenizers refuse."""
    found = re.search("[\ud800-\udfff]", text)
    if found:
        raise ValueError(f"the character U+{ord(found[0]):04X} is half a surrogate pair")

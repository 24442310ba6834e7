"""The limits of what is read from files, which YAML and JSON share. No torch."""

from __future__ import annotations

import re

DEEPEST = 20
"""The deepest nesting of a file; no file of the suite has more than seven levels."""
LARGEST_INTEGER = 2**63 - 1
LONGEST_NUMBER = 100


def check_characters(text: str) -> None:
    """Raises ValueError for half a surrogate pair, which UTF-8 cannot encode and tokenizers refuse."""
    found = re.search("[\ud800-\udfff]", text)
    if found:
        raise ValueError(f"the character U+{ord(found[0]):04X} is half a surrogate pair")

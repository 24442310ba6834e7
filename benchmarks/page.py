"""Writes what a benchmark renders into the page that shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def write_blocks(blocks: Mapping[str, str], page: Path) -> None:
    """Writes every block, by its name, between its markers in a page, ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises:
        ValueError: The page lacks the markers of a block.
    """
    text = page.read_text()
    for name, content in blocks.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, replaced = marked.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
        if not replaced:
            raise ValueError(f"{page} has no block {name}: put <!-- {name} --> and <!-- /{name} --> where it belongs")
    page.write_text(text)

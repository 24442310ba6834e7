"""The comparison of processors says what was measured, and what was asked of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.page import write_blocks
from benchmarks.processors import PAGE, read_pair, render


def test_the_page_shows_what_is_published(tmp_path: Path, in_repository: None) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    write_blocks({"comparison": render(read_pair())}, page)
    assert page.read_text() == PAGE.read_text()
    write_blocks({"comparison": "nothing"}, page)
    assert page.read_text() != PAGE.read_text()
    with pytest.raises(ValueError, match="has no block rooms"):
        write_blocks({"rooms": "nothing"}, page)

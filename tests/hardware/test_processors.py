"""The comparison of processors says what was measured, and what was asked of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.page import write_blocks
from benchmarks.processors import PAGE, read_pair, render, same_memory


@pytest.fixture(autouse=True)
def in_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


def test_the_page_shows_what_is_published(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    write_blocks({"comparison": render(read_pair())}, page)
    assert page.read_text() == PAGE.read_text()
    write_blocks({"comparison": "nothing"}, page)
    assert page.read_text() != PAGE.read_text()
    with pytest.raises(ValueError, match="has no block rooms"):
        write_blocks({"rooms": "nothing"}, page)


def test_both_ways_learn_and_their_bases_agree() -> None:
    pair = read_pair()
    assert (pair["status"] == "ok").all() and (pair["status_fp32"] == "ok").all()
    bases = pair[pair["step_seconds_median"].isna()]
    assert len(bases) == 2
    assert bases["heldout_nll_nats_per_token_fp32"].tolist() == pytest.approx(
        bases["heldout_nll_nats_per_token"].tolist(), rel=0.01
    )
    trained = pair.drop(bases.index)
    assert (trained["heldout_nll_nats_per_token_fp32"] < bases["heldout_nll_nats_per_token"].min() / 2).all()
    assert same_memory(pair)
    assert pair["wall_seconds_fp32"].sum() < 2.5 * pair["wall_seconds"].sum()

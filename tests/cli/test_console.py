"""What commands say while they work."""

from __future__ import annotations

import pytest

from peftscope.cli.console import with_progress


def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0, 10, 40, 50])
    monkeypatch.setattr("peftscope.cli.console.time.monotonic", lambda: next(seconds))
    assert list(with_progress("abc", 3, "measuring")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "measuring: 2 of 3, about 20 s left\n"

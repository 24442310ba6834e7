"""Runs that share this machine: a timed one waits until the others pause, and nobody enters meanwhile."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from peftscope.hardware.turns import Turns


def test_a_timed_run_has_the_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second, third = (Turns(2) for _ in range(3))
    first.enter()
    second.enter()
    with ThreadPoolExecutor() as threads:
        first_timed = threads.submit(first.begin)
        with pytest.raises(TimeoutError):
            first_timed.result(0.2)  # the second one is at work
        third_enters = threads.submit(third.enter)
        os.close(second._room)  # it has ended
        first_timed.result()
        with pytest.raises(TimeoutError):
            third_enters.result(0.2)
        first.end()
        third_enters.result()

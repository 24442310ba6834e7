"""Runs that share this machine: a timed one waits until the others pause, and nobody enters meanwhile."""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from peftscope.evaluation import answers
from peftscope.execution import way
from peftscope.execution.phases import Phases
from peftscope.execution.run import execute
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


def test_what_depends_on_the_number_of_threads_has_those_of_the_turn(
    toy: Path, make_spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads: list[tuple[str, int]] = []

    def followed(place: ModuleType, name: str) -> Callable[..., object]:
        original = getattr(place, name)
        return lambda *args: (threads.append((name, torch.get_num_threads())), original(*args))[1]

    for place, name in ((way, "build_model"), (way, "bits_per_byte"), (way, "train"), (answers, "score_answers")):
        monkeypatch.setattr(place, name, followed(place, name))
    before = torch.get_num_threads()
    turns = Turns(before + 1)
    turns.enter()
    execute(make_spec(), tmp_path / "run", Phases("cpu", time.perf_counter(), turns=turns))
    in_turn = [name for name, count in threads if count == before + 1]
    assert in_turn == ["build_model", "bits_per_byte", "train", "bits_per_byte"]
    assert threads[-1] == ("score_answers", before)

"""Cards of one machine, handed out one by one; there need be none."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peftscope.cli.forecast import card_of
from peftscope.errors import InputError
from peftscope.hardware import device
from peftscope.hardware.cards import find_gpu
from peftscope.hardware.device import cards_claimed, visible_cards

JOB = """
import sys
from pathlib import Path
from peftscope.hardware.device import cards_claimed
with cards_claimed(int(sys.argv[1]), Path(sys.argv[2])) as cards:
    print(*cards, flush=True)
    sys.stdin.readline()
"""


def start(folder: Path, count: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,GPU-8f2c,3"}
    command = [sys.executable, "-c", JOB, str(count), str(folder)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def claimed(job: subprocess.Popen[str]) -> list[str]:
    assert job.stdout is not None
    return job.stdout.readline().split()


def test_four_jobs_on_four_cards_get_one_each_and_the_fifth_waits(tmp_path: Path) -> None:
    jobs = [start(tmp_path) for _ in range(4)]
    cards = [claimed(job) for job in jobs]
    assert sorted(cards) == [["0"], ["1"], ["3"], ["GPU-8f2c"]]
    fifth = start(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        fifth.wait(timeout=1.5)
    jobs[2].send_signal(signal.SIGKILL)
    assert claimed(fifth) == cards[2]
    for job in (*jobs, fifth):
        job.communicate("\n")


def test_jobs_of_three_cards_take_turns(tmp_path: Path) -> None:
    first, second = start(tmp_path, 3), start(tmp_path, 3)
    (outlet, *_), _, _ = select.select([first.stdout, second.stdout], [], [], 60)
    ready, waiting = (first, second) if outlet is first.stdout else (second, first)
    ready.communicate("\n")
    assert len(claimed(waiting)) == 3
    waiting.communicate("\n")


def test_what_a_scheduler_handed_out_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with cards_claimed(1, tmp_path) as one, cards_claimed(1, tmp_path) as again:
        assert one == again == ["2"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="needs 2 cards, 1 are visible"), cards_claimed(2, tmp_path):
        pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_cards() == []


def test_without_nvml_the_driver_names_the_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(device, "DRIVER", tmp_path / "gpus")
    monkeypatch.delenv("PEFTSCOPE_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.cards() == [] and device.detect_device() == "cpu"
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / bus).mkdir(parents=True)
        (tmp_path / "gpus" / bus / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 16\n")
    assert [card.name for card in device.cards()] == 2 * ["NVIDIA H100 80GB HBM3"]
    assert device.detect_device() == "cuda" and visible_cards() == ["0", "1"]
    assert card_of("quick", None) == find_gpu("h100")

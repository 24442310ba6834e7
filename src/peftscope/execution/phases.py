"""Measures the seconds and the memory peaks of each phase of a run separately."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from peftscope.hardware.meter import make_meter
from peftscope.hardware.turns import Turns
from peftscope.record import Memory, PhaseMemory, RankMemory, Seconds


class Phases:
    """Measures a run phase by phase. If a phase is entered twice, its seconds add up and the larger peak counts.

    Attributes:
        seconds: The wall seconds. ``importing`` counts from the start of the process.
        memory: The peaks. ``load`` and ``initialise`` both count as load.
    """

    def __init__(self, device: str, began: float, spent: Seconds | None = None, turns: Turns | None = None) -> None:
        """Ends the imports of a process that began at this ``perf_counter``, and has spent some seconds otherwise."""
        self.meter = make_meter(device)
        self.seconds = spent or Seconds()
        self.seconds.importing = time.perf_counter() - began - self.seconds.verify - self.seconds.wait
        self.memory = Memory()
        self._began = began
        self.turns = turns

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures this context as a phase of ``Seconds``, or as a part of it."""
        self.meter.reset()
        began = time.perf_counter()
        try:
            yield
            self.meter.synchronise()
        finally:
            peaks = self.meter.peaks()
            setattr(self.seconds, name, getattr(self.seconds, name) + time.perf_counter() - began)
            target = {"load": "load", "initialise": "load", "train": "train", "evaluate": "evaluate"}.get(name)
            if target:
                keep_larger(getattr(self.memory, target), peaks)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Has the machine alone inside this context, and all threads that are to be timed."""
        if self.turns is None:
            yield
            return
        beside = torch.get_num_threads()
        with self.phase("wait"):
            self.turns.begin()
        torch.set_num_threads(self.turns.threads)
        try:
            yield
        finally:
            torch.set_num_threads(beside)
            with self.phase("wait"):
                self.turns.end()

    @contextmanager
    def aside(self, of: str, name: str) -> Iterator[None]:
        """Measures a block inside a phase as part of another one, so that neither has the other's seconds and peaks."""
        keep_larger(getattr(self.memory, of), self.meter.peaks())
        began = time.perf_counter()
        with self.phase(name):
            yield
        setattr(self.seconds, of, getattr(self.seconds, of) - (time.perf_counter() - began))
        self.meter.reset()

    def gather_ranks(self, parameter_bytes: int, from_all: Callable[[RankMemory], list[RankMemory]]) -> None:
        """Records the peaks of each process of a sharded run, and raises the run's peaks to the largest of them.

        Args:
            parameter_bytes: The bytes of the model that this process holds.
            from_all: Returns the values that all processes pass to it.
        """
        peaks = {phase: getattr(self.memory, phase).model_copy() for phase in ("load", "train", "evaluate")}
        self.memory.ranks = from_all(RankMemory(parameter_bytes=parameter_bytes, **peaks))
        for rank in self.memory.ranks:
            for phase in peaks:
                keep_larger(getattr(self.memory, phase), getattr(rank, phase).model_dump())

    def finish(self) -> None:
        """Sets the wall seconds of the whole job so far."""
        self.seconds.wall = time.perf_counter() - self._began


def keep_larger(memory: PhaseMemory, peaks: dict[str, int | None]) -> None:
    """Raises each peak of ``memory`` to the given one if that is larger."""
    for field, value in peaks.items():
        if value is not None:
            setattr(memory, field, max(value, getattr(memory, field) or 0))

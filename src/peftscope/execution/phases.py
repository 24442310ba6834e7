"""Phases of a run: their seconds and their memory peaks, reset between phases and kept apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peftscope.hardware.meter import make_meter
from peftscope.record import Memory, PhaseMemory, RankMemory, Seconds


class Phases:
    """Measures a run phase by phase; a phase that is entered twice adds its seconds and keeps its larger peak.

    Attributes:
        seconds: Wall seconds, ``importing`` counted from the process's start.
        memory: Peaks; ``load`` and ``initialise`` both count as load.
    """

    def __init__(self, device: str, began: float) -> None:
        """Starts from ``began``, the ``perf_counter`` of the process's start."""
        self.meter = make_meter(device)
        self.seconds = Seconds()
        self.memory = Memory()
        self._began = began

    def mark_imported(self, verified_seconds: float = 0.0) -> None:
        """Ends the phase that began with the process, of which ``verified_seconds`` went into checksums."""
        self.seconds.verify = verified_seconds
        self.seconds.importing = time.perf_counter() - self._began - verified_seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a block as (part of) a phase of ``Seconds``."""
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

    def gather_ranks(self, parameter_bytes: int, from_all: Callable[[RankMemory], list[RankMemory]]) -> None:
        """Notes what each process of a sharded run held, and raises the peaks to the largest.

        Args:
            parameter_bytes: What this process holds of the model.
            from_all: Returns what every process gives to it.
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
    """Raises the peaks of ``memory`` to those given."""
    for field, value in peaks.items():
        if value is not None:
            setattr(memory, field, max(value, getattr(memory, field) or 0))

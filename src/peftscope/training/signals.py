"""How a training stops when its process is told to: between two steps. No torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(BaseException):
    """The process was told to stop (SIGINT or SIGTERM)."""


def raise_on_signals() -> None:
    """Makes SIGINT and SIGTERM raise ``Interrupted``."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


@contextmanager
def stops_between_steps() -> Iterator[Callable[[], str]]:
    """Within, a first SIGINT or SIGTERM waits for the next question about it; a second one raises ``Interrupted``.

    Only the main thread of a process can listen to signals; in another one, none is waited for.

    Yields:
        A function that returns what to say about the signal that came, or nothing.
    """
    came: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return

    def note(number: int, frame: Any) -> None:
        said = f"stopped by {signal.Signals(number).name}"
        if came:
            raise Interrupted(said)
        came.append(said)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came[0] if came else ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

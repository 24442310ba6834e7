"""Handles SIGINT and SIGTERM, so that training stops between two steps. No torch.

A process that ignores SIGINT, as a script's jobs in the background do, goes on ignoring it, and ends on SIGTERM.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(BaseException):
    """The process received SIGINT or SIGTERM."""


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that stop a run: SIGTERM and, if the process does not ignore it, SIGINT."""
    ignores = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return [signal.SIGTERM] if ignores else [signal.SIGTERM, signal.SIGINT]


def raise_on_signals() -> None:
    """Makes the signals that stop a run raise ``Interrupted``."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    for number in stop_signals():
        signal.signal(number, stop)


@contextmanager
def stops_between_steps() -> Iterator[Callable[[], str]]:
    """Defers the first signal to stop inside this context. A second one raises ``Interrupted``.

    It yields a function that returns a reason to stop if a signal has arrived, and an empty text otherwise. Only the
    main thread can handle signals. In any other thread, this context changes nothing.
    """
    reasons: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return

    def note(number: int, frame: Any) -> None:
        reason = f"stopped by {signal.Signals(number).name}"
        if reasons:
            raise Interrupted(reason)
        reasons.append(reason)

    before = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield lambda: reasons[0] if reasons else ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

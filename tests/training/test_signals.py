"""Which signals stop a run, and when."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from peftscope.training.signals import Interrupted, raise_on_signals, stops_between_steps


@pytest.fixture(autouse=True)
def kept_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_stops_on_either_signal() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise_on_signals()
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(Interrupted, match=f"stopped by {number.name}"):
            signal.raise_signal(number)
    with stops_between_steps() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped() == "stopped by SIGINT"


def test_where_sigint_is_ignored_it_stays_so_and_sigterm_stops_a_run() -> None:
    """As in a job that a script runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_on_signals()
    signal.raise_signal(signal.SIGINT)
    with stops_between_steps() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped() == ""
        signal.raise_signal(signal.SIGTERM)
        assert stopped() == "stopped by SIGTERM"
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN

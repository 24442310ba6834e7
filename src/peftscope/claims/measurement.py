"""The result of a check: a measured quantity with its evidence, and never a verdict. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Quantity = float | int | bool | str


class NotRunError(Exception):
    """A check lacks its input. The message says what is missing."""


@dataclass(frozen=True)
class Measurement:
    """A measured quantity.

    Attributes:
        value: The quantity that the claim's rule judges, in the claim's unit.
        low: The lower bound of its 95 % interval; None for deterministic quantities.
        high: The upper bound.
        n: The number of independent things behind it: seeds, matrices, settings.
        samples: The paired differences behind an interval, one per seed; empty for deterministic quantities.
        tuning_error: The standard error that the choice of learning rates adds to the mean of the samples.
        evidence: Other measured quantities that explain the value, by name.
        curves: The curves of a small figure: {curve: {x: y}}.
        axes: The labels of the figure's axes.
        model: The model on which the value was measured.
        run_ids: The training runs behind the value.
    """

    value: Quantity
    low: float | None = None
    high: float | None = None
    n: int = 1
    samples: tuple[float, ...] = ()
    tuning_error: float = 0.0
    evidence: Mapping[str, Quantity] = field(default_factory=dict)
    curves: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")
    model: str = ""
    run_ids: tuple[str, ...] = ()


def spoken_number(value: Quantity | None) -> str:
    """Returns a measured quantity as text for people.

    >>> spoken_number(16777216), spoken_number(0.000123456), spoken_number(True), spoken_number(None)
    ('16,777,216', '0.0001235', 'yes', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"

"""What a check returns: a measured quantity with its evidence, and never a verdict. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Quantity = float | int | bool | str


class NotRunError(Exception):
    """What a check reads is not there yet; the message says what is missing."""


@dataclass(frozen=True)
class Measurement:
    """A measured quantity.

    Attributes:
        value: The quantity that the claim's rule looks at, in the claim's unit.
        low: Lower bound of its 95 % interval; None for deterministic quantities.
        high: Upper bound.
        n: Number of independent things behind it: seeds, matrices, settings.
        samples: Paired differences behind an interval, one a seed; empty for deterministic quantities.
        evidence: What else was measured and helps a reader to see why, by name.
        curves: Small figure: {curve: {x: y}}.
        axes: Labels of the figure's axes.
        model: What it was measured on.
        run_ids: Training runs behind it.
    """

    value: Quantity
    low: float | None = None
    high: float | None = None
    n: int = 1
    samples: tuple[float, ...] = ()
    evidence: Mapping[str, Quantity] = field(default_factory=dict)
    curves: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")
    model: str = ""
    run_ids: tuple[str, ...] = ()

"""Which card is cheapest for a run: every known card that it fits on, with the time and the cost. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from peftscope.errors import InputError, Problem
from peftscope.hardware.cards import GPUS, SPEEDS, Fits, Gpu, find_gpu, known_speed
from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.formula.step import TrainingTraces
from peftscope.memory.question import Question
from peftscope.sizing.duration import Duration, Schedule, duration, time_json


@dataclass(frozen=True)
class OnCard:
    """A run on one kind of card.

    Attributes:
        gpu: The card.
        fits: Whether the run fits.
        time: How long it takes, and what it costs if the card has a price.
    """

    gpu: Gpu
    fits: Fits
    time: Duration

    def to_json(self) -> dict[str, Any]:
        """Returns the card as JSON content."""
        return {"card": self.gpu.name, "fits": self.fits, **time_json(self.time)}


def read_prices(text: str | None) -> dict[str, float]:
    """Returns the price of an hour of each card in a list such as ``rtx4090=0.4,a100=1.5``.

    Raises:
        InputError: A part is no card and price, or the card's speed is not known.
    """
    prices = {}
    for part in filter(None, (text or "").split(",")):
        name, _, price = part.partition("=")
        gpu = find_gpu(name)
        try:
            prices[gpu.name] = float(price)
        except ValueError:
            raise InputError(Problem("prices", f"not a card and a price (got {part!r})", "as in a100=1.5")) from None
        if not 0 < prices[gpu.name] < inf:
            raise InputError(Problem("prices", f"must be above 0 (got {part!r})"))
        if known_speed(gpu) is None:
            raise InputError(Problem("prices", f"the speed of {gpu.name} is not known", f"known: {', '.join(SPEEDS)}"))
    return prices


def on_cards(question: Question, schedule: Schedule, prices: Mapping[str, float]) -> list[OnCard]:
    """Returns the cards that a run fits on, the cheapest first, then those without a price, the fastest first.

    ``prices`` are those of an hour, by the card's name.

    Raises:
        InputError: The closed form does not cover the run, or it fits on no card.
    """
    duration(replace(question, gpu=GPUS["a100"]), replace(schedule, price_per_hour=1.0))  # refuses what has no time
    traces, found = TrainingTraces(), []
    for gpu in (GPUS[name] for name in SPEEDS):
        peaks = peaks_by_formula(asked := replace(question, gpu=gpu), traces=traces, enough=gpu.usable_bytes)
        fits = gpu.fits(peaks.least_bytes, peaks.device_bytes)
        time = duration(asked, replace(schedule, price_per_hour=prices.get(gpu.name)))
        if fits != "no" and time:
            found.append(OnCard(gpu, fits, time))
    if not found:
        remedy = "peftscope fit says what to change, and --gpus shards it"
        raise InputError(Problem("cards", f"the run fits on none of {len(SPEEDS)}", remedy))
    return sorted(found, key=lambda one: (one.time.cost.value if one.time.cost else inf, one.time.step_seconds.value))

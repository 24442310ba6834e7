"""The scores of a run, item by item. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

FRACTION, NATS = "fraction", "nats per token"
LOSS = "loss"
LOSSES = ("loss", "nll", "perplexity", "ppl", "bits_per_byte")
LOWER_IS_BETTER = (*LOSSES, "forgetting", "error")


@dataclass(frozen=True)
class Scored:
    """The scores of one run.

    Attributes:
        system: The name of what is compared; runs of one system differ in their seed.
        where: The file or the run that the scores are from.
        seed: The run's seed; None if it is not known.
        metric: The name of the score.
        unit: ``FRACTION``, ``NATS``, or empty if it is not known.
        items: One row per item: its ``value``, its ``weight`` in the mean, and its ``content``, which has to be the
            same on both sides. A run whose items were not kept apart has a single row.
        setting: Everything else that decides the run, as text; empty if the file does not say.
        study: The study and the arm that the run was read from, if it was.
    """

    system: str
    where: str
    seed: int | None
    metric: str
    unit: str
    items: pd.DataFrame
    setting: str = ""
    study: tuple[str, str] | None = None

    @property
    def score(self) -> float:
        """The mean over the items."""
        return float((self.items["value"] * self.items["weight"]).sum() / self.items["weight"].sum())

    @property
    def has_items(self) -> bool:
        """Whether the items were kept apart."""
        return len(self.items) > 1

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower score is the better one, by the name of the metric."""
        return any(word in self.metric.lower() for word in LOWER_IS_BETTER)


def unit_of(runs: Iterable[Scored]) -> str:
    """Returns the unit that all runs have; empty if there is none."""
    units = {run.unit for run in runs}
    return units.pop() if len(units) == 1 else ""

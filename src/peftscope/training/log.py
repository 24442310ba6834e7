"""The measurements of the training loop, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from peftscope.record import Speed
from peftscope.spec import RunSpec


@dataclass
class TrainingLog:
    """The measurements of the loop, step by step."""

    nll: list[float | None] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    padded_tokens: list[int] = field(default_factory=list)
    useful_flops: list[int] = field(default_factory=list)
    validation_nll: dict[int, float] = field(default_factory=dict)
    retention: dict[int, float] = field(default_factory=dict)
    shift: dict[int, dict[str, float]] = field(default_factory=dict)
    paged_state_bytes: int | None = None
    data_seconds: float = 0.0

    def write_speed(self, speed: Speed, spec: RunSpec) -> None:
        """Writes median and quartiles of the timed steps into ``speed``. Without timed steps, it writes nothing."""
        timed = slice(spec.untimed_steps, None)
        seconds = np.array(self.step_seconds[timed])
        if seconds.size == 0:
            return
        lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75])
        speed.timed_steps = int(seconds.size)
        speed.step_seconds_median = float(median)
        speed.step_seconds_lower_quartile = float(lower)
        speed.step_seconds_upper_quartile = float(upper)
        speed.tokens_per_second = float(np.median(np.array(self.tokens[timed]) / seconds))
        speed.padded_tokens_per_second = float(np.median(np.array(self.padded_tokens[timed]) / seconds))
        speed.useful_flops_per_second = float(np.median(np.array(self.useful_flops[timed]) / seconds))
        speed.data_seconds = self.data_seconds

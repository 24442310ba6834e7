"""How long a training takes and what it costs: the time of a step over a data set, with its interval. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from peftscope.errors import InputError, Problem, raise_any
from peftscope.hardware.cards import Gpu, Speed, known_speed
from peftscope.memory.question import Question
from peftscope.sizing.speed import fitted, step_time

FP32_SHARE = 0.25
"""The rate of fp32 products over that of bf16, as on most cards, where only the latter is given."""


@dataclass(frozen=True)
class Range:
    """A prediction, and the interval that 80 % of left-out speeds fell into."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Returns so many times as much."""
        return Range(factor * self.value, factor * self.low, factor * self.high)


@dataclass(frozen=True)
class Schedule:
    """A question about time: how much data, at what price, and what a card without a known speed can do.

    Raises:
        InputError: A number is not above 0.
    """

    examples: int | None = None
    epochs: float | None = None
    price_per_hour: float | None = None
    tflops: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        wrong = [(name, value) for name, value in given.items() if not 1e-12 < value < 1e12]
        raise_any(Problem(name, f"must be above 0 and below 1e12 (got {value:g})") for name, value in wrong)
        if self.examples is None and self.epochs is not None:
            raise InputError(Problem("epochs", "of how many examples is not said", "give --examples"))

    def speed(self, gpu: Gpu | None) -> Speed | None:
        """Returns what a card can do: what is given or, by its name, what is known. None: it is not known.

        Raises:
            InputError: The time is asked for, but there is no card, or nothing is known of it.
        """
        asked = any(value is not None for value in asdict(self).values())
        if gpu is None and asked:
            raise InputError(Problem("gpu", "none given, and time and price depend on it", "give --gpu"))
        known = known_speed(gpu) if gpu else None
        if known is None and (self.tflops is None or self.bandwidth is None):
            if gpu and asked:
                remedy = "give --tflops (bf16, dense) and --bandwidth (GB/s) of its data sheet"
                raise InputError(Problem("gpu", f"the speed of {gpu.name} is not known", remedy))
            return None
        bf16 = self.tflops * 1e12 if self.tflops is not None else known.bf16_flops if known else 0.0
        fp32 = known.fp32_flops if known and self.tflops is None else FP32_SHARE * bf16
        size = self.bandwidth * 1e9 if self.bandwidth is not None else known.memory_bytes if known else 0.0
        return Speed(bf16, fp32, size, known.link_bytes) if known else Speed(bf16, fp32, size)


@dataclass(frozen=True)
class Duration:
    """How long a training takes, and what it costs.

    Attributes:
        tokens_per_second: Of all cards, padding included.
        step_seconds: Of an optimizer step.
        parts: The seconds of each part of a step.
        steps: The optimizer steps of the training; None if no number of examples was given, as for what follows.
        epoch_seconds: Of an epoch.
        training_seconds: Of all epochs; evaluations, loading and saving are not in it.
        cost: Of all cards for the training, or for 1M tokens without a number of examples; None without a price.
        unvalidated: Why no measured speeds stand behind the interval; empty if some do.
    """

    tokens_per_second: Range
    step_seconds: Range
    parts: dict[str, float]
    steps: int | None
    epoch_seconds: Range | None
    training_seconds: Range | None
    cost: Range | None
    unvalidated: str


def time_json(time: Duration | None) -> dict[str, Any]:
    """Returns a time as JSON content: ``tokens_per_second``, and all else under ``time``. The keys are stable."""
    content = {} if time is None else asdict(time)
    return {"tokens_per_second": content.pop("tokens_per_second", None), "time": content or None}


def duration(question: Question, schedule: Schedule) -> Duration | None:
    """Returns how long a run takes on its card; None if the card's speed, the model's shape or the job is not known.

    Every sequence has the length ``seq_len``: padding is computed like tokens.

    Raises:
        InputError: The time is asked for, but there is no card, or nothing is known of it or of the model.
    """
    speed = schedule.speed(question.gpu)
    if speed is None:
        return None
    spec, shape = question.spec, question.model.shape
    job = "" if question.beside.job == "sft" else question.beside.job
    if job or shape is None or shape.experts:
        if schedule == Schedule():
            return None
        if job:
            raise InputError(Problem("job", f"the time of {job} is not modelled", "leave out what asks for a time"))
        why = question.model.why_no_shape or "its experts' products are not"
        raise InputError(Problem("model", f"its time is not modelled: {why}"))
    step = step_time(question, speed)
    seconds = with_interval(step.seconds)
    tokens = Range(*(step.cards * step.tokens / value for value in (seconds.value, seconds.high, seconds.low)))
    epoch = training = steps = cost = None
    if schedule.examples:
        each = ceil(schedule.examples / (spec.batch_size * spec.gradient_accumulation * question.gpus))
        steps = ceil(each * (schedule.epochs or 1))
        epoch, training = seconds.times(each), seconds.times(steps)
    if schedule.price_per_hour:
        hours = training or seconds.times(1e6 / (step.cards * step.tokens))
        cost = hours.times(schedule.price_per_hour * question.gpus / 3600)
    return Duration(
        tokens_per_second=tokens,
        step_seconds=seconds,
        parts={part: taken for part, taken in step.parts.items() if taken},
        steps=steps,
        epoch_seconds=epoch,
        training_seconds=training,
        cost=cost,
        unvalidated=unvalidated(question),
    )


def with_interval(seconds: float) -> Range:
    """Returns a predicted time with its interval."""
    low, high = fitted()[1]["interval"]
    return Range(seconds, seconds / high, seconds / low)


def unvalidated(question: Question) -> str:
    """Returns why no measured speeds stand behind a run's interval; empty if some do."""
    spec, known = question.spec, fitted()[1]["methods"]
    if spec.method.name not in known:
        return f"no measured speed of {spec.method.name}"
    if spec.precision != "bf16":
        return f"no measured speed in {spec.precision}"
    beside, model = question.beside, question.model
    if beside.offload != "none" or beside.offload_activations:
        return "what moves to the host is not timed"
    unknown = {"a quantised checkpoint": model.stored, "a vision tower": model.vision}
    for what, has_it in (unknown | {"such an optimizer": beside.optimizer_states != "own"}).items():
        if has_it:
            return f"no measured speed of {what}"
    return f"no run on {question.gpus} cards was fitted" if question.gpus > 1 else ""

"""What fits on a card: each method with its headroom, the largest sizes that still fit, and advice. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from peftscope.errors import InputError, Problem, close_match
from peftscope.hardware.cards import Gpu
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.question import METHOD_OPTIONS, Model, Question, ask, narrowest_target
from peftscope.memory.trace import by_kind
from peftscope.methods import METHODS

LARGEST_BATCH_SIZE = 4096
LARGEST_RANK = 1024
LONGEST_SEQUENCE = 131_072
"""Of models that do not state theirs."""

ADVICE: tuple[dict[str, Any], ...] = (
    {"checkpointing": True},
    {"batch_size": 1},
    {"checkpointing": True, "batch_size": 1},
    {"optimizer": "adamw_8bit"},
    {"checkpointing": True, "batch_size": 1, "optimizer": "adamw_8bit"},
    {"method": "qlora"},
    {"method": "qlora", "checkpointing": True},
    {"method": "qlora", "checkpointing": True, "batch_size": 1},
    {"method": "qlora", "checkpointing": True, "batch_size": 1, "seq_len": 256},
)
"""What may help where something does not fit, mildest first."""


@dataclass(frozen=True)
class Fit:
    """Whether one method fits. All peaks are without an evaluation; None where the method cannot run as asked.

    Attributes:
        model: As it was asked for.
        method: Its name.
        how: Closed form, or simulation where the method has none; then no largest size is searched for.
        fits: Whether it does.
        peak_allocated_bytes: Of torch's allocator.
        peak_reserved_bytes: Segments that the allocator holds.
        peak_device_bytes: What the card needs.
        binding_phase: Where the allocated peak is.
        phases: Allocated peak of each phase.
        components: What is alive at the peak, by kind.
        capacity_bytes: What the card has.
        headroom_bytes: What is left; negative: what is missing.
        largest_batch_size: Up to ``LARGEST_BATCH_SIZE``, with everything else as asked; None: not even 1.
        largest_seq_len: The same for the length of a sequence, up to the model's limit.
        largest_rank: The same for the rank; None also where there is none.
        advice: The mildest change that makes it fit, or why it cannot run as asked; empty if it fits.
        assumptions: What the peaks rest on.
    """

    model: str
    method: str
    capacity_bytes: int
    fits: bool
    how: Literal["formula", "simulation"] = "formula"
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_bytes: int | None = None
    binding_phase: str | None = None
    phases: dict[str, int] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=dict)
    headroom_bytes: int | None = None
    largest_batch_size: int | None = None
    largest_seq_len: int | None = None
    largest_rank: int | None = None
    advice: str = ""
    assumptions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the fit as JSON content."""
        return asdict(self)


def known_methods(names: str | None) -> list[str]:
    """Returns the methods of a list with commas, or all that train.

    Raises:
        InputError: One is not known.
    """
    trained = [name for name, method in METHODS.items() if method.trains]
    chosen = [name.strip() for name in (names or "").split(",") if name.strip()]
    if not chosen:
        return trained
    unknown = [name for name in chosen if name not in trained]
    if unknown:
        raise InputError(
            Problem("methods", f"unknown method (got {name!r})", close_match(name, trained)) for name in unknown
        )
    return chosen


def fit_methods(
    models: Sequence[Model],
    methods: Sequence[str],
    options: Mapping[str, Any],
    gpu: Gpu,
    gpus: int = 1,
) -> Iterator[Fit]:
    """Yields one fit per model and method; an option of a method goes only to methods that have it.

    A method that cannot run as asked gets a row that says why.

    Raises:
        InputError: After the rows: nothing can run as asked.
    """
    problems: list[Problem] = []
    some = False
    for model in models:
        for method in methods:
            try:
                fit = _Search(model, method, options, gpu, gpus).fit()
                some = True
            except InputError as error:
                problems += error.problems
                reason = "; ".join(f"{problem.where}: {problem.message}" for problem in error.problems)
                fit = Fit(model.name, method, gpu.memory_bytes, fits=False, advice=f"cannot run as asked: {reason}")
            yield fit
    if not some:
        raise InputError(problems)


def options_of_method(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the options that a method has, and its name; rank means AdaLoRA's initial rank, too."""
    fields = METHODS[method].model_fields
    found = {k: v for k, v in options.items() if v is not None and (k not in METHOD_OPTIONS or k in fields)}
    if "rank" not in fields and options.get("rank"):
        found |= METHODS[method].with_rank(options["rank"])
    if not METHODS[method].supports_checkpointing:
        found.pop("checkpointing", None)
    return {**found, "method": method}


@dataclass(frozen=True)
class _Search:
    """Asks about one model and method again and again, with some of the options changed."""

    model: Model
    method: str
    asked: Mapping[str, Any]
    gpu: Gpu
    gpus: int

    def fit(self) -> Fit:
        """Returns whether it fits, and the largest sizes that do.

        Raises:
            InputError: It cannot run as asked.
        """
        options = options_of_method(self.method, self.asked)
        question = self._question(options)
        if question.spec.method.closed_form is None:
            return self._simulated(question)
        peaks = self._peaks(options)
        capacity = self.gpu.memory_bytes
        longest = self.model.max_seq_len or LONGEST_SEQUENCE

        def most(field: str, limit: int) -> int | None:
            return largest(lambda value: self._peaks({**options, field: value}).device_bytes, capacity, limit)

        return replace(
            self._fit_of(question, peaks),
            largest_batch_size=most("batch_size", LARGEST_BATCH_SIZE),
            largest_seq_len=most("seq_len", longest - getattr(question.spec.method, "virtual_tokens", 0)),
            largest_rank=self._largest_rank(options, narrowest_target(self.model, question.spec) or LARGEST_RANK),
        )

    def _simulated(self, question: Question) -> Fit:
        from peftscope.memory.simulate import peaks_by_simulation

        return replace(self._fit_of(question, peaks_by_simulation(question, evaluation=False)), how="simulation")

    def _fit_of(self, question: Question, peaks: Peaks) -> Fit:
        taken, capacity = peaks.device_bytes, self.gpu.memory_bytes
        return Fit(
            model=self.model.name,
            method=self.method,
            capacity_bytes=capacity,
            fits=taken <= capacity,
            peak_allocated_bytes=peaks.allocated_bytes,
            peak_reserved_bytes=peaks.reserved_bytes,
            peak_device_bytes=taken,
            binding_phase=peaks.binding_phase,
            phases=peaks.phases,
            components=by_kind(peaks.blocks[peaks.binding_phase]),
            headroom_bytes=capacity - taken,
            advice="" if taken <= capacity else self._advice(),
            assumptions=question.assumptions,
        )

    def _question(self, options: Mapping[str, Any]) -> Question:
        return ask(self.model, options, gpu=self.gpu, gpus=self.gpus)

    def _peaks(self, options: Mapping[str, Any]) -> Peaks:
        # An evaluation of the same batch keeps nothing for a backward pass, so that it does not decide.
        return peaks_by_formula(self._question(options), evaluation=False)

    def _largest_rank(self, options: Mapping[str, Any], narrowest: int) -> int | None:
        method = METHODS[self.method]
        if not method.with_rank(1):
            return None

        def taken(rank: int) -> int:
            return self._peaks({**options, **method.with_rank(rank)}).device_bytes

        return largest(taken, self.gpu.memory_bytes, min(LARGEST_RANK, narrowest))

    def _advice(self) -> str:
        for changes in ADVICE:
            options = options_of_method(changes.get("method", self.method), self.asked)
            try:
                taken = self._peaks({**options, **changes}).device_bytes
            except InputError:
                continue
            if taken <= self.gpu.memory_bytes:
                return " ".join(
                    f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                    for name, value in changes.items()
                )
        return "a smaller model, a larger card, or --gpus"


def largest(takes: Callable[[int], int], capacity: int, limit: int) -> int | None:
    """Returns a number up to ``limit`` whose bytes fit while those of one more do not; None if those of 1 do not fit.

    It is the largest where more never takes less. Reserved bytes fall now and then, where a length fragments less, so
    that some number beyond may fit as well. Bytes are nearly a straight line, so that a guess along it is close.

    >>> largest(lambda n: 10 + 3 * n, 100, 1000), largest(lambda n: 10 + 3 * n, 12, 1000), largest(lambda n: n, 100, 50)
    (30, None, 50)
    """
    low, low_bytes = 1, takes(1)
    if low_bytes > capacity:
        return None
    high, high_bytes = limit + 1, 0
    step = 1.0
    while high - low > 1:
        if high_bytes:
            step = (high_bytes - low_bytes) / (high - low)
            guess = low + int((capacity - low_bytes) / step)
        else:
            guess = 2 if low == 1 else low + int((capacity - low_bytes) / step)
        # Never only one end: a guess just above what fits settles most searches.
        guess = min(max(guess, low + 1), high - 1)
        size = takes(guess)
        if size <= capacity:
            step = max(1.0, (size - low_bytes) / (guess - low))
            low, low_bytes = guess, size
            if low + 1 < high and takes(low + 1) > capacity:
                return low
        else:
            high, high_bytes = guess, size
    return low

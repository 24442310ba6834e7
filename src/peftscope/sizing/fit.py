"""Which methods fit on a card: their headroom, the largest sizes that still fit, and advice. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

from peftscope.errors import InputError, Problem, close_match, raise_any
from peftscope.hardware.cards import Fits, Gpu
from peftscope.memory.allocator import segment_share
from peftscope.memory.answer import Wanted, peaks_by_formula
from peftscope.memory.assumptions import assumptions_of, unquantised_experts
from peftscope.memory.base import Model
from peftscope.memory.formula.step import without_collector
from peftscope.memory.formula.terms import sizes_of
from peftscope.memory.question import ask, narrowest_target, usual_responses
from peftscope.memory.trace import by_kind, bytes_of, factors
from peftscope.methods import METHODS
from peftscope.sizing.changes import Asked, remedies_of, untested
from peftscope.sizing.duration import Duration, Schedule, duration, time_json
from peftscope.sizing.needs import Needs, options_of_method
from peftscope.sizing.search import largest

LARGEST_BATCH_SIZE = 4096
LARGEST_RANK = 1024
LONGEST_SEQUENCE = 131_072
"""The longest sequence that is tried with a model that states no limit."""


@dataclass(frozen=True)
class Fit:
    """The answer whether one method fits. Peaks are None if the method cannot run.

    Attributes:
        model: The model's name, as the question gave it.
        method: The name of the method.
        how: The closed form, or the simulation for a method without one. A simulation finds no largest sizes.
        fits: Whether the method fits, as ``Gpu.fits`` says it.
        peak_allocated_bytes: The peak that torch's allocator counts.
        peak_reserved_bytes: The peak of the segments that the allocator holds.
        peak_device_bytes: The bytes that the card needs.
        binding_phase: The phase that has the allocated peak.
        phases: The allocated peak of each phase.
        components: The bytes that are alive at the peak, by kind.
        capacity_bytes: The bytes of the card that CUDA can hand out.
        headroom_bytes: The bytes that are left where nothing has to be given back. A negative number says how many are
            missing to that.
        missing_bytes: The bytes that are missing for the tensors; 0 if it fits.
        largest_batch_size: The largest batch size that fits, up to ``LARGEST_BATCH_SIZE``, with all else unchanged.
            None means that not even 1 fits.
        largest_tight_batch_size: The largest batch size that fits, tightly or with room.
        largest_seq_len: The same for the length of a sequence, up to the model's limit.
        largest_rank: The same for the rank. None also for a method without a rank.
        advice: The mildest change that makes the method fit, or the reason why it cannot run; empty if it fits.
        advised_device_bytes: The bytes that the card needs after that change; None without one.
        assumed: The batch size, length, rank, precision, loss path and job that were asked about.
        assumptions: The assumptions behind the peaks, one sentence each.
        time: How long it takes; None if the method cannot run, or nothing is known of the card's speed.
    """

    model: str
    method: str
    capacity_bytes: int
    fits: Fits = "no"
    how: Literal["formula", "simulation"] = "formula"
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_bytes: int | None = None
    binding_phase: str | None = None
    phases: dict[str, int] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=dict)
    headroom_bytes: int | None = None
    missing_bytes: int | None = None
    largest_batch_size: int | None = None
    largest_tight_batch_size: int | None = None
    largest_seq_len: int | None = None
    largest_rank: int | None = None
    advice: str = ""
    advised_device_bytes: int | None = None
    assumed: dict[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    time: Duration | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the fit as JSON content."""
        return asdict(self) | time_json(self.time)


def known_methods(names: str | None) -> list[str]:
    """Returns the methods of a comma-separated list, or all that train and have a closed form if the list is empty.

    A method without one takes as long to simulate as all others together.

    Raises:
        InputError: A method is unknown.
    """
    trained = [name for name, method in METHODS.items() if method.trains]
    chosen = [name.strip() for name in (names or "").split(",") if name.strip()]
    if not chosen:
        return [name for name in trained if METHODS[name].closed_form]
    unknown = [name for name in chosen if name not in trained]
    raise_any(Problem("methods", f"unknown method (got {name!r})", close_match(name, trained)) for name in unknown)
    return chosen


def fit_methods(
    models: Sequence[Model],
    methods: Sequence[str],
    options: Mapping[str, Any],
    gpu: Gpu,
    gpus: int = 1,
    schedule: Schedule | None = None,
) -> Iterator[Fit]:
    """Yields one fit per model and method. An option of a method is passed only to methods that have it.

    For a method that cannot run with the options, the fit says why. ``schedule`` is what is asked about time.

    Raises:
        InputError: No method can run with the options. The error comes after the last fit.
    """
    problems: list[Problem] = []
    some, needs, schedule = False, Needs(gpu), schedule or Schedule()
    schedule.speed(gpu)
    with without_collector():  # all the time: whenever it starts again, it looks at every block
        for model in models:
            for method in methods:
                try:
                    search = Search(model, method, options, needs, gpus)
                    fit = replace(search.fit(), time=duration(search.question, schedule))
                    some = True
                except InputError as error:
                    problems += error.problems
                    reason = "; ".join(f"{problem.where}: {problem.message}" for problem in error.problems)
                    fit = Fit(model.name, method, gpu.usable_bytes, advice=f"cannot run as asked: {reason}")
                yield fit
    if not some:
        raise InputError(problems or [Problem("models and methods", "none given", "name at least one of each")])


class Search:
    """Asks about one model and method repeatedly, each time with some options changed.

    A method without a closed form is simulated only once, with the given options, because a simulation is slow.

    Options that the method does not have are left out. ``needs`` has what is known of the card from other searches.

    Raises:
        InputError: The method cannot run with the options.
    """

    def __init__(self, model: Model, method: str, asked: Mapping[str, Any], needs: Needs, gpus: int = 1) -> None:
        self.model, self.method, self.asked, self.needs = model, method, asked, needs
        self._options = options_of_method(method, asked)
        self._ask = partial(ask, model, gpu=needs.gpu, gpus=gpus)
        self._peaks = partial(peaks_by_formula, traces=needs.traces)
        self.question = self._ask(self._options)
        formula = self.question.has_closed_form
        self._how: Literal["formula", "simulation"] = "formula" if formula else "simulation"
        self._asked_peaks = self._peaks(self.question) if formula else needs.simulated(self.question)
        alive = self._asked_peaks.alive(self._asked_peaks.binding_phase)
        self._components, self._experts = by_kind(alive), unquantised_experts(self.question, alive)
        numbers = Counter(block.formula for block in alive if block.formula)
        self._line = [(*factors(formula), number) for formula, number in numbers.items()]

    def fit(self) -> Fit:
        """Returns whether the method fits, and the largest sizes that fit."""
        peaks, capacity, spec = self._asked_peaks, self.needs.gpu.usable_bytes, self.question.spec
        room = self.needs.gpu.room(peaks.least_bytes, peaks.device_bytes)
        fits: Fits = room["fits"]
        asked = Asked(self.question, self.asked)
        remedies = remedies_of(asked, peaks, self.needs, most=1) if fits != "yes" else []
        fit = Fit(
            model=self.model.name,
            method=self.method,
            capacity_bytes=capacity,
            **room,
            how=self._how,
            peak_allocated_bytes=peaks.allocated_bytes,
            peak_reserved_bytes=peaks.reserved_bytes,
            peak_device_bytes=peaks.device_bytes,
            binding_phase=peaks.binding_phase,
            phases=peaks.phases,
            components=self._components,
            advice=remedies[0].words if remedies else "" if fits == "yes" else untested(asked, fits, peaks, capacity),
            advised_device_bytes=remedies[0].peak_device_bytes if remedies else None,
            assumed={
                "batch_size": spec.batch_size,
                "seq_len": spec.seq_len,
                "rank": getattr(spec.method, spec.method.rank_field, None),
                "precision": spec.precision,
                "loss_path": spec.loss_path,
                "job": self.question.beside.job,
            },
            assumptions=(*self._experts, *assumptions_of(self.question)),
        )
        if self._how == "simulation":
            return fit
        most = min(LARGEST_RANK, narrowest_target(self.model, spec) or LARGEST_RANK)
        return replace(
            fit,
            largest_batch_size=self.largest("batch_size", LARGEST_BATCH_SIZE),
            largest_tight_batch_size=self.largest("batch_size", LARGEST_BATCH_SIZE, tight=True),
            largest_seq_len=self.largest("seq_len", self.longest()),
            largest_rank=self.largest("rank", most) if METHODS[self.method].with_rank(1) else None,
        )

    def longest(self) -> int:
        """Returns the longest sequence that the model accepts."""
        longest = self.model.max_seq_len or LONGEST_SEQUENCE
        return longest - getattr(self.question.spec.method, "virtual_tokens", 0)

    def largest(self, field: str, limit: int, *, tight: bool = False) -> int | None:
        """Returns the largest value of a field that fits, with all else unchanged, or None if not even 1 fits.

        ``limit`` is the largest value to try; ``tight``: the allocator may give cached memory back.

        Raises:
            InputError: The method has no closed form.
        """

        def takes(value: int, only_whether: bool) -> int:
            peaks = self._asked_peaks
            wanted: Wanted = "all" if tight else "whether" if only_whether else "reserved"
            if value != start:
                question = self._ask({**self._options, **self._changes(field, value)})
                peaks = self._peaks(question, enough=capacity, wanted=wanted)
            return peaks.least_bytes if tight else peaks.device_bytes

        spec, capacity = self.question.spec, self.needs.gpu.usable_bytes
        start = getattr(spec.method, spec.method.rank_field) if field == "rank" else getattr(spec, field)
        return largest(takes, partial(self._expected, field), capacity, limit, start)

    def _changes(self, field: str, value: int) -> dict[str, int]:
        return METHODS[self.method].with_rank(value) if field == "rank" else {field: value}

    def _expected(self, field: str, value: int) -> float:
        """Returns the bytes of the blocks that are alive at the peak, recomputed for another value of a field."""
        spec, changes = self.question.spec, self._changes(field, value)
        spec = spec.model_copy(
            update={"method": spec.method.model_copy(update=changes)} if field == "rank" else changes
        )
        question = replace(self.question, spec=spec, responses=usual_responses(spec.seq_len))
        sizes = {**sizes_of(question), "2": 2, "1/G": 1 / question.gpus, "2/G": 2 / question.gpus}
        return sum(number * segment_share(bytes_of(width, names, sizes)) for width, names, number in self._line)

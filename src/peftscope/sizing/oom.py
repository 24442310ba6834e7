"""The causes of an out-of-memory error of torch: allocations of the asked size, fragments, remedies. No torch.

Source: ``CUDACachingAllocator.cpp``, whose text changed with torch 1.4 and 2.1. The size in it is that of the segment
that the allocator asked CUDA for, rounded to two decimals.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from peftscope.errors import InputError, Problem
from peftscope.hardware.cards import Fits, Gpu
from peftscope.memory.allocator import MIDDLE_SEGMENT, SMALL_SEGMENT, segment_bytes
from peftscope.memory.answer import Peaks, dimensions_of, name_of, peaks_of, prepared_bytes, term_of
from peftscope.memory.formula.step import trace_evaluation, trace_training
from peftscope.memory.formula.terms import SOURCES
from peftscope.memory.question import Question, ask, options_of
from peftscope.memory.trace import Block, Trace, by_kind, bytes_of
from peftscope.sizing.changes import Asked, Remedy, remedies_of
from peftscope.sizing.needs import Needs
from peftscope.words import GIB, MIB, spoken_bytes

UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": MIB, "GiB": GIB, "TiB": 1 << 40}
_SIZE = rf"(\d{{1,15}}(?:\.\d{{1,15}})?) ?({'|'.join(UNITS)})"
PATTERNS = {
    "requested": rf"Tried to allocate {_SIZE}",
    "capacity": rf"total capaci?ty of {_SIZE}|; {_SIZE} total capacity",
    "free": rf"of which {_SIZE} is free|; {_SIZE} free",
    "in_use": rf"this process has {_SIZE} memory in use",
    "allocated": rf"Of the allocated memory {_SIZE} is allocated|; {_SIZE} already allocated",
    "reserved": rf"; {_SIZE} reserved in total",
    "unallocated": rf"{_SIZE} is reserved by PyTorch but unallocated|; {_SIZE} cached",
}
"""Where each figure stands, by version of torch."""

MATH_SCORES = "scores of one layer, if SDPA takes its math kernel"
FAR = 0.1
"""A warning follows if a candidate's live bytes differ from the message's by more than this share."""


@dataclass(frozen=True)
class Refusal:
    """The figures of an error, in bytes. None: the text does not give them.

    Attributes:
        requested: What was asked of CUDA, at the precision of the text.
        slack: How far the true size may be from that.
        capacity: The memory of the card.
        free: What CUDA had left.
        in_use: What the process had, with its context.
        allocated: What tensors took.
        unallocated: What the allocator held beyond that.
    """

    requested: int
    slack: int
    capacity: int | None = None
    free: int | None = None
    in_use: int | None = None
    allocated: int | None = None
    unallocated: int | None = None

    def matches(self, size: int) -> bool:
        """Returns whether a block of this size, or its segment, can be what was asked for."""
        return any(abs(one - self.requested) <= self.slack for one in (size, segment_bytes(size)))

    @property
    def usable(self) -> int | None:
        """The card's memory without what other processes take, as far as the text says."""
        if self.capacity is None or self.free is None or self.in_use is None or self.in_use > self.capacity:
            return self.capacity
        return self.free + self.in_use


@dataclass(frozen=True)
class Candidate:
    """Allocations that match the request.

    Attributes:
        phase: ``load`` or a phase of a step.
        name: What the blocks hold.
        formula: The bytes of one, as a product of named dimensions.
        size_bytes: The bytes of one.
        count: How often a phase allocates one.
        live_bytes: What is alive before it, at the allocation that fits the text best; of ``load``, at its end.
            None: not known.
        alive: The same by kind.
        source: The code that allocates them.
    """

    phase: str
    name: str
    formula: str
    size_bytes: int
    count: int
    live_bytes: int | None
    alive: dict[str, int]
    source: str


@dataclass(frozen=True)
class Diagnosis:
    """The causes of an error.

    Attributes:
        refusal: The figures of the text.
        peak_allocated_bytes: The predicted peak of tensors, evaluation included.
        peak_device_bytes: The predicted need of the card, evaluation included.
        candidates: The allocations that match, the likeliest first.
        nearest: If none matches, the allocations that are closest in size.
        sentences: The explanation.
        remedies: What makes the run fit, what costs the least quality first.
    """

    refusal: Refusal
    peak_allocated_bytes: int
    peak_device_bytes: int
    candidates: list[Candidate]
    nearest: list[Candidate]
    sentences: list[str]
    remedies: list[Remedy] = field(default_factory=list)


def read_refusal(text: str) -> Refusal:
    """Returns the figures of torch's out-of-memory error, of the first one if there are several.

    Raises:
        InputError: The text has no such error.
    """
    flat = re.sub(r"[\s│]+", " ", text)
    start = flat.find("Tried to allocate")
    following = flat.find("Tried to allocate", start + 1)
    flat = flat[start:following] if following > 0 else flat[start:]
    found: dict[str, tuple[int, int]] = {}
    for name, pattern in PATTERNS.items():
        if match := re.search(pattern, flat):
            number, unit = [group for group in match.groups() if group is not None]
            decimals = len(number.partition(".")[2])
            found[name] = round(float(number) * UNITS[unit]), int(UNITS[unit] * 10**-decimals / 2) + 1
    if start < 0 or "requested" not in found:
        remedy = "paste torch's message with `Tried to allocate 2.32 GiB`, or name a file that has it"
        raise InputError(Problem("error", "the text has no size that torch tried to allocate", remedy))
    figures = {name: size for name, (size, _) in found.items()}
    (requested, slack), reserved = found["requested"], figures.pop("reserved", None)
    if reserved is not None and "allocated" in figures:
        figures["unallocated"] = max(0, reserved - figures["allocated"])
    return Refusal(**{**figures, "requested": requested, "slack": slack})


def diagnose(question: Question, refusal: Refusal) -> Diagnosis:
    """Returns which allocations of a run match a refusal, and what would fit.

    Raises:
        InputError: The closed form does not cover the method or the model.
    """
    spec = question.spec
    if not question.has_closed_form:
        where = "method" if spec.method.closed_form is None else "model"
        remedy = "peftscope memory --simulate says what the run takes"
        raise InputError(Problem(where, "its single allocations are known from the closed form only", remedy))
    if question.gpus > 1:
        raise InputError(Problem("gpus", f"allocations are known on one card only (got {question.gpus})"))
    training = trace_training(question) if spec.method.trains else None
    evaluation = trace_evaluation(question)
    peaks = peaks_of(question, training, evaluation)
    every = [
        *_loaded(question, peaks),
        *(_of_trace(training, refusal) if training else ()),
        *_of_trace(evaluation, refusal),
        *_unmodelled(question),
    ]
    candidates = sorted((one for one in every if refusal.matches(one.size_bytes)), key=lambda one: _rank(one, refusal))
    nearest = [] if candidates else sorted(every, key=lambda one: abs(one.size_bytes - refusal.requested))[:2]
    room = refusal.usable
    sentences = [*_about_candidates(candidates, nearest, refusal), *_about_room(peaks, refusal)]
    remedies = _remedies(question, room, peaks) if room and training else []
    return Diagnosis(refusal, peaks.allocated_bytes, peaks.device_bytes, candidates, nearest, sentences, remedies)


def _of_trace(trace: Trace, refusal: Refusal) -> Iterator[Candidate]:
    """Yields a candidate for each kind of allocation in the phases of a trace."""
    target, live = refusal.allocated, 0
    best: dict[tuple[str, str, str, int], tuple[float, int, int]] = {}
    counts: Counter[tuple[str, str, str, int]] = Counter()
    for phase, first, last in trace.segments():
        within: Counter[tuple[str, str, str, int]] = Counter()
        for position, event in enumerate(trace.events[first:last], first):
            block = trace.blocks[event if event >= 0 else ~event]
            size = 0 if block.paged else block.size
            if event >= 0 and phase and size:
                key = phase, _spoken(block), block.formula, size
                within[key] += 1
                # Without a figure, the likeliest is where most is alive.
                distance = abs(live - target) if target is not None else -live
                if key not in best or distance < best[key][0]:
                    best[key] = distance, position, live
            live += size if event >= 0 else -size
        counts |= within
    for key, (_, position, before) in best.items():
        phase, name, formula, size = key
        alive = by_kind([block for block in trace.alive(position) if not block.paged]) if refusal.matches(size) else {}
        yield Candidate(phase, name, formula, size, counts[key], before, alive, SOURCES.get(name, ""))


def _loaded(question: Question, peaks: Peaks) -> Iterator[Candidate]:
    """Yields what loading and preparation allocate: blocks that stay, and the temporary of the largest layer."""
    blocks = peaks.alive("load")
    whole = sum(block.size for block in blocks)
    counts = Counter((_spoken(block), block.formula, block.size) for block in blocks)
    prepared = {(_spoken(block), block.formula) for block in blocks if prepared_bytes(question, block)}
    for (name, formula, size), count in counts.items():
        copied = (name, formula) in prepared
        source = "peft prepare_model_for_kbit_training" if copied else SOURCES.get(name, "")
        name = f"fp32 copy of {name}" if copied else name
        yield Candidate("load", name, formula, size, count, whole, by_kind(blocks), source)


def _unmodelled(question: Question) -> Iterator[Candidate]:
    """Yields allocations of a step that the closed form does not have, because another kernel makes them."""
    if question.spec.attention != "sdpa":
        return
    for phase in ("forward", "evaluate"):
        sizes = dimensions_of(question, phase)
        for width in (4, 2):
            names = ["B", "a", "S", "P"]
            formula = "·".join([str(width), *names])
            source = "torch scaled_dot_product_attention: _scaled_dot_product_attention_math"
            yield Candidate(phase, MATH_SCORES, formula, bytes_of(width, names, sizes), 1, None, {}, source)


def _spoken(block: Block) -> str:
    persistent = ("weights", "quantised weights", "adapters", "gradients")
    return f"{block.term or name_of(block)} ({block.kind})" if block.kind in persistent else term_of(block)


def _rank(one: Candidate, refusal: Refusal) -> tuple[bool, float]:
    """Returns the order of candidates: by what is alive before each, compared with the text if that says so."""
    if one.live_bytes is None:
        return True, 0.0
    if refusal.allocated is None:
        return False, -one.live_bytes
    return False, _misfit(one.live_bytes, one.phase, refusal.allocated)


def _misfit(live: int, phase: str, allocated: int) -> int:
    """Returns how far what is alive is from the text. While a model loads, anything up to all of it is alive."""
    return max(0, allocated - live) if phase == "load" else abs(allocated - live)


def _about_candidates(candidates: list[Candidate], nearest: list[Candidate], refusal: Refusal) -> list[str]:
    asked = spoken_bytes(refusal.requested)
    sentences = []
    if refusal.requested in (SMALL_SEGMENT, MIDDLE_SEGMENT):
        range_ = "of up to 1 MiB" if refusal.requested == SMALL_SEGMENT else "between 1 and 10 MiB"
        sentences.append(f"torch asks for {asked} whenever a block {range_} finds no room: the size says little.")
    if candidates:
        first = candidates[0]
        text = f"The likeliest is {first.name}, {spoken_bytes(first.size_bytes)}, in the phase {first.phase}"
        up_to = "up to " if first.phase == "load" else ""
        text += f", with {up_to}{spoken_bytes(first.live_bytes)} alive" if first.live_bytes is not None else ""
        beside = f" ({spoken_bytes(refusal.allocated)} in the text)" if refusal.allocated is not None else ""
        kinds = "One kind of allocation matches" if len(candidates) == 1 else f"{len(candidates)} kinds match"
        sentences.append(f"{kinds} {asked}. {text}{beside}.")
        live, allocated = first.live_bytes, refusal.allocated
        if live is not None and allocated is not None and _misfit(live, first.phase, allocated) > FAR * allocated:
            sentences.append("That is far from what was alive: other settings ran, or a longer or shorter batch.")
        return sentences
    close = " and ".join(f"{one.name} ({one.phase}, {spoken_bytes(one.size_bytes)})" for one in nearest)
    text = f"None matches: with these settings, no allocation takes {asked}. The closest are {close}."
    return [*sentences, text, "Another length, batch, model or kernel ran, or another program asked."]


def _about_room(peaks: Peaks, refusal: Refusal) -> list[str]:
    sentences = []
    if refusal.unallocated is not None:
        held, asked = spoken_bytes(refusal.unallocated), spoken_bytes(refusal.requested)
        if refusal.unallocated >= refusal.requested:
            sentences.append(
                f"Fragmentation: torch held {held} that no tensor used, more than {asked}, but in pieces. "
                "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may be enough."
            )
        else:
            sentences.append(f"Fragmentation is not the cause: torch held {held} beyond tensors, less than {asked}.")
    if refusal.capacity is not None and refusal.usable is not None and refusal.capacity - refusal.usable > GIB / 10:
        others = spoken_bytes(refusal.capacity - refusal.usable)
        sentences.append(f"Other processes had {others} of the card.")
    if refusal.usable is not None:
        room, least = spoken_bytes(refusal.usable), spoken_bytes(peaks.least_bytes)
        need = f"By the closed form, these settings need {least} of the card's {room}"
        taken = f"By the closed form, these settings take {spoken_bytes(peaks.device_bytes)} of the card's {room}"
        said: dict[Fits, str] = {
            "no": f"{need}: they do not fit.",
            "tight": f"{taken} where there is room, and {least} at least: it is tight, and fragmentation may decide.",
            "yes": f"{taken}: they fit, so what ran was larger than these settings.",
        }
        sentences.append(said[Gpu("the card", refusal.usable).fits(peaks.least_bytes, peaks.device_bytes)])
    return sentences


def _remedies(question: Question, room: int, peaks: Peaks) -> list[Remedy]:
    """Returns what makes the run fit on the card of the text; an evaluation counts too if it is what does not fit."""
    card = replace(question.gpu, memory_bytes=room, reserve_bytes=0) if question.gpu else Gpu("the card", room)
    too_large = peaks.binding_phase == "evaluate" and peaks.least_bytes > room
    own = {"as_trainer", "reference", "logprobs"}  # the last two follow from the method
    options = options_of(question.spec) | question.beside.model_dump(exclude=own)
    options |= {"evaluation": question.evaluates or too_large}
    asked = Asked(ask(question.model, options, gpu=card), options)
    needs = Needs(card)
    fits = needs.fits(asked.question)
    return remedies_of(asked, needs.peaks(asked.question), needs) if fits != "yes" else []

"""Why two runs, or two phases of one run, take different memory: the difference term by term, in words. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peftscope.memory.answer import Peaks, Term, dimensions_of, prepared_bytes, term_of, terms_of
from peftscope.memory.assumptions import assumptions_of
from peftscope.memory.beside import BESIDE_OPTIONS
from peftscope.memory.formula.terms import DIMENSIONS, SOURCES
from peftscope.memory.question import METHOD_OPTIONS, SPEC_OPTIONS, Question
from peftscope.memory.trace import KINDS, by_kind, factors
from peftscope.methods import METHODS
from peftscope.words import capitalised, listed, spoken_bytes, spoken_number

NOTABLE = 0.05
"""A term gets a sentence above this share of the difference; of the larger peak, where the difference is below it."""

FAINT = 0.01
"""A phase other than the peak's is mentioned if it changed by this share of the larger peak more than the peak did."""

PREPARED = "fp32 copies that k-bit preparation makes"
PREPARATION = "peft prepare_model_for_kbit_training: what exceeds the model's own precision"

WHOLE = ("weights", "quantised weights", "adapters", "gradients", "optimizer states", "logits and loss")
"""Kinds whose blocks are there for one reason, and are told as one term."""

PHASE_NAMES = {
    "load": "loading",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer step",
    "evaluate": "the evaluation",
}


@dataclass(frozen=True)
class Side:
    """A side of the comparison: the memory of a run at the peak of one of its phases.

    Attributes:
        name: What sets it apart from the other side, for sentences.
        question: The run, the model and the card.
        peaks: The peaks of the run.
        phase: The phase.
    """

    name: str
    question: Question
    peaks: Peaks
    phase: str

    @property
    def bytes(self) -> int:
        """The allocated peak of the phase."""
        return self.peaks.phases[self.phase]

    def terms(self) -> list[Term]:
        """Returns what is alive at the peak of the phase."""
        return terms_of(self.peaks.alive(self.phase))


@dataclass(frozen=True)
class Change:
    """One term of a difference.

    Attributes:
        kind: One of ``KINDS``.
        name: What the term is.
        first_bytes: The bytes that the first side has of it at its peak.
        second_bytes: The bytes that the second side has.
        source: The code that allocates them; empty where there are several.
    """

    kind: str
    name: str
    first_bytes: int
    second_bytes: int
    source: str = ""

    @property
    def bytes(self) -> int:
        """The bytes that the first side has more of it; negative: fewer."""
        return self.first_bytes - self.second_bytes


@dataclass(frozen=True)
class Why:
    """The difference of two sides. The changes and what is unchanged add up to both peaks exactly.

    Attributes:
        first: The name of the side that is explained.
        second: The name of the side that it is compared with.
        first_phase: The phase of the first side's peak.
        second_phase: The phase of the second side's peak.
        first_bytes: The first side's peak.
        second_bytes: The second side's peak.
        changes: The terms that differ, the largest difference first.
        unchanged: The terms that are the same in both.
        sentences: The explanation.
        assumptions: What both answers assume.
    """

    first: str
    second: str
    first_phase: str
    second_phase: str
    first_bytes: int
    second_bytes: int
    changes: list[Change]
    unchanged: list[Change]
    sentences: list[str]
    assumptions: list[str]

    @property
    def bytes(self) -> int:
        """The bytes by which the first peak is larger; negative: smaller."""
        return self.first_bytes - self.second_bytes

    @property
    def notable_bytes(self) -> float:
        """The size from which on a change gets a sentence and a bar of its own."""
        return NOTABLE * _scale(self.first_bytes, self.second_bytes)


def compare(first: tuple[Question, Peaks], second: tuple[Question, Peaks]) -> Why:
    """Returns why the first run's peak differs from the second's."""
    names = distinct_names(first[0], second[0])
    sides = [Side(name, *run, run[1].binding_phase) for name, run in zip(names, (first, second), strict=True)]
    one, other = sides
    less = "less" if one.bytes < other.bytes else "more"
    share = abs(one.bytes - other.bytes) / max(one.bytes, other.bytes)
    beside = f"{spoken_bytes(one.bytes)} in {PHASE_NAMES[one.phase]} against {spoken_bytes(other.bytes)}"
    beside += f" in {PHASE_NAMES[other.phase]}" if other.phase != one.phase else ""
    amount = spoken_bytes(abs(one.bytes - other.bytes))
    if one.bytes == other.bytes:
        lead = f"{one.name} and {other.name} take the same at the peak: {beside}."
    elif share < NOTABLE:
        lead = f"The peaks hardly differ: {one.name} takes {amount} {less} than {other.name}, {share:.1%} ({beside})."
    else:
        lead = f"{one.name} takes {amount} {less} than {other.name} at the peak: {beside}."
    shadowed = list(_hidden(one, other)) if share < NOTABLE else []
    return _why(one, other, [lead, *shadowed])


def explain(run: tuple[Question, Peaks]) -> Why:
    """Returns why the phase that has a run's peak takes more than the next phase."""
    question, peaks = run
    order = sorted(peaks.phases, key=lambda phase: -peaks.phases[phase])
    one, other = (Side(PHASE_NAMES[phase], question, peaks, phase) for phase in (peaks.binding_phase, order[1]))
    largest = sorted(by_kind(peaks.alive(one.phase)).items(), key=lambda part: -part[1])
    parts = [f"{spoken_bytes(size)} of {kind}" for kind, size in largest if size > NOTABLE * one.bytes]
    lead = f"{one.name} has the peak, {spoken_bytes(one.bytes)}; {other.name} comes next with"
    held = listed(parts, last=" and ")
    return _why(one, other, [f"{lead} {spoken_bytes(other.bytes)}.", f"At the peak it holds {held}."])


def distinct_names(first: Question, second: Question) -> tuple[str, str]:
    """Returns a name for each of two runs that says in what they differ."""
    both = first, second
    methods = [question.spec.method for question in both]
    words = [question.model.name for question in both] if first.model.name != second.model.name else ["", ""]
    if methods[0].name != methods[1].name:
        words = [f"{word} {METHODS[method.name].label}" for word, method in zip(words, methods, strict=True)]
    parts = [[word.strip()] if word else [] for word in words]
    owners: list[tuple[str, Any, Any]] = [(name, first.spec, second.spec) for name in SPEC_OPTIONS]
    owners += [(name, methods[0], methods[1]) for name in METHOD_OPTIONS]
    owners += [(name, first.beside, second.beside) for name in BESIDE_OPTIONS if name != "as_trainer"]
    own_batch = any(q.spec.eval_batch_size != q.spec.batch_size for q in both)
    missing = object()
    for name, *two in owners:
        values = [getattr(owner, name, missing) for owner in two]
        if missing in values or values[0] == values[1] or (name == "eval_batch_size" and not own_batch):
            continue
        for part, value in zip(parts, values, strict=True):
            part.append(_spoken_setting(name, value))
    for part, question in zip(parts, both, strict=True):
        part += [f"{question.gpus} cards"] if first.gpus != second.gpus else []
    return ", ".join(parts[0]) or "the first run", ", ".join(parts[1]) or "the second run"


def _spoken_setting(name: str, value: Any) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    text = f"{value:g}" if isinstance(value, float) else value
    text = ",".join(value) or "none" if isinstance(value, tuple | list) else text
    return f"{words} {text}"


def _why(one: Side, other: Side, lead: list[str]) -> Why:
    changes, unchanged = _changes(one, other)
    scale = _scale(one.bytes, other.bytes)
    told = [change for change in changes if abs(change.bytes) > NOTABLE * scale] or changes[:1]
    sentences = [*lead, *_widened(one, other, NOTABLE * scale), *(_sentence(change, one, other) for change in told)]
    largest = max(one.bytes, other.bytes)
    same = [change for change in unchanged if change.first_bytes > NOTABLE * largest]
    if same:
        parts = [f"{spoken_bytes(change.first_bytes)} of {change.name}" for change in same]
        share = sum(change.first_bytes for change in same) / largest
        sentences.append(f"The same in both: {listed(parts, last=' and ')}, {share:.0%} of the larger peak.")
    sentences += _grows(one, other)
    others = assumptions_of(other.question)
    both = [line for line in assumptions_of(one.question) if line in others]
    sides = one.name, other.name, one.phase, other.phase, one.bytes, other.bytes
    return Why(*sides, changes, unchanged, [capitalised(text) for text in sentences], both)


def _scale(first: int, second: int) -> int:
    """Returns what terms are measured by: the difference or, where that is small beside it, the larger peak."""
    difference, largest = abs(first - second), max(first, second)
    return difference if difference > NOTABLE * largest else largest


def _changes(one: Side, other: Side) -> tuple[list[Change], list[Change]]:
    """Returns the terms that differ, the largest first, and those that do not."""
    found, base = _named(one), _named(other)
    changes = [
        Change(*key, found.get(key, (0, ""))[0], base.get(key, (0, ""))[0], (found.get(key) or base[key])[1])
        for key in dict.fromkeys([*found, *base])
    ]
    differing = sorted((change for change in changes if change.bytes), key=lambda change: -abs(change.bytes))
    same = sorted((change for change in changes if not change.bytes), key=lambda change: -change.first_bytes)
    return differing, same


def _named(side: Side) -> dict[tuple[str, str], tuple[int, str]]:
    """Returns the bytes and the source of each term of a side, by kind and name."""
    sums: dict[tuple[str, str], tuple[int, str]] = {}

    def add(kind: str, name: str, size: int, source: str) -> None:
        before = sums.get((kind, name), (0, source))
        sums[kind, name] = before[0] + size, source if source == before[1] else ""

    for block in side.peaks.alive(side.phase):
        if more := prepared_bytes(side.question, block):
            add("weights", PREPARED, more, PREPARATION)
        if block.kind in WHOLE:
            kind = "weights" if block.kind == "quantised weights" else block.kind
            add(kind, kind, block.size - more, SOURCES.get(block.kind, ""))
        else:
            name = term_of(block)
            add(block.kind, name, block.size, SOURCES.get(name, SOURCES.get(block.kind, "")))
    return {key: value for key, value in sorted(sums.items(), key=lambda item: KINDS.index(item[0][0]))}


def _sentence(change: Change, one: Side, other: Side) -> str:
    first, second = spoken_bytes(change.first_bytes), spoken_bytes(change.second_bytes)
    amount = spoken_bytes(abs(change.bytes))
    beside = f"{first} against {second}"
    if one.peaks is other.peaks:  # two phases of one run
        text = f"{one.name} holds {amount} {'more' if change.bytes > 0 else 'less'} of {change.name}"
    elif change.bytes < 0:
        text = f"{one.name} saves {amount} of {change.name}"
    else:
        text = f"{one.name} spends {amount} {'more ' if change.second_bytes else ''}on {change.name}"
    if not change.second_bytes:
        beside = f"{other.name} has none then"
    elif not change.first_bytes:
        beside = "all of them"
    return f"{text} ({beside}{f'; {change.source}' if change.source else ''})."


def _hidden(one: Side, other: Side) -> Iterator[str]:
    """Yields a sentence for each phase that changed, although the peak, which another phase has, hardly did."""
    largest, change = max(one.bytes, other.bytes), abs(one.bytes - other.bytes)
    for phase in one.peaks.phases:
        before, after = other.peaks.phases.get(phase), one.peaks.phases[phase]
        if before is None or phase in (one.phase, other.phase) or abs(after - before) - change <= FAINT * largest:
            continue
        binding = " and ".join(dict.fromkeys(PHASE_NAMES[side.phase] for side in (one, other)))
        moved = "falls" if after < before else "grows"
        yield (
            f"The peak of {PHASE_NAMES[phase]} {moved} from {spoken_bytes(before)} to {spoken_bytes(after)}, but "
            f"{binding} had the larger peak."
        )


def _widened(one: Side, other: Side, notable: float) -> Iterator[str]:
    """Yields a sentence for each pair of precisions in which both sides hold the same tensors."""
    held = []
    for side in (one, other):
        tensors: dict[tuple[str, str, tuple[str, ...]], list[Term]] = defaultdict(list)
        for term in side.terms():
            if term.formula and term.kind not in WHOLE:
                tensors[term.kind, term.name, tuple(_letters(term))].append(term)
        held.append({key: terms[0] for key, terms in tensors.items() if len(terms) == 1})
    changes: dict[tuple[float, float], int] = defaultdict(int)
    for key in held[0].keys() & held[1].keys():
        first, second = held[0][key], held[1][key]
        widths = factors(first.formula)[0], factors(second.formula)[0]
        if widths[0] != widths[1] and first.count == second.count:
            changes[widths] += first.bytes - second.bytes
    for (width, before), size in changes.items():
        if abs(size) > notable:
            more = "more" if size > 0 else "less"
            yield (
                f"{one.name} holds the same activations in other precision, {width:g} bytes a value against "
                f"{before:g}: {spoken_bytes(abs(size))} {more}."
            )


def _grows(one: Side, other: Side) -> list[str]:
    """Returns a sentence on the sizes that differ, and on how much of the larger peak depends on them."""
    dimensions = [dimensions_of(side.question, side.phase) for side in (one, other)]
    if one.question.model.name != other.question.model.name or not all(dimensions):
        return []
    letters = [name for name in dimensions[0] if name in DIMENSIONS and dimensions[0][name] != dimensions[1][name]]
    larger = one if one.bytes >= other.bytes else other
    terms = larger.terms()
    used = [name for name in letters if any(name in _letters(term) for term in [*one.terms(), *other.terms()])]
    if not used:
        return []
    sizes = [f"{DIMENSIONS[n]} {' against '.join(spoken_number(each[n]) for each in dimensions)}" for n in used]
    size = sum(term.bytes for term in terms if set(used) & set(_letters(term)))
    it = "it" if len(used) == 1 else "them"
    share = f"{spoken_bytes(size)}, {size / larger.bytes:.0%} of the larger peak, depend on {it}"
    return [f"What differs in size: {listed(sizes, last=' and ')}; {share}."]


def _letters(term: Term) -> Sequence[str]:
    return factors(term.formula)[1] if term.formula else []

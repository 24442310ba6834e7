"""The answer to a question about memory: three peaks, the phase that has them, and what is alive then. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from peftscope.errors import InputError, Problem
from peftscope.hardware.cards import CONTEXT_BYTES
from peftscope.memory.allocator import reserved_bytes
from peftscope.memory.assumptions import assumptions_of, unquantised_experts
from peftscope.memory.formula.linear import WIDTHS
from peftscope.memory.formula.step import TrainingTraces, trace_evaluation, trace_training, without_collector
from peftscope.memory.formula.terms import SOURCES, evaluation_sizes, sizes_of
from peftscope.memory.question import Question
from peftscope.memory.shares import RESIDENT, on_card, share_of
from peftscope.memory.trace import KINDS, Block, Peak, Trace, by_kind, factors
from peftscope.words import grouped, listed

AGREEMENT_FILE = Path(__file__).with_name("agreement.json")
"""The differences between closed form and simulation. ``make agreement`` writes this file."""
MEASURED_FILE = Path(__file__).with_name("measured.json")
"""Those between closed form and peaks that others measured on cards. ``make scorecard`` writes this file."""


@dataclass(frozen=True)
class Term:
    """One line of an explanation: blocks that are alive at the peak for the same reason.

    Attributes:
        kind: One of ``KINDS``.
        name: What the blocks hold.
        count: The number of blocks.
        formula: The bytes of one block, as a product of named dimensions.
        bytes: The bytes of all of them.
        source: The code that allocates them.
    """

    kind: str
    name: str
    count: int
    formula: str
    bytes: int
    source: str


@dataclass(frozen=True)
class Answer:
    """The memory that a training run takes.

    Attributes:
        model: The model's name, as the question gave it.
        method: The name of the method.
        how: The way in which the answer was computed.
        parameters: The parameters of the base; None if the closed form does not know its family.
        trainable_parameters: The trained parameters before any pruning; None for the same reason.
        peak_allocated_bytes: The peak that torch's allocator counts: tensors and kernel workspaces.
        peak_reserved_bytes: The peak of the segments that the allocator holds for them.
        peak_device_bytes: Reserved bytes, the CUDA context and paged states: what nvidia-smi shows.
        least_device_bytes: The tensors at their peak and the CUDA context: a smaller card runs out of memory. If they
            fit on the card that is asked about and their segments do not: these segments, where the run ends.
        binding_phase: The phase that has the allocated peak.
        phases: The allocated peak of each phase.
        evaluation_bytes: The allocated peak that an evaluation with the same batch would have, where none is asked for;
            None if one is, or if it is not known.
        components: The bytes that are alive at the peak, by kind. They add up to the peak.
        modules: The same bytes by module: {name: {"bytes": ..., "modules": {...}}}, to any depth.
        terms: The same bytes, line by line.
        dimensions: The value of every letter in the formulas of the terms.
        assumptions: The assumptions behind the peaks, one sentence each.
        agreement: How far the closed form was from measured peaks of this method, and from simulations; empty for an
            answer that is simulated, or of a method that trains nothing.
    """

    model: str
    method: str
    how: Literal["formula", "simulation"]
    parameters: int | None
    trainable_parameters: int | None
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_device_bytes: int
    least_device_bytes: int
    binding_phase: str
    phases: dict[str, int]
    components: dict[str, int]
    modules: dict[str, Any]
    assumptions: list[str]
    agreement: str = ""
    evaluation_bytes: int | None = None
    terms: list[Term] = field(default_factory=list)
    dimensions: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the answer as JSON content. The keys are stable."""
        return asdict(self)


@dataclass(frozen=True)
class Peaks:
    """The peaks, those of the phases, a function that returns the blocks alive at a phase's peak, and what else to say.

    With less than ``least_bytes`` a run ends out of memory; with ``device_bytes`` its allocator gives nothing back.
    Fragments count among the former on the card that is asked about.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    least_bytes: int
    binding_phase: str
    phases: dict[str, int]
    alive: Callable[[str], list[Block]]
    note: str = ""


Wanted = Literal["all", "reserved", "whether"]
"""How a question asks about reserved bytes: with the fragments on a card, their number, or their excess."""


def peaks_by_formula(
    question: Question,
    *,
    evaluation: bool | None = None,
    traces: TrainingTraces | None = None,
    enough: float = inf,
    wanted: Wanted = "all",
) -> Peaks:
    """Returns the peaks by the closed form.

    Args:
        question: The run, the model and the card.
        evaluation: Whether an evaluation counts; None: if the question asks for one. For a method that trains nothing
            one always counts.
        traces: Traces to reuse from earlier questions. ``alive`` is then valid only until the next question.
        enough: If tensors alone take more bytes than this, the allocator is not replayed, and reserved bytes are those
            of the tensors.
        wanted: What is asked about reserved bytes.

    Raises:
        InputError: The closed form does not cover the model's family or the method.
    """
    model, spec = question.model, question.spec
    if spec.method.closed_form is None:
        raise InputError(Problem("method", f"{spec.method.name} has no closed form", "use --simulate"))
    if model.shape is None:
        remedy = "use --simulate, which works for every causal model of transformers"
        raise InputError(Problem("model", f"no closed form: {model.why_no_shape}", remedy))
    with without_collector():
        training = (traces.trace if traces else trace_training)(question) if spec.method.trains else None
        counts = question.evaluates if evaluation is None else evaluation
        evaluated = trace_evaluation(question) if counts or training is None else None
        return peaks_of(question, training, evaluated, traces, enough, wanted)


def answer_by_formula(question: Question) -> Answer:
    """Returns the answer by the closed form.

    Raises:
        InputError: The closed form does not cover the model's family or the method.
    """
    return answer_of(question, peaks_by_formula(question), "formula")


def peaks_of(
    question: Question,
    training: Trace | None,
    evaluation: Trace | None,
    traces: TrainingTraces | None = None,
    enough: float = inf,
    wanted: Wanted = "all",
) -> Peaks:
    """Returns the peaks of a training trace and an evaluation trace, of which one may be missing.

    ``traces`` is where the training trace is from, if it is kept; all limits are as of ``peaks_by_formula``.
    """
    measure = (traces or TrainingTraces()).measure
    both = [trace for trace in (training, evaluation) if trace is not None]
    loading = _while_loading(question, both[0])
    phases = {"load": sum(block.size for block in loading)}
    places: dict[str, tuple[Trace, int]] = {}
    for trace in both:
        peaks = measure(_unpaged_peaks, trace)
        phases |= {phase: peak.size for phase, peak in peaks.items()}
        if {"offload", "sharding", "master_weights"} & {*question.formula_only}:
            peaks = _unpaged_peaks(on_card(question, trace))
        places |= {phase: (trace, peak.position) for phase, peak in peaks.items()}

    def alive(phase: str) -> list[Block]:
        trace, position = places.get(phase, (both[0], 0))
        blocks = loading if phase == "load" else [block for block in trace.alive(position) if not block.paged]
        return share_of(question, phase, blocks) if question.shared else blocks

    paged = training.paged_bytes() if training and question.spec.optimizer.startswith("paged") else 0
    whole = max(phases.values())
    reserved, limits = whole, [enough] if wanted == "whether" and not question.shared else []
    if whole <= enough or question.shared:
        reserved = max(measure(reserved_bytes, trace, *limits) for trace in both)
    if question.shared:
        phases = {phase: sum(block.size for block in alive(phase)) for phase in phases}
        # The bytes that the allocator holds on top of tensors shrink in proportion.
        reserved = round(reserved / whole * max(phases.values()))
        paged = 0 if question.beside.offload != "none" else paged // question.gpus
    binding = max(phases, key=lambda phase: phases[phase])
    reserved = max(reserved, phases[binding])
    context = question.gpu.context_bytes if question.gpu and question.gpu.context_bytes else CONTEXT_BYTES
    device, least = reserved + context + paged, phases[binding] + context
    room = question.gpu.usable_bytes - context if question.gpu else 0
    if wanted == "all" and phases[binding] <= room < reserved and not question.shared:  # fragments decide
        needed = max(reserved_bytes(trace, room, room) for trace in both)
        least = needed + context if needed > room else least
    return Peaks(phases[binding], reserved, device, least, binding, phases, alive)


def _unpaged_peaks(trace: Trace) -> dict[str, Peak]:
    return trace.peaks(paged=False)


def answer_of(question: Question, peaks: Peaks, how: Literal["formula", "simulation"]) -> Answer:
    """Returns the answer that reports these peaks."""
    method, shape, alive = question.spec.method, question.model.shape, peaks.alive(peaks.binding_phase)
    tower = question.model.vision.parameters if question.model.vision else 0
    return Answer(
        model=question.model.name,
        method=method.name,
        how=how,
        parameters=shape.parameters + _in_score(question) + tower if shape else None,
        trainable_parameters=_trainable(question),
        peak_allocated_bytes=peaks.allocated_bytes,
        peak_reserved_bytes=peaks.reserved_bytes,
        peak_device_bytes=peaks.device_bytes,
        least_device_bytes=peaks.least_bytes,
        binding_phase=peaks.binding_phase,
        phases=peaks.phases,
        components=by_kind(alive),
        modules=_tree(alive),
        assumptions=[*unquantised_experts(question, alive), *assumptions_of(question), *filter(None, [peaks.note])],
        agreement=_agreement(question, peaks) if how == "formula" else "",
        evaluation_bytes=_evaluation_bytes(question) if how == "formula" else None,
        terms=terms_of(alive),
        dimensions=dimensions_of(question, peaks.binding_phase),
    )


def _evaluation_bytes(question: Question) -> int | None:
    if question.evaluates or question.shared or question.beside.job != "sft":
        return None
    return max(peak.size for peak in _unpaged_peaks(trace_evaluation(question)).values())


def _trainable(question: Question) -> int | None:
    """Returns the number of trained values; None without the model's shape, or without a formula for the method."""
    shape = question.model.shape
    if shape is None:
        return None
    method, of_score = question.spec.method, _in_score(question)
    own = method.trainable_parameters(shape)
    of_score = of_score if method.trains_base or not of_score else shape.hidden_size
    return None if own is None else own + of_score + len(question.saved) * shape.vocab_size * shape.hidden_size


def _in_score(question: Question) -> int:
    """Returns the values that the score of a reward model has more than the head that it replaces; 0 without one."""
    shape = question.model.shape
    if shape is None or question.beside.job != "reward":
        return 0
    return shape.hidden_size * (1 if shape.tied_embeddings else 1 - shape.vocab_size)


def dimensions_of(question: Question, phase: str) -> dict[str, float]:
    """Returns the value of every letter in the formulas of a phase."""
    shape = question.model.shape
    if shape is None:
        return {}
    sizes = evaluation_sizes(question) if phase == "evaluate" else sizes_of(question)
    return {**sizes, "1/G": 1 / question.gpus}


def _while_loading(question: Question, trace: Trace) -> list[Block]:
    """Returns the blocks that are alive at the peak of loading and initialising, by formula.

    These are the blocks that persist when the first step begins, and the temporaries of the largest layer.
    """
    stays = [block for block in trace.alive(trace.marks[0][0]) if block.kind in RESIDENT]
    method, shape = question.spec.method, question.model.shape
    if shape is None:
        return stays
    layers = shape.linear_layers(method.targets_of()) or shape.block
    more = method.loading_temporary(max(layers, key=lambda layer: layer.weights))
    return [*stays, Block(more[0], "temporaries", term=more[1])] if more else stays


def _tree(blocks: list[Block]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for block in blocks:
        level = root
        for name in (block.module or "(no module)").split("."):
            node = level.setdefault(name, {"bytes": 0, "modules": {}})
            node["bytes"] += block.size
            level = node["modules"]
    return root


def terms_of(blocks: list[Block]) -> list[Term]:
    """Returns the blocks grouped by kind, name and formula, with the largest group of each kind first."""
    groups = grouped(((b.kind, b.term or name_of(b), b.formula), b.size) for b in blocks)
    terms = [
        Term(kind, name, len(sizes), formula, sum(sizes), SOURCES.get(name, SOURCES.get(kind, "")))
        for (kind, name, formula), sizes in groups.items()
    ]
    return sorted(terms, key=lambda term: (KINDS.index(term.kind), -term.bytes))


def prepared_bytes(question: Question, block: Block) -> int:
    """Returns the part of a weight that k-bit preparation added: the bytes beyond the model's own precision."""
    spec = question.spec
    if getattr(spec.method, "kbit_preparation", "none") == "none" or block.kind != "weights" or not block.formula:
        return 0
    width, own = factors(block.formula)[0], WIDTHS[spec.precision]
    return block.size - int(block.size * own // width) if width > own else 0


def term_of(block: Block) -> str:
    """Returns what a block holds: its term or, without one, its kind and its module."""
    name = name_of(block)
    if name == block.kind:  # a sum of residuals, for example
        name = "layers themselves"
    return block.term or (block.kind if name in block.kind else f"{block.kind} of {name}")


def name_of(block: Block) -> str:
    """Returns a name for a block that has no term: the last parts of its module's path."""
    parts = [part for part in block.module.split(".") if not part.isdigit() and part not in ("layers", "default")]
    return " ".join(parts[-2:]) or block.kind


def _agreement(question: Question, peaks: Peaks) -> str:
    """Returns how far the closed form was from measured peaks of this method, and from simulations of it."""
    method, gpu = question.spec.method, question.gpu
    if not method.trains:
        return ""
    if question.gpus > 1 or question.formula_only or peaks.binding_phase == "load":
        return "no peak of such a run was measured on a card, or compared with a simulation"
    if question.model.stored or question.model.vision:
        kind = "base that is quantised already" if question.model.stored else "model with a vision tower"
        return f"no peak of a {kind} was measured on a card, or compared with a simulation"
    shape, job = question.model.shape, question.beside.job
    plain = question.beside.loss == "plain" and job == "sft" and not (shape and shape.experts)
    measured = json.loads(MEASURED_FILE.read_text()).get(method.name, {}) if plain else {}
    said = [
        f"{counted['points']} {kind} peaks measured on {listed(counted['cards'], last=' and ')}: off by "
        f"{counted['mean_percent']:.1f} % on average, {counted['worst_percent']:+.1f} % at worst"
        for kind, counted in measured.items()
    ] or ["no peak of such a run was measured on a card"]
    said[0] += "" if job == "sft" else " under conditions that are all known"
    if measured and gpu and all(gpu.name not in counted["cards"] for counted in measured.values()):
        said.append(f"none on {gpu.name}")
    agreement = json.loads(AGREEMENT_FILE.read_text())
    if simulated := agreement["methods"].get(method.name) if job == "sft" else agreement["jobs"].get(job):
        each = {kind: simulated[f"{kind}_percent"] for kind in ("allocated", "reserved")}
        parts = (f"{kind} {one['mean']:.2f} % and {one['worst']:.2f} %" for kind, one in each.items())
        said.append(f"on average and at worst in {simulated['questions']} simulations: {', '.join(parts)}")
    return "; ".join(said)

"""The peaks of a deep model from shallow ones: one more layer of a type adds the same at any depth.

So a run's peaks are predicted in a fifth of the time. A hybrid, whose layers run code of thousands of operations, would
take minutes to simulate whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from peftscope.hardware.cards import CONTEXT_BYTES
from peftscope.memory.allocator import reserved_bytes
from peftscope.memory.answer import Peaks
from peftscope.memory.question import Question
from peftscope.memory.shares import RESIDENT
from peftscope.memory.trace import Block, Trace

SLOW = {"linear_attention", "conv"}
"""Types of layers that make a model a hybrid, as transformers names them."""

Simulate = Callable[[Any], tuple[Trace | None, Trace | None]]
"""Returns the traces of a training and of an evaluation, of which one may be missing, for a configuration."""
Places = dict[tuple[str, str], tuple[Trace, int, int]]
"""The largest peak while a place of the model runs in a phase: its trace, the number of events before it, its bytes."""


@dataclass(frozen=True)
class _Depths:
    """Simulations of shallow models, by the type of layer that each has one more of; of the smallest, under ``""``.

    A place of the model has its peak at another moment of the pass than another place, and grows by another amount with
    each layer. So each place is extrapolated, and the largest of a phase is taken last.

    Attributes:
        traces: The traces of each model.
        more: How many more layers of each type the whole model has than the smallest.
        base: The places of the smallest model.
        places: The places of each of the others.
    """

    traces: dict[str, list[Trace]]
    more: dict[str, int]
    base: Places
    places: dict[str, Places]

    def deep(self, key: tuple[str, str]) -> int:
        """Returns the bytes at a place of the whole model."""
        least = self.base[key][2]
        return least + sum(self.more[kind] * (found[key][2] - least) for kind, found in self.places.items())

    def largest(self) -> dict[str, tuple[str, str]]:
        """Returns the place of each phase where most is alive."""
        common = [key for key in self.base if all(key in found for found in self.places.values())]
        return {phase: max((k for k in common if k[0] == phase), key=self.deep) for phase, _ in common}


def phases_by_depth(config: Any, simulate_at: Simulate) -> dict[str, int] | None:
    """Returns the tensor bytes at the peak of each phase on a processor; None if shallow models cannot tell."""
    found = _simulate_depths(config, simulate_at, shallow_layers(config), paged=True)
    return None if found is None else {phase: found.deep(key) for phase, key in found.largest().items()}


def shallow_layers(config: Any) -> dict[str, list[str]]:
    """Returns the layers of shallow models: those of the smallest, and with one more layer of each type.

    The smallest begins with the first layer of the model and ends with the last of each type, in their order. Where the
    whole model is hardly deeper, it is empty.
    """
    types = _types(config)
    last = {kind: index for index, kind in enumerate(types)}
    least = [*types[:1], *sorted(last, key=lambda kind: last[kind])]
    models = {"": least} | {kind: [*least[:1], kind, *least[1:]] for kind in last}
    return models if sum(map(len, models.values())) < len(types) else {}


def layers_are_alike(model: Any, config: Any) -> bool:
    """Returns whether all layers of a type have the same parameters, of the same shapes, of which the same train."""
    layers: dict[int, set[Any]] = {}
    for name, parameter in model.named_parameters():
        if (layer := _layer(name)) is not None:
            own = re.sub(r"layers\.\d+", "", name, count=1)
            layers.setdefault(layer, set()).add((own, parameter.shape, parameter.dtype, parameter.requires_grad))
    types, kinds = _types(config), {*_types(config)}
    alike = [{frozenset(layers.get(index, ())) for index, of in enumerate(types) if of == kind} for kind in kinds]
    return all(len(each) == 1 and frozenset() not in each for each in alike)


def _types(config: Any) -> list[str]:
    return [*(getattr(config, "layer_types", None) or ["layer"] * config.num_hidden_layers)]


def _simulate_depths(
    config: Any, simulate_at: Simulate, models: dict[str, list[str]], *, paged: bool
) -> _Depths | None:
    """Returns the simulations of shallow models; None without any, or if layers of a type are not alike.

    They are alike if gradients reach the first layer: then every other is on their way, and keeps for them.
    """
    if not models:
        return None
    pairs = {"": simulate_at(_with_layers(config, models[""]))}
    trained = pairs[""][0]
    if trained and trained.blocks:
        backward = (trained.events[first:last] for phase, first, last in trained.segments() if phase == "backward")
        born = (trained.blocks[event] for events in backward for event in events if event >= 0)
        if not any(_layer(block.module) == 0 for block in born):
            return None
    pairs |= {kind: simulate_at(_with_layers(config, layers)) for kind, layers in models.items() if kind}
    traces = {kind: [trace for trace in pair if trace and trace.blocks] for kind, pair in pairs.items()}
    more = {kind: _types(config).count(kind) - models[""].count(kind) for kind in models if kind}
    places = {kind: _places(found, inserted=bool(kind), paged=paged) for kind, found in traces.items()}
    return _Depths(traces, more, places.pop(""), places)


def with_a_second_step(trace: Trace) -> Trace:
    """Returns the trace of a step and of one like it, beside what the first one leaves: the optimizer's states."""
    (start, _), (end, _) = trace.marks[0], trace.marks[-1]
    del trace.events[end:]  # when the simulation was over
    events = {*trace.events[start:]}
    trace.repeat(start, {event for event in events if ~event not in events})
    return trace


def peaks_by_depth(question: Question, config: Any, simulate_at: Simulate) -> Peaks | None:
    """Returns the peaks of a hybrid from those of shallow ones; None for other models, or if layers are not alike.

    ``config`` is the transformers configuration of the whole model.
    """
    models = shallow_layers(config) if SLOW & {*_types(config)} else {}
    if not (depths := _simulate_depths(config, simulate_at, models, paged=False)):
        return None
    traces, more, base, largest = depths.traces, depths.more, depths.base, depths.largest()

    def alive(phase: str) -> list[Block]:
        key = largest[phase]
        blocks = _alive(base[key], phase)
        for kind, found in depths.places.items():
            own = [block for block in _alive(found[key], phase) if _layer(block.module) == 1]
            rest = found[key][2] - base[key][2] - sum(block.size for block in own)
            own = [replace(b, module=re.sub(r"layers\.1(?=\.|$)", f"layers.{kind}", b.module)) for b in own]
            blocks += [*own, *([Block(rest, "temporaries")] if rest else [])] * more[kind]
        return blocks

    phases = {phase: depths.deep(key) for phase, key in largest.items()}
    binding = max(phases, key=lambda phase: phases[phase])
    most = {kind: max(size for _, _, size in found.values()) for kind, found in [("", base), *depths.places.items()]}
    reserved = phases[binding] + max(max(map(reserved_bytes, found)) - most[kind] for kind, found in traces.items())
    paged = {kind: found[0].paged_bytes() for kind, found in traces.items()}
    device = reserved + paged[""] + sum(more[kind] * (paged[kind] - paged[""]) for kind in more)
    context = question.gpu.context_bytes if question.gpu and question.gpu.context_bytes else CONTEXT_BYTES
    least, note = len(models[""]), "linear attention in transformers' own code, of which optional kernels keep less"
    note = f"simulations of {least} and {least + 1}, which each type of layer adds to; {note}"
    note = f"{config.num_hidden_layers} layers from {note}"
    return Peaks(phases[binding], reserved, device + context, phases[binding] + context, binding, phases, alive, note)


def _with_layers(config: Any, layers: list[str]) -> Any:
    shallow = deepcopy(config)
    shallow.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        shallow.layer_types = layers
    return shallow


def _layer(module: str) -> int | None:
    found = re.search(r"(?<!tower\.)\blayers\.(\d+)", module)
    return int(found[1]) if found else None


def _alive(place: tuple[Trace, int, int], phase: str) -> list[Block]:
    blocks = [block for block in place[0].alive(place[1]) if not block.paged]
    return [block for block in blocks if block.kind in RESIDENT] if phase == "load" else blocks


def _places(traces: Sequence[Trace], *, inserted: bool, paged: bool) -> Places:
    """Returns the largest peak of each phase and place. An inserted layer, the second, is no place of the smallest."""
    start = traces[0].marks[0][0]
    loaded = sum(block.size for block in _alive((traces[0], start, 0), "load"))
    places: Places = {("load", ""): (traces[0], start, loaded)}
    for trace in traces:
        sizes, live = trace.sizes(paged=paged), 0
        for phase, first, last in trace.segments():
            for position, event in enumerate(trace.events[first:last], first + 1):
                live += sizes[event] if event >= 0 else -sizes[~event]
                module = trace.blocks[event].module if event >= 0 else ""
                layer = _layer(module)
                if event < 0 or not phase or (inserted and layer == 1):
                    continue
                place = module.split(".")[0] if layer is None else str(layer - 1 if inserted and layer else layer)
                if live > places.get((phase, place), (trace, 0, -1))[2]:
                    places[phase, place] = trace, position, live
    return places

"""The peaks of a deep hybrid from shallow ones: one more layer of a type adds the same at any depth.

Its layers run code of thousands of operations, which takes minutes to simulate for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
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


def shallow_layers(config: Any) -> dict[str, list[str]]:
    """Returns the layers of shallow models: those of the smallest, and with one more layer of each type.

    The smallest begins with the first layer of the model and ends with the last of each type, in their order.
    Without such types, or where the whole model is hardly deeper, it is empty.
    """
    types = [*(getattr(config, "layer_types", None) or ())]
    last = {kind: index for index, kind in enumerate(types)}
    least = [*types[:1], *sorted(last, key=lambda kind: last[kind])]
    models = {"": least} | {kind: [*least[:1], kind, *least[1:]] for kind in last}
    return models if SLOW & {*types} and sum(map(len, models.values())) < len(types) else {}


def peaks_by_depth(question: Question, config: Any, simulate_at: Simulate) -> Peaks | None:
    """Returns the peaks of a model from those of the shallow ones; None if layers of a type are not alike.

    They are alike if the first layer trains something: then every other is on the way of gradients, and keeps for them.

    A place of the model has its peak at another depth of the pass than another place, and grows by another amount with
    each layer. So each place is extrapolated, and the largest of a phase is taken last.

    Args:
        question: The run, the model and the card.
        config: The transformers configuration of the whole model.
        simulate_at: Simulates a model.
    """
    if not (models := shallow_layers(config)):
        return None
    types = [*config.layer_types]
    pairs = {"": simulate_at(_with_layers(config, models[""]))}
    trained = pairs[""][0]
    if trained and not any(block.kind == "gradients" and _layer(block.module) == 0 for block in trained.blocks):
        return None
    pairs |= {kind: simulate_at(_with_layers(config, layers)) for kind, layers in models.items() if kind}
    traces = {kind: [trace for trace in pair if trace is not None] for kind, pair in pairs.items()}
    more = {kind: types.count(kind) - models[""].count(kind) for kind in models if kind}
    places = {kind: _places(found, inserted=bool(kind)) for kind, found in traces.items()}
    base = places.pop("")

    def deep(key: tuple[str, str]) -> int:
        return base[key][2] + sum(more[kind] * (found[key][2] - base[key][2]) for kind, found in places.items())

    common = [key for key in base if all(key in found for found in places.values())]
    largest = {phase: max((k for k in common if k[0] == phase), key=deep) for phase, _ in common}

    def alive(phase: str) -> list[Block]:
        key = largest[phase]
        blocks = _alive(base[key], phase)
        for kind, found in places.items():
            own = [block for block in _alive(found[key], phase) if _layer(block.module) == 1]
            rest = found[key][2] - base[key][2] - sum(block.size for block in own)
            own = [replace(b, module=re.sub(r"layers\.1(?=\.|$)", f"layers.{kind}", b.module)) for b in own]
            blocks += [*own, *([Block(rest, "temporaries")] if rest else [])] * more[kind]
        return blocks

    phases = {phase: deep(key) for phase, key in largest.items()}
    binding = max(phases, key=lambda phase: phases[phase])
    most = {kind: max(size for _, _, size in found.values()) for kind, found in [("", base), *places.items()]}
    reserved = phases[binding] + max(max(map(reserved_bytes, found)) - most[kind] for kind, found in traces.items())
    paged = {kind: found[0].paged_bytes() for kind, found in traces.items()}
    device = reserved + paged[""] + sum(more[kind] * (paged[kind] - paged[""]) for kind in more)
    context = question.gpu.context_bytes if question.gpu and question.gpu.context_bytes else CONTEXT_BYTES
    least, note = len(models[""]), "linear attention in transformers' own code, of which optional kernels keep less"
    note = f"{len(types)} layers from simulations of {least} and {least + 1}, which each type of layer adds to; {note}"
    return Peaks(phases[binding], reserved, device + context, phases[binding] + context, binding, phases, alive, note)


def _with_layers(config: Any, layers: list[str]) -> Any:
    shallow = deepcopy(config)
    shallow.layer_types, shallow.num_hidden_layers = layers, len(layers)
    return shallow


def _layer(module: str) -> int | None:
    found = re.search(r"(?<!tower\.)\blayers\.(\d+)", module)
    return int(found[1]) if found else None


def _alive(place: tuple[Trace, int, int], phase: str) -> list[Block]:
    blocks = [block for block in place[0].alive(place[1]) if not block.paged]
    return [block for block in blocks if block.kind in RESIDENT] if phase == "load" else blocks


def _places(traces: Sequence[Trace], *, inserted: bool) -> Places:
    """Returns the largest peak of each phase and place. An inserted layer, the second, is no place of the smallest."""
    start = traces[0].marks[0][0]
    loaded = sum(block.size for block in _alive((traces[0], start, 0), "load"))
    places: Places = {("load", ""): (traces[0], start, loaded)}
    for trace in traces:
        sizes, live = trace.sizes(paged=False), 0
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

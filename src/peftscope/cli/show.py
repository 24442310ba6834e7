"""Prints answers about memory as tables. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from peftscope.hardware.cards import CONTEXT_BYTES, Gpu, known_speed
from peftscope.memory.answer import Answer
from peftscope.memory.formula.terms import DIMENSIONS
from peftscope.methods import METHODS
from peftscope.models.presets import PRESETS, SIMULATED
from peftscope.models.shapes import FAMILIES
from peftscope.sizing.speed import fitted
from peftscope.words import counted, spoken_bytes, spoken_number, spoken_time

if TYPE_CHECKING:
    from peftscope.sizing.changes import Remedy
    from peftscope.sizing.cheapest import OnCard
    from peftscope.sizing.config_file import Reading
    from peftscope.sizing.duration import Duration, Range
    from peftscope.sizing.fit import Fit
    from peftscope.sizing.oom import Diagnosis
    from peftscope.sizing.why import Why

SHOWN = 8
"""The most candidates that a table lists."""


def show_reading(reading: Reading, console: Console) -> None:
    """Prints what was understood, ignored and assumed of a trainer's file, and what the answer leaves out."""
    console.print(f"{reading.path}: a file of {reading.trainer}", markup=False)
    lists = {
        "understood": reading.understood,
        "ignored": [", ".join(reading.ignored)] if reading.ignored else [],
        "assumed, because the file does not say it": reading.assumed,
        "not modelled": reading.not_modelled,
        "may change memory, and is not read": reading.may_change_memory,
    }
    for title, lines in lists.items():
        if lines:
            console.print(f"{title}:")
        for line in lines:
            console.print(f"  {line}", markup=False)
    console.print()


def show_headroom(gpu: Gpu, found: Answer, console: Console) -> None:
    """Prints whether a run fits on a card, as ``Gpu.fits`` says it, and what is left or missing."""
    size = f"{gpu.name}, {spoken_bytes(gpu.usable_bytes)}{' for CUDA' if gpu.reserve_bytes else ''}"
    least, left = found.least_device_bytes, gpu.usable_bytes - found.peak_device_bytes
    if (fits := gpu.fits(least, found.peak_device_bytes)) == "no":
        console.print(f"[red]does not fit[/] on {size}: {spoken_bytes(least - gpu.usable_bytes)} are missing")
        if least - found.peak_allocated_bytes > (gpu.context_bytes or CONTEXT_BYTES):
            console.print("  its tensors fit: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True leaves fewer fragments")
    elif fits == "tight":
        why = f"the allocator has to give back cached memory, {spoken_bytes(-left)} of it, and steps are slower"
        console.print(f"[yellow]tight[/] on {size}: {why}")
    else:
        console.print(f"[green]fits[/] on {size}: {spoken_bytes(left)} are left")


def show_remedies(remedies: Iterable[Remedy | str], console: Console) -> None:
    """Prints what to change so that a run fits, one line each, with the peak after it."""
    for number, remedy in enumerate(remedies):
        console.print(f"{'or' if number else 'fits with'}: {remedy}", markup=False, soft_wrap=True)


def show_answer(answer: Answer, console: Console, *, explain: bool, depth: int) -> None:
    """Prints an answer: its peaks, its phases, what is alive at the peak, and its assumptions."""
    how = "closed form" if answer.how == "formula" else "simulated on tensors without data"
    if METHODS[answer.method].closed_form is None:
        how += f", because {answer.method} has no closed form"
    elif answer.parameters is None:
        how += f", because {answer.model} has no closed form"
    console.print(f"[bold]{answer.model}, {answer.method}[/]: {how}")
    if answer.agreement:
        console.print(f"accuracy: {answer.agreement}", markup=False, soft_wrap=True)
    if answer.parameters is not None:
        trained = "" if answer.trainable_parameters is None else f", {answer.trainable_parameters:,} trained"
        console.print(f"{answer.parameters:,} parameters{trained}")
    peaks = Table(box=None, show_header=False)
    peaks.add_row("allocated", spoken_bytes(answer.peak_allocated_bytes), "tensors and workspaces that torch counts")
    peaks.add_row("reserved", spoken_bytes(answer.peak_reserved_bytes), "segments that the allocator holds for them")
    peaks.add_row("device", spoken_bytes(answer.peak_device_bytes), "with the CUDA context: what nvidia-smi shows")
    console.print(peaks)
    phases = Table("phase", "peak", "", box=None)
    for phase, size in answer.phases.items():
        phases.add_row(phase, spoken_bytes(size), "<- binds" if phase == answer.binding_phase else "")
    if answer.evaluation_bytes is not None:
        phases.add_row("evaluate", spoken_bytes(answer.evaluation_bytes), "not counted: no evaluation is asked for")
    console.print(phases)
    parts = Table(f"alive at the peak of {answer.binding_phase}", "bytes", "share", box=None)
    for kind, size in answer.components.items():
        parts.add_row(kind, spoken_bytes(size), f"{size / answer.peak_allocated_bytes:.1%}")
    console.print(parts)
    if depth:
        console.print(_module_tree(answer.modules, depth))
    if explain:
        _show_terms(answer, console)
    _show_assumptions(answer.assumptions, console)


def _show_assumptions(lines: Sequence[str], console: Console, of: str = "") -> None:
    console.print(f"assumptions{of}:")
    for line in lines:
        console.print(f"  {line}", markup=False)


def _show_terms(answer: Answer, console: Console) -> None:
    formulas = any(term.formula for term in answer.terms)
    table = Table("kind", "what", "count", *(["bytes of one"] if formulas else []), "all", "source", box=None)
    for term in answer.terms:
        formula = [term.formula] if formulas else []
        table.add_row(term.kind, term.name, str(term.count), *formula, spoken_bytes(term.bytes), term.source)
    console.print(table)
    if not formulas:
        return
    used = {name for term in answer.terms for name in term.formula.split("·")[1:]}
    letters = ", ".join(
        f"{name} = {spoken_number(value)} ({DIMENSIONS[name]})"
        for name, value in answer.dimensions.items()
        if name in used and name in DIMENSIONS
    )
    console.print(f"with {letters}", markup=False)


def _module_tree(modules: dict[str, Any], depth: int) -> Tree:
    root = Tree("by module", guide_style="dim")

    def grow(branch: Tree, level: dict[str, Any], left: int) -> None:
        for name, node in sorted(level.items(), key=lambda item: -item[1]["bytes"]):
            twig = branch.add(f"{name}  {spoken_bytes(node['bytes'])}")
            if left > 1:
                grow(twig, node["modules"], left - 1)

    grow(root, modules, depth)
    return root


def show_models(console: Console) -> None:
    """Prints the models that are known by name, and the public code that lists each one's shape."""
    table = Table("name", "parameters", "kind", "hub id", box=None)
    sources: dict[str, list[str]] = {}
    for name, preset in PRESETS.items():
        table.add_row(name, f"{preset.parameters:,}", preset.shape.family, preset.hub_id)
        sources.setdefault(preset.source, []).append(name)
    for name, known in SIMULATED.items():
        table.add_row(name, "simulated", known.config["model_type"], known.hub_id)
        sources.setdefault(known.source, []).append(name)
    console.print(table)
    console.print("Their shapes are listed in")
    for source, names in sources.items():
        console.print(f"  {source}: {', '.join(names)}", markup=False)
    kinds = ", ".join(FAMILIES)
    console.print(f"The closed form knows the kinds {kinds}. Give any other model's config.json: it is simulated.")


def show_time(time: Duration | None, gpu: Gpu, console: Console) -> None:
    """Prints how long a run takes, what it costs, and what stands behind the interval."""
    if time is None:
        unknown = f"the speed of {gpu.name} is not known; give --tflops and --bandwidth"
        console.print(f"time: {'not modelled for this model or job' if known_speed(gpu) else unknown}", markup=False)
        return
    step = f"a step takes {spoken_range(time.step_seconds, _spoken_step)}"
    console.print(f"time: about {spoken_range(time.tokens_per_second, spoken_speed)} tokens/s; {step}")
    if time.training_seconds and time.epoch_seconds:
        epoch = f"an epoch takes {spoken_range(time.epoch_seconds, spoken_time)}"
        training = spoken_range(time.training_seconds, spoken_time)
        console.print(f"  {epoch}; the training, {counted(time.steps or 0, 'step')}, {training}")
    if time.cost:
        cost = spoken_range(time.cost, lambda price: f"{price:,.2f}")
        of = "the training" if time.training_seconds else "1M tokens"
        console.print(f"  cost of {of}: about {cost}, in the currency of the price")
    behind = "80 % of the measured speeds of such runs and their like, on one card in bf16, lie in the interval"
    said = f"not validated: {time.unvalidated}" if time.unvalidated else behind
    console.print(f"  {said} (docs/time.md)", markup=False)


def spoken_range(range_: Range, told: Callable[[float], str]) -> str:
    """Returns a prediction with its interval."""
    return f"{told(range_.value)} ({told(range_.low)} to {told(range_.high)})"


def _spoken_step(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 60 else spoken_time(seconds)


def spoken_speed(speed: float) -> str:
    """Returns tokens a second, with three digits."""
    return f"{float(f'{speed:.3g}'):,.0f}"


def show_cheapest(cards: Sequence[OnCard], console: Console) -> None:
    """Prints the cards that a run fits on, the cheapest first, with the time and the cost on each."""
    is_whole = cards[0].time.training_seconds is not None
    of = ("time of the training", "cost") if is_whole else ("time of a step", "cost of 1M tokens")
    table = Table("card", "fits", "tokens/s", *of, box=None)
    for one in cards:
        speed = spoken_range(one.time.tokens_per_second, spoken_speed)
        training, step = one.time.training_seconds, one.time.step_seconds
        taken = spoken_range(training, spoken_time) if training else spoken_range(step, _spoken_step)
        cost = spoken_range(one.time.cost, lambda price: f"{price:,.2f}") if one.time.cost else "no price"
        table.add_row(one.gpu.name, f"[{STATE_COLOURS[one.fits]}]{one.fits}[/]", speed, taken, cost)
    console.print(table)
    first = cards[0].time
    console.print(f"intervals as in docs/time.md{f'; not validated: {first.unvalidated}' if first.unvalidated else ''}")


STATE_COLOURS = {"yes": "green", "tight": "yellow", "no": "red"}


def _assumed(fits: Sequence[Fit]) -> list[str]:
    """Returns what was asked about, in a line for all methods, and what the words of the table mean."""
    ran = [fit for fit in fits if fit.assumed]
    if not ran:
        return []
    asked, ranks = ran[0].assumed, {fit.method: fit.assumed["rank"] for fit in ran if fit.assumed["rank"]}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else None
    others = "".join(f", {method} {rank}" for method, rank in ranks.items() if rank != usual)
    loss = "loss_path" if asked["job"] == "sft" else "job"
    said = [f"{name}={asked[name]}" for name in ("batch_size", "seq_len", "precision", loss)]
    said += [f"rank={usual}{others}"] if usual else []
    tight = "tight: cached memory has to be given back"
    return [f"assuming {', '.join(said)}; largest sizes with all else as assumed; {tight}"]


def _taken(fit: Fit) -> tuple[str, str]:
    """Returns the tokens a second of a run, and the time of its training with its cost."""
    if not fit.time:
        return "-", "-"
    training, cost = fit.time.training_seconds, fit.time.cost
    taken = spoken_time(training.value) if training else "-"
    return spoken_speed(fit.time.tokens_per_second.value), taken + (f", {cost.value:,.2f}" if cost else "")


def show_fits(fits: Sequence[Fit], gpu: Gpu, console: Console) -> None:
    """Prints which methods fit, the bytes that are left, and the largest batch, length and rank that still fit."""
    kept = f", of which CUDA can use {spoken_bytes(gpu.usable_bytes)} ({gpu.reserve_source})" * bool(gpu.reserve_bytes)
    console.print(f"on {gpu.name}, {spoken_bytes(gpu.memory_bytes)}{kept}; closed form")
    for line in _assumed(fits):
        console.print(line, markup=False, soft_wrap=True)
    ran = [fit for fit in fits if fit.how == "simulation"]
    simulated = sorted({fit.model if METHODS[fit.method].closed_form else fit.method for fit in ran})
    largest_of = ("largest batch", "largest length", "largest rank")
    timed = ("tokens/s", "training") if any(fit.time and fit.time.training_seconds for fit in fits) else ("tokens/s",)
    names = ("device peak", "fits", "left", *timed, *largest_of, "what to do", "peak then")
    table = Table("model", "method", *names, box=None)
    for fit in fits:
        mark = f"[{STATE_COLOURS[fit.fits]}]{fit.fits}[/]"
        none = "?" if fit.how == "simulation" else "-"
        sizes = (fit.largest_batch_size, fit.largest_seq_len, fit.largest_rank)
        largest = [str(value) if value else none for value in sizes]
        if fit.largest_tight_batch_size and fit.largest_tight_batch_size != fit.largest_batch_size:
            largest[0] += f" (tight {fit.largest_tight_batch_size})"
        then = spoken_bytes(fit.advised_device_bytes) if fit.advised_device_bytes is not None else ""
        device, left = (spoken_bytes(b) if b is not None else "-" for b in (fit.peak_device_bytes, fit.headroom_bytes))
        table.add_row(fit.model, fit.method, device, mark, left, *_taken(fit)[: len(timed)], *largest, fit.advice, then)
    console.print(table)
    if any(fit.time for fit in fits):
        low, high = fitted()[1]["interval"]
        console.print(f"tokens/s: {low} to {high} times as many hold 80 % of measured speeds (docs/time.md)")
    for name in simulated:
        console.print(f"{name} has no closed form: its peak is simulated, and largest sizes are not searched")
    for fit in fits:
        for line in fit.assumptions[:1]:
            if line.startswith("experts: "):
                console.print(f"{fit.model}, {fit.method}: {line}", markup=False)


def show_why(why: Why, console: Console) -> None:
    """Prints a difference: the sentences, then every term of it, and the two peaks as its sums."""
    for sentence in why.sentences:
        console.print(sentence, markup=False)
    table = Table("term", "of", why.second, why.first, "difference", box=None)
    large = [change for change in why.changes if abs(change.bytes) > why.notable_bytes / 50]
    rows = [(change.name, change.kind, [change]) for change in large]
    rows += [("smaller differences", "", why.changes[len(large) :]), ("the same in both", "", why.unchanged)]
    for name, kind, changes in [*rows, ("peak", "", [*why.changes, *why.unchanged])]:
        second, first = sum(each.second_bytes for each in changes), sum(each.first_bytes for each in changes)
        difference = spoken_bytes(first - second, sign=True)
        if changes:
            table.add_row(name, kind, spoken_bytes(second), spoken_bytes(first), difference)
    console.print(table)
    _show_assumptions(why.assumptions, console, of=" of both")


def show_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Prints what an out-of-memory error was about: the sentences, the candidates, and what would fit."""
    for sentence in diagnosis.sentences:
        console.print(sentence, markup=False)
    table = Table("phase", "what", "bytes of one", "size", "count", "alive before", "mostly", "source", box=None)
    for one in diagnosis.candidates[:SHOWN]:
        live = "?" if one.live_bytes is None else spoken_bytes(one.live_bytes)
        live = f"up to {live}" if one.phase == "load" else live
        largest = sorted(one.alive.items(), key=lambda part: -part[1])[:2]
        mostly = ", ".join(f"{kind} {spoken_bytes(size)}" for kind, size in largest)
        size = spoken_bytes(one.size_bytes)
        table.add_row(one.phase, one.name, one.formula, size, str(one.count), live, mostly, one.source)
    if diagnosis.candidates:
        console.print(table)
    if len(diagnosis.candidates) > SHOWN:
        console.print(f"and {len(diagnosis.candidates) - SHOWN} more (--json)")
    show_remedies(diagnosis.remedies, console)

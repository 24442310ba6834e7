"""Joins rules, memory and time into advice, and says what is nearest if nothing fits. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from peftscope.hardware.cards import GPUS, speed_of
from peftscope.memory.answer import answer_by_formula
from peftscope.report.advice.options import Fitter, Option
from peftscope.report.advice.rules import HABIT, Findings, Rules, Standing
from peftscope.report.advice.settings import BITS_PER_PARAMETER, Line, Situation
from peftscope.sizing.changes import NOTHING
from peftscope.sizing.duration import unvalidated
from peftscope.sizing.trainer_file import trainer_file
from peftscope.words import spoken_bytes, spoken_time


@dataclass(frozen=True)
class Advice:
    """The advice for a situation.

    Attributes:
        situation: What was asked.
        options: The ways that fit, the best first; empty if nothing fits.
        lines: The settings of the first option with their reasons, and what it takes.
        nearest: What would fit, if nothing does, the nearest first.
        claims_from: Where the verdicts on claims were read.
        rules: The rules.
        findings: The findings on claims, by id.
    """

    situation: Situation
    options: tuple[Option, ...]
    lines: tuple[Line, ...]
    nearest: tuple[str, ...]
    claims_from: str
    rules: Rules
    findings: Findings

    def costs(self, option: Option) -> str:
        """Returns what an option costs in quality, and on what that rests."""
        said = []
        for name in option.changes:
            change = self.rules.change(name)
            said.append(f"{change.says} ({change.evidence(self.findings, self.situation.billions)})")
        return "; ".join(said) or "nothing"

    def brief(self) -> Iterator[tuple[str, str, str]]:
        """Yields the decisions about the first option: what each is about, its value, and the worlds it rests on."""
        lines = {line.setting: line for line in self.lines}
        method, on = self.options[0].question.spec.method.model_dump(), {name: lines[name].rests_on for name in lines}
        yield "method", self.options[0].method, "; ".join(on["method"])
        if "rank" in lines:
            rests = "; ".join(on["rank"])
            rests = "; ".join([rests, *(more for more in on["alpha"] if re.split(r":| \(", more)[0] not in rests)])
            yield "rank and alpha", f"{method['rank']} and {method['alpha']:g}", rests
            yield "targets", str(method["targets"]), "; ".join(on["targets"])
        yield "learning rate", f"{lines['learning_rate'].value:g}", "; ".join(on["learning_rate"])

    @property
    def file(self) -> str | None:
        """The trainer's file for the first option; None: no trainer is named, nothing fits, or it has a tower."""
        if self.situation.trainer is None or not self.options or self.situation.model.vision:
            return None  # adapters of all linear layers would be on a tower's too, which is not what was sized
        option = self.options[0]
        rate, epochs = option.settings.value("learning_rate"), option.settings.value("epochs")
        spec = option.question.spec.model_copy(update={"learning_rate": rate})
        return trainer_file(self.situation.trainer, spec, epochs, option.question.beside)

    def to_json(self) -> dict[str, Any]:
        """Returns the advice as JSON content. The keys are stable."""
        situation = self.situation
        return {
            "model": situation.model.name,
            "gpu": situation.gpu.name,
            "gpus": situation.gpus,
            "examples": situation.examples,
            "priority": situation.priority,
            "data_bits": situation.data_bits,
            "data_rank": situation.data_rank,
            "fits": bool(self.options),
            "claims_from": self.claims_from,
            "lines": [{**asdict(line), "text": line.text} for line in self.lines],
            "options": [self._option(option) for option in self.options],
            "nearest": list(self.nearest),
            "file": self.file,
        }

    def _option(self, option: Option) -> dict[str, Any]:
        spec = option.question.spec
        sizes = {"batch_size", "gradient_accumulation", "seq_len", "checkpointing", "precision", "optimizer"}
        return {
            "method": spec.method.model_dump(mode="json"),
            "changes": list(option.changes),
            "quality_loss_rests_on": option.standing.name.lower(),
            "costs": self.costs(option),
            **spec.model_dump(include=sizes),
            "loss": option.question.beside.loss,
            "quantize_moe_experts": option.question.beside.quantize_moe_experts,
            "shards": option.question.gpus,
            "steps": option.steps,
            "peak_device_bytes": option.peak_device_bytes,
            "seconds": list(option.seconds),
            "time_is_measured": option.time_is_measured,
            "adapter_bytes": option.adapter_bytes,
        }


def advise(situation: Situation, rules: Rules, findings: Findings, claims_from: str = "") -> Advice:
    """Returns the advice for a situation.

    Raises:
        InputError: The closed form does not know the model.
    """
    fitter = Fitter(situation, rules, findings)
    preferred = rules.rule("method", situation.facts(""), findings)
    assert preferred is not None  # the last rule always speaks
    methods = list(preferred.value)
    options = tuple(fitter.options(methods))
    lines = tuple(_lines(options, situation)) if options else ()
    nearest = () if options else tuple(_nearest(fitter, methods))
    return Advice(situation, options, lines, nearest, claims_from, rules, findings)


def _lines(options: tuple[Option, ...], situation: Situation) -> Iterator[Line]:
    """Yields the lines about the first option."""
    option, settings = options[0], options[0].settings
    spec = option.question.spec
    yield _method_line(options)
    for name in ("precision", "rank", "targets", "alpha", "dropout", "learning_rate"):
        if name in settings.lines:
            yield _as_it_is(settings.lines[name], option, situation)
    accumulated = f"{spec.batch_size} × {spec.gradient_accumulation} accumulated"
    cards = f" × {situation.gpus} cards" if situation.gpus > 1 else ""
    batch = settings.lines["batch"]
    most = max(batch.choice, default=batch.value)
    over = f"{situation.gpus}, one on each card, where at most {most:g} are advised"
    in_step = over if situation.gpus > most else batch.text
    yield replace(batch, choice=(), value=f"{accumulated}{cards} (in a step: {in_step})")
    yield _length_line(option, situation)
    how = "on" if spec.checkpointing else "off"
    reason = "Gradients are the same; a step takes about a third longer, and activations take a fraction of the memory."
    yield Line("recomputation", how, reason if spec.checkpointing else "It fits without.")
    if option.liger:
        yield Line("loss", "Liger's", "The same loss over chunks of the logits, which are never whole.")
    if option.question.beside.quantize_moe_experts:
        yield Line("experts", "in 4 bits too", "transformers leaves them in 16 bits; axolotl packs them.")
    epochs = settings.lines["epochs"]
    yield replace(epochs, choice=(), value=f"{option.steps:,} steps (epochs: {epochs.text})")
    yield _peak_line(option, situation)
    yield _time_line(option, situation)
    saved = "all weights in 16 bits" if spec.method.trains_base else "the adapter in 32 bits"
    yield Line("size on disk", spoken_bytes(option.adapter_bytes), saved)
    yield from (settings.lines[name] for name in ("variants", "merging") if name in settings.lines)


def _method_line(options: tuple[Option, ...]) -> Line:
    """Returns the line on the method. What may be equal stands beside it only as far as it fits without a loss."""
    line, chosen = options[0].settings.lines["method"], options[0].method
    fitting = [option.method for option in options if option.standing <= Standing.OPEN]
    equal = [method for method in line.choice if method in fitting and method != chosen]
    choice = (chosen, *equal) if equal and chosen in line.choice else ()
    return replace(line, value=chosen, choice=choice)


def _as_it_is(line: Line, option: Option, situation: Situation) -> Line:
    """Returns a line on a setting with what the option changed of it."""
    spec = option.question.spec
    if line.setting == "rank":
        rank = getattr(spec.method, spec.method.rank_field)
        bits = f"{situation.data_bits:,.0f} bits of responses, which rank {situation.data_rank} stores"
        says = f"{line.says} The data hold about {bits} at {BITS_PER_PARAMETER:g} bits for each parameter."
        return replace(line, value=rank, says=says)
    if line.setting == "alpha":
        return replace(line, choice=(), value=f"{spec.method.model_dump()['alpha']:g} (times the rank: {line.text})")
    if line.setting == "precision" and spec.method.trains_base:
        value = "32-bit weights under bf16 autocast" if spec.precision == "amp" else spec.precision
        return replace(line, choice=(), value=value)
    return line


def _length_line(option: Option, situation: Situation) -> Line:
    length = option.question.spec.seq_len
    asked = situation.seq_len
    taken = "be as long" if length == asked else f"have {asked:,} tokens, and is cut to fit"
    return Line("length", length, f"Every example is taken to {taken}. Give --seq-len.", "custom", HABIT)


def _peak_line(option: Option, situation: Situation) -> Line:
    line = option.settings.lines["peak"]
    answer = answer_by_formula(option.question)
    each = f" on each of {option.question.gpus} cards" if option.question.gpus > 1 else ""
    value = f"{spoken_bytes(option.peak_device_bytes, 1)}{each} of {spoken_bytes(situation.gpu.usable_bytes, 1)}"
    says = f"{line.says} The longest batch, with a loss on every token.".strip()
    evidence = f"calculator: {answer.agreement}" + (f"; {line.evidence}" if line.claims else "")
    return Line("peak", value, says, evidence=evidence, claims=line.claims)


def _time_line(option: Option, situation: Situation) -> Line:
    value, fast_card = " to ".join(map(spoken_time, option.seconds)), speed_of(situation.gpu)[1]
    if option.time_is_measured:
        return Line("time", value, "The training alone.", "measured", "records of such a card")
    reason = unvalidated(option.question)
    says = f"The training alone, by the model of docs/time.md, for {fast_card}."
    says += f" Not validated: {reason}." if reason else " Of measured speeds, 80 % lie in the interval."
    return Line("time", value, says, evidence=f"not validated: {reason}" if reason else "measured speeds")


def _nearest(fitter: Fitter, methods: list[str]) -> Iterator[str]:
    """Yields what is missing if nothing fits, and what would help: what ``fit`` says, and the smallest card."""
    question, card = fitter.least(methods), fitter.situation.gpu
    spec, peak = question.spec, fitter.peak(question)
    yield (
        f"The least that advised runs take is {spec.method.name} with one sequence of {spec.seq_len} tokens and "
        f"recomputation: {spoken_bytes(peak, 1)}, {spoken_bytes(peak - card.usable_bytes, 1)} more than the card has."
    )
    enough = [larger for larger in GPUS.values() if larger.usable_bytes >= peak]
    larger = min(enough, key=lambda larger: larger.usable_bytes, default=None)
    named = f"; the smallest card: {larger.name} ({spoken_bytes(larger.usable_bytes, 1)})" if larger else ""
    yield f"It takes {NOTHING}{named}."

"""Changes after which a run fits on a card, those that cost the least quality first, and the peak after each. No torch.

``LEVELS`` is the one list of them: ``memory``, ``fit``, ``oom`` and the forecasts of experiments go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, product
from typing import Any

from pydantic import ValidationError

from peftscope.errors import InputError
from peftscope.hardware.cards import Fits
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.formula.step import without_collector
from peftscope.memory.question import SCALED_LOGITS, Question, ask
from peftscope.memory.shares import RESIDENT
from peftscope.memory.trace import by_kind
from peftscope.methods import METHODS
from peftscope.sizing.needs import ACCEPTED, Needs, options_of_method
from peftscope.sizing.reading import OWN, Reading, spoken
from peftscope.spec import RunSpec
from peftscope.words import spoken_bytes

MOST = 3
"""The most remedies of an answer."""
MOST_ROWS = 1 << 16
"""The largest smaller batch that is tried."""
SHORTEST = 256
"""The fewest tokens that a remedy cuts sequences to."""
NOTHING = "a smaller model, a larger card, or --gpus"
"""The last remedies, where no change makes a run fit."""

FREE = ("reference", "loss", "checkpointing", "batch_size")
LEVELS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("reference",), ("loss",), ("checkpointing",), ("batch_size",), ("loss", "checkpointing"), FREE),
    (("optimizer",), (*FREE, "optimizer")),
    (("method",), ("loss", "checkpointing", "method"), (*FREE, "method")),
    ((*FREE, "method", "seq_len"),),
)
"""Changes by what they cost in quality: nothing, 8-bit states, a 4-bit base, text that is cut. The last one of a level
has all others of it: where that does not fit, no other does."""
SPARED: dict[str, tuple[str, ...]] = {
    "loss": (*RESIDENT, "saved activations"),
    "checkpointing": (*RESIDENT, "logits and loss"),
    "batch_size": RESIDENT,
    "eval_batch_size": RESIDENT,
    "optimizer": ("weights", "adapters", "gradients", "saved activations", "logits and loss"),
}
"""The kinds of blocks that a change leaves as they are; a change that is not named may shrink all."""

Values = Mapping[str, list[dict[str, Any]]]
"""The values that each change of ``LEVELS`` may set, the mildest first; none: the run is so already, or cannot be."""


def values_of(
    spec: RunSpec, loss: dict[str, Any], packing: dict[str, Any], reference: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Returns what changes may set in a run.

    A smaller batch comes with as many more accumulated ones, so that a step learns from as many examples.

    Args:
        spec: The run.
        loss: What leaves the logits out; empty: nothing does.
        packing: What packs a model's experts into 4 bits; empty: nothing does, or it has none.
        reference: What keeps a copy of the model from the card; empty: there is none.
    """
    rows, method = spec.batch_size * spec.gradient_accumulation, METHODS[spec.method.name]
    fewer = [size for size in range(min(spec.batch_size - 1, MOST_ROWS), 0, -1) if rows % size == 0]
    values: dict[str, list[dict[str, Any]]] = {
        "reference": [reference],
        "loss": [loss],
        "checkpointing": [{"checkpointing": True}] if method.supports_checkpointing and not spec.checkpointing else [],
        "batch_size": [{"batch_size": size, "gradient_accumulation": rows // size} for size in fewer],
        "optimizer": [{"optimizer": "adamw_8bit"}] if spec.optimizer == "adamw" and spec.method.trains else [],
        "method": [packing if getattr(spec.method, "quant_type", None) else {"method": "qlora", **packing}],
        "seq_len": [{"seq_len": spec.seq_len >> n} for n in range(1, 20) if spec.seq_len >> n >= SHORTEST],
        "eval_batch_size": [{"eval_batch_size": 1}] if spec.eval_batch_size > 1 else [],
    }
    return {step: [part for part in parts if part] for step, parts in values.items()}


def ways(values: Values, steps: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yields what these steps set: one for each batch or length, the largest first."""
    helpful = [step for step in steps if values[step]]
    if "seq_len" in helpful:  # text is cut only where the smallest batch does not do
        values = {**values, "batch_size": values["batch_size"][-1:]}
    for parts in product(*(values[step] for step in helpful)):
        yield {name: value for part in parts for name, value in part.items()}


def mildest_change(fits: Callable[[Mapping[str, Any]], bool], values: Values) -> dict[str, Any] | None:
    """Returns the mildest change that makes a run fit, or None if none does.

    Args:
        fits: Returns whether a run fits with these changes. It raises ``InputError`` or ``ValidationError`` if they are
            not possible.
        values: What changes may set.
    """
    tried: list[dict[str, Any]] = []
    for changes in chain.from_iterable(ways(values, steps) for steps in chain(*LEVELS)):
        if changes and changes not in tried:
            tried.append(changes)
            with suppress(InputError, ValidationError):
                if fits(changes):
                    return changes
    return None


@dataclass(frozen=True)
class Remedy:
    """Changes after which a run fits.

    Attributes:
        changes: The keys of the trainer's file and the options of the command, which begin with dashes, with their
            values.
        fits: Whether it then fits.
        peak_device_bytes: The bytes that the card then needs.
    """

    changes: dict[str, Any]
    fits: Fits
    peak_device_bytes: int

    @property
    def words(self) -> str:
        """The changes as they are written in the file or given to the command."""
        own = {key: value for key, value in self.changes.items() if not key.startswith("--")}
        keys = ", ".join(f"no {key}" if value is None else f"{key}: {_yaml(value)}" for key, value in own.items())
        options = [(key, value) for key, value in self.changes.items() if key.startswith("--")]
        given = " ".join(key if value is True else f"{key} {value}" for key, value in options)
        return ", and ".join(filter(None, (keys, given)))

    def __str__(self) -> str:
        tight = "" if self.fits == "yes" else ", tight"
        return f"{self.words}  ({spoken_bytes(self.peak_device_bytes)}{tight})"


def _yaml(value: Any) -> str:
    return f"[{spoken(value)}]" if isinstance(value, list) else spoken(value)


@dataclass(frozen=True)
class Asked:
    """A question that can be asked again with changes.

    Attributes:
        question: The question.
        given: The options of the command line; None: not given.
        responses: The positions with a loss, if they were given.
        gpus: The number of cards, if it was given.
        reading: The trainer's file, if the question came from one.
    """

    question: Question
    given: Mapping[str, Any]
    responses: int | None = None
    gpus: int | None = None
    reading: Reading | None = None

    def with_changes(self, changes: Mapping[str, Any]) -> Question:
        """Returns the question with other values of these keys and options.

        Raises:
            InputError: They are not possible.
        """
        options = {key[2:].replace("-", "_"): value for key, value in changes.items() if key.startswith("--")}
        given = {name: value for name, value in {**self.given, **options}.items() if value is not None}
        if self.reading is None or "method" in options:
            given = options_of_method(given.get("method", self.question.spec.method.name), given)
        responses = self.responses
        if responses is not None and "seq_len" in given:
            responses = min(responses, given["seq_len"])  # cut text has fewer
        more: dict[str, Any] = {"responses": responses, "gpu": self.question.gpu}
        if self.reading is None:
            return ask(self.question.model, given, gpus=self.question.gpus, **more)
        from peftscope.sizing.config_file import question_of, read_config

        keys = {key: value for key, value in changes.items() if not key.startswith("--")}
        name = self.reading.model if self.reading.keys.get("model") == "model" else None
        return question_of(read_config(self.reading.path, given, name, keys), gpus=self.gpus, **more)

    @cached_property
    def keys(self) -> Mapping[str, Mapping[str, Any]]:
        """The trainer's key for each option; nothing without a trainer."""
        from peftscope.sizing.trainers import remedies_in

        return remedies_in(self.reading.trainer if self.reading else self.question.beside.as_trainer or "")

    def values(self) -> dict[str, list[dict[str, Any]]]:
        """Returns what changes may set, in the words of the file and the command line."""
        question, shape = self.question, self.question.model.shape
        beside, scaled = question.beside, question.model.config["model_type"] in SCALED_LOGITS
        own = self.reading is None and beside.as_trainer is None  # a trainer's release computes them in one way
        loss = {"logprobs": "chunked"} if own and beside.logprobs in ("full", "whole") else {}
        fused = "loss" in self.keys or not self.keys
        if beside.job == "sft" and beside.loss == "plain" and fused and not scaled:
            loss = {"loss": "liger"}
        reference = {"reference": "precomputed"} if beside.reference == "copy" and beside.job != "grpo" else {}
        packs = "quantize_moe_experts" in self.keys or not self.keys
        packs = packs and bool(shape and shape.experts) and not beside.quantize_moe_experts
        packing = {"quantize_moe_experts": True} if packs else {}
        plain = values_of(question.spec, loss, packing, reference)
        return {step: [self._worded(part) for part in parts] for step, parts in plain.items()}

    def _worded(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a part as the file's keys, or as options where the command line decides or the file has no key."""
        reading, by_command = self.reading, any(self.given.get(name) is not None for name in part)
        names = [*part, *(["adapter"] if "method" in part and self.question.spec.method.trains_base else [])]
        if reading is None or not {*names} <= self.keys.keys() or by_command:
            return {f"--{name.replace('_', '-')}": value for name, value in part.items()}
        changes: dict[str, Any] = {}
        for name in names:
            for key, value in self.keys.get(name, {}).items():
                before = reading.values.get(key)
                if value is OWN:
                    changes[reading.keys.get(name, key)] = part[name]
                elif value is not None or before is not None:
                    longer = [*(before or []), *value] if isinstance(value, list) else value
                    changes[key] = value(before) if callable(value) else longer
        return changes


def untested(asked: Asked, fits: Fits, peaks: Peaks, usable: int) -> str:
    """Returns what to say where no remedy was found; of a run without a closed form, what may help and nobody tried."""
    values, alive = asked.values(), by_kind(peaks.alive(peaks.binding_phase))
    steps = [step for step in (*FREE, "optimizer", "method") if values[step] and _spared(alive, [step]) <= usable]
    if asked.question.has_closed_form or not steps:
        return NOTHING if fits == "no" else ""
    first = [Remedy(values[step][0], fits, 0).words for step in steps[:MOST]]
    return f"perhaps {', or '.join(first)} (not tried: each takes a simulation)"


def _spared(alive: Mapping[str, int], steps: Iterable[str]) -> int:
    """Returns bytes that stay whatever these steps set, so that not every change is asked about."""
    return sum(size for kind, size in alive.items() if all(kind in SPARED.get(step, ()) for step in steps))


@without_collector()
def remedies_of(asked: Asked, peaks: Peaks, needs: Needs, most: int = MOST) -> list[Remedy]:
    """Returns at most so many remedies, all of which cost the same quality: the least that helps.

    Changes that leave room are preferred to those after which a run is tight. No remedy has all changes of another one.
    ``peaks`` are those of the run as it is.
    """
    usable, values, alive = needs.gpu.usable_bytes, asked.values(), by_kind(peaks.alive(peaks.binding_phase))
    runs = needs.gpu.fits(peaks.least_bytes, peaks.device_bytes) == "tight"
    too_large = peaks.phases.get("evaluate", 0) + peaks.least_bytes - peaks.allocated_bytes > usable
    also = ("eval_batch_size",) if too_large else ()

    def least(changes: Mapping[str, Any]) -> float:
        with suppress(InputError, ValidationError):
            return peaks_by_formula(asked.with_changes(changes), traces=needs.traces, enough=0).least_bytes
        return 0

    def those(accepted: tuple[Fits, ...]) -> Iterator[Remedy]:
        known: list[set[str]] = []
        for level in (((),), *LEVELS):
            if known:
                return
            if {"optimizer", "method"} & {*level[-1]} and least([*ways(values, (*level[-1], *also))][-1]) > usable:
                continue
            for steps in level:
                kept = {step for step in (*steps, *also) if values[step]}
                if not kept or any(fewer <= kept for fewer in known) or _spared(alive, kept) > usable:
                    continue
                for changes in ways(values, (*steps, *also)):
                    with suppress(InputError, ValidationError):
                        after = asked.with_changes(changes)
                        if (fits := needs.fits(after)) in accepted:
                            known.append(kept)
                            yield Remedy(changes, fits, needs.peaks(after).device_bytes)
                            break

    every = (list(islice(those(accepted), most)) for accepted in (ACCEPTED[:1] if runs else ACCEPTED))
    return next(filter(None, every), [])

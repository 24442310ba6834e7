"""Remedies of a run that does not fit on a card, or just fits: what to change, and the peak after it. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from peftscope.errors import InputError
from peftscope.hardware.cards import Fits
from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.formula.step import without_collector
from peftscope.memory.question import SCALED_LOGITS, Question, ask
from peftscope.methods import METHODS
from peftscope.sizing.config_file import question_of, read_config
from peftscope.sizing.fit import ACCEPTED, Needs, options_of_method
from peftscope.sizing.reading import Reading, spoken
from peftscope.sizing.trainers import OWN, REMEDIES
from peftscope.words import spoken_bytes

MOST = 3
"""The most remedies of an answer."""
SHORTEST = 256
"""The fewest tokens that a remedy cuts sequences to."""

FREE = ("reference", "loss", "checkpointing", "batch_size")
LEVELS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("reference",), ("loss",), ("checkpointing",), ("batch_size",), ("loss", "checkpointing"), FREE),
    (("optimizer",), (*FREE, "optimizer")),
    (("method",), ("loss", "checkpointing", "method"), (*FREE, "method")),
    ((*FREE, "method", "seq_len"),),
)
"""Changes by what they cost in quality: nothing, 8-bit states, a 4-bit base, text that is cut. The last one of a level
has all others of it: where that does not fit, no other does."""


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

    def to_json(self) -> dict[str, Any]:
        """Returns the remedy as JSON content."""
        return asdict(self)

    def __str__(self) -> str:
        words = [
            (key if value is True else f"{key} {value}") if key.startswith("--") else f"{key}: {_yaml(value)}"
            for key, value in self.changes.items()
        ]
        keys = all(not key.startswith("--") for key in self.changes)
        tight = "" if self.fits == "yes" else ", tight"
        return f"{(', ' if keys else ' ').join(words)}  ({spoken_bytes(self.peak_device_bytes)}{tight})"


def _yaml(value: Any) -> str:
    return f"[{spoken(value)}]" if isinstance(value, list) else spoken(value)


@dataclass(frozen=True)
class Asked:
    """What was asked, so that it can be asked again with changes.

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
        if "method" in options:
            given = options_of_method(options["method"], given)
        more: dict[str, Any] = {"responses": self.responses, "gpu": self.question.gpu}
        if self.reading is None:
            return ask(self.question.model, given, gpus=self.question.gpus, **more)
        keys = {key: value for key, value in changes.items() if not key.startswith("--")}
        name = self.reading.model if self.reading.keys.get("model") == "model" else None
        return question_of(read_config(self.reading.path, given, name, keys), gpus=self.gpus, **more)

    def helps(self, step: str) -> bool:
        """Returns whether a change of this kind makes the run another one, and is possible."""
        spec, beside = self.question.spec, self.question.beside
        scaled = self.question.model.config["model_type"] in SCALED_LOGITS
        helps = {
            "reference": beside.reference == "copy" and beside.job != "grpo",
            "loss": beside.logprobs == "full" or (beside.job == "sft" and beside.loss == "plain" and not scaled),
            "checkpointing": not spec.checkpointing and METHODS[spec.method.name].supports_checkpointing,
            "batch_size": spec.batch_size > 1,
            "optimizer": spec.optimizer == "adamw" and spec.method.trains_base,
            "method": not getattr(spec.method, "quant_type", None),
            "seq_len": spec.seq_len > SHORTEST,
            "eval_batch_size": spec.eval_batch_size > 1,
        }
        return helps[step]

    def ways(self, steps: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Yields the changes of these steps: one for each batch or length, the largest first."""
        spec = self.question.spec
        values: dict[str, list[dict[str, Any]]] = {
            "reference": [{"reference": "precomputed"}],
            "loss": [{"loss": "liger"} if self.question.beside.job == "sft" else {"logprobs": "chunked"}],
            "checkpointing": [{"checkpointing": True}],
            "batch_size": list(self._batches()),
            "optimizer": [{"optimizer": "adamw_8bit"}],
            "method": [{"method": "qlora"}],
            "seq_len": [{"seq_len": spec.seq_len >> n} for n in range(1, 20) if spec.seq_len >> n >= SHORTEST],
            "eval_batch_size": [{"eval_batch_size": 1}],
        }
        helpful = [step for step in steps if self.helps(step)]
        if "seq_len" in helpful:
            values["batch_size"] = values["batch_size"][-1:]
        for parts in product(*(values[step] for step in helpful)):
            changes: dict[str, Any] = {}
            for part in parts:
                changes |= self._worded(part)
            yield changes

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yields smaller batches of which whole numbers are accumulated to what a step learns from now."""
        rows = self.question.spec.batch_size * self.question.spec.gradient_accumulation
        for size in range(self.question.spec.batch_size - 1, 0, -1):
            if rows % size == 0:
                yield {"batch_size": size, "gradient_accumulation": rows // size}

    def _worded(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a part as the file's keys, or as options where the command line decides or the file has no key."""
        reading = self.reading
        known = REMEDIES.get(reading.trainer, {}) if reading else {}
        if reading is None or not part.keys() <= known.keys() or any(self.given.get(name) is not None for name in part):
            return {f"--{name.replace('_', '-')}": value for name, value in part.items()}
        names = [*part, *(["adapter"] if "method" in part and self.question.spec.method.trains_base else [])]
        changes: dict[str, Any] = {}
        for name in names:
            for key, value in known.get(name, {}).items():
                if value is OWN:
                    changes[reading.keys.get(name, key)] = part[name]
                elif isinstance(value, list):
                    changes[key] = [*(reading.values.get(key) or []), *value]
                else:
                    changes[key] = value
        return changes


@without_collector()
def remedies_of(asked: Asked) -> list[Remedy]:
    """Returns at most three remedies, those that cost the least quality first; none for a run that is simulated.

    Changes that leave room are preferred to those after which a run is tight. No remedy has all changes of another one.
    """
    question = asked.question
    if question.gpu is None or not question.has_closed_form:
        return []
    needs, found = Needs(question.gpu), list[tuple[set[str], Remedy]]()
    peaks = needs.peaks(question)
    runs = question.gpu.fits(peaks.least_bytes, peaks.device_bytes) == "tight"
    too_large = peaks.phases.get("evaluate", 0) + peaks.least_bytes - peaks.allocated_bytes > question.gpu.usable_bytes
    also = ("eval_batch_size",) if too_large else ()

    def first(ways: Iterable[Mapping[str, Any]], accepted: Sequence[Fits]) -> Remedy | None:
        for changes in ways:
            with suppress(InputError, ValidationError):
                changed = asked.with_changes(changes)
                if (fits := needs.fits(changed)) in accepted:
                    return Remedy(dict(changes), fits, needs.peaks(changed).device_bytes)
        return None

    def least(changes: Mapping[str, Any]) -> float:
        with suppress(InputError, ValidationError):
            return peaks_by_formula(asked.with_changes(changes), traces=needs.traces, enough=0).least_bytes
        return 0

    for accepted in ACCEPTED[:1] if runs else ACCEPTED:
        for level in (((),), *LEVELS):
            if len(found) >= MOST or ("seq_len" in level[-1] and found):
                break
            if least([*asked.ways((*level[-1], *also))][-1]) > question.gpu.usable_bytes:
                continue
            for steps in level:
                kept = {step for step in (*steps, *also) if asked.helps(step)}
                if kept and not any(known <= kept for known, _ in found):
                    remedy = first(asked.ways((*steps, *also)), accepted)
                    found += [(kept, remedy)] if remedy else []
        if found:
            break
    return [remedy for _, remedy in found[:MOST]]

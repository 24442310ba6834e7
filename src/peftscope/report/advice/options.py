"""The ways in which methods fit on a card, with what each takes and costs. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

from peftscope.hardware.cards import Fits
from peftscope.memory.base import Model
from peftscope.memory.question import Question, ask
from peftscope.methods import METHODS
from peftscope.planning.forecast import Forecaster
from peftscope.report.advice.rules import Change, Findings, Rules, Standing
from peftscope.report.advice.settings import Settings, Situation, settings_for
from peftscope.sizing.duration import with_interval
from peftscope.sizing.needs import ACCEPTED, Needs
from peftscope.sizing.speed import step_time
from peftscope.sizing.trainer_file import ALWAYS_HALF

LENGTHS = (8192, 4096, 2048, 1024, 768, 512, 384, 256, 128)
"""The lengths that are tried if examples have to be cut."""
SMALLEST_PLAIN_BATCH = 4
"""Smaller batches than this come with recomputation rather than without it: they use a card badly."""
PURE_BF16 = "pure bf16"
"""The change that a trainer makes of itself if it loads all weights in 16 bits."""
SHORTER = "shorter"
"""The change that cuts examples."""


@dataclass(frozen=True)
class Option:
    """One way in which a method fits.

    Attributes:
        settings: What the rules say about the method.
        changes: The changes that cost quality, or may; empty if none is needed.
        standing: What the loss of quality by these changes rests on; computed: there is none.
        question: The run and its memory.
        peak_device_bytes: The bytes that each card needs.
        steps: The optimizer steps of the run.
        seconds: The shortest and the longest expected time of the training.
        time_is_measured: Whether records of such a card corrected the time.
        adapter_bytes: The size of what is trained, on disk.
    """

    settings: Settings
    changes: tuple[str, ...]
    standing: Standing
    question: Question
    peak_device_bytes: int
    steps: int
    seconds: tuple[float, float]
    time_is_measured: bool
    adapter_bytes: int

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.settings.method


class Fitter:
    """Finds the options of a situation.

    Args:
        situation: The model, the card and the data.
        rules: The rules of the advice.
        findings: The findings on claims, by id.
    """

    def __init__(self, situation: Situation, rules: Rules, findings: Findings) -> None:
        self.situation, self.rules, self.findings = situation, rules, findings
        self._needs, self._forecaster = Needs(situation.gpu), Forecaster(situation.gpu)
        self._accepted: tuple[Fits, ...] = ACCEPTED[0]

    def options(self, methods: Sequence[str]) -> list[Option]:
        """Returns the options of methods, the best first. They fit with room if any option does."""
        stored = self.situation.model.stored  # the weights of such a base are not trained
        possible = [method for method in methods if not (stored and METHODS[method].trains_base)]
        for accepted in ACCEPTED:
            self._accepted = accepted
            options = [option for method in possible for option in self._options_of(method)]
            if options:
                return sorted(options, key=lambda option: self._worth(option, methods))
        return []

    def _worth(self, option: Option, methods: Sequence[str]) -> tuple[float, ...]:
        """Returns the key by which options are sorted: the loss of quality by its evidence, then the priority."""
        order, priority = methods.index(option.method), self.situation.priority
        if priority in ("memory", "speed"):
            loss = max(option.standing, Standing.PAPERS)  # what is open counts as no loss
            taken_up = option.peak_device_bytes if priority == "memory" else sum(option.seconds)
            return loss, SHORTER in option.changes, taken_up, order
        return max(option.standing, Standing.HOLDS), order, len(option.changes)

    def _options_of(self, method: str) -> Iterator[Option]:
        """Yields the option of a method at full length with the least loss, and one that cuts examples instead."""
        settings = settings_for(method, self.situation, self.rules, self.findings)
        shards = self.shards(method)
        own = PURE_BF16 if method == "full" and self.situation.trainer in ALWAYS_HALF else method
        forced = [change for change in self.rules.changes if change.name == own]
        possible = [change for change in self.rules.changes if self._is_possible(change, settings, shards)]
        free = [change for change in possible if change not in forced]
        subsets = [subset for size in range(len(free) + 1) for subset in combinations(free, size)]
        subsets.sort(key=lambda subset: (self._standing(subset), len(subset)))
        full = next(self._fitting(settings, subsets, forced, [self.situation.seq_len]), None)
        if full:
            yield full
        if full is None or len(full.changes) > len(forced):
            shorter = [length for length in LENGTHS if length < self.situation.seq_len]
            cut = [*forced, self.rules.change(SHORTER)]
            yield from islice(self._fitting(settings, [(), tuple(free)], cut, shorter), 1)

    def shards(self, method: str) -> int:
        """Returns the cards that share the weights of a method: all, or one for a trainer or a base in 4 bits."""
        quantised = METHODS[method].model_validate({"name": method}).quantization()
        return 1 if quantised or self.situation.trainer else self.situation.gpus

    def _is_possible(self, change: Change, settings: Settings, shards: int) -> bool:
        if change.name == SHORTER or change.name == settings.method or settings.method not in change.methods:
            return False
        if change.rank is not None:
            return bool(settings.value("rank") > change.rank)
        return shards == 1 or "optimizer" not in change.fields  # sharded training needs an optimizer of torch

    def _standing(self, changes: Sequence[Change]) -> Standing:
        return max((change.standing(self.findings) for change in changes), default=Standing.COMPUTED)

    def _fitting(
        self,
        settings: Settings,
        subsets: Sequence[tuple[Change, ...]],
        always: Sequence[Change],
        lengths: Sequence[int],
    ) -> Iterator[Option]:
        """Yields the options of these sets of changes that fit, each at the largest of the lengths at which it does."""
        step_examples = max(1, int(settings.value("batch")) // self.situation.gpus)  # that each card sees
        for subset in subsets:
            changes = [*always, *subset]
            fields = changed(settings.fields, changes)
            for length in lengths:
                batch = self._batch({**fields, "seq_len": length}, step_examples)
                if batch:
                    yield self._option(settings, changes, {**fields, "seq_len": length, **batch})
                    break

    def _batch(self, fields: Mapping[str, Any], step_examples: int) -> dict[str, Any] | None:
        """Returns the batch and whether activations are recomputed, or None if not even one sequence fits."""

        def fits(batch: dict[str, Any]) -> bool:
            return self._needs.fits(self.ask({**fields, **batch})) in self._accepted

        def of(size: int, checkpointing: bool) -> dict[str, Any]:
            # Gradients are there while the second of several batches runs. Cards that do not divide a step's examples
            # see fewer in a step, so that there are more steps.
            accumulation = max(1, step_examples // size)
            return {"batch_size": size, "gradient_accumulation": accumulation, "checkpointing": checkpointing}

        least = of(1, True)
        if not fits(least):
            return None
        if self.situation.priority == "memory":
            return least
        sizes = [2**power for power in range(step_examples.bit_length()) if 2**power <= step_examples][::-1]
        smallest = 1 if self.situation.priority == "speed" else min(SMALLEST_PLAIN_BATCH, sizes[0])
        plain = [of(size, False) for size in sizes if size >= smallest]
        return next((batch for batch in [*plain, *(of(size, True) for size in sizes)] if fits(batch)), least)

    def ask(self, fields: Mapping[str, Any], gpus: int | None = None, model: Model | None = None) -> Question:
        """Returns the question about a run on the card, with a loss on every token: the most that a run takes."""
        shards, trainer = gpus or self.shards(fields["method"]), self.situation.trainer
        regime = {"as_trainer": trainer} if trainer else {"loss_path": "response_only"}
        asked, of = {**fields, **regime}, model or self.situation.model
        return ask(of, asked, responses=fields["seq_len"], gpu=self.situation.gpu, gpus=shards)

    def peak(self, fields: Mapping[str, Any], gpus: int | None = None, model: Model | None = None) -> int:
        """Returns the bytes that each card needs for the training, as ``Needs`` does."""
        return self._needs.peaks(self.ask(fields, gpus, model)).device_bytes

    def _option(self, settings: Settings, changes: Sequence[Change], fields: dict[str, Any]) -> Option:
        situation = self.situation
        question = self.ask(fields)
        spec, shape = question.spec, situation.shape
        epochs = settings.value("epochs")
        step = spec.batch_size * spec.gradient_accumulation * situation.gpus
        seconds = step_time(question, self._forecaster.speed).seconds * epochs * situation.examples / step
        ratios = self._forecaster.measured_ratios(spec)
        taken = with_interval(seconds)
        low, high = (seconds * min(ratios), seconds * max(ratios)) if ratios else (taken.low, taken.high)
        return Option(
            settings=settings,
            changes=tuple(change.name for change in changes),
            standing=self._standing(changes),
            question=question,
            peak_device_bytes=self.peak(fields),
            steps=max(1, round(epochs * situation.examples / step)),
            seconds=(low, high),
            time_is_measured=bool(ratios),
            adapter_bytes=(2 if spec.method.trains_base else 4) * (spec.method.trainable_parameters(shape) or 0),
        )


def changed(fields: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """Returns the fields of a run after changes. A lower rank keeps the ratio of α to it."""
    after = dict(fields)
    for change in changes:
        after |= change.fields
        if change.rank is not None and after.get("rank", 0) > change.rank:
            after |= {"rank": change.rank, "alpha": after["alpha"] * change.rank / after["rank"]}
    return after

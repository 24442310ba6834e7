"""The ways in which methods fit on a card, with what each takes and costs. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pydantic import ValidationError

from peftscope.errors import InputError
from peftscope.memory.question import Question, ask
from peftscope.methods import METHODS
from peftscope.planning.forecast import Forecaster
from peftscope.report.advice.rules import Change, Findings, Rules, Standing
from peftscope.report.advice.settings import Settings, Situation, settings_for
from peftscope.sizing.changes import LEVELS, Asked, remedies_of, ways
from peftscope.sizing.duration import with_interval
from peftscope.sizing.needs import Needs
from peftscope.sizing.speed import step_time
from peftscope.sizing.trainer_file import ALWAYS_HALF
from peftscope.spec import RunSpec


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

    @property
    def liger(self) -> bool:
        """Whether the loss is Liger's."""
        return self.question.beside.loss == "liger"


class Fitter:
    """Finds the options of a situation: each method as the rules advise it, or with the mildest remedies of ``fit``.

    Args:
        situation: The model, the card and the data.
        rules: The rules of the advice.
        findings: The findings on claims, by id.
    """

    def __init__(self, situation: Situation, rules: Rules, findings: Findings) -> None:
        self.situation, self.rules, self.findings = situation, rules, findings
        self._needs, self._forecaster = Needs(situation.gpu), Forecaster(situation.gpu)

    def options(self, methods: Sequence[str]) -> list[Option]:
        """Returns the options of methods, the best first. They fit with room if any option does."""
        stored = self.situation.model.stored  # the weights of such a base are not trained
        possible = [method for method in methods if not (stored and METHODS[method].trains_base)]
        options = [option for method in possible for option in self._option_of(method)]
        with_room = [option for option in options if self._needs.fits(option.question) == "yes"]
        return sorted(with_room or options, key=lambda option: self._worth(option, methods))

    def _worth(self, option: Option, methods: Sequence[str]) -> tuple[float, ...]:
        """Returns the key by which options are sorted: the loss of quality by its evidence, then the priority."""
        order, priority = methods.index(option.method), self.situation.priority
        if priority in ("memory", "speed"):
            loss = max(option.standing, Standing.PAPERS)  # what is open counts as no loss
            taken_up = option.peak_device_bytes if priority == "memory" else sum(option.seconds)
            return loss, taken_up, order
        return max(option.standing, Standing.HOLDS), order, len(option.changes)

    def _option_of(self, method: str) -> Iterator[Option]:
        """Yields the option of a method if it fits, as it is or with a remedy that leaves the method."""
        settings = self._settings(method)
        asked = self._asked(settings)
        fits = self._needs.fits(asked.question)
        found = [] if fits == "yes" else remedies_of(asked, self._needs.peaks(asked.question), self._needs)
        own = [remedy.changes for remedy in found if remedy.changes.get("--method", method) == method]
        ways = [self._option(settings, asked.with_changes(changes)) for changes in own]  # they cost the same quality
        if not ways and fits != "no":
            ways = [self._option(settings, asked.question)]
        quickest = self.situation.priority == "speed"
        yield from sorted(ways, key=lambda option: option.seconds if quickest else ())[:1]

    def _settings(self, method: str) -> Settings:
        return settings_for(method, self.situation, self.rules, self.findings)

    def _asked(self, settings: Settings) -> Asked:
        """Returns the question about a method as it is advised, with a loss on every token: the most that it takes.

        All examples of a step are in one batch; with priority on memory, one is.
        """
        situation, method = self.situation, METHODS[settings.method]
        rows = max(1, int(settings.value("batch")) // situation.gpus)  # that each card sees in a step
        sizes: dict[str, Any] = {"batch_size": rows, "seq_len": situation.seq_len}
        if situation.priority == "memory":
            sizes |= {"batch_size": 1, "gradient_accumulation": rows, "checkpointing": True}
        if method.trains_base and situation.trainer in ALWAYS_HALF:
            sizes["precision"] = "bf16"
        trainer = situation.trainer
        regime = {"as_trainer": trainer} if trainer else {"loss_path": "response_only"}
        quantised = method.model_validate({"name": settings.method}).quantization()
        shards = 1 if quantised or trainer else situation.gpus  # a trainer, or a base in 4 bits, shares nothing
        given = {**settings.fields, **sizes, **regime}
        question = ask(situation.model, given, responses=situation.seq_len, gpu=situation.gpu, gpus=shards)
        return Asked(question, given, responses=situation.seq_len)

    def least(self, methods: Sequence[str]) -> Question:
        """Returns the question about the method that needs the least after all changes, whether it fits or not."""
        questions: list[Question] = []
        for asked in (self._asked(self._settings(method)) for method in methods):
            with suppress(InputError, ValidationError):
                questions.append(asked.with_changes([*ways(asked.values(), chain(*LEVELS[-1]))][-1]))
        return min(questions, key=self.peak)

    def peak(self, question: Question) -> int:
        """Returns the bytes that each card needs for the training, as ``Needs`` does."""
        return self._needs.peaks(question).device_bytes

    def _costly(self, spec: RunSpec) -> list[Change]:
        """Returns the changes of a run that cost quality, or may."""
        pure = spec.method.trains_base and spec.precision == "bf16"
        made = {
            "qlora": spec.method.name == "qlora",
            "8-bit optimizer": spec.optimizer == "adamw_8bit",
            "pure bf16": pure,
            "shorter": spec.seq_len < self.situation.seq_len,
        }
        return [self.rules.change(name) for name in made if made[name]]

    def _option(self, settings: Settings, question: Question) -> Option:
        situation, spec = self.situation, question.spec
        costly = self._costly(spec)
        epochs = settings.value("epochs")
        step = spec.batch_size * spec.gradient_accumulation * situation.gpus
        seconds = step_time(question, self._forecaster.speed).seconds * epochs * situation.examples / step
        ratios = self._forecaster.measured_ratios(spec)
        taken = with_interval(seconds)
        low, high = (seconds * min(ratios), seconds * max(ratios)) if ratios else (taken.low, taken.high)
        trained = spec.method.trainable_parameters(situation.shape) or 0
        return Option(
            settings=settings,
            changes=tuple(change.name for change in costly),
            standing=max((change.standing(self.findings) for change in costly), default=Standing.COMPUTED),
            question=question,
            peak_device_bytes=self.peak(question),
            steps=max(1, round(epochs * situation.examples / step)),
            seconds=(low, high),
            time_is_measured=bool(ratios),
            adapter_bytes=(2 if spec.method.trains_base else 4) * trained,
        )

"""The situation that advice is asked for, and the settings that the rules give for it. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftscope.errors import InputError, Problem
from peftscope.hardware.cards import Gpu
from peftscope.memory.base import Model
from peftscope.methods import METHODS
from peftscope.methods.fields import target_modules
from peftscope.methods.lora import LoRA
from peftscope.models.shapes import ModelShape
from peftscope.report.advice.rules import Findings, Priority, Rules, Setting, Standing
from peftscope.sizing.trainer_file import Pasted

USUAL_LENGTH = 512
"""The tokens of an example that are assumed if none are named."""
RESPONSE_SHARE = 0.5
"""The share of the tokens that carry a loss, as the memory calculator assumes."""
BITS_PER_TOKEN = 1.0
"""The bits of a response token that are to be learned. Source: Schulman et al. 2025 (LoRA Without Regret)."""
BITS_PER_PARAMETER = 2.0
"""The bits that a trained parameter stores, claim P5."""
LARGEST_RANK = 256
"""The largest rank that is advised, which is the largest that papers tuned."""


@dataclass(frozen=True)
class Situation:
    """The subject of advice.

    Attributes:
        model: The base.
        gpu: The card.
        examples: The number of training examples.
        gpus: The number of such cards.
        priority: What matters most.
        seq_len: The length in tokens that an example may have.
        trainer: The trainer that the run is for; None: runs of this project.
    """

    model: Model
    gpu: Gpu
    examples: int
    gpus: int = 1
    priority: Priority = "quality"
    seq_len: int = USUAL_LENGTH
    trainer: Pasted | None = None

    @property
    def shape(self) -> ModelShape:
        """The sizes of the model.

        Raises:
            InputError: They are unknown.
        """
        if self.model.shape is None:
            remedy = "ask `peftscope memory --simulate` about single runs"
            raise InputError(Problem("model", f"no advice: {self.model.why_no_shape}", remedy))
        return self.model.shape

    @property
    def billions(self) -> float:
        """The parameters of the model in billions."""
        return self.shape.parameters / 1e9

    @property
    def data_bits(self) -> float:
        """The bits that the responses hold, as far as their number says."""
        return self.examples * self.seq_len * RESPONSE_SHARE * BITS_PER_TOKEN

    @property
    def data_rank(self) -> int:
        """The lowest power of two as rank on all linear layers at which the parameters store the data's bits."""
        stored = BITS_PER_PARAMETER * LoRA(rank=1).trainable_parameters(self.shape)
        return int(2 ** max(0, math.ceil(math.log2(max(1.0, self.data_bits / stored)))))

    @property
    def largest_rank(self) -> int:
        """The largest rank that is advised for this model: never above its narrowest matrix."""
        layers = self.shape.linear_layers(target_modules("all-linear"))
        return min(LARGEST_RANK, *(min(layer.inputs, layer.outputs) for layer in layers))

    def facts(self, method: str) -> dict[str, Any]:
        """Returns what conditions of rules ask about."""
        return {
            "priority": self.priority,
            "method": method,
            "examples": self.examples,
            "billions": self.billions,
            "data_rank": self.data_rank,
        }


@dataclass(frozen=True)
class Line:
    """One line of the advice.

    Attributes:
        setting: What it is about.
        value: The value to take or to start from.
        says: The reason.
        standing: What it rests on, in one word.
        evidence: The claims, studies and papers, and how far they carry.
        choice: The values among which the evidence leaves the choice; empty if it says one.
        claims: The ids of the claims that are named.
        rests_on: The worlds in which the recommendation was tested, and papers, in few words.
    """

    setting: str
    value: Any
    says: str
    standing: str = "computed"
    evidence: str = "computed"
    choice: tuple[Any, ...] = ()
    claims: tuple[str, ...] = ()
    rests_on: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The value as people read it, with what the evidence leaves open."""
        if self.setting == "learning_rate":
            grid = f"; search {', '.join(f'{rate:g}' for rate in self.choice)}" if self.choice else ""
            return f"{self.value:g}{grid}"
        if self.choice and all(isinstance(value, int | float) for value in self.choice):
            return f"{self.choice[0]:g} to {self.choice[-1]:g}, start at {self.value:g}"
        if self.choice:
            return " or ".join(map(str, self.choice))
        if isinstance(self.value, list):
            return str(self.value[0])
        return "" if self.value is None else f"{self.value:g}" if isinstance(self.value, float) else str(self.value)


@dataclass(frozen=True)
class Settings:
    """The lines of the advice for one method, and the fields of a run that follow from them."""

    method: str
    lines: Mapping[str, Line] = field(repr=False)

    def value(self, setting: Setting) -> Any:
        """Returns the value of a setting to take or to start from."""
        return self.lines[setting].value

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the run and its method that decide memory, as ``peftscope.memory.question.ask`` takes them."""
        chosen: dict[str, Any] = {"method": self.method}
        if METHODS[self.method].trains_base:
            return {**chosen, "precision": "amp"}  # as the line on precision says
        rank = self.value("rank")
        own = {"rank": rank, "alpha": self.value("alpha") * rank}
        return {**chosen, **own, **{name: self.value(name) for name in ("targets", "dropout")}}


def settings_for(method: str, situation: Situation, rules: Rules, findings: Findings) -> Settings:
    """Returns what the rules say about one method in a situation."""
    lines: dict[str, Line] = {}
    without = {"rank", "targets", "alpha", "dropout"} if METHODS[method].trains_base else ()
    for name in dict.fromkeys(rule.setting for rule in rules.rules if rule.setting not in without):
        rule = rules.rule(name, situation.facts(method), findings)
        if rule is None:
            continue
        standing = rule.standing(findings)
        decided = standing in (Standing.HOLDS, Standing.COMPUTED) and name != "learning_rate"
        choice = tuple(dict.fromkeys(_resolved(value, situation, name) for value in rule.range or ()))
        lines[name] = Line(
            name,
            _resolved(rule.value, situation, name),
            rule.says,
            standing.name.lower(),
            rule.evidence(findings, situation.billions),
            () if decided or len(choice) == 1 else choice,
            (*rule.claims, *rule.against),
            rule.rests_on(findings, situation.billions),
        )
    return Settings(method, lines)


def _resolved(value: Any, situation: Situation, setting: Setting) -> Any:
    """Returns a value of a rule in a situation. A rank never exceeds the largest that is advised."""
    value = situation.data_rank if value == "data_rank" else value
    return min(value, situation.largest_rank) if setting == "rank" else value

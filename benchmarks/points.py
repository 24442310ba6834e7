"""Peaks that others published, which of them are in scope, and what this project predicts for them.

``published_points.csv`` holds the figures as they were published, with their settings and their source. Its columns
from ``kind`` on are our reading of them.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict

from peftscope.files.atomic import write_json
from peftscope.hardware.cards import find_gpu
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.question import BESIDE_OPTIONS, METHOD_OPTIONS, SPEC_OPTIONS, Question, ask
from peftscope.methods import METHODS
from peftscope.models.presets import PRESETS

POINTS_FILE = Path("benchmarks/published_points.csv")
CACHE = Path("results/scorecard")
"""Results that are computed once: simulations, and the answers of others."""

NOT_PEAKS = {
    "resident": "what stays between steps, not a peak",
    "device": "what nvidia-smi shows: the CUDA context, other programs, and what torch has freed",
    "unknown": "whether tensors or segments were counted is not stated",
}
RULE = (
    "The number is the peak of a training run on one card that torch counted, allocated or reserved; or the run ended "
    "out of memory on a card of a stated size.",
    "The source states all that decides the peak: model, method, rank and targets, batch, the tokens of the longest "
    "batch (a limit alone does not), optimizer, attention and recomputation. What its public code sets counts.",
    "The step is that of transformers with PEFT, and bitsandbytes or an optimizer of torch: no fused kernels, no "
    "compiled layers, no plugin or trainer with model code of its own, no mixture of experts.",
)
"""The rule of scope. It says nothing about how well anybody predicts a point."""

SIMULATED_BY = (
    *("data", "evaluation", "hardware", "methods", "models", "training", "spec.py", "memory/simulate.py"),
    *("memory/tracker.py", "memory/probe.py", "memory/trace.py", "memory/allocator.py", "memory/answer.py"),
    "memory/kernels.py",
)
"""The parts of the package whose code decides a simulation."""

Kind = Literal["allocated", "reserved", "out of memory", "resident", "device", "unknown"]
Json = BeforeValidator(lambda text: json.loads(text or "{}"))


class PublishedRun(BaseModel):
    """A run that somebody published.

    Attributes:
        preset: The name of the model here; empty if its shape is not known.
        gpu: The card, as ``find_gpu`` takes it.
        asked: The run as options, the number of its cards among them; empty if too little is stated to ask at all.
            Settings that the calculator does not know may be among them.
        not_modelled: What the run did that the calculator does not model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    source: str
    preset: str
    gpu: str
    asked: Annotated[dict[str, Any], Json]
    not_modelled: str

    @classmethod
    def read(cls, path: Path) -> list[Self]:
        """Returns the runs of a table."""
        with path.open(newline="") as file:
            return [cls.model_validate(row) for row in csv.DictReader(file)]


class Point(PublishedRun):
    """A figure that somebody published; model, method and settings are in the source's words.

    Attributes:
        metric: The quantity and its unit.
        kind: What was counted.
        measured_bytes: The figure in bytes; None if the run ended out of memory.
        unstated: What decides the peak and is not stated.
    """

    model: str
    method: str
    settings: str
    metric: str
    value: str
    kind: Kind
    measured_bytes: Annotated[int | None, BeforeValidator(lambda text: text or None)]
    unstated: str

    @property
    def run(self) -> str:
        """The name of the run, which several points may share."""
        return self.id.removesuffix(f"-{self.kind.replace(' ', '-')}")

    @property
    def hub_id(self) -> str:
        """The model's id on a hub."""
        return self.model if "/" in self.model else PRESETS[self.preset].hub_id


def why_out(point: Point) -> str:
    """Returns why a point is out of scope; empty if it is in scope."""
    if point.kind in NOT_PEAKS:
        return NOT_PEAKS[point.kind]
    if point.not_modelled:
        return f"not modelled: {point.not_modelled}"
    return f"not stated: {point.unstated}" if point.unstated else ""


def question_of(point: PublishedRun) -> tuple[Question, list[str]]:
    """Returns the question about a run, and the settings that the calculator cannot be asked about."""
    method = METHODS[point.asked["method"]]
    known = {"method", *SPEC_OPTIONS, *BESIDE_OPTIONS, *(set(METHOD_OPTIONS) & set(method.model_fields))}
    options = {name: value for name, value in point.asked.items() if name in known}
    gpu = find_gpu(point.gpu) if point.gpu else None
    beside = {"gpus": point.asked.get("gpus", 1), "responses": point.asked.get("responses")}
    question = ask(describe_model(point.preset), options, gpu=gpu, **beside)
    return question, sorted(set(point.asked) - known - {*beside})


def by_formula(point: Point) -> int:
    """Returns the closed form's prediction."""
    return _size(point, sizes_by_formula(point))


def sizes_by_formula(point: PublishedRun) -> dict[str, int]:
    """Returns a run's peaks by the closed form. Evaluations do not count: none of these runs had one."""
    return _sizes(peaks_by_formula(question_of(point)[0], evaluation=False))


def by_simulation(point: Point) -> int:
    """Returns the simulation's prediction; computed once for each run and state of the code."""
    from peftscope.memory.predict import code_digest

    question = question_of(point)[0]
    card = (question.gpu.cublas_bytes, question.before_ampere) if question.gpu else None
    run = [question.spec.model_dump_json(), repr(question.model.shape), question.responses]
    key = [*run, question.beside.model_dump_json(), card, code_digest(SIMULATED_BY)]

    def simulated() -> dict[str, int]:
        from peftscope.memory.simulate import peaks_by_simulation

        return _sizes(peaks_by_simulation(question, evaluation=False))

    return _size(point, once("simulation", key, simulated))


def _sizes(peaks: Peaks) -> dict[str, int]:
    sizes = {"allocated": peaks.allocated_bytes, "reserved": peaks.reserved_bytes}
    return sizes | {"device": peaks.device_bytes, "least": peaks.least_bytes}


def _size(point: Point, sizes: dict[str, int]) -> int:
    """Returns the peak of the kind that was measured; for a run out of memory what the card would need."""
    return sizes[{"allocated": "allocated", "out of memory": "device", "device": "device"}.get(point.kind, "reserved")]


def once(name: str, key: Any, compute: Callable[[], Any]) -> Any:
    """Returns what was computed for this key before, or computes and keeps it."""
    path = CACHE / name / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
    if not path.is_file():
        write_json(path, compute())
    return json.loads(path.read_text())

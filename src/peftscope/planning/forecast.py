"""Forecasts the GPU hours and the peak memory of every run of an experiment on a card. No torch.

Memory comes from the closed form, for batches in which every sequence has the largest allowed length. Real runs take
less. Seconds are those of the time model (``sizing/speed.py``), times what records of such a card took over it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from peftscope.data.tasks import item_tokens
from peftscope.hardware.cards import GIB, Fits, Gpu, Rates, known_card, speed_of
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.base import Model
from peftscope.memory.question import Question
from peftscope.memory.shares import RESIDENT
from peftscope.models.catalog import find_model
from peftscope.models.shapes import ModelShape
from peftscope.planning import estimate
from peftscope.sizing.changes import mildest_change, values_of
from peftscope.sizing.speed import StepTime, step_time
from peftscope.spec import RunSpec, memory_key

PADDING = 1.5
"""The length of the longest sequence of a small batch, over the mean length."""
START_SECONDS = 40.0
"""The seconds before a job's model is loaded: imports, tokenising, the memory prediction."""
LOAD_BYTES_PER_SECOND = 1e9
"""The rate at which weights go from disk to card."""
TOKEN_SECONDS_PER_LAYER = 1e-3
"""The seconds of one generated token of a batch. Kernels are so small that starting them takes most of the time."""
ANSWER_TOKENS = 256
"""The tokens that are generated for each item, most of them after the answer: lm-eval's usual limit."""


@dataclass(frozen=True)
class Forecast:
    """The time and the memory that one run will take.

    Attributes:
        run_id: The id of the run.
        spec: The run.
        chosen: Whether its learning rate is final. If the study has yet to choose it, the forecast uses a middle one.
        seconds: The seconds on the card.
        peak_device_bytes: The most bytes that the card needs, or None if unknown.
        binding_phase: The phase of this peak. ``generate`` is the part of the evaluation that has a key-value cache.
        fits: Whether the run fits, as ``Gpu.fits`` says it, or None if unknown.
        advice: A change that would make the run fit; empty if it does.
        unknown: The reason why the peak is unknown; empty if it is known.
    """

    run_id: str
    spec: RunSpec
    chosen: bool
    seconds: float
    peak_device_bytes: int | None
    binding_phase: str
    fits: Fits | None
    advice: str
    unknown: str = ""


class Forecaster:
    """Forecasts runs on one card. Memory is computed only once for all runs that take the same memory."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.speed, self.speed_name = speed_of(gpu)
        self._memory: dict[str, tuple[Peaks, int]] = {}
        self._advised: dict[tuple[str, int], str] = {}

    def forecast(self, identity: str, spec: RunSpec, *, chosen: bool = True) -> Forecast:
        """Returns the forecast of a run."""
        shape = find_model(spec.model).shape
        unknown = "" if shape else f"the shape of {spec.model} is not known"
        unknown = unknown or ("" if spec.method.closed_form else f"{spec.method.name} has no closed form")
        if shape is None or unknown:
            return Forecast(identity, spec, chosen, self.seconds(spec), None, "", None, "", unknown)
        peak, least, phase = self._peak(spec, shape)
        fits, key = self._card(spec).fits(least, peak), (memory_key(spec), _cache_bytes(spec, shape))
        if fits == "no" and key not in self._advised:
            self._advised[key] = self._advice(spec, shape)
        advice = self._advised[key] if fits == "no" else ""
        return Forecast(identity, spec, chosen, self.seconds(spec), peak, phase, fits, advice)

    def _card(self, spec: RunSpec) -> Gpu:
        """Returns the card, or the smaller one that the run is limited to."""
        limit = min(self.gpu.usable_bytes, (spec.memory_limit_gib or math.inf) * GIB)
        return replace(self.gpu, memory_bytes=int(limit), reserve_bytes=0)

    def _peak(self, spec: RunSpec, shape: ModelShape) -> tuple[int, int, str]:
        """Returns the most bytes that the card needs, those without which it does not do, and the phase of them."""
        key = memory_key(spec)
        if key not in self._memory:
            model = Model(spec.model, shape.to_config(), shape)
            each = spec.model_copy(update={"batch_size": spec.batch_size // spec.shards})  # cards share a batch's rows
            peaks = peaks_by_formula(Question(model, each, spec.seq_len, self.gpu, spec.shards), evaluation=True)
            resident = sum(block.size for block in peaks.alive("evaluate") if block.kind in RESIDENT)
            self._memory[key] = peaks, resident
        (peaks, resident), cache = self._memory[key], _cache_bytes(spec, shape)
        more = resident + cache - peaks.allocated_bytes
        more, phase = (more, "generate") if cache and more > 0 else (0, peaks.binding_phase)
        return peaks.device_bytes + more, peaks.least_bytes + more, phase

    def _advice(self, spec: RunSpec, shape: ModelShape) -> str:
        def fields_of(changes: Mapping[str, Any]) -> dict[str, Any]:
            fields = dict(changes)
            if "batch_size" in fields:
                fields["eval_batch_size"] = fields["batch_size"]
            if fields.pop("method", None):
                fields["precision"] = "bf16"  # a 4-bit base computes in bf16
            return fields

        def fits(changes: Mapping[str, Any]) -> bool:
            method = spec.method.model_dump(mode="json")
            if "method" in changes:
                method = {"name": changes["method"]}
            fields = spec.model_dump(mode="json") | fields_of(changes)
            changed = RunSpec.model_validate({**fields, "method": method})
            peak, least, _ = self._peak(changed, shape)
            return changed != spec and self._card(spec).fits(least, peak) != "no"

        loss = {"loss_path": "response_only"} if spec.loss_path == "hf" else {}
        changes = mildest_change(fits, values_of(spec, loss, {}, {}))
        if changes is None:
            return "a larger card"
        return ", ".join(f"{k}: {json.dumps(v).strip(chr(34))}" for k, v in (changes | fields_of(changes)).items())

    def measured_ratios(self, spec: RunSpec) -> list[float]:
        """Returns what records of such a card took over what is predicted for them, if possible of the same method."""
        here = [
            (record, before, shape)
            for record in estimate.measured_runs()
            if (before := RunSpec.model_validate(record["spec"])).device == "cuda"
            and before.method.trains
            and record["seconds"]["train"] > 0
            and _card_of(record["provenance"]["hardware"]) == self.gpu
            and (shape := find_model(before.model).shape)
        ]
        same = [one for one in here if one[1].method.name == spec.method.name]
        return [
            record["seconds"]["train"] / (before.steps * self.step(before, shape).seconds)
            for record, before, shape in same or here
        ]

    def seconds(self, spec: RunSpec) -> float:
        """Returns the estimated seconds of a run on the card.

        For a model of unknown shape it is a rougher guess, from records of such runs, or else as for 1B parameters.
        """
        shape = find_model(spec.model).shape
        if shape is None:
            rates = Rates(self.speed.bf16_flops, self.speed.memory_bytes, casts=False)
            return estimate.estimate_seconds(spec, lambda _: rates)
        step = self.step(spec, shape)
        training = spec.steps * step.seconds if spec.method.trains else 0.0
        token = step.forward_seconds * spec.gradient_accumulation / step.tokens
        seconds = training + estimate.evaluated_tokens(spec) * token
        seconds += _answers(spec) / spec.eval_batch_size * ANSWER_TOKENS * _token_seconds(spec, shape, token)
        seconds *= median(self.measured_ratios(spec) or [1.0])
        seconds += START_SECONDS + 2 * shape.parameters / LOAD_BYTES_PER_SECOND
        return seconds + spec.method.initialisation_seconds(shape)

    def step(self, spec: RunSpec, shape: ModelShape) -> StepTime:
        """Returns the time of a step of usual length on each card."""
        length = spec.seq_len if spec.packing else max(1, round(min(spec.seq_len, PADDING * item_tokens(spec.task))))
        each = {"batch_size": max(1, spec.batch_size // spec.shards), "seq_len": length}
        model = Model(spec.model, shape.to_config(), shape)
        question = Question(model, spec.model_copy(update=each), length, self.gpu, spec.shards)
        return step_time(question, self.speed)


def _card_of(hardware: Mapping[str, Any]) -> Gpu | None:
    return known_card(str(hardware.get("gpu")), hardware.get("gpu_memory_bytes") or 0)


def _answers(spec: RunSpec) -> int:
    """Returns the number of generated answers."""
    items = spec.benchmark_items or estimate.BENCHMARK_ITEMS
    return spec.generation_items + items * sum(name in estimate.GENERATING for name in spec.benchmarks)


def _token_seconds(spec: RunSpec, shape: ModelShape, token: float) -> float:
    """Returns the seconds of one more token of a batch. Without a cache, all before it take ``token`` seconds each."""
    if spec.method.generates_from_cache:
        return TOKEN_SECONDS_PER_LAYER * shape.num_layers
    return token * spec.eval_batch_size * _context(spec)


def _context(spec: RunSpec) -> int:
    """Returns the number of tokens of the longest question."""
    long = any(name in estimate.GENERATING for name in spec.benchmarks)
    return max(estimate.BENCHMARK_TOKENS if long else 0, spec.seq_len if spec.generation_items else 0)


def _cache_bytes(spec: RunSpec, shape: ModelShape) -> int:
    """Returns the bytes of the key-value cache after the longest answer, and of the logits of one more token."""
    if not _answers(spec) or not spec.method.generates_from_cache:
        return 0
    width = 4 if spec.precision == "fp32" else 2
    each = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * width
    logits = shape.vocab_size * (4 + width)
    return spec.eval_batch_size * ((_context(spec) + ANSWER_TOKENS) * each + logits)

"""What an experiment will take on a card, before anything starts: GPU hours and peak memory, run by run. No torch.

Memory is the closed form's, for batches in which every sequence is as long as it may be, so that real runs take less.
Seconds follow from floating-point operations at a share of the card's peak: a guess, until the card has records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from pydantic import ValidationError

from peftscope.data.tasks import item_tokens
from peftscope.errors import InputError, Problem
from peftscope.hardware.cards import GIB, Gpu, known_card, speed_of
from peftscope.memory.answer import RESIDENT, peaks_by_formula
from peftscope.memory.fit import mildest_change
from peftscope.memory.question import Model, Question
from peftscope.models.catalog import find_model
from peftscope.models.shapes import ModelShape
from peftscope.planning.estimate import measured_runs
from peftscope.spec import RunSpec

SHARE, SHARE_FOUR_BIT, SHARE_FP32 = 0.3, 0.2, 0.03
"""Of the card's bf16 peak that training reaches, where nothing was measured: guesses; 4-bit weights are dequantised in
every pass, and fp32 products do not use the fast units."""
PADDING = 1.5
"""Longest sequence of a small batch over its mean."""
START_SECONDS = 40.0
"""Of a job: imports, tokenising, the memory prediction."""
LOAD_BYTES_PER_SECOND = 1e9
"""From disk to card."""
TOKEN_SECONDS_PER_LAYER = 1e-3
"""Of one generated token of a batch: kernels are small, and starting them is what takes the time."""
ANSWER_TOKENS = 256
"""Generated for each item, most of them in vain: lm-eval's usual limit."""
BENCHMARK_TOKENS = 1024
"""Of the longest usual question, GSM8K's with five worked examples."""
BENCHMARK_ITEMS = 1319
"""Of GSM8K's test split, where no limit is set."""
CHOICES, CHOICE_TOKENS = 4, 100
"""Sequences that a multiple-choice item takes, and their usual length."""
GENERATING = ("gsm8k",)
"""Benchmarks whose answers are generated."""


@dataclass(frozen=True)
class Forecast:
    """What one run will take.

    Attributes:
        run_id: Its name.
        spec: The run.
        chosen: False where its learning rate is yet to be chosen by the study, and stands for a middle one.
        seconds: On the card.
        peak_device_bytes: What the card needs at most; None where it is not known.
        binding_phase: Where that is; ``generate`` is the evaluation's, with its key-value cache.
        fits: Whether the card has that; None where it is not known.
        advice: What would fit, where it does not.
        unknown: Why the peak is not known; empty where it is.
    """

    run_id: str
    spec: RunSpec
    chosen: bool
    seconds: float
    peak_device_bytes: int | None
    binding_phase: str
    fits: bool | None
    advice: str
    unknown: str = ""


@dataclass(frozen=True)
class _Memory:
    """The closed form's peaks, and what of the model is alive in an evaluation."""

    allocated_bytes: int
    device_bytes: int
    phase: str
    resident_bytes: int


class Forecaster:
    """Forecasts runs on one card; memory is computed once for all runs that differ in nothing that matters to it."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.peak_flops, self.speed_name = speed_of(gpu)
        self._memory: dict[str, _Memory] = {}
        self._advised: dict[tuple[str, int], str] = {}

    def forecast(self, identity: str, spec: RunSpec, *, chosen: bool = True) -> Forecast:
        """Returns what a run will take."""
        shape = find_model(spec.model).shape
        unknown = "" if shape else f"the shape of {spec.model} is not known"
        unknown = unknown or ("" if spec.method.closed_form else f"{spec.method.name} has no closed form")
        if shape is None or unknown:
            return Forecast(identity, spec, chosen, self.seconds(spec), None, "", None, "", unknown)
        peak, phase = self._peak(spec, shape)
        fits = peak <= self._capacity(spec)
        advice = "" if fits else self._advice_once(spec, shape)
        return Forecast(identity, spec, chosen, self.seconds(spec), peak, phase, fits, advice)

    def _capacity(self, spec: RunSpec) -> float:
        """Returns the bytes that the run may take: those of the card, or of the smaller one that it is limited to."""
        return min(self.gpu.memory_bytes, (spec.memory_limit_gib or math.inf) * GIB)

    def _peak(self, spec: RunSpec, shape: ModelShape) -> tuple[int, str]:
        """Returns what the card needs at most, and the phase of that."""
        key = memory_key(spec)
        if key not in self._memory:
            model = Model(spec.model, shape.to_config(), shape)
            peaks = peaks_by_formula(Question(model, spec, spec.seq_len, self.gpu, spec.shards, ()))
            resident = sum(block.size for block in peaks.alive("evaluate") if block.kind in RESIDENT)
            self._memory[key] = _Memory(peaks.allocated_bytes, peaks.device_bytes, peaks.binding_phase, resident)
        memory, cache = self._memory[key], _cache_bytes(spec, shape)
        more = memory.resident_bytes + cache - memory.allocated_bytes
        return (memory.device_bytes + more, "generate") if cache and more > 0 else (memory.device_bytes, memory.phase)

    def _advice_once(self, spec: RunSpec, shape: ModelShape) -> str:
        key = memory_key(spec), _cache_bytes(spec, shape)
        if key not in self._advised:
            self._advised[key] = self._advice(spec, shape)
        return self._advised[key]

    def _advice(self, spec: RunSpec, shape: ModelShape) -> str:
        def fields_of(changes: Mapping[str, Any]) -> dict[str, Any]:
            fields = dict(changes)
            if "batch_size" in fields:
                fields["eval_batch_size"] = 1
            if fields.pop("method", None):
                fields["precision"] = "bf16"  # what a 4-bit base computes in
            return fields

        def fits(changes: Mapping[str, Any]) -> bool:
            method = spec.method.model_dump(mode="json")
            if "method" in changes:
                method = {"name": changes["method"]}
            fields = spec.model_dump(mode="json") | fields_of(changes)
            changed = RunSpec.model_validate({**fields, "method": method})
            return changed != spec and self._peak(changed, shape)[0] <= self._capacity(spec)

        changes = mildest_change(fits)
        if changes is None:
            return "a larger card"
        return ", ".join(f"{k}: {json.dumps(v).strip(chr(34))}" for k, v in (changes | fields_of(changes)).items())

    def share(self, spec: RunSpec) -> float:
        """Returns the share of the card's peak that training reaches: measured on this kind of card, or a guess."""
        here = [
            (record, before)
            for record, before in _measured_specs()
            if before.device == "cuda" and known_card(str(record["provenance"]["hardware"].get("gpu"))) == self.gpu
        ]
        same = [pair for pair in here if pair[1].method.name == spec.method.name]
        reached = [training_flops(before) / record["seconds"]["train"] for record, before in same or here]
        if reached:
            return median(reached) / self.peak_flops
        if spec.precision == "fp32":
            return SHARE_FP32
        return SHARE_FOUR_BIT if spec.method.quantization() else SHARE

    def seconds(self, spec: RunSpec) -> float:
        """Returns the seconds that a run will take on the card, to within a factor of about two."""
        shape = find_model(spec.model).shape
        if shape is None:
            raise InputError(Problem("model", f"{spec.model}: its shape is not known", "give it one in models.yaml"))
        speed = self.share(spec) * self.peak_flops
        seconds = START_SECONDS + 2 * shape.parameters / LOAD_BYTES_PER_SECOND
        seconds += training_flops(spec) / speed + _evaluation_flops(spec, shape) / speed
        seconds += _answers(spec) / spec.eval_batch_size * ANSWER_TOKENS * _token_seconds(spec, shape, speed)
        return seconds + spec.method.initialisation_seconds(shape)


_NO_MEMORY = {
    *("seed", "init_seed", "learning_rate", "shuffled_targets", "steps", "schedule", "warmup_steps", "task"),
    *("validation_items", "heldout_items", "generation_items", "benchmarks", "benchmark_items", "retention_tokens"),
    *("untimed_steps", "probe_steps", "latency_tokens"),
}
"""Fields that change nothing in the closed form's memory; the scale alpha is the methods' own one."""


def memory_key(spec: RunSpec) -> str:
    """Returns what runs that take the same memory have in common."""
    fields = {name: value for name, value in spec.canonical().items() if name not in _NO_MEMORY}
    return json.dumps({**fields, "method": {**fields["method"], "alpha": None}}, sort_keys=True)


def _measured_specs() -> Iterator[tuple[dict[str, Any], RunSpec]]:
    """Yields the measured runs that trained, with their specs; records of older specs are left out."""
    for record in measured_runs():
        try:
            spec = RunSpec.model_validate(record["spec"])
        except ValidationError:
            continue
        if spec.method.trains and record["seconds"]["train"] > 0:
            yield record, spec


def training_flops(spec: RunSpec) -> float:
    """Returns the floating-point operations of a run's training, padding included.

    Two for each weight and token forward, two more for the gradients of activations, two for those of the weights that
    are trained, two for recomputing; attention is causal.
    """
    shape = find_model(spec.model).shape
    if shape is None or not spec.method.trains:
        return 0.0
    length = min(spec.seq_len, PADDING * item_tokens(spec.task))
    tokens = spec.steps * spec.gradient_accumulation * spec.batch_size * (spec.seq_len if spec.packing else length)
    trained = spec.method.trainable_parameters(shape)
    full = spec.method.trains_base
    passes = 3 if full else 2
    matrices = shape.linear_parameters + shape.vocab_size * shape.hidden_size
    each: float = 2 * passes * matrices + (0 if full else 6 * trained)
    each += passes * 2 * length * shape.num_heads * shape.head_dim * shape.num_layers
    return float(tokens * (each + (2 * shape.linear_parameters if spec.checkpointing else 0)))


def _evaluation_flops(spec: RunSpec, shape: ModelShape) -> float:
    length = min(spec.seq_len, item_tokens(spec.task))
    tokens = (spec.validation_items + spec.heldout_items + spec.generation_items) * length + 2 * spec.retention_tokens
    items = spec.benchmark_items or BENCHMARK_ITEMS
    tokens += sum(
        items * (BENCHMARK_TOKENS if name in GENERATING else CHOICES * CHOICE_TOKENS) for name in spec.benchmarks
    )
    return float(2 * shape.parameters * tokens)


def _answers(spec: RunSpec) -> int:
    """Returns how many answers are generated."""
    items = spec.benchmark_items or BENCHMARK_ITEMS
    return spec.generation_items + items * sum(name in GENERATING for name in spec.benchmarks)


def _token_seconds(spec: RunSpec, shape: ModelShape, speed: float) -> float:
    """Returns the seconds of one more token of a batch; without a cache everything before it is computed again."""
    if spec.method.generates_from_cache:
        return TOKEN_SECONDS_PER_LAYER * shape.num_layers
    return 2 * shape.parameters * spec.eval_batch_size * _context(spec) / speed


def _context(spec: RunSpec) -> int:
    """Returns the tokens of the longest question that is answered."""
    long = any(name in GENERATING for name in spec.benchmarks)
    return max(BENCHMARK_TOKENS if long else 0, spec.seq_len if spec.generation_items else 0)


def _cache_bytes(spec: RunSpec, shape: ModelShape) -> int:
    """Returns the bytes of the key-value cache at the end of the longest answer, and of its next token's logits."""
    if not _answers(spec) or not spec.method.generates_from_cache:
        return 0
    width = 4 if spec.precision == "fp32" else 2
    each = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * width
    logits = shape.vocab_size * (4 + width)
    return spec.eval_batch_size * ((_context(spec) + ANSWER_TOKENS) * each + logits)

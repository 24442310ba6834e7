"""What the check on a card measures: jobs of four kinds, for a card or for one small model. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peftscope.analysis.cards import KINDS, label_of
from peftscope.hardware.cards import GPUS, Gpu
from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.question import Model, Question, ask, describe_model
from peftscope.methods import METHODS

BIG, MIDDLE = "llama-2-7b", "llama-3.2-1b"
"""The claims' model, and one that small cards train in full."""

Options = dict[str, Any]


@dataclass(frozen=True)
class CardJob:
    """One measurement, in a process of its own.

    Attributes:
        kind: Of ``KINDS``.
        label: Names it in results.
        question: The run.
        limit: The card whose memory it is held to, of ``GPUS``; empty: it may take all that there is.
        headroom: Share of that which stays free.
    """

    kind: str
    label: str
    question: Question
    limit: str = ""
    headroom: float = 0

    @property
    def capacity_bytes(self) -> int:
        """What the job may take of a card, context included."""
        return int((1 - self.headroom) * GPUS[self.limit].memory_bytes)


def make_job(
    model: Model, gpu: Gpu, options: Options, kind: str = "memory", limit: str = "", headroom: float = 0
) -> CardJob:
    """Returns the job of a model with options of ``ask``, one sequence where no ``batch_size`` is given."""
    question = ask(model, options, gpu=gpu)
    return CardJob(kind, label_of(model.name, options, limit, headroom), question, limit, headroom)


def card_jobs(gpu: Gpu) -> Iterator[CardJob]:
    """Yields the jobs for a card, kind by kind."""
    for model, limit, headroom, options in FITS:
        yield make_job(describe_model(model), gpu, options, "fits", limit, headroom)
    for model, options in _steps():
        yield make_job(describe_model(model), gpu, options, "steps")
    for model, options in _latencies():
        yield make_job(describe_model(model), gpu, options, "latency")
    for model, options in _memory():
        yield make_job(describe_model(model), gpu, options)


FITS: tuple[tuple[str, str, float, Options], ...] = (
    (BIG, "a100-80gb", 0.1, {"method": "full", "seq_len": 2048, "checkpointing": True}),
    (BIG, "a100-80gb", 0.1, {"method": "full", "seq_len": 2048, "checkpointing": True, "optimizer": "adamw_8bit"}),
    (BIG, "rtx4090", 0, {"method": "lora", "targets": "attention"}),
    (BIG, "rtx4090", 0, {"method": "lora", "targets": "attention", "batch_size": 4, "seq_len": 2048}),
    (BIG, "rtx3090", 0, {"method": "lora", "targets": "attention", "seq_len": 2048, "checkpointing": True}),
    (BIG, "rtx4060", 0, {"method": "qlora", "targets": "attention", "adapter_dtype": "base"}),
    (BIG, "rtx4060", 0, {"method": "qlora", "targets": "attention"}),
    (BIG, "rtx4060", 0, {"method": "qlora", "targets": "attention", "checkpointing": True}),
    (
        "llama-3-8b",
        "rtx4060",
        0,
        {"method": "qlora", "targets": "attention", "checkpointing": True, "kbit_preparation": True},
    ),
)
"""Model, the card it is held to, what of that stays free, options."""


def _steps() -> Iterator[tuple[str, Options]]:
    for batch_size in (1, 4, 16):
        yield BIG, {"method": "full", "batch_size": batch_size, "checkpointing": True}
        yield BIG, {"method": "lora", "targets": "attention", "batch_size": batch_size, "checkpointing": True}
    for batch_size in (1, 4):
        for method in ("lora", "dora", "adalora", "qlora"):
            yield BIG, {"method": method, "targets": "all-linear", "batch_size": batch_size}
        # AdaLoRA starts at this rank.
        yield BIG, {"method": "lora", "targets": "all-linear", "rank": 12, "batch_size": batch_size}
    yield BIG, {"method": "lora", "targets": "minimal"}
    yield BIG, {"method": "lora", "targets": "attention"}
    yield BIG, {"method": "qlora", "targets": "attention"}
    yield BIG, {"method": "lora", "targets": "all-linear", "rank": 256, "batch_size": 4, "checkpointing": True}
    for batch_size in (1, 4, 16):
        yield MIDDLE, {"method": "full", "batch_size": batch_size}
        yield MIDDLE, {"method": "lora", "targets": "attention", "batch_size": batch_size}


def _latencies() -> Iterator[tuple[str, Options]]:
    # Adapters in the type of the base: what serving takes at best.
    served = {"seq_len": 128, "adapter_dtype": "base"}
    for batch_size in (1, 16):
        for method, targets in (("lora", "attention"), ("lora", "all-linear"), ("dora", "all-linear")):
            yield BIG, {"method": method, "targets": targets, "batch_size": batch_size, **served}
        yield MIDDLE, {"method": "lora", "targets": "all-linear", "batch_size": batch_size, **served}


def _memory() -> Iterator[tuple[str, Options]]:
    """Yields every method on a 7B model, full fine-tuning on smaller ones too, and variants."""
    adapters = [name for name, cls in METHODS.items() if cls.trains and cls.closed_form and not cls.trains_base]
    for method in adapters:
        yield BIG, {"method": method, "seq_len": 512}
    for model in (BIG, "llama-3.2-3b", MIDDLE, "qwen2.5-0.5b"):
        for seq_len, checkpointing in ((512, False), (1024, True)):
            yield model, {"method": "full", "seq_len": seq_len, "checkpointing": checkpointing}
    for method in adapters:
        yield BIG, {"method": method, "seq_len": 1024, "checkpointing": METHODS[method].supports_checkpointing}
    yield "mistral-7b", {"method": "lora"}
    yield "qwen2.5-0.5b", {"method": "lora", "batch_size": 4}
    for options in (
        {"batch_size": 4, "loss_path": "response_only"},
        {"precision": "fp32"},
        {"precision": "amp"},
        {"attention": "eager"},
        {"dropout": 0.05},
    ):
        yield MIDDLE, {"method": "lora", **options}
    for options in ({"optimizer": "sgd"}, {"optimizer": "adamw_8bit"}, {"optimizer_implementation": "fused"}):
        yield MIDDLE, {"method": "full", **options}


def small_jobs(model: Model, gpu: Gpu) -> Iterator[CardJob]:
    """Yields small jobs of every kind on one model: what a processor can do too."""
    small: Options = {"batch_size": 2, "seq_len": 32}
    for method, limit, options in (
        ("full", "a100-80gb", {}),
        ("lora", "rtx4090", {"targets": "attention"}),
        ("qlora", "rtx4060", {"targets": "attention", "adapter_dtype": "base"}),
    ):
        yield make_job(model, gpu, {"method": method, **options, **small}, "fits", limit)
    for method in ("full", "lora", "dora", "adalora", "qlora"):
        yield make_job(model, gpu, {"method": method, **small}, "steps")
    yield make_job(model, gpu, {"method": "lora", "rank": 12, **small}, "steps")
    for method in ("full", "lora"):
        yield make_job(model, gpu, {"method": method, **small, "batch_size": 8}, "steps")
    for method in ("lora", "dora"):
        for batch_size in (1, 16):
            served: Options = {"batch_size": batch_size, "seq_len": 32, "adapter_dtype": "base"}
            yield make_job(model, gpu, {"method": method, **served}, "latency")
    for method, cls in METHODS.items():
        if cls.trains and cls.closed_form:
            yield make_job(model, gpu, {"method": method, **small})


def predicted_bytes(job: CardJob) -> dict[str, int]:
    """Returns the closed form's peaks of a job: of training, or of a forward pass where only latency is measured."""
    question = job.question
    if job.kind == "latency":
        options = {"method": "none", "batch_size": question.spec.batch_size, "seq_len": question.spec.seq_len}
        question = ask(question.model, options, gpu=question.gpu)
    peaks = peaks_by_formula(question, evaluation=job.kind == "memory")
    return {"allocated": peaks.allocated_bytes, "reserved": peaks.reserved_bytes, "device": peaks.device_bytes}


def why_not_tried(job: CardJob, device: str) -> str:
    """Returns the status of a job that this card is too small for, by the closed form; empty: it is tried.

    A job that is held to less is tried whatever the closed form says: running out of that is a result.
    """
    gpu = job.question.gpu
    if device != "cuda" or gpu is None:
        return ""
    if job.limit:
        return "" if job.capacity_bytes <= gpu.memory_bytes else "card too small"
    return "too large" if predicted_bytes(job)["device"] > gpu.memory_bytes else ""


def in_order(jobs: Iterator[CardJob], kinds: tuple[str, ...] = KINDS) -> list[CardJob]:
    """Returns the jobs of some kinds, kind by kind."""
    return sorted((job for job in jobs if job.kind in kinds), key=lambda job: KINDS.index(job.kind))

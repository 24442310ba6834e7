"""In which precision a step computes, and with which attention kernel: closed form, simulation and measured peaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peftscope.errors import GIB, InputError
from peftscope.memory.answer import Answer, answer_by_formula
from peftscope.memory.kernels import attention_kernel
from peftscope.memory.question import Model, Question, ask, describe_model
from peftscope.memory.simulate import answer_by_simulation
from peftscope.models.presets import PRESETS


def asked(name: str, layers: int | None = None, **options: Any) -> Question:
    """A question about a preset, cut to its first layers."""
    shape = PRESETS[name].shape
    shape = shape.model_copy(update={"num_layers": layers or shape.num_layers})
    return ask(Model(name, shape.to_config(), shape), options)


def off(question: Question) -> float:
    """The largest relative difference between closed form and simulation, over the phases of a step."""
    closed, simulation = answer_by_formula(question), answer_by_simulation(question)
    return max(abs(closed.phases[phase] / size - 1) for phase, size in simulation.phases.items())


def errors(answer: Answer, allocated_gib: float, reserved_gib: float) -> tuple[float, float]:
    return answer.peak_allocated_bytes / GIB / allocated_gib - 1, answer.peak_reserved_bytes / GIB / reserved_gib - 1


PREPARED = {"method": "qlora", "rank": 16, "targets": "attention", "kbit_preparation": True}


@pytest.mark.parametrize(
    ("kernel", "width", "head_dim", "masked", "grouped"),
    [
        ("flash", 2, 128, False, True),
        ("efficient", 2, 128, True, False),  # a mask; transformers repeats the keys
        ("efficient", 4, 128, False, False),
        ("math", 4, 128, False, True),
        ("efficient", 2, 320, False, False),  # too wide for flash
        ("math", 4, 13, True, False),  # no multiple of 16 bytes
    ],
)
def test_the_kernel_that_cuda_runs(kernel: str, width: int, head_dim: int, masked: bool, grouped: bool) -> None:
    assert attention_kernel(width, head_dim, masked=masked, grouped=grouped) == kernel


def test_a_measured_peak_with_the_math_kernel() -> None:
    # DaoyuanLi2816/can-i-finetune-this at 053ce9e, Qwen2.5-1.5B on an RTX 4080: one row, so nothing is padded.
    run = {**PREPARED, "seq_len": 1024, "optimizer": "paged_adamw_8bit"}
    answer = answer_by_formula(asked("qwen2.5-1.5b", padding="none", **run))
    allocated, reserved = errors(answer, 9.3413, 9.5527)
    assert abs(allocated) < 0.02
    assert abs(reserved) < 0.01
    masked = answer_by_formula(asked("qwen2.5-1.5b", padding="some", **run))
    assert masked.peak_allocated_bytes < 0.9 * answer.peak_allocated_bytes


@pytest.mark.parametrize(
    "options",
    [
        {**PREPARED, "padding": "none"},
        {**PREPARED, "padding": "none", "checkpointing": True},
        {"method": "lora", "precision": "fp32", "loss_path": "response_only"},
    ],
    ids=str,
)
def test_scores_of_the_math_kernel_are_simulated(options: dict[str, Any]) -> None:
    question = asked("qwen2.5-0.5b", 2, batch_size=2, seq_len=512, **options)
    assert off(question) < 0.005
    scores = 4 * 2 * PRESETS["qwen2.5-0.5b"].shape.num_heads * 512**2
    masked = answer_by_formula(replace(question, padding="some"))
    if options.get("padding") == "none" and not options.get("checkpointing"):
        assert answer_by_formula(question).phases["backward"] > masked.phases["backward"] + scores


def test_scores_of_an_evaluation_under_autocast() -> None:
    # Queries and keys that are rotated in 32 bits, beside 32-bit scores, make the peak.
    run = {"method": "lora", "precision": "amp", "attention": "eager", "batch_size": 8, "seq_len": 1024}
    assert off(asked("phi-3-mini", 1, **run)) < 0.005


def test_padding_changes_nothing_for_kernels_without_a_mask() -> None:
    for attention, same in (("flash_attention_2", True), ("eager", True), ("sdpa", False)):
        peaks = {
            answer_by_formula(asked("qwen2.5-0.5b", 2, padding=padding, attention=attention)).peak_allocated_bytes
            for padding in ("none", "some")
        }
        assert (len(peaks) == 1) == same


def test_unknown_padding_is_a_sentence() -> None:
    with pytest.raises(InputError, match="padding: .*'none' or 'some'"):
        ask(describe_model("qwen2.5-0.5b"), {"padding": "all"})

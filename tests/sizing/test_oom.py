"""``oom``: torch's texts of several versions, and the allocations that match them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from peftscope.errors import InputError
from peftscope.memory.allocator import segment_bytes
from peftscope.memory.answer import name_of, peaks_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.formula.step import trace_training
from peftscope.memory.question import Question, ask
from peftscope.sizing.oom import MATH_SCORES, Refusal, diagnose, read_refusal
from peftscope.words import GIB, MIB


def run_of(model: str, **options: Any) -> Question:
    return ask(describe_model(model), options)


def gib(number: float) -> int:
    return round(number * GIB)


OLD = "CUDA out of memory. Tried to allocate"
TEXTS = {
    "1.0, pytorch#16417": (
        f"RuntimeError: {OLD} 12.50 MiB (GPU 0; 10.92 GiB total capacity; 8.57 MiB already allocated; 9.28 GiB free; "
        "4.68 MiB cached)",
        {"requested": round(12.5 * MIB), "allocated": round(8.57 * MIB), "unallocated": round(4.68 * MIB)},
    ),
    "2.0, FastChat#2701, folded": (
        f"OutOfMemoryError: {OLD} 1.25 GiB (GPU 1; 79.10 GiB total capacity; 76.13 GiB \nalready allocated; 290.12 MiB "
        "free; 77.47 GiB reserved in total by PyTorch) If reserved memory is >> allocated \nmemory try setting "
        "max_split_size_mb to avoid fragmentation.",
        {"capacity": gib(79.10), "free": round(290.12 * MIB), "unallocated": gib(77.47) - gib(76.13)},
    ),
    "2.1, MGFN#35": (
        f"torch.cuda.OutOfMemoryError: {OLD} 1.70 GiB. GPU 0 has a total capacty of 6.00 GiB of which 0 bytes is free. "
        "Of the allocated memory 2.93 GiB is allocated by PyTorch, and 2.30 GiB is reserved by PyTorch but "
        "unallocated.",
        {"requested": gib(1.7), "capacity": 6 * GIB, "free": 0, "allocated": gib(2.93), "unallocated": gib(2.3)},
    ),
    "2.1 on Windows, axolotl#998": (
        f"{OLD} 20.00 MiB. GPU 0 has a total capacty of 24.00 GiB of which 0 bytes is free. Including "
        "non-PyTorch memory, this process has 17179869184.00 GiB memory in use. Process 2954422 has 17179869184.00 GiB "
        "memory in use. Of the allocated memory 23.01 GiB is allocated by PyTorch, and 121.23 MiB is reserved by "
        "PyTorch but unallocated.",
        {"requested": 20 * MIB, "usable": 24 * GIB, "allocated": gib(23.01)},
    ),
    "2.8, lora-fast#1": (
        f"torch.OutOfMemoryError: {OLD} 90.00 MiB. GPU 0 has a total capacity of 23.55 GiB of which 45.75 MiB is free. "
        "Including non-PyTorch memory, this process has 23.48 GiB memory in use. Of the allocated memory 22.72 GiB is "
        "allocated by PyTorch, and 257.71 MiB is reserved by PyTorch but unallocated.",
        {"in_use": gib(23.48), "usable": gib(23.48) + round(45.75 * MIB), "unallocated": round(257.71 * MIB)},
    ),
    "CUDA graphs": (
        f"{OLD} 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.21 GiB is free. Process 7 has "
        "8.00 GiB memory in use. Including non-PyTorch memory, this process has 69.89 GiB memory in use. Of the "
        "allocated memory 60.00 GiB is allocated by PyTorch, with 50.00 MiB allocated in private pools (e.g., CUDA "
        "Graphs), and 1.20 GiB is reserved by PyTorch but unallocated.",
        {"usable": gib(69.89) + gib(1.21), "unallocated": gib(1.2)},
    ),
}


@pytest.mark.parametrize(("text", "figures"), TEXTS.values(), ids=TEXTS)
def test_texts_of_every_version_give_their_figures(text: str, figures: dict[str, int]) -> None:
    refusal = read_refusal(f"Traceback (most recent call last):\n  x = 1\n{text}")
    assert {name: getattr(refusal, name) for name in figures} == figures
    assert read_refusal(f"{text}\n{text.replace('Tried to allocate', 'Tried to allocate 3.00 GiB or')}") == refusal


def test_a_text_without_a_size_is_refused() -> None:
    for text in ("", "RuntimeError: CUDA error: out of memory", "Tried to allocate much"):
        with pytest.raises(InputError, match="no size that torch tried to allocate"):
            read_refusal(text)


RUNS: dict[str, dict[str, Any]] = {
    "lora": {"batch_size": 8},
    "prepared": {"method": "qlora", "kbit_preparation": True, "batch_size": 4, "checkpointing": True},
    "full": {"method": "full", "batch_size": 2},
    "eager": {"attention": "eager", "batch_size": 2},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_whatever_allocation_fails_is_the_likeliest(options: dict[str, Any]) -> None:
    question = run_of("smollm2-135m", **options)
    trace = trace_training(question)
    live, large = 0, []
    phases = [phase for phase, first, last in trace.segments() for _ in range(first, last)]
    for event, phase in zip(trace.events, phases, strict=True):
        block = trace.blocks[event if event >= 0 else ~event]
        if event >= 0 and phase and block.size > 10 * MIB:
            large.append((live, phase, block))
        live += block.size if event >= 0 else -block.size
    for before, phase, block in large[:: max(1, len(large) // 4)]:
        refusal = Refusal(segment_bytes(block.size), 1, allocated=before)
        first = diagnose(question, refusal).candidates[0]
        assert first.live_bytes == before
        assert sum(first.alive.values()) == before
        if not any(live == before and other is not block for live, _, other in large):
            assert (first.phase, first.size_bytes) == (phase, block.size)
            assert (block.term or name_of(block)) in first.name


def test_logits_copies_scores_and_embedding_gradients_are_known() -> None:
    def names(request: float, **options: Any) -> set[str]:
        found = diagnose(run_of("llama-3-8b", **options), Refusal(gib(request), gib(0.005)))
        return {one.name for one in found.candidates}

    assert "logits in 32 bits" in names(4 * 4 * 1024 * 128256 / GIB, batch_size=4, seq_len=1024)
    assert names(4 * 4096 * 128256 / GIB, method="qlora", kbit_preparation=True) == {
        "fp32 copy of embed_tokens (weights)",
        "fp32 copy of lm_head (weights)",
    }
    assert MATH_SCORES in names(4 * 32 * 4096**2 / GIB, seq_len=4096)
    assert "attention probabilities in 32 bits" in names(2.0, seq_len=4096, attention="eager")
    assert "embed_tokens (gradients)" in names(2 * 4096 * 128256 / GIB, method="full")


def test_no_match_is_an_answer() -> None:
    found = diagnose(run_of("llama-3-8b"), read_refusal(f"{OLD} 37.12 GiB"))
    assert found.candidates == []
    assert len(found.nearest) == 2
    assert found.sentences[0].startswith("None matches: with these settings, no allocation takes 37.12 GiB.")


def test_sizes_of_shared_segments_say_little() -> None:
    found = diagnose(run_of("smollm2-135m"), read_refusal(TEXTS["2.1 on Windows, axolotl#998"][0]))
    assert found.sentences[0] == (
        "torch asks for 20.0 MiB whenever a block between 1 and 10 MiB finds no room: the size says little."
    )


def test_fragmentation_other_processes_and_what_fits_are_told() -> None:
    question = run_of("llama-3-8b", batch_size=4, seq_len=1024)
    said = " ".join(diagnose(question, read_refusal(TEXTS["2.1, MGFN#35"][0])).sentences)
    assert "Fragmentation: torch held 2.30 GiB that no tensor used, more than 1.70 GiB, but in pieces" in said
    said = " ".join(diagnose(question, read_refusal(TEXTS["CUDA graphs"][0])).sentences)
    assert "Fragmentation is not the cause: torch held 1.20 GiB" in said
    assert "Other processes had 8.00 GiB of the card." in said
    assert "they fit, so what ran was larger" in " ".join(
        diagnose(run_of("smollm2-135m"), read_refusal(TEXTS["2.8, lora-fast#1"][0])).sentences
    )


@pytest.mark.parametrize("options", [{"batch_size": 4, "seq_len": 1024}, {"eval_batch_size": 200}], ids=str)
def test_changes_make_it_fit(options: dict[str, Any]) -> None:
    refusal = Refusal(gib(1), 1, capacity=24 * GIB)
    found = diagnose(run_of("llama-3-8b", **options), refusal)
    assert 1 <= len(found.remedies) <= 3
    for remedy in found.remedies:
        changed = {name[2:].replace("-", "_"): value for name, value in remedy.changes.items()}
        peaks = peaks_by_formula(run_of("llama-3-8b", **options | changed), evaluation="eval_batch_size" in changed)
        assert peaks.least_bytes <= 24 * GIB and peaks.device_bytes == remedy.peak_device_bytes
    assert "they do not fit" in found.sentences[-1]


def test_options_replace_what_a_spec_says(tmp_path: Path, peftscope: Command) -> None:
    spec, text = tmp_path / "spec.json", "CUDA out of memory. Tried to allocate 250.00 MiB."
    spec.write_text(json.dumps({"model": "smollm2-135m", "method": "lora", "batch_size": 2}))
    said = {
        batch: peftscope("oom", str(spec), text, "--json", *(["--batch-size", str(batch)] if batch else []))[1]
        for batch in (None, 2, 4)
    }
    assert said[None] == said[2] != said[4]
    code, _, err = peftscope("oom", str(spec), text, "--method", "full")
    assert code == 2 and "--method: " in err and "says it already -> leave it out" in err

"""``why``: the terms of a difference add up to both peaks, and the sentences say what the terms say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_memory import model_of, small_shape

from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.base import Model, describe_model
from peftscope.memory.question import Question, ask
from peftscope.sizing.why import PREPARED, Change, Why, compare, explain
from peftscope.words import spoken_bytes


def run_of(model: Model | str, **options: Any) -> tuple[Question, Peaks]:
    question = ask(describe_model(model) if isinstance(model, str) else model, options)
    return question, peaks_by_formula(question)


def named(why: Why, name: str) -> Change:
    (change,) = [change for change in [*why.changes, *why.unchanged] if change.name == name]
    return change


PAIRS = {
    "methods": ({"method": "qlora", "kbit_preparation": True}, {"method": "lora"}),
    "recomputation": ({"checkpointing": True}, {}),
    "ranks": ({"rank": 32}, {"rank": 4}),
    "lengths": ({"seq_len": 300}, {"seq_len": 37}),
    "full and prompts": ({"method": "full", "optimizer": "adamw_8bit"}, {"method": "prompt-tuning"}),
    "cards and DoRA": ({"method": "dora", "precision": "amp"}, {"method": "adalora"}),
}


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_terms_add_up_to_both_peaks(first: dict[str, Any], second: dict[str, Any]) -> None:
    model = model_of(small_shape())
    one, other = run_of(model, **first), run_of(model, **second)
    why = compare(one, other)
    terms = [*why.changes, *why.unchanged]
    assert sum(change.first_bytes for change in terms) == why.first_bytes == one[1].allocated_bytes
    assert sum(change.second_bytes for change in terms) == why.second_bytes == other[1].allocated_bytes
    assert sum(change.bytes for change in why.changes) == why.bytes
    assert all(change.bytes == 0 for change in why.unchanged)
    said = "\n".join(why.sentences)
    for change in why.changes:
        if abs(change.bytes) > why.notable_bytes:
            assert f"{spoken_bytes(abs(change.bytes))} " in said
            assert change.name in said


def test_qlora_saves_weights_and_spends_on_preparation() -> None:
    prepared = run_of("llama-3-8b", method="qlora", rank=64, kbit_preparation=True)
    why = compare(prepared, run_of("llama-3-8b", method="lora", rank=64))
    shape = prepared[0].model.shape
    values = 2 * shape.vocab_size * shape.hidden_size + (2 * shape.num_layers + 1) * shape.hidden_size
    assert named(why, PREPARED).first_bytes == 2 * values  # two bytes beyond the two of bf16
    saved = -named(why, "weights").bytes
    assert f"QLoRA saves {spoken_bytes(saved)} of weights" in "\n".join(why.sentences)
    assert f"QLoRA spends {spoken_bytes(2 * values)} on {PREPARED} (LoRA has none" in "\n".join(why.sentences)
    widened = [text for text in why.sentences if "in other precision, 4 bytes a value against 2" in text]
    assert len(widened) == 1
    assert widened[0].endswith(" more.")
    plain = run_of("llama-3-8b", method="qlora", rank=64)
    assert PREPARED not in "\n".join(compare(plain, run_of("llama-3-8b", rank=64)).sentences)
    assert [c.name for c in compare(prepared, plain).changes if c.kind == "weights"] == [PREPARED]


def test_a_rank_that_hardly_matters_is_told_with_what_depends_on_it() -> None:
    why = compare(run_of("llama-2-7b", rank=16), run_of("llama-2-7b", rank=8))
    assert why.sentences[0].startswith("The peaks hardly differ: rank 16 takes ")
    (said,) = [text for text in why.sentences if "What differs in size: rank 16 against 8" in text]
    assert "3% of the larger peak, depend on it" in said
    assert any("The same in both: 12.55 GiB of weights" in text for text in why.sentences)


def test_recomputation_that_changes_nothing_is_hidden_behind_another_phase() -> None:
    why = compare(run_of("llama-2-7b", method="full", checkpointing=True), run_of("llama-2-7b", method="full"))
    assert why.bytes == 0
    assert why.sentences[0].startswith("Checkpointing and no checkpointing take the same at the peak")
    (said,) = [
        text for text in why.sentences if text.startswith("The peak of the forward pass falls from 40.70 GiB to ")
    ]
    assert said.endswith("but the optimizer step had the larger peak.")
    alike = compare(run_of("llama-2-7b", method="qlora"), run_of("llama-2-7b", method="qlora", rank=9))
    assert not any("had the larger peak" in text for text in alike.sentences)  # all phases changed alike
    helps = compare(run_of("llama-2-7b", checkpointing=True), run_of("llama-2-7b"))
    assert not any("had the larger peak" in text for text in helps.sentences)


def test_one_run_is_explained_by_its_next_phase() -> None:
    why = explain(run_of("llama-2-7b", checkpointing=True, eval_batch_size=64))
    assert (why.first_phase, why.second_phase) == ("evaluate", "backward")
    said = "\n".join(why.sentences)
    assert "The evaluation has the peak, " in said
    assert "rows of a batch 64 against 1" in said
    assert sum(change.bytes for change in why.changes) == why.bytes > 0
    assert explain(run_of("llama-2-7b")).first_phase == "backward"


def test_the_waterfall_leads_from_one_peak_to_the_other(tmp_path: Path) -> None:
    from peftscope.report.memory import draw_waterfall, waterfall

    why = compare(run_of("llama-2-7b", method="qlora"), run_of("llama-2-7b"))
    steps = waterfall(why)
    assert why.second_bytes + sum(size for _, size in steps) == why.first_bytes
    assert all(abs(size) > why.notable_bytes for name, size in steps if name != "all other terms")
    draw_waterfall(why, tmp_path / "why.png")
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")

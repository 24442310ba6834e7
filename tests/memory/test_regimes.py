"""In which precision a step computes, and with which attention kernel: closed form, simulation and measured peaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fast_if
from test_simulate import both

from peftscope.errors import InputError
from peftscope.hardware.cards import GPUS
from peftscope.memory.answer import answer_by_formula, peaks_by_formula
from peftscope.memory.assumptions import assumptions_of
from peftscope.memory.base import Model, describe_model
from peftscope.memory.kernels import attention_kernel
from peftscope.memory.question import Question, ask
from peftscope.memory.regimes import REGIMES, Trainer
from peftscope.memory.simulate import answer_by_simulation
from peftscope.methods import METHODS
from peftscope.models.presets import PRESETS
from peftscope.spec import RunSpec, run_id
from peftscope.training.build import build_model
from peftscope.training.load import load_base
from peftscope.words import GIB


def asked(name: str, layers: int | None = None, **options: Any) -> Question:
    """A question about a preset, cut to its first layers."""
    shape = PRESETS[name].shape
    shape = shape.model_copy(update={"num_layers": layers or shape.num_layers})
    return ask(Model(name, shape.to_config(), shape), options)


def off(question: Question) -> float:
    """The largest relative difference between closed form and simulation, over the phases of a step."""
    closed, simulation = answer_by_formula(question), answer_by_simulation(question)
    return max(abs(closed.phases[phase] / size - 1) for phase, size in simulation.phases.items())


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
    before_ampere = attention_kernel(width, head_dim, masked=masked, grouped=grouped, before_ampere=True)
    assert before_ampere == ("math" if width == 2 else kernel)


@pytest.mark.parametrize("precision", ["bf16", "amp"])
def test_before_ampere_attention_in_16_bits_keeps_its_scores(precision: str) -> None:
    """The scores of every pair of positions, in 32 bits and for each layer; the closed form agrees."""
    shape = PRESETS["llama-3.2-1b"].shape.model_copy(update={"num_layers": 2})
    model = Model("two layers", shape.to_config(), shape)
    options = {"method": "lora", "precision": precision, "seq_len": 1024, "loss_path": "response_only"}
    old, new = (ask(model, options, gpu=GPUS[name]) for name in ("t4", "l4"))
    scores = 2 * shape.num_heads * 1024**2 * 4
    assert peaks_by_formula(old).allocated_bytes - peaks_by_formula(new).allocated_bytes > 0.9 * scores
    assert off(old) < 0.002 and off(new) < 0.002


def test_padding_changes_nothing_for_kernels_without_a_mask() -> None:
    for attention, same in (("flash_attention_2", True), ("eager", True), ("sdpa", False)):
        peaks = {
            answer_by_formula(asked("qwen2.5-0.5b", 2, padding=padding, attention=attention)).peak_allocated_bytes
            for padding in ("none", "some")
        }
        assert (len(peaks) == 1) == same


FIELD = {**PREPARED, "kbit_preparation": "trl", "autocast": True}
"""How the field runs QLoRA: bf16 autocast over a 4-bit base as TRL prepared it."""


FLASH = {"attention": "flash_attention_2"}
REGIMES_OF_STEPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "scores of the math kernel": ("qwen2.5-0.5b", 2, {**PREPARED, "padding": "none"}),
    "those and recomputation": ("qwen2.5-0.5b", 2, {**PREPARED, "padding": "none", "checkpointing": True}),
    "fp32": ("qwen2.5-0.5b", 2, {"method": "lora", "precision": "fp32", "loss_path": "response_only"}),
    "rotated queries in 32 bits beside scores in 32 bits": (
        "phi-3-mini",
        1,
        {"method": "lora", "precision": "amp", "attention": "eager", "batch_size": 8, "seq_len": 1024},
    ),
    "autocast over narrow weights": ("qwen2.5-0.5b", 2, {**FIELD, **FLASH, "dropout": 0.1, "checkpointing": True}),
    "without preparation": ("qwen2.5-0.5b", 2, {**FIELD, "kbit_preparation": "none", "attention": "eager"}),
    "packing": ("qwen2.5-0.5b", 2, {**FLASH, "packing": True, "loss_path": "hf", "seq_len": 512}),
    "liger": ("llama-3.2-1b", 2, {"loss": "liger", "seq_len": 512}),
    "liger, full": ("llama-3.2-1b", 2, {"loss": "liger", "method": "full", "precision": "amp", "seq_len": 512}),
    "chunked": ("gemma-2-2b", 2, {"loss": "chunked", "method": "full", "precision": "amp", "evaluation": True}),
    "liger, the field's": ("llama-3.2-1b", 2, {"loss": "liger", "seq_len": 512, **FIELD}),
}
"""Other settings than those of random runs, which test_simulate.py compares: models, layers and options."""
LONG = {"rotated queries in 32 bits beside scores in 32 bits", "those and recomputation", "liger, full"}


@pytest.mark.parametrize("regime", [fast_if(name not in LONG, name) for name in REGIMES_OF_STEPS])
def test_closed_form_and_simulation_agree_in_every_regime(regime: str) -> None:
    name, layers, options = REGIMES_OF_STEPS[regime]
    question = asked(name, layers, **{"batch_size": 2, "seq_len": 256, **options})
    assert off(question) < 0.005
    for loss, said in (("packing", "SDPA without a mask stands in"), ("liger", "loss=liger (stand-in)")):
        assert any(said in line for line in assumptions_of(question)) == regime.startswith(loss)


@pytest.mark.parametrize(
    "fields",
    [
        {"kbit_preparation": "trl", "autocast": True},
        {"kbit_preparation": "peft", "autocast": True, "loss_path": "hf", "keep_logits": False},
    ],
    ids=str,
)
def test_a_simulated_step_is_the_real_one(fields: dict[str, Any], toy: Path, make_spec: Any) -> None:
    simulated, tracked = both(make_spec(method="qlora", **fields))
    assert simulated == tracked


def test_trl_casts_embeddings_and_head_back(toy: Path, make_spec: Any) -> None:
    spec = make_spec(method="qlora", kbit_preparation="trl", autocast=True)
    named = dict(build_model(load_base(spec), spec).model.named_parameters())
    wide = {name for name, value in named.items() if value.dtype == torch.float32 and "lora" not in name}
    assert wide
    assert all("norm" in name or name.endswith("bias") for name in wide)
    assert {value.dtype for name, value in named.items() if "embed_tokens" in name} == {torch.bfloat16}


def test_the_old_spelling_of_the_preparation_keeps_ids(make_spec: Any) -> None:
    old, new, none = (make_spec(method="qlora", kbit_preparation=value) for value in (True, "peft", "none"))
    assert run_id(old) == run_id(new) != run_id(none) == run_id(make_spec(method="qlora"))
    assert old.canonical()["method"]["kbit_preparation"] is True
    assert RunSpec.model_validate_json(old.model_dump_json()) == old


@pytest.mark.parametrize("trainer", REGIMES)
def test_as_a_trainer_sets_its_defaults_and_cites_them(trainer: Trainer) -> None:
    copies = {"modules_to_save": ["lm_head"]}  # without them, no setting about them applies
    question = ask(describe_model("mistral-7b"), {"method": "qlora", "as_trainer": trainer} | copies)
    for name, (value, source) in REGIMES[trainer].settings.items():
        owner = next(one for one in (question.spec, question.spec.method, question.beside) if hasattr(one, name))
        assert getattr(owner, name) == value
        assert any(f"{name}={value} ({source})" in line for line in assumptions_of(question))
    assert any(REGIMES[trainer].version in line for line in assumptions_of(question))
    for method in METHODS:
        ask(describe_model("mistral-7b"), {"method": method, "as_trainer": trainer})
    given = ask(
        describe_model("mistral-7b"),
        {"method": "lora", "as_trainer": trainer, "precision": "amp", "keep_logits": True, "optimizer": "adamw_8bit"},
    )
    assert given.spec.keeps_logits
    assert not given.spec.autocast


@pytest.mark.parametrize(("size", "length"), [(8, 2_972), (12, 21_848), (16, 40_724), (24, 78_475)])
def test_the_longest_contexts_that_unsloth_publishes_fill_their_cards(size: int, length: int) -> None:
    given = {"method": "qlora", "rank": 32, "optimizer": "adamw_8bit", "seq_len": length, "as_trainer": "unsloth"}
    away, here = (asked("llama-3.1-8b", **given, offload_activations=away) for away in (True, False))
    assert 0.92 < answer_by_formula(away).least_device_bytes / GIB / size < 1.09
    spared = answer_by_formula(here).peak_allocated_bytes - answer_by_formula(away).peak_allocated_bytes
    assert 0.5 < spared / (32 * length * 4096 * 2) < 1  # the peak moves to where all gradients are there


def test_a_missing_kernel_is_a_sentence(toy: Path, make_spec: Any) -> None:
    spec = make_spec(method="lora").model_copy(update={"attention": "flash_attention_2"})
    with pytest.raises(InputError, match=r"flash-attn, whose kernel is missing on this machine -> .*use sdpa"):
        load_base(spec)


def test_a_fused_loss_holds_no_logits_of_all_positions() -> None:
    run = {"method": "lora", "batch_size": 4, "seq_len": 2048, "checkpointing": True}
    plain, *fused = (
        answer_by_formula(asked("llama-3.2-1b", 2, loss=loss, **run))
        for loss in ("plain", "liger", "chunked", "cut-cross-entropy")
    )
    every = 4 * 4 * 2048 * PRESETS["llama-3.2-1b"].shape.vocab_size
    assert all(answer.phases["backward"] < plain.phases["backward"] - 2 * every for answer in fused)
    with pytest.raises(InputError, match="known to the closed form only"):
        answer_by_simulation(asked("llama-3.2-1b", 2, loss="cut-cross-entropy", **run))
    with pytest.raises(InputError, match="not modelled for gemma2"):
        asked("gemma-2-2b", loss="liger", **run)

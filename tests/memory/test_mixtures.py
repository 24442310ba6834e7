"""Mixtures of experts: the same answer from every entrance, which says what a 4-bit base leaves in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_memory import model_of, small_shape

from peftscope.errors import InputError
from peftscope.hardware.cards import find_gpu
from peftscope.memory.answer import answer_by_formula
from peftscope.memory.base import Model, describe_model
from peftscope.memory.question import ask
from peftscope.models.presets import PRESETS
from peftscope.models.shapes import Experts
from peftscope.sizing.config_file import question_of, read_config
from peftscope.sizing.fit import fit_methods

MIXTURE = "qwen3-30b-a3b"
EXPERT_BYTES = 2 * PRESETS[MIXTURE].shape.expert_parameters
SAID = "experts: 54.00 GiB in 16 bits: under transformers 5 bitsandbytes skips fused parameters"


def tiny(family: str) -> Model:
    sizes = {"vocab_size": 1000, "hidden_size": 128, "head_dim": 32, "tied_embeddings": False}
    experts = Experts(number=8, per_token=2, size=160)
    return model_of(small_shape(family=family, experts=experts, **sizes), "tiny")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora"},
        {"method": "full", "checkpointing": True},
        {"method": "lora", "precision": "amp", "checkpointing": True},
        {"method": "qlora", "kbit_preparation": "peft", "evaluation": True},
        {"method": "qlora", "quantize_moe_experts": True},
        {"method": "qlora", "quantize_moe_experts": True, "checkpointing": True, "double_quant": False},
    ],
    ids=str,
)
def test_closed_form_and_simulation_agree(family: str, options: dict[str, Any]) -> None:
    from peftscope.memory.simulate import answer_by_simulation

    question = ask(tiny(family), {"batch_size": 2, "seq_len": 64, **options})
    closed, simulation = answer_by_formula(question), answer_by_simulation(question)
    for phase, size in simulation.phases.items():
        assert closed.phases[phase] == pytest.approx(size, rel=0.015, abs=32_000), phase
    assert closed.assumptions[0] == simulation.assumptions[0]


def test_every_entrance_gives_the_same_answer_and_says_what_is_not_quantised(tmp_path: Path) -> None:
    options = {"method": "qlora", "rank": 16, "batch_size": 2, "seq_len": 512, "checkpointing": True}
    options |= {"autocast": True, "keep_logits": False, "optimizer_implementation": "fused"}
    asked = answer_by_formula(ask(describe_model(MIXTURE), options))
    assert asked.assumptions[0].startswith(SAID)
    assert EXPERT_BYTES < asked.components["weights"] < EXPERT_BYTES + 3e9
    (fit,) = fit_methods([describe_model("Qwen/Qwen3-30B-A3B")], ["qlora"], options, find_gpu("a100-80gb"))
    assert fit.peak_allocated_bytes == asked.peak_allocated_bytes
    assert fit.assumptions[0] == asked.assumptions[0]
    file = tmp_path / "qlora.yml"
    content = {"base_model": "Qwen/Qwen3-30B-A3B", "adapter": "qlora", "load_in_4bit": True, "lora_r": 16}
    content |= {"sequence_len": 512, "micro_batch_size": 2, "gradient_checkpointing": True, "lora_target_linear": True}
    file.write_text(yaml.safe_dump(content))
    read = answer_by_formula(question_of(read_config(file, {}), gpus=None))
    assert read.peak_allocated_bytes == asked.peak_allocated_bytes
    assert read.assumptions[0] == asked.assumptions[0]
    file.write_text(yaml.safe_dump(content | {"quantize_moe_experts": True}))
    packed = answer_by_formula(question_of(read_config(file, {}), gpus=None))
    assert not packed.assumptions[0].startswith("experts")
    assert packed.phases["load"] < asked.phases["load"] - 0.7 * EXPERT_BYTES


def test_a_16_bit_base_needs_no_such_sentence() -> None:
    assert not answer_by_formula(ask(describe_model(MIXTURE), {"method": "lora"})).assumptions[0].startswith("experts")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ["gate_proj"]}, "experts are fused parameters"),
        ({"targets": "mlp"}, "experts are fused parameters"),
        ({"quantize_moe_experts": True}, "use qlora"),
    ],
)
def test_what_is_not_modelled_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ask(describe_model(MIXTURE), options)

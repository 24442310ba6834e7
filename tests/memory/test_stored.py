"""Bases that are stored in few bits: bytes by their format, and what a product with them keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftscope.errors import InputError
from peftscope.memory.answer import Answer, answer_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.question import ask
from peftscope.models.presets import PRESETS
from peftscope.models.stored import INT8

BASE = PRESETS["qwen2.5-7b"].shape
LINEAR = BASE.linear_parameters
FORMATS: dict[str, tuple[dict[str, Any], float]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128),
    "gptq in 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 32}, 1 + 3 / 32),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64}, 0.5 + 2.5 / 64),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1 + 4 / 128**2),
    "fp8 of whole matrices": ({"quant_method": "fp8"}, 1),
    "bnb-4bit": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        0.5 + 1 / 64 + 4 / 64 / 256,
    ),
    "bnb-4bit, plain": ({"load_in_4bit": True}, 0.5 + 4 / 64),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1),
}
"""What a ``config.json`` says, and the bytes that a weight takes."""


def answer(folder: Path, how: dict[str, Any] | None, **options: Any) -> Answer:
    file = folder / "config.json"
    file.write_text(json.dumps(BASE.to_config() | ({"quantization_config": how} if how else {})))
    return answer_by_formula(ask(describe_model(str(file)), {"method": "lora", "seq_len": 256, **options}))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_have_the_bytes_of_their_format(name: str, tmp_path: Path) -> None:
    how, width = FORMATS[name]
    found = answer(tmp_path, how)
    assert found.components["quantised weights"] == pytest.approx(LINEAR * width, rel=1e-3)
    assert found.components["weights"] == pytest.approx(2 * (BASE.parameters - LINEAR), rel=1e-3)
    assert found.assumptions[0].startswith(f"base stored as {name.split(',')[0].split(' ')[0]}")


def test_a_4_bit_checkpoint_takes_what_qlora_takes(tmp_path: Path) -> None:
    asked = answer(tmp_path, FORMATS["bnb-4bit"][0])
    made = answer(tmp_path, None, method="qlora")
    assert asked.phases["backward"] == made.phases["backward"]
    assert answer(tmp_path, FORMATS["bnb-4bit"][0], method="qlora").phases["backward"] == made.phases["backward"]


def test_unpacked_weights_of_gptq_stay_for_the_backward_pass(tmp_path: Path) -> None:
    kept, recomputed = (answer(tmp_path, FORMATS["gptq"][0], checkpointing=on) for on in (False, True))
    unpacked = [term.bytes for term in kept.terms if term.name == "dequantised weights of one layer"]
    assert sum(unpacked) > 1.9 * LINEAR
    assert recomputed.peak_allocated_bytes < kept.peak_allocated_bytes - 1.9 * LINEAR
    assert answer(tmp_path, FORMATS["fp8"][0]).peak_allocated_bytes < kept.peak_allocated_bytes - 0.9 * LINEAR


def test_mxfp4_is_unpacked_to_train(tmp_path: Path) -> None:
    found = answer(tmp_path, {"quant_method": "mxfp4"})
    assert found.phases == answer(tmp_path, None).phases
    assert "trains no MXFP4" in found.assumptions[0]


def test_an_8_bit_base_is_an_option_and_a_key(tmp_path: Path) -> None:
    from peftscope.sizing.config_file import question_of, read_config

    asked = answer(tmp_path, None, load_in_8bit=True, rank=16)
    assert asked.phases == answer(tmp_path, FORMATS["int8"][0], rank=16).phases
    half, few = answer(tmp_path, None, rank=16), answer(tmp_path, None, method="qlora", rank=16)
    assert few.phases["load"] < asked.phases["load"] < half.phases["load"] - 0.99 * LINEAR
    files = {
        "axolotl": {"base_model": "qwen2.5-7b", "adapter": "lora", "load_in_8bit": True, "lora_r": 16},
        "LLaMA-Factory": {"model_name_or_path": "qwen2.5-7b", "finetuning_type": "lora", "quantization_bit": 8},
        "TRL": {"model_name_or_path": "qwen2.5-7b", "use_peft": True, "load_in_8bit": True, "dtype": "bfloat16"},
    }
    for trainer, content in files.items():
        file = tmp_path / "trainer.yml"
        file.write_text(json.dumps({**content, "datasets": [], "lora_target_modules": ["q_proj"]}))
        question = question_of(read_config(file, {"seq_len": 128}), gpus=None)
        assert question.model.stored == INT8, trainer
        assert question.spec.method.name == "lora", trainer
        assert answer_by_formula(question).components["quantised weights"] == LINEAR, trainer


@pytest.mark.parametrize(
    ("how", "options", "said"),
    [
        (FORMATS["gptq"][0], {"method": "full"}, "full on a base stored as gptq is not modelled"),
        (FORMATS["awq"][0], {"method": "dora"}, "dora on a base stored as awq is not modelled"),
        (FORMATS["fp8"][0], {"precision": "amp"}, "in bf16"),
    ],
)
def test_what_is_not_modelled_is_refused(
    how: dict[str, Any] | None, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        answer(tmp_path, how, **options)

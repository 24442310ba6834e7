"""Vision towers have as many weights as transformers builds, and count wherever their models are asked about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from peftscope.errors import InputError
from peftscope.memory.answer import Answer, answer_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.question import ask
from peftscope.memory.simulate import answer_by_simulation
from peftscope.models.presets import PRESETS
from peftscope.models.vision import KINDS, vision_of

TEXT = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 24}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "intermediate_size": 100, "patch_size": 14}
QWEN = {**SIZES, "depth": 3, "num_heads": 4, "out_hidden_size": 96, "deepstack_visual_indexes": [1, 2]}
OTHER = {**SIZES, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "vision_use_head": False}
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl_moe": (QWEN, {"num_experts": 4, "moe_intermediate_size": 32}),
    "gemma3": (OTHER, {}),
    "mistral3": (OTHER | {"model_type": "pixtral"}, {"model_type": "mistral"}),
}
"""The tower and the text model of each kind, where they are not as elsewhere."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_has_the_weights_that_transformers_builds(kind: str) -> None:
    tower, text = OWN.get(kind, (QWEN, {}))
    tower = {key: value for key, value in tower.items() if "deep" not in key or "3_vl" in kind}
    config = CONFIG_MAPPING[kind](vision_config=tower, text_config=TEXT | text)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    beside = {n: m for n, m in model.named_modules() if "language_model" not in n and n != "lm_head"}
    own = [p for m in beside.values() if m is not model and m is not model.model for p in m.parameters(recurse=False)]
    found = vision_of(kind, tower, 96)
    assert found.parameters == sum(parameter.numel() for parameter in own)
    linear = sum(module.weight.numel() for module in beside.values() if isinstance(module, torch.nn.Linear))
    assert found.layers * found.block + found.outside == linear


GEMMA = {
    "model_type": "gemma3",
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024},
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 896},
}
QWEN25 = {
    **{"model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
    **{"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    **{"max_position_embeddings": 128000, "sliding_window": 32768, "use_sliding_window": False},
    "vision_config": {"hidden_size": 1280},
}


@pytest.mark.parametrize(("config", "preset"), [(GEMMA, "gemma-3-4b"), (QWEN25, "qwen2.5-vl-3b")])
def test_the_files_of_the_hub_leave_out_defaults(config: dict[str, Any], preset: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = describe_model(str(tmp_path))
    assert (found.shape, found.vision) == (PRESETS[preset].shape, PRESETS[preset].vision)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": {"patch_size": "14"}}))
    with pytest.raises(InputError, match="does not describe a model"):
        describe_model(str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"method": "qlora", "kbit_preparation": "peft", "autocast": True}], ids=str)
def test_a_tower_adds_its_frozen_weights_and_nothing_else(options: dict[str, Any], tmp_path: Path) -> None:
    config = QWEN25 | {"num_hidden_layers": 2, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
    plain = config | {"model_type": "qwen2", "vision_config": None}
    seen, blind = (_asked(tmp_path, one, **options) for one in (config, plain))
    more = [answer.peak_allocated_bytes - other.peak_allocated_bytes for answer, other in zip(seen, blind, strict=True)]
    vision = vision_of("qwen2_5_vl", {}, 128)
    quarter, linear = options.get("method") == "qlora", vision.parameters - vision.other
    weights = linear * (0.516 if quarter else 2) + vision.other * (4 if quarter else 2)
    assert more == pytest.approx([weights] * 2, rel=0.001)
    assert any(f"vision tower of {vision.parameters:,} weights: frozen" in line for line in seen[0].assumptions)


def _asked(folder: Path, config: dict[str, Any], **options: Any) -> tuple[Answer, Answer]:
    (folder / "config.json").write_text(json.dumps(config))
    question = ask(describe_model(str(folder)), {"seq_len": 32, **options})
    return answer_by_formula(question), answer_by_simulation(question)

"""Base models: what is fetched is whole, what it is said to be, and loads as the spec says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from peftscope.errors import InputError
from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.assumptions import assumptions_of
from peftscope.memory.base import describe_model
from peftscope.memory.question import ask
from peftscope.methods.loftq import float_weight
from peftscope.models.catalog import find_model, model_folder
from peftscope.models.fetch import fetch_model
from peftscope.models.presets import PRESETS, did_you_mean
from peftscope.training.load import load_base, load_tokenizer


def test_the_toy_is_deterministic_and_its_manifest_true(toy: Path) -> None:
    folder = model_folder("toy")
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files} == manifest["sha256"]
    assert manifest["licence"] == "Apache-2.0"
    (folder / "manifest.json").unlink()
    fetch_model("toy")
    again = json.loads((folder / "manifest.json").read_text())
    assert again["sha256"]["model.safetensors"] == manifest["sha256"]["model.safetensors"]


def test_an_interrupted_fetch_leaves_nothing_behind(write_experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    write_experiment("mine", "fixed: {model: toy}\n")

    def broken(path: Path, content: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peftscope.files.resource.write_json", broken)
    with pytest.raises(KeyboardInterrupt):
        fetch_model("toy")
    assert list(Path("resources/models").iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp"])
def test_weights_have_the_dtype_of_the_precision(precision: str, toy: Path, make_spec) -> None:
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in load_base(make_spec(method="full", precision=precision)).parameters()} == {wanted}


@pytest.mark.slow
def test_the_real_model_is_what_the_catalogue_says(workspace: Path, make_spec) -> None:
    folder = fetch_model("smollm2-135m")
    spec = make_spec(method="lora", model="smollm2-135m")
    model = load_base(spec)
    shape = find_model("smollm2-135m").shape
    assert sum(p.numel() for p in model.parameters()) == shape.parameters == 134_515_008
    assert model.config.num_hidden_layers == shape.num_layers
    assert load_tokenizer(spec).decode(load_tokenizer(spec)("12 + 34 = 46")["input_ids"]) == "12 + 34 = 46"
    # The caveat that reports carry: blocks of 32 with at most 16 values each.
    blocks = float_weight(folder, "model.layers.7.mlp.up_proj.weight").reshape(-1, 32)
    assert max(len(block.unique()) for block in blocks[:500]) <= 16


def test_presets_and_their_hub_ids_are_models_of_known_shape() -> None:
    entry = find_model("llama-3.2-1b")
    assert entry.source.repository == "meta-llama/Llama-3.2-1B"
    assert entry.shape == find_model("meta-llama/Llama-3.2-1B").shape
    assert find_model("someone/something").shape is None
    assert find_model("smollm2-135m").source.kind == "wheel"  # models.yaml comes first
    with pytest.raises(InputError, match=r"did you mean `llama-3\.2-1b`"):
        find_model("llama-3.2-1")
    with pytest.raises(InputError, match=r"did you mean `llama-4-scout`"):
        describe_model("llama-4")


@pytest.mark.parametrize("name", ["llama-5", "deepseek-v2", "qwen2-vl-7b", "qwen3-omni-30b", "gemma-3n", "gpt-j-6b"])
def test_no_model_of_another_family_is_suggested(name: str) -> None:
    assert "did you mean" not in did_you_mean(name, PRESETS)
    with pytest.raises(InputError, match="peftscope models"):
        describe_model(name)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Silent:
        def head(self, url: str, timeout: float) -> None:
            asked.append(timeout)
            raise TimeoutError("[Errno 110] a library's message")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Silent)
    with pytest.raises(InputError, match=r"the hub is not reached.*peftscope models") as error:
        describe_model("someone/something")
    assert sum(asked) <= 3 and "Errno" not in str(error.value)


@pytest.mark.parametrize(
    "hub_id",
    ["meta-llama/Llama-3.1-8B-Instruct", "unsloth/Meta-Llama-3.1-8B-bnb-4bit", "o/Llama-3.1-8B-unsloth-bnb-4bit"],
)
def test_a_variant_on_the_hub_has_the_shape_of_its_preset(hub_id: str) -> None:
    model, preset = describe_model(hub_id), "llama-3.1-8b"
    assert model.shape == PRESETS[preset].shape and model.variant_of == preset
    stored = describe_model("o/Qwen2.5-7B-Instruct-GPTQ-Int4").stored
    assert (stored and stored.name, describe_model("unsloth/gpt-oss-20b").variant_of) == ("gptq", "gpt-oss-20b")
    said = assumptions_of(ask(model, {}))
    assert any("a variant of it" in line for line in said)
    assert any("bnb-4bit" in line and "stored" in line for line in said) is hub_id.endswith("bnb-4bit")
    assert any(line.startswith("dynamic 4 bits") for line in said) is ("unsloth-bnb" in hub_id)
    stored, qlora = (ask(describe_model(name), {"method": "qlora"}) for name in (hub_id, preset))
    assert peaks_by_formula(stored).allocated_bytes == peaks_by_formula(qlora).allocated_bytes

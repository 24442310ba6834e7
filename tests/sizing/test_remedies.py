"""Remedies fit whoever follows them: the keys are pasted into the file, the options are given to the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command

from peftscope.hardware.cards import CONTEXT_BYTES, Gpu
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.base import Model, describe_model
from peftscope.memory.question import ask
from peftscope.memory.trace import Block
from peftscope.models.presets import PRESETS
from peftscope.sizing import changes
from peftscope.sizing.changes import NOTHING, Asked, remedies_of, untested
from peftscope.sizing.needs import Needs
from peftscope.words import GIB

SHAPE = PRESETS["smollm2-135m"].shape.model_copy(update={"num_layers": 2})
SMALL = Model("two layers", SHAPE.to_config(), SHAPE)

BASE = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
TUNE = {
    "tokenizer": {"max_seq_len": 256},
    "enable_activation_checkpointing": True,
    "model.lora_attn_modules": ["q_proj"],
}
ADAMW = {"optimizer._component_": "torch.optim.AdamW", "optimizer.fused": True, "optimizer_in_bwd": True}
FILES: dict[str, dict[str, Any]] = {
    "axolotl": {"base_model": "Qwen/Qwen2.5-0.5B", "sequence_len": 1024, "micro_batch_size": 4, "adapter": "lora"}
    | {"lora_r": 8, "lora_target_linear": True, "gradient_accumulation_steps": 2, "val_set_size": 0.1},
    "LLaMA-Factory": BASE | {"finetuning_type": "lora", "cutoff_len": 1024, "disable_gradient_checkpointing": True},
    "torchtune": TUNE | {"model._component_": "torchtune.models.qwen2_5.lora_qwen2_5_3b"},
    "torchtune, all weights": TUNE | ADAMW | {"model._component_": "torchtune.models.llama3_2.llama3_2_1b"},
    "TRL": BASE | {"max_length": 1024, "gradient_checkpointing": False, "eval_strategy": "epoch"},
}


@pytest.mark.parametrize("trainer", FILES)
def test_keys_of_a_remedy_are_pasted_into_the_file(trainer: str, peftscope: Command, tmp_path: Path) -> None:
    path, changed = tmp_path / "train.yaml", tmp_path / "changed.yaml"
    card = "7.2GiB" if "weights" in trainer else "6GiB"
    path.write_text(yaml.safe_dump(FILES[trainer]))
    code, said, _ = peftscope("memory", "--config", str(path), "--gpu", card, "--json")
    remedies = json.loads(said)["remedies"]
    assert code == 1 and 1 <= len(remedies) <= 3
    for remedy in remedies:
        assert not any(key.startswith("--") for key in remedy["changes"])
        changed.write_text(yaml.safe_dump(FILES[trainer] | remedy["changes"]))
        after = json.loads(peftscope("memory", "--config", str(changed), "--gpu", card, "--json")[1])
        assert after["fits"] == remedy["fits"] != "no"
        assert after["peak_device_bytes"] == remedy["peak_device_bytes"]


def test_options_of_a_remedy_are_given_to_the_command(peftscope: Command) -> None:
    asked = ["memory", "qwen2.5-0.5b", "--batch-size", "4", "--seq-len", "1024", "--gradient-accumulation", "2"]
    lines = [
        line for line in peftscope(*asked, "--gpu", "6GiB")[1].splitlines() if "fits with:" in line or "or: " in line
    ]
    assert 1 <= len(lines) <= 3
    for line in lines:
        options, peak = line.split(": ", 1)[1].rsplit("  (", 1)
        words = options.split()
        if "--batch-size" in words:  # a step learns from as many examples
            batch, more = (int(words[words.index(name) + 1]) for name in ("--batch-size", "--gradient-accumulation"))
            assert batch * more == 8
        after = peftscope(*asked, *words, "--gpu", "6GiB")[1]
        assert "fits on" in after and f"device     {peak.rstrip(')')}" in after


def test_the_command_line_decides_before_the_file(peftscope: Command, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(FILES["LLaMA-Factory"] | {"enable_liger_kernel": True, "quantization_bit": 4}))
    said = peftscope("memory", "--config", str(path), "--gpu", "5GiB", "--batch-size", "8", "--json")[1]
    changes = [remedy["changes"] for remedy in json.loads(said)["remedies"]]
    assert {"disable_gradient_checkpointing": False} in changes
    assert all("per_device_train_batch_size" not in one for one in changes)
    assert any("--batch-size" in one for one in changes)


ERROR = "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of {} of which 0 bytes is free."


@pytest.mark.parametrize("options", [("--batch-size", "4"), ("--method", "full"), ("--loss", "liger")], ids=str)
def test_memory_fit_and_oom_say_the_same(options: tuple[str, ...], peftscope: Command) -> None:
    run, method = ["qwen2.5-0.5b", "--seq-len", "1024", *options], "full" if "full" in options else "lora"
    remedies = json.loads(peftscope("memory", *run, "--gpu", "3GiB", "--json")[1])["remedies"]
    (fit,) = json.loads(peftscope("fit", *run[:3], "--gpu", "3GiB", "--method", method, *options[-2:], "--json")[1])
    text = ERROR.format("3.00 GiB")
    assert remedies and json.loads(peftscope("oom", run[0], text, *run[1:], "--json")[1])["remedies"] == remedies
    words = [key if value is True else f"{key} {value}" for key, value in remedies[0]["changes"].items()]
    assert fit["advice"] == " ".join(words) and fit["advised_device_bytes"] == remedies[0]["peak_device_bytes"]


def test_experts_are_packed_where_the_trainer_packs_them(peftscope: Command, tmp_path: Path) -> None:
    shape = PRESETS["qwen3-30b-a3b"].shape.model_copy(update={"num_layers": 2})
    (tmp_path / "config.json").write_text(json.dumps(shape.to_config()))
    path, experts = tmp_path / "train.yaml", {"quantize_moe_experts": True}
    few = {"base_model": "config.json", "adapter": "qlora", "load_in_4bit": True, "micro_batch_size": 1}
    path.write_text(yaml.safe_dump(FILES["axolotl"] | few))
    found = json.loads(peftscope("memory", "--config", str(path), "--gpu", "4GiB", "--json")[1])["remedies"]
    assert found and all(one["changes"].items() >= experts.items() for one in found)
    few = {"model_name_or_path": "config.json", "quantization_bit": 4, "per_device_train_batch_size": 1}
    path.write_text(yaml.safe_dump(FILES["LLaMA-Factory"] | few))
    assert json.loads(peftscope("memory", "--config", str(path), "--gpu", "4GiB", "--json")[1])["remedies"] == []


@pytest.mark.parametrize(("weights", "says"), [(20, "perhaps --loss liger (not tried"), (50, NOTHING)])
def test_what_a_simulated_run_may_try_leaves_room_for_what_stays(weights: int, says: str) -> None:
    question = ask(describe_model("gpt-oss-20b"), {"method": "qlora"}, gpu=Gpu("a card", 40 * GIB))
    alive = [Block(weights * GIB, "weights"), Block(25 * GIB, "logits and loss")]
    size = sum(block.size for block in alive)
    peaks = Peaks(size, size, size, size, "backward", {"backward": size}, lambda _: alive)
    assert untested(Asked(question, {}), "no", peaks, 40 * GIB).startswith(says)


def test_no_remedy_is_lost_among_changes_that_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[dict[str, Any]] = [{"batch_size": 4}, {"method": "full"}, {"batch_size": 2, "evaluation": True}]

    def remedies(share: float, given: dict[str, Any]) -> list[str]:
        given = {"seq_len": 128, **given}
        whole = peaks_by_formula(ask(SMALL, given))
        gpu = Gpu("a card", CONTEXT_BYTES + int((whole.device_bytes - CONTEXT_BYTES) * share))
        asked = Asked(ask(SMALL, given, gpu=gpu), given)
        return [str(each) for each in remedies_of(asked, whole, Needs(gpu))]

    every = [(share, given) for share in (0.3, 0.7) for given in runs]
    found = [remedies(*each) for each in every]
    monkeypatch.setattr(changes, "SPARED", {})
    assert found == [remedies(*each) for each in every]
    assert len({len(each) for each in found}) > 1

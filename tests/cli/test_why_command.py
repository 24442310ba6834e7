"""``peftscope why``: settings and files, and what is said about wrong ones."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from conftest import Command

MODEL = "smollm2-135m"
SIZES = {"batch_size": 2, "eval_batch_size": 2, "seq_len": 64}


def told(peftscope: Command, *arguments: str) -> dict:
    code, output, message = peftscope("why", *arguments, "--json")
    assert (code, message) == (0, "")
    return json.loads(output)


def test_settings_and_files_are_compared_alike(peftscope: Command, tmp_path: Path) -> None:
    words = "qlora --rank 16 --loss-path response_only", "lora --rank 16 --loss-path response_only"
    by_words = told(peftscope, MODEL, *words, "--batch-size", "2", "--seq-len", "64", "--optimizer", "adamw")
    assert by_words["first"] == "QLoRA"
    found = []
    for method, suffix in (("qlora", "json"), ("lora", "yaml")):
        spec = {"model": MODEL, "task": "x", "learning_rate": 1e-4, **SIZES}
        path = tmp_path / f"{method}.{suffix}"
        path.write_text(json.dumps({**spec, "method": {"name": method, "rank": 16}}))
        found.append(str(path))
    assert told(peftscope, *found)["changes"] == by_words["changes"]
    assert "smollm2-135m" in told(peftscope, "lora", f"lora --model {MODEL}", "--model", "qwen2.5-0.5b")["second"]


def test_a_trainers_file_keeps_all_that_it_says(peftscope: Command, tmp_path: Path) -> None:
    asked = {"base_model": MODEL, "adapter": "lora", "lora_r": 8, "lora_target_linear": True, "micro_batch_size": 2}
    path = tmp_path / "axolotl.yml"
    path.write_text(json.dumps({**asked, "cut_cross_entropy": True, "sequence_len": 64, "fsdp": ["full_shard"]}))
    code, output, _ = peftscope("memory", "--config", str(path), "--gpus", "4", "--json")
    assert code == 0
    assert told(peftscope, str(path), "--gpus", "4")["first_bytes"] == json.loads(output)["peak_allocated_bytes"]
    tune = {"tokenizer": {"path": "t"}, "model": {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}}
    path.write_text(json.dumps({**tune, "batch_size": 1, "dtype": "bf16"}))
    shorter, longer = (told(peftscope, str(path), "--seq-len", length)["first_bytes"] for length in ("64", "512"))
    assert shorter < longer
    words = str(path), "lora --model llama-3.2-1b", "--seq-len", "64", "--rank", "16"  # full fine-tuning has no rank
    assert told(peftscope, *words)["first_bytes"] == shorter


def test_the_text_has_the_sentences_the_table_and_the_figure(peftscope: Command, tmp_path: Path) -> None:
    figure = tmp_path / "why.png"
    words = [MODEL, "lora --checkpointing", "lora"]
    code, output, _ = peftscope("why", *words, "--figure", str(figure))
    why = told(peftscope, *words)
    assert code == 0
    assert figure.is_file()
    flat = " ".join(output.split())
    assert all(sentence in flat for sentence in why["sentences"])
    assert "the same in both" in flat
    assert "has the peak" in peftscope("why", MODEL, "lora")[1]


WRONG = {
    "no model": (["qlora", "lora"], "model: none given", "--model llama-2-7b"),
    "unknown method": ([MODEL, "qlra --rank 8", "lora"], "'qlra' is not a method", "`qlora`?"),
    "unknown option": ([MODEL, "qlora --rnak 8", "lora"], "No such option: --rnak", "--rank"),
    "wrong value": ([MODEL, "qlora --rank eight"], "--rank", "why --help"),
    "three settings": ([MODEL, "lora", "full", "dora"], "compares two settings (got 3)", "quote each"),
    "no setting": ([MODEL, "lora", "nothing"], "nothing: is no setting or spec file", "qlora --rank 64"),
    "half a quote": ([MODEL, "lora --targets 'mlp"], "cannot be read", ""),
    "a long name": ([MODEL, "a" * 300 + ".yaml"], "is no setting or spec file", ""),
    "broken file": ([MODEL, "broken.yaml"], "broken.yaml", ""),
}


@pytest.mark.parametrize(("words", "what", "remedy"), WRONG.values(), ids=WRONG)
def test_a_wrong_comparison_gets_one_line(words: list[str], what: str, remedy: str, refusal) -> None:
    Path("broken.yaml").write_text("method: [")
    message = refusal("why", *words)
    assert what in message
    assert remedy in message


ERROR = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 768.00 MiB. GPU 0 has a total capacity of "
    "3.00 GiB of which 45.75 MiB is free. Of the allocated memory 2.40 GiB is allocated by PyTorch, and 10.00 MiB is "
    "reserved by PyTorch but unallocated."
)


def test_an_error_is_read_from_an_argument_a_file_and_stdin(peftscope, refusal, tmp_path, monkeypatch) -> None:
    options = ["--batch-size", "8", "--checkpointing"]
    code, output, _ = peftscope("oom", MODEL, ERROR, *options)
    assert code == 0
    assert "logits in 32 bits" in output
    assert "fits with: " in output
    path = tmp_path / "train.log"
    log = f"step 3\n{ERROR}\n".encode() + b"\xff"  # no UTF-8
    path.write_bytes(log)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(log), encoding="utf-8"))
    assert output == peftscope("oom", MODEL, str(path), *options)[1] == peftscope("oom", MODEL, *options)[1]
    assert "did you mean `qlora`?" in refusal("oom", MODEL, ERROR, "--method", "qlra", "--rank", "8")
    assert "paste torch's message" in refusal("oom", MODEL, "no-such-file.log")

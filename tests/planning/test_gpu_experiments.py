"""The GPU tier without a GPU and without a hub: local folders stand in for what it downloads."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import in_one_process

from peftscope.data.benchmarks import benchmark_folder, benchmark_resource, find_benchmark
from peftscope.data.tasks import SPLITS, make_task, read_split, split_of, task_folder
from peftscope.errors import InputError
from peftscope.files import hub
from peftscope.memory.base import describe_model
from peftscope.models.catalog import find_model, model_folder
from peftscope.models.fetch import fetch_model
from peftscope.models.shapes import ModelShape
from peftscope.planning.checks import check_runs, check_unchanged
from peftscope.planning.plan import plan_experiment
from peftscope.planning.sweep import expand
from peftscope.report.benchmarks import benchmark_changes, readable_benchmarks
from peftscope.training.load import load_base

SHORT = """
extends: gpu-7b
fixed: {steps: 4, batch_size: 2, gradient_accumulation: 1, warmup_steps: 0, checkpointing: true, validation_items: 8,
  heldout_items: 8, generation_items: 0, eval_batch_size: 4, retention_tokens: 64, benchmark_items: 2, untimed_steps: 1,
  probe_steps: 1}
methods: # a token of a 4-bit model takes long on a CPU
  lora: {generation_items: 2}
  prompt-tuning: {generation_items: 0}
  prefix-tuning: {generation_items: 0}
  qlora: {benchmarks: [hellaswag, arc_challenge]}
runs:
- {method: none}
- {method: none, base_weights: nf4, benchmarks: [hellaswag, arc_challenge]}
study:
  learning_rates: {lora: [1.0e-4, 1.0e-3, 1.0e-2], qlora: [1.0e-4, 1.0e-3, 1.0e-2]}
  seeds: [0, 1]
  controls: {lora: []}
ladders: [{centre: {method: lora, benchmarks: [], generation_items: 0}, seeds: [0], axes: {rank: [4, 16]}}]
exclude:
"""
LEFT_OUT = ("full", "dora", "adalora", "loftq", "lora-plus", "rslora", "pissa", "ia3", "prompt-tuning", "prefix-tuning")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_card(folder: Path, configurations: dict[str, list[str]]) -> None:
    """Writes what a hub data set says about its files."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [f"  - {{split: {split}, path: {name}/{split}.jsonl}}" for split in splits]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.fixture
def mirror(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has, under the hub's names, a tiny random Llama and a few rows of each data set."""
    root, draw = tmp_path / "hub", random.Random(0)
    ignored = shutil.ignore_patterns("manifest.json")
    shutil.copytree(toy / model_folder("toy"), root / "meta-llama/Llama-2-7b-hf", ignore=ignored)
    sums = [(draw.randrange(100), draw.randrange(100)) for _ in range(200)]
    rows = [
        {"type": "GSM_Rephrased", "original_question": f"{a} + {b}?", "query": f"{wording} {a} + {b}?"}
        | {"response": f"It is a sum.\nThe answer is: {a + b}"}
        for a, b in sums
        for wording in ("What is", "Say what is")
    ]
    write_rows(root / "meta-math/MetaMathQA/train.jsonl", rows)
    for split in ("train", "test"):
        rows = [{"question": f"{a} and {b}?", "answer": f"{a}+{b}\n#### {a + b}"} for a, b in sums[:20]]
        write_rows(root / f"openai/gsm8k/main/{split}.jsonl", rows)
    write_card(root / "openai/gsm8k", {"main": ["train", "test"]})
    for split in ("train", "validation", "test"):
        choices = {"text": ["cold", "hot", "wet", "old"], "label": ["A", "B", "C", "D"]}
        rows = [{"id": str(n), "question": f"Ice {n} is", "choices": choices, "answerKey": "A"} for n in range(8)]
        write_rows(root / f"allenai/ai2_arc/ARC-Challenge/{split}.jsonl", rows)
        sentence = {"ctx_a": "A man walks.", "ctx_b": "he", "activity_label": "Walking", "label": "1"}
        rows = [sentence | {"endings": ["sits.", "goes on.", "is a tree.", "two."], "ind": n} for n in range(8)]
        write_rows(root / f"Rowan/hellaswag/{split}.jsonl", rows)
    write_card(root / "allenai/ai2_arc", {"ARC-Challenge": ["train", "validation", "test"]})
    monkeypatch.setenv(hub.MIRROR, str(root))
    return root


@pytest.mark.slow
def test_the_7b_experiment_runs_to_its_report_on_local_folders(mirror: Path, write_experiment) -> None:
    """The file itself, shortened; models and data are found under their hub names."""
    excluded = [f"- {{match: {{method: {method}}}, reason: shortened}}\n" for method in LEFT_OUT]
    write_experiment("short", SHORT + "".join(excluded))
    done = in_one_process("sweep short", "report short")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runs = pd.read_csv("results/short/runs.csv")
    assert set(runs["status"]) == {"ok"} and set(runs["method"]) == {"none", "lora", "qlora"}
    compared = runs[runs["comparisons"].str.contains("grid|runs")]
    for benchmark, methods in (("gsm8k", 1), ("hellaswag", 2), ("arc_challenge", 2)):
        scored = compared[compared[f"benchmark_{benchmark}_fraction"].between(0, 1)]
        assert scored[scored["method"] != "none"].groupby("method").size().tolist() == [2] * methods
        assert runs.loc[runs["comparisons"].str.contains("tune-"), f"benchmark_{benchmark}_fraction"].isna().all()
    found = pd.read_csv("results/short/tables/benchmarks.csv")
    assert len(found) == 1 + 2 + 2 and found["before"].notna().all()
    page = Path("reports/short/report.html").read_text()
    assert "Llama-2-7B on MetaMathQA" in page and "<h2>Benchmarks</h2>" in page

    arms = json.loads(Path("results/short/tuned.json").read_text())["arms"]
    assert all(3 <= len(chosen["rates"]) <= 5 for chosen in arms.values())

    record = json.loads(next(Path("results/runs").glob("lora-*/record.json")).read_text())
    assert record["provenance"]["model"]["mirror"] == str(mirror / "meta-llama/Llama-2-7b-hf")
    assert record["provenance"]["model"]["source"]["revision"] == find_model("llama-2-7b").source.revision


def test_rewordings_of_one_question_stay_in_one_split(mirror: Path, own_folder: Path) -> None:
    make_task("metamath")
    splits = {
        split: {item.prompt.split("what is ")[-1].split("What is ")[-1] for item in read_split("metamath", split)}
        for split in SPLITS
    }
    assert not splits["train"] & splits["test"] and not splits["train"] & splits["validation"]
    (item, *_) = read_split("metamath", "test")
    assert item.prompt.startswith("Question: ") and item.prompt.endswith("?\nAnswer:")
    assert split_of(item.prompt.split("is ", 1)[1].removesuffix("\nAnswer:")) == "test"
    manifest = json.loads((task_folder("metamath") / "manifest.json").read_text())
    assert manifest["mirror"] == str(mirror / "meta-math/MetaMathQA")
    assert check_unchanged(expand("gpu-7b").runs) == []


def test_long_rows_are_left_out_and_a_size_is_kept(mirror: Path, own_folder: Path) -> None:
    tasks = Path("experiments/tasks.yaml")
    rows = [{"query": f"Count to {n}", "response": "9" * n} for n in range(1, 201)]
    write_rows(mirror / "some/counts/train.jsonl", rows)
    source = "kind: hub, dataset: some/counts, prompt: query, response: response, longest: 100, size: 60"
    tasks.write_text(tasks.read_text() + f"\ncounts:\n  source: {{{source}}}\n")
    Path("experiments/tasks/counts.yaml").write_text("task: counts\n")
    make_task("counts")
    items = [item for split in SPLITS for item in read_split("counts", split)]
    assert len(items) == 60 and max(len(item.prompt) + len(item.response) for item in items) <= 92


def test_a_column_that_is_not_there_is_named_with_those_that_are(mirror: Path, own_folder: Path) -> None:
    tasks = Path("experiments/tasks.yaml")
    tasks.write_text(tasks.read_text().replace("prompt: query", "prompt: question"))
    with pytest.raises(InputError, match="no such column: question -> it has type, original_question, query, response"):
        make_task("metamath")


def test_without_a_hub_what_is_missing_is_a_message(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = benchmark_resource("hellaswag").fetch
    for make in (lambda: fetch_model("llama-2-7b"), lambda: make_task("metamath"), benchmark):
        with pytest.raises(InputError, match=r"(it|not reached): .*PEFTSCOPE_HUB=FOLDER"):
            make()
    assert hub.commit_of("org/name", "a" * 40, "model") == "a" * 40  # a full commit is its own answer
    monkeypatch.setenv(hub.MIRROR, "no/such/folder")
    with pytest.raises(InputError, match="PEFTSCOPE_HUB: no such folder"):
        fetch_model("llama-2-7b")
    assert not [path for path in Path("resources").rglob("*") if path.is_file()]


def test_a_benchmark_that_lm_eval_does_not_know_is_said_before_any_job(write_experiment) -> None:
    write_experiment("mine", "fixed: {model: toy, benchmarks: [hellaswog]}\n")
    with pytest.raises(InputError, match="did you mean `hellaswag`"):
        plan_experiment("mine")
    write_experiment("mine", "fixed: {model: toy, benchmarks: [hellaswag, arc_challenge, gsm8k]}\n")
    assert check_runs(expand("mine").runs, "mine") == []
    assert find_benchmark("arc_challenge").name == "arc_challenge.yaml"


def test_a_benchmarks_manifest_says_where_its_rows_are_from(mirror: Path, own_folder: Path) -> None:
    manifest = json.loads((benchmark_resource("gsm8k").fetch() / "manifest.json").read_text())
    assert manifest["dataset"] == "openai/gsm8k" and manifest["items"] == {"test": 20, "train": 20}
    assert manifest["mirror"].startswith(str(mirror)) and set(manifest["sha256"]) == {"test", "train"}
    assert sorted(path.stem for path in benchmark_folder("gsm8k").glob("*.parquet")) == ["test", "train"]


def test_the_calculator_reads_a_local_configuration_under_its_hub_name(mirror: Path) -> None:
    (mirror / "some").mkdir(exist_ok=True)
    (mirror / "some/model").symlink_to(mirror / "meta-llama/Llama-2-7b-hf")
    shape = describe_model("some/model").shape
    assert shape is not None and shape.hidden_size == find_model("toy").shape.hidden_size


def test_random_weights_of_a_shape_are_written_in_pieces_and_load(write_experiment, make_spec, monkeypatch) -> None:
    from peftscope.models import fetch

    models = "tiny:\n  source: {kind: random, like: qwen2.5-0.5b}\n  licence: none\n"
    write_experiment("models", Path("experiments/models.yaml").read_text() + models)
    shape = find_model("tiny").shape
    assert shape is not None and shape.parameters == find_model("qwen2.5-0.5b").shape.parameters
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "head_dim": 16, "vocab_size": 300}
    small = ModelShape(**shape.model_dump() | sizes | {"num_heads": 4, "num_kv_heads": 2})
    monkeypatch.setattr(fetch, "SHARD_BYTES", 100_000)
    entry = find_model("tiny").model_copy(update={"shape": small})
    monkeypatch.setattr(fetch, "find_model", lambda name: entry)
    folder = fetch_model("tiny")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = load_base(make_spec(method="lora", model="tiny"))
    assert sum(p.numel() for p in model.parameters()) == small.parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert float(model.model.embed_tokens.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
    assert model.model.layers[1].input_layernorm.weight.eq(1).all()


def test_changes_are_against_the_base_that_a_method_started_from() -> None:
    def run(method: str, label: str, score: float, **more: Any) -> dict[str, Any]:
        known = {"comparisons": "grid", "status": "ok", "model": "m", "quant_type": None, "base_weights": None}
        return known | {"method": method, "label": label, "benchmark_gsm8k_fraction": score} | more

    runs = pd.DataFrame(
        [
            run("none", "base", 0.2, comparisons="runs", base_weights="full"),
            run("none", "base in NF4", 0.1, comparisons="runs", base_weights="nf4"),
            run("lora", "LoRA", 0.4),
            run("lora", "LoRA", 0.6),
            run("qlora", "QLoRA", 0.3, quant_type="nf4"),
            run("lora", "LoRA", 0.0, comparisons="ladder-0-rank"),
            run("lora", "LoRA", 0.0, status="oom"),
        ]
    )
    found = benchmark_changes(runs).set_index("method")
    assert found.loc["LoRA", ["n", "before", "after"]].tolist() == pytest.approx([2, 0.2, 0.5])
    assert found.loc["QLoRA", ["n", "before", "after"]].tolist() == pytest.approx([1, 0.1, 0.3])
    assert readable_benchmarks(benchmark_changes(runs))["change (points)"].tolist() == ["+30.0", "+20.0"]
    assert readable_benchmarks(benchmark_changes(runs.drop(columns="benchmark_gsm8k_fraction"))).empty

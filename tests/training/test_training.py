"""Whole runs: records, determinism, every way that a run can end, and steps in worlds that are not the toy's."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, command, fast_if, python, run_here

from peftscope.data.tasks import draw_items, make_task, read_split
from peftscope.errors import InputError
from peftscope.execution.job import Job
from peftscope.execution.merge import base_of_adapter, find_run, merge_run
from peftscope.layout import PREDICTIONS_FOLDER
from peftscope.models.catalog import find_model, model_folder
from peftscope.models.fetch import fetch_model
from peftscope.planning.experiment import read_experiment
from peftscope.planning.published import RETENTION, loss_rows
from peftscope.record import read_record
from peftscope.spec import RunSpec, run_id
from peftscope.training.load import MASK_FREE_SDPA, MASK_FREE_SDPA_CPU, training_attention

QUICKLY = {"generation_items": 0, "retention_tokens": 0, "probe_steps": 0}


def run_command(spec: RunSpec, folder: Path, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return python(*command(spec, folder)[1:], env={**os.environ, "PYTHONHASHSEED": hash_seed})


@pytest.mark.slow
def test_prose_is_scored_along_a_training_without_changing_it(toy: Path, make_spec, tmp_path: Path) -> None:
    options = {"method": "lora", "dropout": 0.1, "learning_rate": 1e-2, "generation_items": 0, "probe_steps": 0}
    plain, along = (run_here(make_spec(**options, retention_every=every), tmp_path / str(every)) for every in (0, 2))
    assert along.train_nll == plain.train_nll and along.quality.heldout_nll == plain.quality.heldout_nll
    assert along.quality.retention_bits_per_byte == plain.quality.retention_bits_per_byte
    curve = along.quality.retention_curve
    assert list(curve) == [2, 4] and plain.quality.retention_curve == {}
    before, after = along.quality.retention_bits_per_byte_before, along.quality.retention_bits_per_byte
    assert len({before, *curve.values(), after}) == 4
    rows = loss_rows(along.model_dump(mode="json"))
    assert [row[RETENTION] for row in rows] == [None, curve[2], None, curve[4], None, None]


def test_a_record_holds_everything_that_a_cpu_can_measure(toy: Path, make_spec, tmp_path: Path) -> None:
    spec = make_spec(method="lora", validation_items=4)
    record = run_here(spec, tmp_path)
    assert (record.status, record.reason, record.run_id) == ("ok", None, run_id(spec))
    assert record.spec == spec
    assert len(record.train_nll) == spec.steps
    parts = (record.speed, record.ceilings, record.quality, record.size, record.memory.predicted)
    missing = {name for part in parts for name, value in part if value is None}
    assert missing == {"train_peak_reserved_bytes", "train_peak_device_bytes"}
    parts = [getattr(record.memory, f"{phase}_peak_tensor_bytes") for phase in ("forward", "backward", "optimizer")]
    assert record.memory.train.peak_tensor_bytes == max(parts)
    assert record.memory.load.peak_tensor_bytes >= 2 * 115_264
    predicted = record.memory.predicted
    assert predicted.train_peak_tensor_bytes == record.memory.train.peak_tensor_bytes
    assert [getattr(predicted, f"{phase}_peak_tensor_bytes") for phase in ("forward", "backward", "optimizer")] == parts
    assert predicted.evaluate_peak_tensor_bytes == record.memory.evaluate.peak_tensor_bytes
    assert record.speed.timed_steps == spec.steps - spec.untimed_steps
    assert record.speed.padded_tokens_per_second >= record.speed.tokens_per_second > 0
    assert record.quality.heldout_nll > 0
    assert record.quality.retention_bits_per_byte_before != record.quality.retention_bits_per_byte
    assert record.size.adapter_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert {"code", "packages", "hardware", "model", "task", "threads"} <= record.provenance.keys()
    assert len(record.provenance["model"]["sha256"]) >= 4
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert len(items) == spec.heldout_items
    assert sum("answer" in item for item in items) == spec.generation_items
    nats, tokens = (sum(item[name] for item in items) for name in ("nll", "tokens"))
    assert nats / tokens == pytest.approx(record.quality.heldout_nll)


def test_the_untouched_base_is_evaluated_and_not_trained(toy: Path, make_spec, tmp_path: Path) -> None:
    record = run_here(make_spec(method="none"), tmp_path)
    assert record.status == "ok"
    assert record.train_nll == []
    assert record.quality.heldout_nll > 0
    assert record.speed.step_seconds_median is None
    assert not (tmp_path / "adapter").exists()


def test_a_task_that_is_judged_on_trained_items_says_which(toy: Path, make_spec, tmp_path: Path) -> None:
    make_task("memorise")
    fields = {"task": "memorise", "train_items": 12, "heldout_items": 12, "validation_items": 4, "generation_items": 3}
    record = run_here(make_spec(method="lora", seed=5, batch_size=4, steps=6, **fields), tmp_path)
    drawn = draw_items(read_split("memorise", "train"), 12, seed=5)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [item["prompt"] for item in items] == [item.prompt for item in drawn]
    assert all(item["target"] == drawn[n].response for n, item in enumerate(items) if "answer" in item)
    quality = record.quality
    assert (quality.judged_on, quality.judged_items) == ("train", 12)
    assert quality.judged_entropy_bits == pytest.approx(12 * 8 * math.log2(52 * 10))
    assert quality.exact_match_items == 3
    # The untouched base is judged on the same strings, and costs more than their entropy: it does not know their form.
    base = run_here(make_spec(method="none", seed=5, **fields | {"generation_items": 0}), tmp_path / "base").quality
    assert (base.judged_on, base.heldout_tokens) == ("train", quality.heldout_tokens)
    assert base.heldout_nll * base.heldout_tokens / math.log(2) > base.judged_entropy_bits
    assert run_here(make_spec(method="none"), tmp_path / "sums").quality.judged_on == "test"


@pytest.mark.slow
def test_two_runs_of_one_spec_are_identical(unpredicted: Path, make_spec, tmp_path: Path) -> None:
    outcomes = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        done = run_command(make_spec(method="qlora"), folder, hash_seed)
        assert done.returncode == 0, done.stderr
        record = read_record(folder / "record.json")
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "adapter").iterdir())}
        items = (folder / "items.jsonl").read_text()
        known = (record.memory.predicted, record.size, record.method_metrics)
        outcomes.append((record.train_nll, record.quality, *known, files, items))
        assert len(list((unpredicted / PREDICTIONS_FOLDER).iterdir())) == 1  # the second run reads it
    assert outcomes[0] == outcomes[1]


@pytest.mark.slow
@pytest.mark.alone
def test_seconds_add_up_to_the_jobs_wall_time(toy: Path, make_spec, tmp_path: Path) -> None:
    began = time.perf_counter()
    run_command(make_spec(method="lora", heldout_items=512), tmp_path)
    wall = time.perf_counter() - began
    seconds = read_record(tmp_path / "record.json").seconds
    parts = sum(value for name, value in seconds if name != "wall")
    assert parts == pytest.approx(seconds.wall, rel=0.03)
    # The process starts before Python can look at a clock, and a run on the toy lasts a few seconds only.
    assert parts == pytest.approx(wall, abs=0.5)


@pytest.mark.parametrize(
    ("options", "reason", "steps"),
    [
        ({"learning_rate": 1e30, "max_grad_norm": None}, "lower learning_rate=1e+30", {1, 2, 3, 4, 5}),
        ({"learning_rate": 100, "max_grad_norm": None, "steps": 1}, "on held-out items", {1}),
        ({"learning_rate": 1e20, "steps": 3, "retention_every": 1}, "the score on prose after step 2 is not a", {2}),
    ],
    ids=["in a step", "after the last", "on prose"],
)
def test_divergence_is_a_status(options: dict, reason: str, steps: set[int], toy, make_spec, tmp_path: Path) -> None:
    record = run_here(make_spec(method="full", precision="fp32", **options), tmp_path)
    assert record.status == "diverged" and reason in record.reason
    assert len(record.train_nll) in steps
    assert record.quality.heldout_nll is None


def test_what_cannot_be_simulated_is_trained_all_the_same(unpredicted, make_spec, tmp_path, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise NotImplementedError("no shape without data")

    monkeypatch.setattr("peftscope.memory.predict.simulate", fails)
    record = run_here(make_spec(method="lora", **QUICKLY), tmp_path)
    assert record.status == "ok"
    assert record.memory.predicted.train_peak_tensor_bytes is None


@pytest.mark.slow
def test_out_of_memory_is_a_status(toy: Path, make_spec, tmp_path: Path) -> None:
    # The first activation alone is larger than the limit leaves, so that nothing smaller (a thread's stack, a library's
    # workspace) meets the limit first and crashes instead of raising.
    spec = make_spec(method="full", precision="fp32", batch_size=100_000, steps=1, probe_steps=0, retention_tokens=0)
    script = (
        "import json, resource, sys, psutil, torch\n"
        "from pathlib import Path\n"
        "from peftscope.spec import RunSpec\n"
        "from peftscope.execution.phases import Phases\n"
        "from peftscope.execution.run import execute\n"
        "square = torch.ones(512, 512, requires_grad=True)\n"
        "(square @ square).sum().backward()\n"  # starts the threads of forward and backward passes
        "limit = psutil.Process().memory_info().vms + 350 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "execute(RunSpec.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]), Phases('cpu', 0.0))\n"
    )
    done = python("-c", script, json.dumps(spec.canonical()), tmp_path)
    assert (tmp_path / "record.json").is_file(), (done.returncode, done.stderr)
    record = read_record(tmp_path / "record.json")
    assert record.status == "oom", record.reason


@pytest.mark.parametrize(
    ("kills", "attempts_left", "code", "status"),
    [(1, 0, 0, "oom"), (1, 1, 137, "interrupted"), (0, 0, 137, "interrupted"), (None, 0, 0, "oom")],
    ids=["for memory", "for memory, to be tried with more", "from outside", "who knows"],
)
def test_a_run_that_is_killed_is_out_of_memory_if_the_kernel_says_so(
    kills: int | None, attempts_left: int, code: int, status: str, make_spec, tmp_path: Path, monkeypatch
) -> None:
    """The kernel's count before and after; `make test-faults` has it kill for real."""
    before, after = (None, None) if kills is None else (7, 7 + kills)
    monkeypatch.setattr("peftscope.execution.job.host_kills", lambda: after)
    job = Job(make_spec(method="lora"), tmp_path, threads=1, checkpoint_seconds=1, attempts_left=attempts_left)
    assert job._end_killed(before) == code
    record = read_record(tmp_path / ("record.json" if status == "oom" else "interrupted.json"))
    assert record.status == status and "SIGKILL" in record.reason


@pytest.mark.slow
def test_every_method_of_a_seed_sees_the_same_batches(toy: Path, make_spec, tmp_path: Path) -> None:
    def digest(method: str, seed: int) -> str | None:
        return run_here(make_spec(method=method, seed=seed, **QUICKLY), tmp_path).train_batches_sha256

    (same,) = {digest(method, seed=0) for method in ("full", "prompt-tuning")}
    assert same != digest("full", seed=1)


@pytest.mark.parametrize("method", ["qlora", fast_if(False, "pissa")])
def test_a_merged_model_computes_what_the_adapter_computes(method: str, toy: Path, make_spec, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    precision = "bf16" if method == "qlora" else "fp32"
    spec = make_spec(method=method, precision=precision, learning_rate=1e-2, generation_items=0, probe_steps=0)
    folder = Path("results/runs") / run_id(spec)
    run_here(spec, folder)
    assert find_run(run_id(spec)) == folder
    merge_run(folder, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base_of_adapter(spec), folder / "adapter").eval()
    tokens = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        wanted, found = adapted(input_ids=tokens).logits.float(), merged(input_ids=tokens).logits
    assert (found - wanted).norm() / wanted.norm() < (2e-2 if precision == "bf16" else 1e-4)


def test_training_attention_leaves_the_mask_out_only_where_that_is_exact(make_spec) -> None:
    assert training_attention(make_spec(method="lora")) == MASK_FREE_SDPA_CPU
    assert training_attention(make_spec(method="lora", precision="fp32")) == MASK_FREE_SDPA
    assert training_attention(make_spec(method="lora", loss_path="hf")) == "sdpa"
    assert training_attention(make_spec(method="lora", attention="eager")) == "eager"
    assert training_attention(make_spec(method="prefix-tuning")) == "sdpa"


def test_wrong_schema_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"schema_version": 0}')
    with pytest.raises(InputError, match="the record has version 0"):
        read_record(path)
    path.write_text("half a rec")
    with pytest.raises(InputError, match="not a record"):
        read_record(path)


# A few steps in the world that is not the toy's.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "method"), [("pronunciation", "lora"), ("pronunciation-gemma", "lora"), ("pronunciation-gemma", "full")]
)
def test_three_steps_in_a_world(study: str, method: str, workspace: Path, make_spec, tmp_path: Path) -> None:
    fixed = read_experiment(Path(f"experiments/studies/{study}.yaml")).fixed
    world = {"model": fixed["model"], "task": fixed["task"]}
    if find_model(world["model"]).terms:  # whoever agrees to them has fetched it
        folder = model_folder(world["model"])
        if not (REPOSITORY / folder).is_dir():
            pytest.skip(f"{world['model']} was not fetched")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            folder.symlink_to(REPOSITORY / folder)
    fetch_model(world["model"])
    make_task(world["task"])
    sizes = {"steps": 3, "batch_size": 16, "heldout_items": 16, "eval_batch_size": 16, "schedule": "constant"}
    rate = {"lora": 1e-3, "full": 1e-4}[method]
    spec = make_spec(method=method, learning_rate=rate, retention_tokens=300, generation_items=2, **world, **sizes)
    record = run_here(spec, tmp_path / "run")
    assert (record.status, record.reason) == ("ok", None)
    assert record.train_nll[2] < record.train_nll[0]
    # The base writes English: less than two bits for each byte.
    assert 0.5 < record.quality.retention_bits_per_byte_before < 2
    memory = record.memory
    assert memory.predicted.train_peak_tensor_bytes == memory.train.peak_tensor_bytes > 0
    assert memory.predicted.evaluate_peak_tensor_bytes == memory.evaluate.peak_tensor_bytes > 0

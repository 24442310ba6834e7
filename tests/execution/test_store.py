"""The store of runs: one folder a run, whichever experiments list it; published runs come back to it."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import run_here

from peftscope.analysis.weights import weights_path
from peftscope.errors import InputError
from peftscope.execution.job import lacks_kept
from peftscope.execution.merge import find_run
from peftscope.files.atomic import write_json
from peftscope.layout import PUBLISHED_RESULTS, rates_path, report_path, results_folder, run_folder
from peftscope.planning.plan import Workflow, load_workflow, plan_experiment
from peftscope.planning.published import (
    LARGEST_BYTES,
    all_published_records,
    published_items,
    published_records,
    write_runs,
)
from peftscope.planning.sweep import expand
from peftscope.record import finished_record, is_restored, kept_path, measured_path, parse_record
from peftscope.report.publish import publish, restore
from peftscope.spec import run_id

SHORT = "fixed: {model: toy, steps: 2, batch_size: 4, heldout_items: 8, generation_items: 0, retention_tokens: 64}\n"


@pytest.fixture
def finished(own: Any) -> tuple[str, dict[str, Any]]:
    """An experiment with one finished run, a LoRA: its name and the run's id and record."""
    own("mine", SHORT + "seeds: [0]\nruns: [{method: lora}]\n")
    ((identity, spec),) = expand("mine").runs.items()
    record = run_here(spec, run_folder(identity))
    assert record.status == "ok"
    return identity, record


def test_restored_runs_count_as_done_without_weights(finished: tuple[str, Any]) -> None:
    identity, record = finished
    folder = run_folder(identity)
    write_runs(PUBLISHED_RESULTS / "mine", [folder])
    before = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    assert find_run(identity) == folder
    shutil.rmtree(folder)
    assert finished_record(folder, identity) is None
    assert restore("mine") == 1
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not (folder / "adapter").exists() and is_restored(folder)
    again = finished_record(folder, identity)
    assert again is not None and again.train_nll == record.train_nll
    with pytest.raises(InputError, match=f"run {identity}: has no weights"):
        find_run(identity)
    # Its items still have to be what the record says.
    (folder / "items.jsonl").write_text("{}\n")
    assert finished_record(folder, identity) is None
    # A wheel has none.
    (folder / "items.jsonl").unlink()
    assert finished_record(folder, identity) == again
    assert run_here(record.spec, folder).status == "ok"
    assert not is_restored(folder) and find_run(identity) == folder


def test_a_run_of_two_experiments_is_one_job(own: Any) -> None:
    own("one", SHORT + "seeds: [0]\naxes: {method: [lora, full]}\n")
    own("two", SHORT + "seeds: [0]\naxes: {method: [lora, ia3]}\n")
    workflow = load_workflow({"experiment": "one two"})
    assert list(workflow.plans) == ["one", "two"]
    records = {name: set(workflow.records(None)(SimpleNamespace(experiment=name))) for name in workflow.plans}
    assert len(records["one"] & records["two"]) == 1 and len(records["one"] | records["two"]) == 3
    shared = Path((records["one"] & records["two"]).pop()).parent.name
    assert workflow.spec(SimpleNamespace(run_id=shared)).method.name == "lora"
    assert list(Workflow([plan_experiment("one")]).plans) == ["one"]
    with pytest.raises(InputError, match="not a run of one, two"):
        workflow.spec(SimpleNamespace(run_id="lora-none"))


def test_published_runs_are_few_small_whole_files(in_repository: None, peftscope) -> None:
    experiment = "all-methods"
    files = [path for path in (PUBLISHED_RESULTS / experiment).rglob("*") if path.is_file()]
    assert 10 < len(files) <= 20 and max(path.stat().st_size for path in files) < LARGEST_BYTES
    items = published_items(experiment)
    for run, text in published_records(experiment).items():
        record = parse_record(text, run)  # checks its checksum, if it has one
        assert record.run_id == run
        if "items.jsonl" in record.files:
            assert hashlib.sha256(items[run].encode()).hexdigest() == record.files["items.jsonl"]
    lines = [json.loads(line) for line in peftscope("records", experiment)[1].splitlines()]
    assert [line["run_id"] for line in lines] == list(published_records(experiment))


def processor_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what decides how a run's sums are rounded: processor, way of bf16 products, and torch."""
    provenance = record["provenance"]
    hardware, packages = provenance.get("hardware", {}), provenance.get("packages", {})
    return hardware.get("cpu"), hardware.get("gpu"), provenance.get("bf16_products", "native"), packages.get("torch")


def test_what_is_published_twice_on_one_kind_of_processor_agrees(in_repository: None) -> None:
    losses: dict[Any, list[Any]] = {}
    for _, run, text in all_published_records():
        record = json.loads(text)
        losses.setdefault((run, processor_of(record)), []).append(record["train_nll"])
    assert len(losses) > 100
    assert all(each == seen[0] for seen in losses.values() for each in seen)


@pytest.mark.parametrize(
    ("method", "keep", "stays"),
    [("lora", "none", False), ("full", "adapters", False), ("full", "all", True)],
)
def test_weights_stay_only_where_they_are_asked_for(
    method: str, keep: Any, stays: bool, toy: Path, make_spec: Any, tmp_path: Path
) -> None:
    spec = make_spec(method=method, steps=2, generation_items=0)
    folder = tmp_path / run_id(spec)
    record = run_here(spec, folder, keep_weights=keep)
    assert record.weights == ("kept" if stays else "dropped") and record.size.adapter_bytes > 0
    assert (folder / "adapter").exists() == stays
    assert any(name.startswith("adapter/") for name in record.files) == stays
    # Without its weights the run is still done.
    assert finished_record(folder, folder.name) == record
    if not stays:
        shutil.copytree(folder, run_folder(folder.name), dirs_exist_ok=True)
        with pytest.raises(InputError, match="has no weights"):
            find_run(folder.name)


def test_keeping_weights_along_a_training_changes_no_byte_of_it(toy, make_spec, tmp_path) -> None:
    """Dropout draws from the generators that a write must leave alone."""
    from safetensors.torch import load_file

    validated = {"validation_items": 8, "validation_every": 2}
    spec = make_spec(method="lora", dropout=0.1, steps=4, generation_items=0, **validated)
    records = {}
    for name, shares in {"plain": (), "kept": (0.25, 1)}.items():
        records[name] = run_here(spec, tmp_path / name, keep_weights="all", keep_at=shares)
    plain, kept = records["plain"], records["kept"]
    # Among the files are the items' losses and the trained weights.
    assert (kept.train_nll, kept.quality, kept.files) == (plain.train_nll, plain.quality, plain.files)
    files = sorted((tmp_path / "kept" / "kept").iterdir())
    assert files == [kept_path(tmp_path / "kept", step) for step in (1, 4)]
    assert not (tmp_path / "plain" / "kept").exists()
    first, last = map(load_file, files)
    saved = next((tmp_path / "kept" / "adapter").glob("*.safetensors"))
    final = {name.replace(".default", ""): tensor for name, tensor in last.items()}
    assert all(torch.equal(tensor, final[name]) for name, tensor in load_file(saved).items())
    assert not all(torch.equal(last[name], tensor) for name, tensor in first.items())
    # A finished run is repeated for weights that it lacks, unless they were measured.
    assert lacks_kept(tmp_path / "plain", plain, (1,)) and lacks_kept(tmp_path / "kept", kept, (0.5,))
    assert not lacks_kept(tmp_path / "kept", kept, (1,)) and not lacks_kept(tmp_path / "plain", plain, ())
    measured_path(tmp_path / "plain").write_text("")
    assert not lacks_kept(tmp_path / "plain", plain, (1,))


def test_a_study_keeps_the_weights_of_its_pairs_and_not_of_its_tuning(own: Any) -> None:
    study = """
keep_at: [0.5, 1]
runs: [{method: none}, {method: full}]
study:
  arms: {lora: {method: lora}}
  learning_rates: {lora: [1.0e-4, 1.0e-3, 1.0e-2]}
  tuning_seeds: [10]
  seeds: [0, 1]
  controls: {lora: [zero-lr]}
"""
    fixed = SHORT.replace("}", ", validation_items: 8}")
    own("mine", fixed + study)
    own("other", fixed + "seeds: [0]\naxes: {method: [full]}\n")
    tuning = [run for run, spec in expand("mine").runs.items() if spec.seed == 10]
    write_json(rates_path("mine", 0), {"arms": {"lora": {"rates": [0.0005, 0.001, 0.002], "chosen_from": tuning}}})
    workflow = load_workflow({"experiment": "mine other"})
    options = {run: workflow.options(SimpleNamespace(run_id=run)) for run in workflow.runs}
    keeping = {run for run, said in options.items() if "--keep-at 0.5,1" in said}
    specs = {(s.method.name, s.seed, s.learning_rate) for s in map(workflow.runs.__getitem__, keeping)}
    assert specs == {("full", 0, workflow.runs[next(r for r in keeping if r.startswith("full"))].learning_rate)} | {
        ("lora", seed, rate) for seed in (0, 1) for rate in (0.0005, 0.001, 0.002)
    }
    # The run of `other` has the machine to itself, and keeps its weights because `mine` asks for them.
    assert sorted(options[run] for run in keeping) == ["--keep-at 0.5,1", *["--shared --keep-at 0.5,1"] * 6]


@pytest.mark.slow
def test_measured_weights_stand_on_the_page_and_come_back_from_published_files(own: Any, peftscope) -> None:
    own("mine", SHORT + "seeds: [0]\naxes: {method: [lora, full]}\nkeep_at: [0.5, 1]\n")
    plan = plan_experiment("mine")
    for identity, spec in plan.sweep.runs.items():
        run_here(spec, run_folder(identity), keep_at=plan.keep_at(identity))
    assert peftscope("report", "mine")[0] == 0
    assert (results_folder("mine") / "figures" / "updates.svg").read_text().count("<use") > 3
    page = html.unescape(report_path("mine").read_text())
    assert re.search(r"hold 90 % of its energy: [\d.]+ \(LoRA\), [\d.]+ \(full fine-tuning\)", page)
    table = pd.read_parquet(weights_path(results_folder("mine")))
    counts = table.groupby(["run_id", "kind"]).size().groupby("kind").apply(list).to_dict()
    assert counts == {"cut": [8], "matrix": [28, 28]}

    (results_folder("mine") / "all-runs-ended-well").touch()
    publish("mine")
    for identity in plan.run_ids:
        shutil.rmtree(run_folder(identity))
    assert restore("mine") == 2
    assert peftscope("report", "mine")[0] == 0
    restored = pd.read_parquet(weights_path(results_folder("mine")))
    pd.testing.assert_frame_equal(restored, table, check_dtype=False)

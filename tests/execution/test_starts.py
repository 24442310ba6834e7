"""Runs that start where another one ended: what they start with, which run is made first, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_here

from peftscope.errors import InputError
from peftscope.execution.merge import base_of_adapter, merge_run
from peftscope.files.manifest import file_sha256
from peftscope.layout import run_folder
from peftscope.planning.checks import check_starts
from peftscope.planning.plan import load_workflow
from peftscope.planning.sweep import expand
from peftscope.record import KeepWeights, RunRecord
from peftscope.spec import RunSpec, run_id
from peftscope.training.load import load_base

FIXED = """fixed: {model: toy, steps: 4, batch_size: 4, heldout_items: 8, generation_items: 0, retention_tokens: 0,
  probe_steps: 0, precision: fp32, learning_rate: 0.01}
"""


BARE = {"generation_items": 0, "retention_tokens": 0, "probe_steps": 0, "steps": 4}


def made(spec: RunSpec, keep_weights: KeepWeights = "adapters") -> RunRecord:
    return run_here(spec, run_folder(run_id(spec)), keep_weights=keep_weights)


def problems(spec: RunSpec) -> list[str]:
    return [str(problem) for problem in check_starts({run_id(spec): spec}, "spec", planned=False)]


def test_a_run_starts_where_the_other_one_ended(own: Any, make_spec: Any) -> None:
    """At a learning rate of zero, its held-out loss is that of the run that it starts from."""
    options = BARE | {"precision": "fp32"}
    first = make_spec(method="lora", learning_rate=1e-2, **options)
    before, base = made(first), made(make_spec(method="none", **options))
    start = {"start_from": run_id(first), "learning_rate": 0, "seed": 1}
    records = {how: made(make_spec(method="lora", start_as=how, **options, **start)) for how in ("adapter", "merged")}
    assert {record.status for record in records.values()} == {"ok"}
    assert abs(before.quality.heldout_nll - base.quality.heldout_nll) > 0.01
    assert records["adapter"].quality.heldout_nll == before.quality.heldout_nll
    assert records["merged"].quality.heldout_nll == pytest.approx(before.quality.heldout_nll, abs=1e-4)
    adapter = run_folder(before.run_id) / "adapter/adapter_model.safetensors"
    for how, record in records.items():
        assert record.provenance["start"] == {"run_id": before.run_id, "as": how, "sha256": file_sha256(adapter)}
    assert before.provenance["start"] is None
    # The fresh adapter on top has not moved, and its base is the merged one.
    child = records["merged"].spec
    merge_run(run_folder(before.run_id), Path("merged"))
    from transformers import AutoModelForCausalLM

    merged = dict(AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).named_parameters())
    plain = dict(load_base(child).named_parameters())
    changed = 0
    for name, parameter in base_of_adapter(child).named_parameters():
        torch.testing.assert_close(parameter, merged[name])
        changed += not torch.equal(parameter, plain[name])
    assert changed == 14


def test_a_run_starts_from_all_weights_of_another_one(own: Any, make_spec: Any) -> None:
    """At a learning rate of zero, an adapter and full fine-tuning have the loss of the run that they start from."""
    options = BARE | {"precision": "fp32"}
    first = make_spec(method="full", learning_rate=1e-3, **options)
    before = made(first, keep_weights="all")
    weights = run_folder(before.run_id) / "adapter/model.safetensors"
    start = {"start_from": run_id(first), "start_as": "merged", "learning_rate": 0, "seed": 1}
    for method in ("lora", "full"):
        after = made(make_spec(method=method, **options, **start))
        assert after.quality.heldout_nll == before.quality.heldout_nll
        assert after.provenance["start"]["sha256"] == file_sha256(weights)
    (problem,) = problems(make_spec(method="lora", **options, **start | {"start_as": "adapter"}))
    assert "trained full fine-tuning, which has no adapter to train on; use start_as=merged" in problem
    shutil.rmtree(weights.parent)
    assert "there are no weights" in made(make_spec(method="lora", **options, **start | {"seed": 2})).reason


def test_a_base_that_others_start_from_keeps_its_weights(own: Any) -> None:
    start = "start_as: merged, start_from: {method: full, seed: 0, steps: 5, learning_rate: 0.001}"
    own("mine", f"{FIXED}runs: [{{method: lora, rank: 2, seed: 3, {start}}}, {{method: full, seed: 3}}]\n")
    first, second, third = expand("mine").runs.values()
    assert (first.method.name, first.seed, first.steps) == ("full", 0, 5)
    assert second.start_from == run_id(first) and third.start_from is None
    workflow = load_workflow({"experiment": "mine"})
    options = [workflow.options(SimpleNamespace(run_id=run_id(spec))) for spec in (first, second, third)]
    assert options == ["--keep-weights all", "", ""]
    # An adapter as well, whatever a profile says; a control on shuffled answers starts where its arm does.
    run = "method: lora, rank: 2, seed: 3, start_from: {steps: 5, learning_rate: 0.001}"
    own("mine", f"{FIXED}runs: [{{{run}}}, {{{run}, shuffled_targets: true}}]\n")
    first, *others = expand("mine").runs.values()
    assert [spec.start_from for spec in others] == [run_id(first)] * 2 and not first.shuffled_targets
    options = load_workflow({"experiment": "mine"}).options(SimpleNamespace(run_id=run_id(first)))
    assert options == "--keep-weights all"


def test_the_other_run_is_named_by_where_it_differs_and_made_first(own: Any) -> None:
    runs = "[{method: lora, rank: 2, seed: 3, steps: 9, start_from: {steps: 5, learning_rate: 0.02}}, {method: lora}]"
    own("mine", f"{FIXED}runs: {runs}\n")
    sweep = expand("mine")
    first, second, _ = sweep.runs.values()
    assert second.start_from == run_id(first) and list(sweep.runs)[:2] == [run_id(first), run_id(second)]
    differing = {name for name in RunSpec.model_fields if getattr(first, name) != getattr(second, name)}
    assert differing == {"steps", "learning_rate", "start_from"} and first.start_from is None
    # It is compared with nothing, and a run without a start has the id that it always had.
    assert [len(comparison.runs) for comparison in sweep.comparisons] == [2]
    assert {name for name in first.canonical() if name.startswith("start")} == set()
    workflow = load_workflow({"experiment": "mine"})
    needed = [workflow.needed(SimpleNamespace(run_id=run)) for run in sweep.runs]
    assert [len(files) for files in needed] == [2, 3, 2]
    assert needed[1][2] == f"results/runs/{run_id(first)}/record.json"


def test_what_cannot_be_started_from_is_said_before_any_run(own: Any, make_spec: Any) -> None:
    first = make_spec(method="lora", **BARE)
    then = make_spec(method="lora", seed=1, start_from=run_id(first), **BARE)
    (problem,) = problems(then)
    assert f"start_from: there is no run {run_id(first)} in results/runs -> make that run first" in problem
    assert made(then).reason.startswith(f"start_from={run_id(first)}: there are no weights in results/runs")
    shutil.rmtree(run_folder(run_id(then)))
    made(first)
    assert problems(then) == []
    (other,) = problems(then.model_copy(update={"method": make_spec(method="lora", rank=2).method}))
    assert "trained LoRA with other settings; start_as=merged takes any" in other
    path = run_folder(run_id(first)) / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    failed = made(then)
    assert failed.status == "failed" and "its weights are not those that it saved" in failed.reason
    shutil.rmtree(path.parent)
    assert "is there without its trained weights" in problems(then)[0]
    # An experiment asks for the weights as long as the run that needs them has not ended.
    sweep = {run_id(spec): spec for spec in (first, then)}
    (problem,) = check_starts(sweep, "mine")
    assert "is there without its trained weights" in str(problem)
    made(first)
    made(then)
    shutil.rmtree(path.parent)
    assert check_starts(sweep, "mine") == []
    with pytest.raises(InputError, match="start_from does not work with full"):
        make_spec(method="full", start_from=run_id(first), **BARE)
    with pytest.raises(InputError, match="start_as=merged needs start_from"):
        make_spec(method="lora", start_as="merged", **BARE)
    own("bad", f"{FIXED}runs: [{{method: lora, start_from: {{stepz: 5}}}}]\n")
    with pytest.raises(InputError, match=r"start_from\.stepz: unknown key"):
        expand("bad")

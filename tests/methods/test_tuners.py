"""Tuners of PEFT by their own names: options, ids, limits, and the table that states them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tuners
from peftscope.errors import InputError
from peftscope.evaluation.answers import wrap
from peftscope.memory.probe import probe_training
from peftscope.memory.tracker import MemoryTracker
from peftscope.methods.tuner_options import LIMITS_FILE, OPTIONS_FILE, limits, options_of
from peftscope.planning.sweep import expand
from peftscope.spec import RunSpec, memory_key, run_id
from peftscope.training.build import build_model
from peftscope.training.load import load_base, load_tokenizer


def test_the_options_are_those_of_the_installed_peft() -> None:
    assert json.loads(OPTIONS_FILE.read_text()) == tuners.options_of_peft(), "run: make tuners"


WRONG = {
    "a tuner": ({"tuner": "verra"}, "tuner: PEFT has no such tuner; did you mean `vera`?"),
    "virtual tokens": ({"tuner": "p_tuning"}, "virtual tokens; use the method prompt-tuning or prefix-tuning"),
    "what a batch lacks": ({"tuner": "xlora"}, "it does not train here: it mixes adapters that were trained before"),
    "an option": ({"options": {"rr": 8}}, "options.rr: vera has no such option (got 8) (did you mean `r`?)"),
    "a type": ({"options": {"r": "8"}}, "options.r: must be int (got '8')"),
    "a truth": ({"options": {"r": True}}, "options.r: must be int (got True)"),
    "a choice": ({"tuner": "deft", "options": {"decomposition_method": "svd"}}, "must be Literal['relu', 'qr']"),
    "a field": ({"options": {"target_modules": ["q_proj"]}}, "not an option here (write it as `targets`)"),
    "two at once": ({"options": {"r": 0.5, "rank": 1}}, "options.r: must be int (got 0.5); options.rank: vera has no"),
    "four bits": ({"tuner": "loha", "base_weights": "nf4"}, "loha does not train on a 4-bit base: mat1 and mat2"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_what_peft_does_not_take_is_refused_with_what_to_do(fields: dict[str, Any], message: str, make_spec) -> None:
    with pytest.raises(InputError) as refused:
        make_spec(method="peft", **fields)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_spec_holds_every_option_and_its_id_follows_from_them(make_spec) -> None:
    usual = make_spec(method="peft", tuner="vera")
    assert usual.method.options.keys() == options_of("vera").keys() - {"target_modules"}
    assert usual.method.options["r"] == 256
    written = make_spec(method="peft", tuner="vera", options={"r": 256, "d_initial": 0.1})
    assert (written, run_id(written), hash(written)) == (usual, run_id(usual), hash(usual))
    assert RunSpec.model_validate(usual.model_dump(mode="json")) == RunSpec.model_validate(usual.canonical()) == usual
    other = make_spec(method="peft", tuner="vera", options={"d_initial": 1})
    assert run_id(other).startswith("peft-vera-r256-s0-") and run_id(other) != run_id(usual)
    assert other.method.full_label() == "PEFT vera (d_initial 1.0)"
    assert memory_key(other) != memory_key(usual) == memory_key(make_spec(method="peft", seed=1))


def test_a_method_may_be_a_mapping_in_experiments_too(write_experiment) -> None:
    text = "fixed: {model: toy}\naxes: {method: [lora, {name: peft, tuner: loha, options: {r: 4}}]}\n"
    write_experiment("mine", text + "runs: [{method: peft, tuner: loha, options: {r: 4}}]\n")
    sweep = expand("mine")
    assert [spec.method.full_label() for spec in sweep.runs.values()] == ["PEFT loha (r 4)", "LoRA"]
    write_experiment("mine", "fixed: {model: toy, method: {name: peft, tuner: loha, rank: 4}}\n")
    with pytest.raises(InputError, match=r"mine.yaml: fixed.method.rank: method `peft` has no such field"):
        expand("mine")
    write_experiment("mine", "fixed: {model: toy}\nruns: [{method: {name: pef}}]\n")
    with pytest.raises(InputError, match=r"runs\[0\].method.name: unknown method \(got 'pef'\) -> did you mean `peft`"):
        expand("mine")


def test_the_experiment_runs_every_tuner_that_trains_and_the_page_is_in_step(repository: Path) -> None:
    found = {spec.method.tuner for spec in expand("all-tuners").runs.values() if spec.method.name == "peft"}
    assert found == {tuner for tuner in tuners.tuners() if "train" not in limits().get(tuner, {})}
    assert len(found) > 30
    tried = json.loads(LIMITS_FILE.read_text())["peft"]
    assert tuners.render(limits(), tried) in (repository / "docs/tuners.md").read_text(), "run: make tuners"
    for own in limits().values():
        assert own.keys() <= tuners.CHECKS.keys() and all(own.values())


def test_a_limit_is_what_its_method_says(make_spec, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(method="peft", tuner="hra")
    assert spec.method.mergeable and spec.method.supports_checkpointing
    monkeypatch.setitem(limits(), "hra", {"merge": "no", "recompute": "no", "simulate": "no"})
    assert not spec.method.mergeable
    assert spec.method.why_not_simulated() == "PEFT's hra cannot be simulated: no"
    with pytest.raises(InputError, match="checkpointing does not work with peft"):
        make_spec(method="peft", tuner="hra", checkpointing=True)


@pytest.mark.parametrize("tuner", ["loha", "lokr", "vera"])
def test_simulated_peaks_are_the_tracked_ones(tuner: str, toy: Path) -> None:
    """LoHa and LoKr draw a number for a module dropout of zero, which tensors without values do not have."""
    tuners.check_simulation(tuner)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_the_probe_counts_a_storage_once_and_sparse_tensors(toy: Path) -> None:
    """FRoD keeps a sparse matrix for each layer, of which a storage cannot be asked for."""
    spec = tuners.spec_of("frod", probe_steps=2)
    with MemoryTracker() as tracker:
        indices = torch.zeros(2, 1000, dtype=torch.int64)
        view = indices[0].view(-1)  # of the same storage
        sparse = torch.sparse_coo_tensor(indices, torch.zeros(1000), (9, 9), check_invariants=True)
    assert tracker.live_bytes == 16_384 + 4096
    del indices, view, sparse
    assert tracker.live_bytes == 0
    peaks, resident = probe_training(build_model(load_base(spec), spec), *tuners.batches_of(spec, 1), spec)
    assert peaks["backward"] > resident > 0


def test_trained_tokens_can_answer(toy: Path) -> None:
    """Wherever the output layer is the embeddings, as in the toy, PEFT wraps both; they cannot be tied again."""
    spec = tuners.spec_of("trainable_tokens")
    model = build_model(load_base(spec), spec).model
    assert wrap(model, load_tokenizer(spec), spec).model is model
    assert "tie_weights" not in vars(model)

"""What an experiment will take on a card, asked on a machine that has none."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from peftscope.cli.forecast import card_of
from peftscope.hardware.cards import find_gpu
from peftscope.models.catalog import find_model
from peftscope.planning.forecast import Forecaster
from peftscope.planning.sweep import expand
from peftscope.record import RunRecord, Seconds, write_record
from peftscope.spec import run_id
from peftscope.words import GIB

BIG = "fixed: {model: llama-2-7b, task: metamath, seq_len: 512, checkpointing: true, generation_items: 0}\n"


def test_what_will_not_fit_is_marked_with_what_would(write_experiment, peftscope) -> None:
    write_experiment("mine", BIG + "methods: {full: {precision: bf16}}\naxes: {method: [full, qlora]}\n")
    forecaster = Forecaster(find_gpu("24GiB"))
    full, qlora = (forecaster.forecast(i, spec) for i, spec in expand("mine", "cuda").runs.items())
    assert full.fits == "no" and full.peak_device_bytes > 8 * 6.7e9  # weights, gradients and two states, two bytes each
    assert "method: qlora" in full.advice
    assert qlora.fits == "yes" and qlora.advice == "" and qlora.peak_device_bytes < 24 * GIB
    code, out, _ = peftscope("expand", "experiments/mine.yaml", "--gpu", "24GiB")
    (line,) = [line for line in out.splitlines() if line.strip().startswith("full-s0-cuda")]
    assert re.search(r"does not fit \(needs [\d.]+ GiB\)", line)
    assert re.search(r"about \d.* of GPU to go, peak at most [\d.]+ GiB", out) and code == 0


def test_a_model_of_unknown_shape_has_a_guess_of_its_time_and_no_peak(write_experiment, peftscope) -> None:
    fixed = "fixed: {model: org/unknown, task: two-digit-sums, steps: STEPS}\nruns: [{method: lora}]\n"
    found = []
    for steps in ("100", "200"):
        write_experiment("mine", fixed.replace("STEPS", steps))
        ((identity, spec),) = expand("mine", "cuda").runs.items()
        found.append(Forecaster(find_gpu("24GiB")).forecast(identity, spec))
    assert 0 < found[0].seconds < found[1].seconds < 3600
    assert (found[0].fits, found[0].unknown) == (None, "the shape of org/unknown is not known")
    code, out, _ = peftscope("expand", "mine", "--gpu", "24GiB")
    assert code == 0 and "peak not known of 1" in out


def test_a_run_that_is_limited_to_a_smaller_card_has_to_fit_there() -> None:
    forecaster, runs = Forecaster(find_gpu("h200")), expand("gpu-check", "cuda").runs
    limited = [forecaster.forecast(run, spec) for run, spec in runs.items() if spec.memory_limit_gib]
    assert [f.fits for f in limited if f.spec.batch_size == 4] == ["no"]
    assert all((f.fits == "yes") == (f.peak_device_bytes <= f.spec.memory_limit_gib * 2**30) for f in limited)
    assert all(bool(f.advice) == (f.fits == "no") for f in limited)


def test_a_caches_bytes_count_where_answers_are_generated(write_experiment) -> None:
    """Of Llama-2-7B: keys and values of 32 layers, 4096 wide, two bytes each."""
    write_experiment("mine", BIG.replace("generation_items: 0", "generation_items: 64, eval_batch_size: 32"))
    (spec,) = expand("mine", "cuda").runs.values()
    forecaster = Forecaster(find_gpu("80GiB"))
    answered = forecaster.forecast("a", spec)
    silent = forecaster.forecast("b", spec.model_copy(update={"generation_items": 0}))
    assert answered.binding_phase == "generate"
    assert answered.peak_device_bytes > silent.peak_device_bytes
    assert answered.peak_device_bytes > 32 * (512 + 256) * 2 * 32 * 4096 * 2 + 2 * 6.7e9


def test_a_record_of_the_card_corrects_the_prediction(write_experiment) -> None:
    from peftscope.planning import estimate

    write_experiment("mine", BIG + "axes: {method: [lora]}\n")
    (spec,) = expand("mine", "cuda").runs.values()
    card, other = find_gpu("a100"), find_gpu("h100")
    shape = find_model(spec.model).shape
    assert shape is not None
    before, elsewhere = Forecaster(card).seconds(spec), Forecaster(other).seconds(spec)
    seconds = 2 * spec.steps * Forecaster(card).step(spec, shape).seconds
    provenance = {"hardware": {"gpu": "NVIDIA A100-SXM4-40GB"}}
    record = RunRecord(run_id=run_id(spec), status="ok", spec=spec, seconds=Seconds(train=seconds, wall=seconds))
    record = record.model_copy(update={"provenance": provenance})
    write_record(Path("results/runs") / run_id(spec) / "record.json", record)
    estimate._measured.cache_clear()
    try:
        assert Forecaster(card).measured_ratios(spec) == [pytest.approx(2)]
        assert 1.3 * before < Forecaster(card).seconds(spec) < 2 * before
        assert Forecaster(other).seconds(spec) == elsewhere < before
    finally:
        estimate._measured.cache_clear()


def test_the_runs_that_a_study_has_yet_to_choose_rates_for_are_counted() -> None:
    known, assumed = expand("gpu-7b", "cuda").runs, expand("gpu-7b", "cuda", assume_rates=True).runs
    study = expand("gpu-7b", "cuda").experiment.study
    assert study is not None
    more = 3 * len(study.arms) * len(study.seeds) + sum(map(len, study.controls.values())) * len(study.seeds)
    assert len(assumed) == len(known) + more
    assert len(Counter(assumed)) == len(assumed)


def test_without_a_card_the_one_that_an_experiment_is_made_for_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card_of("gpu-7b", None) == find_gpu("80GiB")
    assert card_of("gpu-7b", "rtx4090") == find_gpu("rtx4090")
    assert card_of("quick", None) is None


@pytest.mark.parametrize("name", ["gpu-7b", "gpu-8b", "gpu-small", "gpu-medium"])
def test_everything_of_a_hub_is_pinned_to_a_commit(name: str) -> None:
    from peftscope.data.tasks import find_task

    for spec in expand(name, "cuda").runs.values():
        sources = find_model(spec.model).source, find_task(spec.task).source
        assert all(re.fullmatch(r"[0-9a-f]{40}", str(source.revision)) for source in sources), json.dumps(spec.model)

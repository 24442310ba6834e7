"""A sweep without Snakemake: what it skips, where it stops, how it goes on, and what it does without."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import in_one_process

from peftscope.analysis.tuning import choose_next
from peftscope.errors import InputError
from peftscope.execution import provenance, sweep
from peftscope.execution.sweep import run_sweep
from peftscope.layout import record_path, run_folder, tuned_path
from peftscope.planning.plan import plan_experiment
from peftscope.record import Quality, RunRecord, Status, read_record, state_folder, write_record
from peftscope.spec import RunSpec, run_id

SHORT = """
fixed: {model: toy, steps: 4, batch_size: 4, validation_items: 8, heldout_items: 8, generation_items: 0,
  retention_tokens: 0, eval_batch_size: 8, untimed_steps: 1, probe_steps: 0}
"""
THREE = f"{SHORT}axes: {{method: [lora, ia3, full]}}\n"
STUDY = f"""{SHORT}
study:
  arms: {{small: {{method: lora, rank: 2}}, large: {{method: lora, rank: 8}}}}
  learning_rates: {{small: [1.0e-4, 1.0e-3, 1.0e-2], large: [1.0e-4, 1.0e-3, 1.0e-2]}}
  tuning_seeds: [10]
  seeds: [0, 1]
runs: [{{method: none}}]
"""
PACKED = f"{SHORT}runs: [{{method: lora, packing: true, seq_len: 64, attention: flash_attention_2}}, {{method: ia3}}]\n"
NOT_THERE = ("pandas", "pyarrow", "snakemake", "lm_eval", "seaborn", "matplotlib", "datasets", "reasoning_gym")


class Runs:
    """Stands in for the processes of runs: each writes its record as a job does, and takes so long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0, **endings: Status) -> None:
        self.seen: list[str] = []
        self.now, self.seconds, self.endings = 0.0, seconds, endings
        monkeypatch.setattr(sweep, "run_apart", self.run)
        monkeypatch.setattr(sweep, "fetch_inputs", lambda spec: None)
        monkeypatch.setattr(sweep, "run_seconds", lambda spec: 1.0)
        monkeypatch.setattr(sweep.time, "monotonic", lambda: self.now)

    def run(self, spec: RunSpec, folder: Path, *, deadline: float) -> Status:
        self.seen.append(spec.method.name)
        self.now += self.seconds
        status = self.endings.get(spec.method.name, "ok")
        loss = 1 + abs(math.log(spec.learning_rate / 1e-3)) if spec.learning_rate else 9.0
        quality = Quality(validation_nll=loss, heldout_nll=loss)
        record = RunRecord(run_id=run_id(spec), status=status, spec=spec, quality=quality)
        state_folder(folder).mkdir(parents=True, exist_ok=True)
        (folder / "items.jsonl").write_text("")
        for path in (folder / "record.json", state_folder(folder) / "record.json"):
            write_record(path, record)
        return status


def refuse(_: Any) -> None:
    pytest.fail("there is nothing to choose")


def test_finished_runs_are_skipped_and_failed_ones_are_tried_again(write_experiment, monkeypatch, capfd) -> None:
    write_experiment("mine", THREE)
    runs = Runs(monkeypatch, ia3="failed", full="oom")
    outcome = run_sweep("mine", refuse)
    assert runs.seen == ["lora", "ia3", "full"] and outcome.left == 0
    assert [run.partition("-")[0] for run in outcome.failed] == ["ia3"]
    runs.endings, runs.seen = {}, []
    outcome = run_sweep("mine", refuse)
    assert runs.seen == ["ia3"] and not outcome.failed
    said = capfd.readouterr().err
    assert "mine: 0 of 3 runs done before" in said and "mine: 2 of 3 runs done before" in said


def test_no_run_begins_that_would_end_too_late_but_the_first(write_experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    write_experiment("mine", THREE)
    runs = Runs(monkeypatch, seconds=40)
    # The estimate says a second each; after the first run it says 40.
    for minutes, done in ((0, []), (1, ["lora"]), (1.4, ["lora", "ia3", "full"])):
        left = run_sweep("mine", refuse, minutes).left
        assert (runs.seen, left) == (done, 3 - len(done))


def test_the_time_left_follows_what_runs_took(write_experiment, monkeypatch, capfd) -> None:
    write_experiment("mine", THREE)
    Runs(monkeypatch, seconds=90)
    seconds = {"lora": 10.0, "ia3": 20.0, "full": 30.0}
    monkeypatch.setattr(sweep, "run_seconds", lambda spec: seconds[spec.method.name])
    run_sweep("mine", refuse)
    said = capfd.readouterr().err
    assert [line.rpartition("(")[2] for line in said.splitlines() if "to go" in line] == [
        "about 1 min 0 s to go)",
        "about 7 min 30 s to go)",
        "about 3 min 0 s to go)",
    ]


def test_a_study_goes_on_with_the_runs_that_follow_from_what_was_chosen(write_experiment, monkeypatch, capfd) -> None:
    write_experiment("mine", STUDY)
    runs = Runs(monkeypatch)
    assert run_sweep("mine", choose_next).left == 0
    plan = plan_experiment("mine")
    assert len(runs.seen) == len(plan.run_ids) == 1 + 2 * 3 + 2 * 3 * 2
    assert all(record_path(run).is_file() for run in plan.run_ids)
    said = capfd.readouterr().err
    assert "0 of 19 runs done before" in said and "19/19" in said
    run_sweep("mine", choose_next)
    assert len(runs.seen) == 19


def test_an_arm_that_comes_later_has_its_three_rates_as_well(write_experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    first = text = STUDY.replace("1.0e-4", "3.0e-4").replace("1.0e-2", "3.0e-3")
    write_experiment("mine", text)
    Runs(monkeypatch)
    run_sweep("mine", choose_next)
    text = text.replace("large: {method: lora, rank: 8}}", "large: {method: lora, rank: 8}, other: {method: dora}}")
    write_experiment("mine", text.replace("large: [", "other: [3.0e-4, 1.0e-3, 3.0e-3], large: ["))
    runs = Runs(monkeypatch)
    run_sweep("mine", choose_next)
    assert runs.seen == ["dora"] * (3 + 3 * 2)
    arms = json.loads(tuned_path("mine").read_text())["arms"]
    assert [len(arms[arm]["rates"]) for arm in ("small", "large", "other")] == [3, 3, 3]
    # A longer list whose best rate is the same: nothing but the new rate runs, and the pairs are there.
    write_experiment("mine", first.replace("small: [", "small: [1.0e-4, "))
    runs = Runs(monkeypatch)
    run_sweep("mine", choose_next)
    assert runs.seen == ["lora"]
    assert {"arm-small", "arm-large"} <= {group.name for group in plan_experiment("mine").sweep.comparisons}


def test_a_study_does_not_choose_from_runs_that_failed(write_experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    write_experiment("mine", STUDY)
    Runs(monkeypatch, lora="failed")
    with pytest.raises(InputError, match="failed: None"):
        run_sweep("mine", choose_next)


def test_a_run_that_is_refused_ends_the_sweep(own, monkeypatch: pytest.MonkeyPatch) -> None:
    own("mine", f"{SHORT}axes: {{method: [lora]}}\n")
    monkeypatch.setenv("PEFTSCOPE_BF16", "native")
    (identity,) = plan_experiment("mine").run_ids
    spec = plan_experiment("mine").sweep.runs[identity]
    monkeypatch.setenv("PEFTSCOPE_BF16", "sideways")
    with pytest.raises(InputError, match=r"PEFTSCOPE_BF16.*train\.log"):
        sweep.run_apart(spec, run_folder(identity), deadline=time.monotonic() + 600)


def test_a_process_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "STOP_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        sweep._stop(process)
        assert process.returncode == -9


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert provenance._version("lm-evil") is None and provenance._version("torch")


@pytest.mark.slow
def test_runs_that_need_a_package_are_skipped_and_the_others_go_on(own, tmp_path: Path) -> None:
    own("mine", f"{SHORT}axes: {{method: [qlora, lora]}}\n")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['bitsandbytes'] = None\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = in_one_process("sweep mine", env=environment)
    assert done.returncode == 0 and "skipped, it needs the package bitsandbytes" in done.stderr, done.stderr
    found = map(read_record, Path("results/runs").glob("*/record.json"))
    records = {record.spec.method.name: record for record in found}
    assert {name: record.status for name, record in records.items()} == {"lora": "ok"}


@pytest.mark.slow
def test_the_check_of_a_card_on_a_processor_with_few_packages(own, repository: Path, tmp_path: Path, peftscope) -> None:
    """A borrowed card may have torch, transformers and PEFT, and little else: neither Snakemake nor lm-eval."""
    own("mine", "extends: gpu-check-cpu\nfixed: {steps: 6}\n")
    Path("results").mkdir()
    Path("results/published").symlink_to(repository / "results/published")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_THERE!r}))\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = in_one_process("sweep mine --minutes 0", "sweep mine", env=environment)
    assert done.returncode == 0 and done.stdout.count("runs left: repeat the command to go on") == 1, done.stderr
    records = [json.loads(path.read_text()) for path in Path("results/runs").glob("*/record.json")]
    assert len(records) == 10 and {record["status"] for record in records} == {"ok"}
    assert {record["spec"]["device"] for record in records} == {"cpu"}
    assert sum(record["latency"] is not None for record in records) == 2
    memory = [record["memory"] for record in records]
    assert all(part["train"]["peak_tensor_bytes"] == part["predicted"]["train_peak_tensor_bytes"] for part in memory)
    # The whole environment makes the report of them, which says what it is.
    text = Path(peftscope("report", "mine")[1].strip()).read_text()
    assert "shows the instrument, decides no claim" in text and "not enforced on a processor" in text
    assert "Does it fit?" in text and "apart over merged" in text


def test_a_run_whose_package_is_missing_is_skipped_and_the_sweep_ends(
    write_experiment: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_experiment("mine", PACKED)
    monkeypatch.setenv("PEFTSCOPE_DEVICE", "cuda")
    runs = Runs(monkeypatch)
    monkeypatch.setattr(sweep, "find_spec", lambda package: None)
    for _ in range(2):
        outcome = run_sweep("mine", refuse)
        assert (outcome.left, outcome.failed) == (0, [])
        assert "skipped, it needs the package flash_attn" in capfd.readouterr().err
    assert runs.seen == ["ia3"]
    monkeypatch.setattr(sweep, "find_spec", lambda package: package)
    run_sweep("mine", refuse)
    assert runs.seen == ["ia3", "lora"]


def test_a_run_that_wrote_no_checkpoint_in_time_is_told_apart_from_one_that_did(
    write_experiment: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_experiment("mine", THREE)
    runs = Runs(monkeypatch, lora="interrupted", ia3="interrupted")
    (slow,) = (run for run in plan_experiment("mine").run_ids if run.startswith("lora"))
    (quick,) = (run for run in plan_experiment("mine").run_ids if run.startswith("ia3"))
    state_folder(run_folder(quick)).mkdir(parents=True)
    (state_folder(run_folder(quick)) / "checkpoint-00000001-0.pt").touch()
    outcome = run_sweep("mine", refuse)
    told = capfd.readouterr().err
    assert outcome.left == 2 and told.count("wrote no checkpoint in time") == 1
    assert told.index(slow) < told.index("wrote no checkpoint in time") < told.index(quick)
    assert len(runs.seen) == 3

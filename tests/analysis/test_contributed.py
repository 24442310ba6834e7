"""Results from the cards of others: what a made-up card measured is packed, and only what is sound is read."""

from __future__ import annotations

import contextlib
import getpass
import json
import shutil
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Command, quartiles
from ledger_parts import claims

from peftscope.analysis.cards import find_run
from peftscope.analysis.collect import row_of
from peftscope.analysis.contributed import pack, read_contribution, read_contributions
from peftscope.claims.evaluate import PartFinding, evaluate_part
from peftscope.claims.verdict import Verdict
from peftscope.errors import InputError
from peftscope.memory.base import describe_model
from peftscope.memory.question import ask
from peftscope.planning.sweep import expand
from peftscope.record import (
    CHECKSUM,
    Memory,
    PhaseMemory,
    PredictedMemory,
    RunRecord,
    Speed,
    Timing,
    content_sha256,
    write_record,
)
from peftscope.spec import RunSpec

GB, GIB = 10**9, 2**30
CARD = "NVIDIA GeForce RTX 4090"
PEAK = 15 * GB
SECRET = "a-machine-of-somebody"


@cache
def specs() -> dict[str, RunSpec]:
    return expand("gpu-check", "cuda").runs


def found_on_cards(claim: str) -> PartFinding:
    """Returns what cards have found now about the last part of a claim that they decide."""
    return evaluate_part([part for part in claims()[claim].parts if part.check.startswith("gpu.")][-1])


def record_of(run: str, **changes: Any) -> RunRecord:
    """Returns what a run of gpu-check left on a made-up card, with a machine's name wherever a record may have one."""
    spec = specs()[run]
    peaks = PhaseMemory(peak_tensor_bytes=PEAK, peak_reserved_bytes=PEAK + GB, peak_device_bytes=PEAK + 3 * GB)
    sizes = {"tensor": PEAK + GB // 10, "reserved": PEAK + GB, "device": PEAK + 2 * GB}
    predicted = PredictedMemory(**{f"train_peak_{kind}_bytes": size for kind, size in sizes.items()})
    home = f"/home/{SECRET}"
    facts: dict[str, Any] = {
        "status": "ok",
        "memory": Memory(train=peaks, predicted=predicted, resident_tensor_bytes=13 * GB),
        "speed": Speed(timed_steps=20, matmul_share=0.5, **quartiles(0.19, 0.2, 0.21, of="step_")),
        "latency": latency(1.05),
        "train_nll": [10.5] * spec.steps,
        "train_batches_sha256": "ab" * 32,
        "reason": f"written to {home}",
        "provenance": {
            "started_at": "2026-11-26T20:00:00+00:00",
            "code": {"commit": "c" * 40, "dirty": False, "remote": home},
            "python": "3.12.1",
            "packages": {"torch": "2.13.0+cu128", SECRET: "1"},
            "hardware": {"cpu": "A CPU @ 2.20GHz", "gpu": CARD, "gpu_memory_bytes": 24 * GIB, "node": SECRET},
            "environment": {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": SECRET, "PYTORCH_ALLOC_CONF": None},
            "card": {"used_bytes": GB, "other_processes": [{"pid": 4711, "used_bytes": 1}], "owner": SECRET},
            "model": {"name": "random-llama-2-7b", "source": {"path": home}},
        },
    }
    return RunRecord(run_id=run, spec=spec, **{**facts, **changes})


def latency(apart: float) -> dict[str, Timing]:
    """Returns the latencies of a token with an adapter apart and merged, whose ratio is given."""
    seconds = {"apart_token": 0.02 * apart, "merged_token": 0.02}
    return {name: Timing(repeats=9, **quartiles(one)) for name, one in seconds.items()}


def run_named(name: str) -> str:
    """Returns the run of gpu-check that decides S71 on a card, or one with the memory of a smaller card."""
    wanted = {"S71": ("all-linear", 192, 128, None), "limited": ("attention", 512, 0, 23.988)}[name]
    (found,) = (
        run
        for run, spec in specs().items()
        if (spec.method.name, spec.model, spec.batch_size) == ("lora", "random-llama-2-7b", 1)
        and (getattr(spec.method, "targets", ""), spec.seq_len, spec.latency_tokens, spec.memory_limit_gib) == wanted
    )
    return found


@pytest.fixture
def card(tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[RunRecord]]:
    """A folder of its own, and what fills its store with what a made-up card measured."""
    (tmp_path / "experiments").symlink_to(workspace / "experiments")
    monkeypatch.chdir(tmp_path)

    def fill(*names: str, **changes: Any) -> list[RunRecord]:
        records = [record_of(run_named(name), **changes) for name in names]
        for record in records:
            write_record(Path("results/runs") / record.run_id / "record.json", record)
        return records

    return fill


@pytest.fixture(scope="module")
def sound(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A contribution in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "experiments").symlink_to(workspace / "experiments")
    with contextlib.chdir(folder):
        identity = run_named("S71")
        write_record(Path("results/runs") / identity / "record.json", record_of(identity))
        (contribution,) = pack("gpu-check")
        path = folder / contribution.path()
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(contribution.content()))
    return path


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Edits a contribution, puts its checksum right, renames it accordingly, and returns its new path."""
    content = json.loads(path.read_text())
    content.pop(CHECKSUM)
    edit(content)
    checksum = content_sha256(content)
    path.write_text(json.dumps(content | {CHECKSUM: checksum}))
    return path.rename(path.with_name(f"{content.get('experiment')}-{checksum[:8]}.json"))


def test_what_a_card_left_is_shown_then_written_and_decides_claims(card: Any, peftscope: Command) -> None:
    (s71,) = card("S71")
    code, said, _ = peftscope("contribute")
    assert code == 0 and "Nothing was written" in said and "2.13.0+cu128" in said and CARD in said and ", +0.7" in said
    assert not Path("results/contributed").exists()
    code, said, _ = peftscope("contribute", "--yes")
    (first,) = Path("results/contributed").rglob("*.json")
    assert code == 0 and first.parent.name == "geforce-rtx-4090" and str(first) in said
    text = first.read_text()
    for name in (SECRET, "4711", "/home", socket.gethostname(), f'"{getpass.getuser()}"', "T20:00"):
        assert name not in text, name
    assert read_contribution(first).records[0].memory == s71.memory
    # More runs of the same card make a new file, which replaces the one that it contains.
    card("limited", status="oom", train_nll=[])
    assert peftscope("contribute", "--yes")[0] == 0
    (second,) = Path("results/contributed").rglob("*.json")
    assert second != first and len(read_contribution(second).records) == 2
    # Contributed runs decide what no card of ours has measured, and are named as what they are.
    theirs = found_on_cards("S71")
    assert theirs.verdict == Verdict.HOLDS and theirs.known == "on a contributed card"
    assert theirs.to_json()["contributed"] and "(contributed)" in theirs.to_json()["model"]
    assert found_on_cards("S74").verdict == Verdict.NOT_RUN
    # A card of ours that measured the same decides alone.
    ours = record_of(run_named("S71"), latency=latency(2))
    Path("results/gpu-check").mkdir()
    row = {"run_id": ours.run_id, "comparisons": "grid", **row_of(ours.spec, ours)}
    pd.DataFrame([row]).to_csv("results/gpu-check/runs.csv", index=False)
    own = found_on_cards("S71")
    assert own.verdict == Verdict.WRONG and own.known == "on a card"


Edit = Callable[[dict[str, Any]], object]


def record(edit: Edit) -> Edit:
    return lambda content: edit(content["records"][0])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c.update(contribution_version=2), "not a contribution of version 1"),
        (lambda c: c.update(records=[]), "at least 1 item"),
        (record(lambda r: r["spec"].pop("learning_rate")), "learning_rate: not a contribution: Field required"),
        (record(lambda r: r["spec"].update(steps=23)), "its spec is another run's"),
        (record(lambda r: r["spec"].update(model="somebody/something")), "has no name in experiments/models.yaml"),
        (record(lambda r: r["spec"].update(device="cpu")), "not a finished run on a card"),
        (record(lambda r: r["provenance"].update(host="node7")), "has what is not shared"),
        (record(lambda r: r["provenance"].update(python="/home/bob/bin")), "a path or an address"),
        (record(lambda r: r["method_metrics"].update({"~/x": 1.0})), "a path or an address"),
        (record(lambda r: r["train_nll"].pop()), "23 losses for 24 steps"),
        (record(lambda r: r["train_nll"].__setitem__(3, float("nan"))), "its checksum does not match"),
        (record(lambda r: r.update(train_batches_sha256=None)), "hash of its batches"),
        (record(lambda r: r["memory"]["train"].update(peak_tensor_bytes=5 * GB)), "over 1.5 times apart"),
        (record(lambda r: r["memory"]["load"].update(peak_device_bytes=30 * GIB)), "on a card of 24.00 GiB"),
        (record(lambda r: r["speed"].update(matmul_share=3.0)), "300%"),
        (record(lambda r: r["speed"].update(step_seconds_median=0.5)), "not in order"),
        (lambda c: c["records"].append(c["records"][0]), "stands twice"),
        (lambda c: c.update(card="Another card"), "not the name that its card and content give"),
    ],
)
def test_a_file_that_is_not_sound_is_refused_in_a_sentence(edit: Edit, said: str, sound: Path, tmp_path: Path) -> None:
    path = tmp_path / sound.parent.name / sound.name
    path.parent.mkdir()
    changed = change(shutil.copy(sound, path), edit)
    with pytest.raises(InputError) as refused:
        read_contribution(changed)
    assert said in str(refused.value) and str(changed) in str(refused.value), refused.value


def test_damaged_files_are_refused_and_decide_nothing(card: Any) -> None:
    card("S71")
    (contribution,) = pack("gpu-check")
    path = contribution.path()
    path.parent.mkdir(parents=True)
    text = json.dumps(contribution.content())
    for damaged in ("", text[:2000], "[]", text.replace("10.5", "10.6", 1), "\udcff"):
        path.write_bytes(damaged.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match=path.name):
            read_contributions()
        finding = found_on_cards("S71")
        assert finding.verdict == Verdict.NOT_RUN and path.name in finding.reason
    path.write_text(text)
    assert list(read_contributions()) == [path]
    path.with_name("notes.txt").write_text("see my machine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        read_contributions()


def test_two_cards_must_agree_on_the_first_loss_and_on_the_batches(card: Any) -> None:
    card("S71")
    (first,) = pack("gpu-check")
    (record,) = first.records
    for changes, said in (
        ({"train_nll": [10.6] * 24}, ""),
        ({"train_nll": [11.5] * 24}, "over 2% apart"),
        ({"train_batches_sha256": "cd" * 32}, "saw other batches"),
    ):
        facts = record.provenance | {"hardware": record.provenance["hardware"] | {"gpu": "Second card"}}
        changed = record.model_copy(update={"provenance": facts, **changes})
        second = first.model_copy(update={"card": "Second card", "records": [changed]})
        for each in (first, second):
            each.path().parent.mkdir(parents=True, exist_ok=True)
            each.path().write_text(json.dumps(each.content()))
        if said:
            with pytest.raises(InputError, match=said):
                read_contributions()
        else:
            assert len(read_contributions()) == 2
        second.path().unlink()


def test_a_run_is_found_by_the_options_of_its_tuner() -> None:
    asked: dict[str, Any] = {"method": "peft", "tuner": "lora", "options": {"r": 4}}
    spec = ask(describe_model("llama-2-7b"), asked).spec
    fields = spec.model_dump(mode="json", exclude={"method"}) | {"model": "random-llama-2-7b"}
    row = {"status": "ok", "method": "peft", **fields, **spec.method.columns()}
    assert find_run([row], "llama-2-7b", asked) == row
    assert find_run([row], "llama-2-7b", asked | {"options": {"r": 8}}) is None


def test_without_a_run_on_a_card_it_says_what_to_do(card: Any, peftscope: Command) -> None:
    card()
    code, _, errors = peftscope("contribute")
    assert code == 2 and "make gpu-check" in errors and "Traceback" not in errors


def test_every_contributed_file_passes_the_checks(in_repository: None) -> None:
    read_contributions()

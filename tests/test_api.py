"""The API: what docs/api.md shows works, in any folder, and leaves the process as it was."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import conftest
import numpy
import psutil
import pytest
import torch
from conftest import Command

import peftscope
from peftscope import layout
from peftscope.errors import InputError
from peftscope.hardware.cards import find_gpu
from peftscope.models.catalog import find_model
from peftscope.models.presets import PRESETS
from peftscope.planning.experiment import experiment_names
from peftscope.record import read_record, state_folder
from peftscope.spec import RunSpec

HEAVY = "{'torch', 'pandas', 'transformers', 'peft'}"
FIELDS = {"model": "toy", "method": "lora", "rank": 4, "steps": 4, "batch_size": 8, "heldout_items": 8}
FIELDS |= {"generation_items": 0, "retention_tokens": 0, "probe_steps": 0, "untimed_steps": 1}


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return conftest.python("-c", code, check=True, cwd=folder)


@pytest.fixture
def bare(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the toy model and the sums and nothing else, as the current one."""
    shutil.copytree(toy / "resources", tmp_path / "resources")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(request: pytest.FixtureRequest) -> Command:
    """The command in this process; here its name is the module's."""
    return request.getfixturevalue("peftscope")


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "docs/api.md").read_text()


class TestThePage:
    def test_lists_every_name(self, page: str) -> None:
        assert sorted(re.findall(r"^\| `(\w+)", page, re.MULTILINE)) == sorted(peftscope.__all__)

    @pytest.mark.slow
    def test_its_code_runs_where_nothing_was_fetched(self, page: str, repository: Path, tmp_path: Path) -> None:
        (tmp_path / "results").mkdir()
        (tmp_path / "results/published").symlink_to(repository / "results/published")
        code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
        done = python(code, tmp_path)
        lines = done.stdout.splitlines()
        assert re.fullmatch(r"ok \d\.\d+ nats a token", lines[0])
        assert re.fullmatch(r"\d{6,} bytes at the peak of training", lines[1])
        assert re.search(r"GiB; \w+ binds; {'weights': ", lines[2])
        assert [line.split()[:2] for line in lines[3:5]] == [["lora", "yes"], ["full", "yes"]]
        assert lines[5].startswith("results/published/quick/runs.csv label")
        assert [line.partition(": ")[0] for line in lines[-2:]] == ["spec.rnak", "spec.steps"]
        assert "did you mean `rank`?" in lines[-2]
        said = [line for line in done.stderr.splitlines() if not line.startswith("train ")]
        assert not said
        assert read_record(tmp_path / "runs/first/record.json").status == "ok"
        assert not (tmp_path / "runs/second").exists()


class TestTheImport:
    def test_loads_nothing_heavy_and_touches_no_other_library(self, tmp_path: Path) -> None:
        for before, kept in (("", "None"), ("sys.modules['kernels'] = sys", "<module 'sys' (built-in)>")):
            code = f"import sys\n{before}\nimport peftscope\nprint(sys.modules.get('kernels'))\n"
            code += f"peftscope.memory('llama-2-7b')\npeftscope.RunSpec\nprint({HEAVY} & set(sys.modules))"
            code += "\nprint(sys.modules.get('kernels'))"
            assert python(code, tmp_path).stdout.splitlines() == [kept, "set()", kept]

    @pytest.mark.parametrize("first", ["import peftscope.memory.answer", "from peftscope.memory import question"])
    def test_memory_is_a_room_and_a_function(self, first: str, tmp_path: Path) -> None:
        code = f"{first}\nimport peftscope\nprint(peftscope.memory('qwen2.5-0.5b').method)\n"
        code += "import peftscope.memory.answer\nprint(peftscope.memory.answer.__name__)"
        assert python(code, tmp_path).stdout.split() == ["lora", "peftscope.memory.answer"]


def state_of_the_process() -> dict[str, Any]:
    return {
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "torch's threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "threads": threading.enumerate(),
        "children": psutil.Process().children(),
        "generators": (random.getstate(), torch.get_rng_state().tolist(), repr(numpy.random.get_state())),
        "torch": (torch.is_grad_enabled(), torch.get_default_dtype()),
        "warnings": list(warnings.filters),
        "hub": (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("CUDA_VISIBLE_DEVICES")),
        "kernels": sys.modules.get("kernels"),
        "folder": Path.cwd(),
    }


class TestRun:
    def test_leaves_the_process_as_it_was(self, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "kernels", ModuleType("kernels"))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        peftscope.run(FIELDS, "first")  # for what libraries do as they are imported
        for seed in (random.seed, torch.manual_seed, numpy.random.seed):
            seed(123)  # another state than the one in which a run leaves them
        before = state_of_the_process()
        record = peftscope.run({**FIELDS, "generation_items": 4}, "run")
        assert state_of_the_process() == before
        assert (record.status, record.reason) == ("ok", None)
        assert len(record.train_nll) == 4 and record.quality.exact_match_items == 4
        assert read_record(bare / "run/record.json") == record
        assert RunSpec.model_validate_json((bare / "run/spec.json").read_text()) == record.spec

    def test_takes_a_spec_and_makes_no_run_twice(self, bare: Path, make_spec: Callable[..., RunSpec]) -> None:
        spec = make_spec(**FIELDS)
        record = peftscope.run(spec, bare / "run")
        assert record.spec == spec
        began = (bare / "run/items.jsonl").stat().st_mtime_ns
        fields = spec.model_dump(mode="json", exclude={"device"})
        fields |= {**fields["method"], "method": fields["method"]["name"]}
        fields.pop("name")
        assert peftscope.run(fields, str(bare / "run")) == record
        assert (bare / "run/items.jsonl").stat().st_mtime_ns == began

    @pytest.fixture
    def usual(self) -> Iterator[Any]:
        """Python's own handler of SIGINT, which a job in the background does not have."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield signal.default_int_handler
        signal.signal(signal.SIGINT, before)

    @pytest.mark.usefixtures("usual")
    def test_one_that_is_stopped_while_it_loads_is_not_done(self, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import peftscope.execution.way

        def interrupt(spec: RunSpec) -> None:
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(peftscope.execution.way, "load_base", interrupt)
        with pytest.raises(KeyboardInterrupt):
            peftscope.run(FIELDS, "run")
        record = read_record(bare / "run/interrupted.json")
        assert (record.status, record.reason) == ("interrupted", "stopped by SIGINT")
        assert not (bare / "run/record.json").exists()
        assert not (state_folder(bare / "run") / "record.json").exists()

    def test_a_failure_is_a_status(self, bare: Path) -> None:
        record = peftscope.run({**FIELDS, "seq_len": 2}, "run")
        assert record.status == "failed" and "seq_len=2 is too short" in (record.reason or "")
        assert read_record(bare / "run/record.json") == record

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"method": "lroa"}, "did you mean `lora`?"),
            ({"task": "sums"}, "unknown task"),
            ({"shards": 2}, "peftscope run"),
            ({"device": "cuda"}, "the machine decides it"),
        ],
    )
    def test_what_is_wrong_is_said_before_anything_is_written(
        self, wrong: dict[str, Any], said: str, bare: Path
    ) -> None:
        with pytest.raises(InputError, match=re.escape(said)):
            peftscope.run({**FIELDS, **wrong}, "run")
        assert not (bare / "run").exists()

    def test_a_file_is_no_spec_and_no_folder(self, bare: Path) -> None:
        (bare / "run").write_text("mine")
        with pytest.raises(InputError, match=re.escape("spec: no fields of a run (got 'spec.json') -> give fields")):
            peftscope.run("spec.json", "other")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="run: is a file, and a run needs a folder -> name another one"):
            peftscope.run(FIELDS, "run")
        assert (bare / "run").read_text() == "mine"

    def test_one_of_another_thread_in_its_folder_is_kept(self, bare: Path) -> None:
        made: list[Any] = []
        thread = threading.Thread(target=lambda: made.append(peftscope.run(FIELDS, "run")))
        thread.start()
        thread.join()
        (record,) = made
        assert record.status == "ok", record.reason
        said = f"run: holds another run, {record.run_id}, with status ok -> name another folder, or remove this one"
        with pytest.raises(InputError, match=re.escape(said)):
            peftscope.run({**FIELDS, "rank": 2}, "run")
        done = conftest.python("-m", "peftscope", "run", json.dumps({**FIELDS, "rank": 2}), "--output", "run")
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, said)
        assert read_record(bare / "run/record.json") == record
        assert json.loads((bare / "run/spec.json").read_text())["method"]["rank"] == 4


class TestAnswers:
    def test_memory_is_the_commands(self, command: Command) -> None:
        answer = peftscope.memory("llama-2-7b", "qlora", rank=16, targets=["q_proj", "v_proj"], gpu="rtx4090", gpus=2)
        options = ["--method", "qlora", "--rank", "16", "--targets", "q_proj,v_proj", "--gpu", "rtx4090", "--gpus", "2"]
        left = find_gpu("rtx4090").usable_bytes - answer.peak_device_bytes
        said = {"headroom_bytes": left, "fits": "yes", "missing_bytes": 0, "remedies": []}
        printed = json.loads(command("memory", "llama-2-7b", *options, "--json")[1])
        assert printed.pop("tokens_per_second")["value"] > 0 and printed.pop("time")["step_seconds"]["value"] > 0
        assert answer.to_json() | said == printed

    def test_memory_simulates(self, bare: Path) -> None:
        peftscope.memory("toy", simulate=True)
        torch.manual_seed(123)
        before = state_of_the_process()
        simulated = peftscope.memory("toy", simulate=True, seq_len=64)
        assert state_of_the_process() == before
        assert simulated.how == "simulation"
        formula = peftscope.memory("toy", seq_len=64).peak_allocated_bytes
        assert simulated.peak_allocated_bytes == pytest.approx(formula, rel=0.02)

    def test_fit_is_the_commands(self, command: Command) -> None:
        found = peftscope.fit("8GiB", ["qwen2.5-0.5b"], "lora", seq_len=64)
        assert [(fit.model, fit.method) for fit in found] == [("qwen2.5-0.5b", "lora")]
        options = ["--models", "qwen2.5-0.5b", "--methods", "lora", "--seq-len", "64", "--gpu", "8GiB"]
        answers = json.loads(json.dumps([fit.to_json() for fit in found]))
        assert answers == json.loads(command("fit", *options, "--json")[1])

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"rnak": 8}, "rnak: unknown option -> did you mean `rank`?"),
            ({"gpu": 24}, 'gpu: not a text (got 24) -> name the card or its memory, as in "rtx4090" or "24GiB"'),
            ({"method": {"name": "lora"}}, "method: not a text (got {'name': 'lora'}) -> name it, and give its fields"),
        ],
    )
    def test_wrong_options_are_named(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=re.escape(said)):
            peftscope.memory("llama-2-7b", **options)

    def test_a_model_may_be_a_path(self, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(PRESETS["qwen2.5-0.5b"].shape.to_config()))
        peaks = {peftscope.memory(model).peak_allocated_bytes for model in (file, str(file), "qwen2.5-0.5b")}
        assert len(peaks) == 1
        assert peftscope.fit("8GiB", file, "lora")[0].method == "lora"


class TestResults:
    def test_your_own_come_before_the_published_ones_and_comparisons_have_names(self, repository, bare: Path) -> None:
        published = Path("results/published/quick")
        shutil.copytree(repository / published, published)
        runs = peftscope.load_results("quick")
        assert runs.attrs["source"] == "results/published/quick/runs.csv"
        assert runs["run_id"].is_unique and len(runs) > 1
        Path("results/quick").mkdir()
        runs.head(1).to_csv("results/quick/runs.csv", index=False)
        own = peftscope.load_results("quick")
        assert (own.attrs["source"], len(own)) == ("results/quick/runs.csv", 1)
        shutil.rmtree("results/quick")
        ladder = peftscope.load_results("quick", "ladder-0-rank")
        assert ladder["rank"].is_unique and len(ladder) > 2
        assert peftscope.load_results("quick")["rank"].value_counts().max() > 1
        with pytest.raises(InputError, match=r"no such comparison \(got 'rank'\) -> known: grid, ladder-0-alpha"):
            peftscope.load_results("quick", "rank")

    @pytest.mark.parametrize(
        ("name", "said"), [("smoke", "no such file"), ("mine", "peftscope sweep mine"), ("../quick", "not a name")]
    )
    def test_there_are_none(self, name: str, said: str, bare: Path) -> None:
        with pytest.raises(InputError, match=said):
            peftscope.load_results(name)


class TestExperiments:
    def test_those_of_the_repository_are_read_elsewhere(self, bare: Path, repository: Path) -> None:
        (bare / "experiments").mkdir()  # somebody else's
        assert "quick" in experiment_names()
        assert find_model("toy").shape is not None
        assert layout.shipped(layout.CLAIMS_FILE) == repository / "experiments/claims.yaml"

    def test_own_tasks_without_defaults_are_said_to_be_left_out(self, bare: Path, repository: Path) -> None:
        (bare / "experiments").mkdir()
        (bare / "experiments/tasks.yaml").write_text("mine: {source: {kind: jsonl, path: mine.jsonl}}\n")
        said = "; experiments/tasks.yaml is not read without experiments/defaults.yaml: "
        said += f"copy what it lacks from {repository}"
        with pytest.raises(InputError, match=re.escape(said)):
            peftscope.run({**FIELDS, "task": "mine"}, "run")

    def test_without_either_it_is_said(self, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layout, "REPOSITORY", bare)
        with pytest.raises(InputError, match=re.escape("there is no experiments/defaults.yaml here -> run from")):
            peftscope.run(FIELDS, "run")
        assert peftscope.memory("qwen2.5-0.5b").peak_allocated_bytes > 0

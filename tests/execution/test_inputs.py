"""Model and data files that were damaged after they were fetched or made."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftscope.errors import InputError
from peftscope.files.atomic import write_json
from peftscope.files.manifest import file_sha256, read_manifest
from peftscope.planning.checks import check_unchanged, inputs
from peftscope.spec import RunSpec

pytestmark = pytest.mark.usefixtures("own")
RESOURCES = Path("resources")


def verify(spec: RunSpec) -> None:
    for resource in inputs(spec):
        resource.verify()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def change(path: Path) -> None:
    """Another digit of a checksum, or another bit."""
    text = path.read_bytes()
    at = text.index(b'"sha256"') + 40 if path.name == "manifest.json" else len(text) // 2
    path.write_bytes(text[:at] + (b"0" if text[at : at + 1] != b"0" else b"1") + text[at + 1 :])


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (cut, "models/toy/model.safetensors"),
        (change, "models/toy/model.safetensors"),
        (change, "models/toy/manifest.json"),
        (Path.unlink, "models/toy/manifest.json"),
        (Path.unlink, "models/toy/tokenizer.json"),
        (change, "tasks/two-digit-sums/train.jsonl"),
    ],
)
def test_a_damaged_folder_is_quarantined_and_fetched_again(make_spec, capfd, file: str, damage) -> None:
    spec, path = make_spec(), RESOURCES / file
    verify(spec)
    assert capfd.readouterr().err == ""
    before = path.read_bytes()
    damage(path)
    left = path.read_bytes() if path.is_file() else None
    verify(spec)
    assert path.read_bytes() == before
    aside = path.parent.with_name(f"{path.parent.name}.damaged")
    # A checksum that was changed is seen at the file that it is of.
    name = "config.json" if (damage, path.name) == (change, "manifest.json") else path.name
    assert f"{name} damaged or missing; the folder was moved to {aside}" in capfd.readouterr().err
    assert (aside / path.name).is_file() == (left is not None)
    verify(spec)
    assert capfd.readouterr().err == ""


def test_data_that_come_back_different_stop_the_run(make_spec) -> None:
    verify(make_spec())
    train = RESOURCES / "tasks/two-digit-sums/train.jsonl"
    manifest = train.parent / "manifest.json"
    # As an earlier version of the generator might have made them.
    train.write_text(train.read_text().replace('"response": "9', '"response": "8'))
    content = read_manifest(train.parent)
    assert content is not None
    write_json(manifest, content | {"sha256": content["sha256"] | {"train": file_sha256(train)}})
    verify(make_spec())
    cut(train)
    with pytest.raises(InputError, match=r"train.jsonl is not what it was, so its results would mix"):
        verify(make_spec())


def test_a_damaged_manifest_is_no_changed_source(make_spec) -> None:
    cut(RESOURCES / "models/toy/manifest.json")
    assert check_unchanged({"run": make_spec()}) == []

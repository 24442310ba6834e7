"""Prompts and responses of any text: an item that every part of the suite takes, or a line that is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import forget_files
from fuzzing import (
    cases,
    loads_or_refuses,
)
from hypothesis import given
from hypothesis import strategies as st

from peftscope.data import scoring
from peftscope.data.batching import IGNORED, collate, pack, tokenise
from peftscope.data.sources import SHOWN_LINES, Item
from peftscope.data.tasks import SPLITS, make_task, read_split
from peftscope.errors import InputError
from peftscope.evaluation.heldout import ItemLoss
from peftscope.execution.scores import write_items
from peftscope.planning.plan import plan_experiment
from peftscope.training.load import load_tokenizer

ANYTHING = st.one_of(
    st.text(st.characters(), max_size=30),
    st.sampled_from(
        [
            "",
            " ",
            "\x00",
            "\n",
            "\r",
            "\u2028",
            "\u2029",
            "\x85",
            "\u202e",
            "é",
            "👩‍👩‍👧",
            "\ud800",
            "<eos>",
            "{{x}}",
            "x" * 300,
        ]
    ),
)


def write_task(own_folder: Path, lines: list[bytes]) -> None:
    (own_folder / "experiments/tasks.yaml").write_text("mine:\n  source: {kind: jsonl, path: mine.jsonl}\n")
    scoring.lm_eval_file("mine").write_text("task: mine\n")
    (own_folder / "mine.jsonl").write_bytes(b"\n".join(lines))
    shutil.rmtree(own_folder / "resources/tasks", ignore_errors=True)
    forget_files()


FILLING = [json.dumps({"prompt": f"What is {n}?", "response": str(n)}).encode() for n in range(60)]


def is_text(text: str) -> bool:
    return bool(text.strip()) and not re.search("[\ud800-\udfff]", text)


@pytest.fixture
def tokenizer(toy: Path, make_spec: Callable[..., Any]) -> Any:
    return load_tokenizer(make_spec(method="lora"))


@cases(60)
@given(prompt=ANYTHING, response=ANYTHING, as_ascii=st.booleans())
def test_any_prompt_and_response_is_an_item_or_refused(
    prompt: str, response: str, as_ascii: bool, tokenizer: Any, own_folder: Path
) -> None:
    line = json.dumps({"prompt": prompt, "response": response}, ensure_ascii=as_ascii)
    write_task(own_folder, [*FILLING[:7], line.encode(errors="surrogatepass"), *FILLING[7:]])
    if not (is_text(prompt) and is_text(response)):
        with pytest.raises(InputError) as caught:
            make_task("mine")
        assert [problem.where for problem in caught.value.problems] == ["mine.jsonl: line 8"]
        assert not list(Path("resources/tasks").glob("mine*"))
        return
    make_task("mine")
    items = [item for split in SPLITS for item in read_split("mine", split)]
    assert Item(prompt, response.strip()) in items or prompt in {f"What is {n}?" for n in range(60)}
    (found,) = [item for item in items if item.prompt == prompt]
    try:
        examples = tokenise([found, items[0]], tokenizer, 256)
    except InputError as error:
        assert len(f" {found.response}".encode()) + 2 > 256
        assert repr(prompt[:60])[:8] in error.problems[0].where
        return
    for batch in (collate(examples, 0), pack([examples], 0)):
        assert int((batch.labels != IGNORED).sum()) == sum(len(e.tokens) - e.prompt_length for e in examples)
        assert int((batch.kept_labels != IGNORED).sum()) == int(batch.response_tokens)
    if not re.search("<(bos|eos|pad|unk)>", prompt + response):
        tokens = examples[0].tokens
        assert tokenizer.decode(tokens[examples[0].prompt_length : -1]) == f" {found.response}"
    path = own_folder / "items.jsonl"
    write_items(path, [found], [ItemLoss(1.0, 2, "01")], [{"item": 0, "answer": found.response, "correct": 1}])
    (row,) = [json.loads(text) for text in path.read_bytes().decode().split("\n") if text]
    assert (row["prompt"], row["target"], row["answer"]) == (prompt, found.response, found.response)


BROKEN_LINES = st.sampled_from(
    [
        b"nonsense",
        b"[]",
        b"null",
        b'{"prompt": "a"}',
        b'{"response": "a"}',
        b'{"prompt": null, "response": "a"}',
        b'{"prompt": "a", "response": true}',
        b'{"prompt": "a", "response": ["b"]}',
        b'{"prompt": "", "response": "a"}',
        b'{"prompt": "a", "response": " "}',
        b'{"prompt": "\\ud800", "response": "a"}',
        b'{"prompt": "\xff", "response": "a"}',
        b"[" * 100_000,
        b'{"prompt": 1, "response": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        b"\x00",
    ]
)


@cases(40)
@given(broken=st.dictionaries(st.integers(0, 60), BROKEN_LINES, min_size=1, max_size=30))
def test_every_broken_line_is_named(broken: dict[int, bytes], own_folder: Path) -> None:
    lines = [broken.get(number, line) for number, line in enumerate([*FILLING, b""])]
    write_task(own_folder, lines)
    error = loads_or_refuses(lambda: make_task("mine"))
    assert isinstance(error, InputError)
    wanted = [f"mine.jsonl: line {number + 1}" for number in sorted(broken)]
    shown = [problem.where for problem in error.problems]
    assert shown[:SHOWN_LINES] == wanted[:SHOWN_LINES]
    if len(wanted) > SHOWN_LINES:
        assert error.problems[-1].message == f"{len(wanted) - SHOWN_LINES} more lines are not items"


@pytest.mark.parametrize("path", ["x" * 5000, "a\x00b", "experiments", "/dev/zero", "nothing.jsonl"])
def test_data_that_are_no_file(path: str, own_folder: Path) -> None:
    write_task(own_folder, FILLING)
    (own_folder / "experiments/tasks.yaml").write_text(
        json.dumps({"mine": {"source": {"kind": "jsonl", "path": path}}})
    )
    (own_folder / "experiments/mine.yaml").write_text("fixed: {model: toy, task: mine}\n")
    for load in (lambda: make_task("mine"), lambda: plan_experiment("mine")):
        assert "no such file" in str(loads_or_refuses(load))


def test_an_example_is_never_longer_than_a_sequence_and_has_a_prompt(tokenizer: Any) -> None:
    for length in range(1, 30):
        found = loads_or_refuses(lambda: tokenise([Item("question", "y" * length)], tokenizer, 20))  # noqa: B023
        assert isinstance(found, InputError) == (length > 17)
        if length <= 17:
            assert len(found[0].tokens) <= 20
            assert found[0].prompt_length >= 1
    with pytest.raises(InputError, match="its prompt has no token"):
        tokenise([Item("", "yes")], tokenizer, 20)

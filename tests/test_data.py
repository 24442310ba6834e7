"""Tasks, splits, order and the collator."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from peftscope.data.batching import IGNORED, collate, tokenise, training_order
from peftscope.data.tasks import SPLITS, Item, lm_eval_file, make_task, read_split, task_folder
from peftscope.errors import InputError
from peftscope.experiment import read_yaml
from peftscope.models.fetch import fetch_model
from peftscope.models.load import load_tokenizer

TASKS = ["two-digit-sums", "family-relationships", "time-intervals"]


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_prompt_and_are_large_enough(name: str) -> None:
    make_task(name)
    prompts = {split: [item.prompt for item in read_split(name, split)] for split in SPLITS}
    for split, found in prompts.items():
        assert len(found) == len(set(found)) > 200, split
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(prompts[one]) & set(prompts[other])


def test_the_sums_are_all_there_and_right() -> None:
    make_task("two-digit-sums")
    items = [item for split in SPLITS for item in read_split("two-digit-sums", split)]
    assert len(items) == 90 * 90
    for item in items:
        left, right = item.prompt.removesuffix(" =").split(" + ")
        assert int(left) + int(right) == int(item.response)


def test_a_pool_is_made_once_and_the_same(tmp_path: Path) -> None:
    make_task("time-intervals")
    before = json.loads((task_folder("time-intervals") / "manifest.json").read_text())
    (task_folder("time-intervals") / "manifest.json").unlink()
    make_task("time-intervals")
    assert json.loads((task_folder("time-intervals") / "manifest.json").read_text()) == before


def test_seeds_share_no_batch_and_one_seed_is_one_order() -> None:
    def batches(seed: int) -> list[tuple[int, ...]]:
        order = training_order(6480, seed)
        return [tuple(itertools.islice(order, 16)) for _ in range(400)]

    assert batches(0) == batches(0)
    assert not {frozenset(batch) for batch in batches(0)} & {frozenset(batch) for batch in batches(1)}


def test_an_epoch_sees_every_item_once() -> None:
    assert sorted(itertools.islice(training_order(10, 3), 10)) == list(range(10))


def test_collator_marks_the_positions_that_predict_responses(toy: Path, make_spec) -> None:
    tokenizer = load_tokenizer(make_spec(method="lora"))
    examples = tokenise([Item("12 + 34 =", "46"), Item("1 + 2 =", "3")], tokenizer, 64)
    batch = collate(examples, tokenizer.pad_token_id)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        assert batch.attention_mask[row].sum() == length
        assert (batch.labels[row] != IGNORED).sum() == length - example.prompt_length
        wanted = batch.kept_labels[row][batch.kept_labels[row] != IGNORED]
        assert wanted.tolist() == list(example.tokens[example.prompt_length :])
    assert tokenizer.decode(examples[0].tokens) == "12 + 34 = 46<eos>"
    assert batch.tokens == sum(len(example.tokens) for example in examples)


def test_a_long_prompt_loses_its_start_and_never_its_response(toy: Path, make_spec) -> None:
    tokenizer = load_tokenizer(make_spec(method="lora"))
    (example,) = tokenise([Item("x" * 100 + "end", "yes")], tokenizer, 20)
    assert len(example.tokens) == 20
    assert tokenizer.decode(example.tokens).endswith("end yes<eos>")
    with pytest.raises(ValueError, match="too short for the response"):
        tokenise([Item("x", "y" * 50)], tokenizer, 20)


def test_own_jsonl_file(write_experiment) -> None:
    lines = [json.dumps({"prompt": f"What is {n}?", "response": str(n)}) for n in range(200)]
    write_experiment("tasks", "mine:\n  source: {kind: jsonl, path: mine.jsonl}\n  licence: CC0-1.0\n")
    lm_eval_file("mine").write_text("task: mine\n")
    Path("mine.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    manifest = json.loads((make_task("mine") / "manifest.json").read_text())
    assert sum(manifest["items"].values()) == 200
    assert manifest["duplicates_dropped"] == 1


def test_broken_jsonl_names_every_line(write_experiment) -> None:
    write_experiment("tasks", "mine:\n  source: {kind: jsonl, path: mine.jsonl}\n")
    lm_eval_file("mine").write_text("task: mine\n")
    Path("mine.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\nnonsense\n')
    with pytest.raises(InputError) as caught:
        make_task("mine")
    assert [problem.where for problem in caught.value.problems] == ["mine.jsonl: line 2", "mine.jsonl: line 3"]


def test_a_model_that_cannot_be_had_is_a_message(workspace: Path) -> None:
    with pytest.raises(InputError, match="cannot download it"):
        fetch_model("nobody/nothing")
    assert not list(Path("resources/models").glob("*nobody*"))


@pytest.mark.parametrize("name", TASKS)
def test_lm_eval_file_points_at_the_data_we_make(name: str) -> None:
    content = read_yaml(lm_eval_file(name))
    assert content["task"] == name
    assert content["dataset_kwargs"]["data_files"]["test"] == (task_folder(name) / "test.jsonl").as_posix()

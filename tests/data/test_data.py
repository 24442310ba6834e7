"""Tasks, splits, order and the collator; and texts that begin with a token of the tokenizer's own."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from peftscope.data.batching import IGNORED, Batch, Example, collate, pack, tokenise, training_batches, training_order
from peftscope.data.scoring import lm_eval_file
from peftscope.data.sources import Item, RandomStringsSource
from peftscope.data.tasks import SPLITS, draw_items, find_task, make_task, read_split, task_folder
from peftscope.errors import InputError
from peftscope.evaluation.answers import wrap
from peftscope.evaluation.retention import WINDOW_TOKENS, bits_per_byte, prose
from peftscope.files.content import read_yaml
from peftscope.layout import PROSE_FOLDER
from peftscope.spec import RunSpec
from peftscope.training.build import build_model
from peftscope.training.load import load_base, load_tokenizer
from peftscope.training.step import forward_loss

TASKS = ["two-digit-sums", "family-relationships", "time-intervals", "memorise"]


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


def test_seeds_share_no_batch_one_seed_is_one_order_and_an_epoch_sees_every_item_once() -> None:
    def batches(seed: int) -> list[tuple[int, ...]]:
        order = training_order(6480, seed)
        return [tuple(itertools.islice(order, 16)) for _ in range(400)]

    assert batches(0) == batches(0)
    assert not {frozenset(batch) for batch in batches(0)} & {frozenset(batch) for batch in batches(1)}
    assert sorted(itertools.islice(training_order(10, 3), 10)) == list(range(10))


def test_a_run_draws_its_training_items_by_its_seed() -> None:
    items = [Item(str(n), "x") for n in range(50)]
    assert draw_items(items, None, seed=0) == items
    few, more = (draw_items(items, count, seed=0) for count in (8, 20))
    assert len(set(more)) == 20 and more[:8] == few
    assert set(draw_items(items, 8, seed=1)) != set(few)
    with pytest.raises(InputError, match=r"train_items: the task has 50 training items \(got 51\)"):
        draw_items(items, 51, seed=0)


def test_random_strings_have_the_entropy_that_they_state() -> None:
    make_task("memorise")
    source = find_task("memorise").source
    assert isinstance(source, RandomStringsSource)
    responses = [item.response for split in SPLITS for item in read_split("memorise", split)]
    counted = 0.0
    for place in range(source.response_symbols):
        counts = Counter(response[place] for response in responses).values()
        counted -= sum(count * math.log2(count / len(responses)) for count in counts) / len(responses)
    assert {len(response) for response in responses} == {source.response_symbols}
    assert counted == pytest.approx(source.entropy_bits, rel=1e-3)
    assert len(set(responses)) == len(responses)


@pytest.mark.parametrize("model", ["toy", "smollm2-135m"])
def test_each_symbol_of_a_random_string_is_a_token(model: str, toy, repository, make_spec, monkeypatch) -> None:
    make_task("memorise")
    items = read_split("memorise", "test")[:200]
    if model != "toy":
        monkeypatch.chdir(repository)
        if not Path("resources/models", model, "tokenizer.json").is_file():
            pytest.skip(f"{model} was not fetched")
    for example in tokenise(items, load_tokenizer(make_spec(method="none", model=model)), 64):
        assert example.prompt_length == 6
        # The end of the sequence and, in bytes, the space before the response: they are form and carry no entropy.
        assert len(example.tokens) - example.prompt_length == 16 + (2 if model == "toy" else 1)


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
    with pytest.raises(InputError, match="too short for the response"):
        tokenise([Item("x", "y" * 50)], tokenizer, 20)


@pytest.mark.parametrize("name", TASKS)
def test_lm_eval_file_points_at_the_data_we_make(name: str) -> None:
    content = read_yaml(lm_eval_file(name))
    assert content["task"] == name
    assert content["dataset_kwargs"]["data_files"]["test"] == (task_folder(name) / "test.jsonl").as_posix()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("loss_path", ["response_only", "hf"])
def test_packing_changes_no_loss_and_no_gradient(attention: str, loss_path: str, toy: Path, make_spec) -> None:
    spec = make_spec(method="full", precision="fp32", attention=attention, loss_path=loss_path)
    examples = tokenise(read_split("two-digit-sums", "train")[:6], load_tokenizer(spec), spec.seq_len)

    def gradients(batch: Batch, changes: dict[str, Any]) -> tuple[float, torch.Tensor]:
        changed = spec.model_copy(update=changes)
        model = build_model(load_base(changed), changed).model
        loss = forward_loss(model, batch, changed).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    apart = gradients(collate(examples, 0), {})
    together = gradients(pack([examples[:3], examples[3:]], 0), {"packing": True})
    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    torch.testing.assert_close(together[1], apart[1], rtol=1e-3, atol=1e-5)
    # An attention that sees the neighbour gives another loss: the mask is what keeps examples apart.
    packed = pack([examples[:3], examples[3:]], 0)
    seen = replace(packed, example_ids=torch.zeros_like(packed.example_ids))
    assert gradients(seen, {"packing": True})[0] != pytest.approx(apart[0], rel=1e-3)


@pytest.mark.parametrize("loss_path", ["response_only", "hf"])
def test_examples_end_to_end_without_a_mask_have_each_its_own_loss(loss_path: str, toy: Path, make_spec) -> None:
    # What flash attention is given; on a CPU, transformers makes SDPA's mask from the same positions.
    spec = make_spec(method="full", precision="fp32", loss_path="hf", packing=True)
    model = build_model(load_base(spec), spec).model
    examples = tokenise(read_split("two-digit-sums", "train")[:5], load_tokenizer(spec), spec.seq_len)
    flash = spec.model_copy(update={"attention": "flash_attention_2", "loss_path": loss_path})
    total = torch.tensor(1)
    together = forward_loss(model, pack([examples[:3], examples[3:]], 0), flash, total).loss
    apart = [forward_loss(model, collate([example], 0), spec, total).loss for example in examples]
    assert together.item() == pytest.approx(sum(loss.item() for loss in apart), rel=1e-5)


def test_packed_rows_are_full_and_hold_every_example_once() -> None:
    lengths = [3, 9, 4, 4, 8, 2, 6, 5]
    examples = [Example((index, *[50] * (length - 1)), 1) for index, length in enumerate(lengths)]
    stream = training_batches(examples, seed=0, batch_size=2, pad_token_id=99, pack_to=12)
    rows = [row for batch in itertools.islice(stream, 40) for row in batch.input_ids.tolist()]
    order = [index for index in itertools.islice(training_order(8, 0), 400)]
    seen = [token for row in rows for token in row if token < 50]
    assert seen == order[: len(seen)]
    for row, after in itertools.pairwise(rows):
        used = sum(token != 99 for token in row)
        assert used <= 12 < used + lengths[after[0]]


# Texts begin with a token where the tokenizer puts one by itself, as Gemma's does.

BOS = 0


@pytest.fixture
def spec(toy: Path, make_spec) -> RunSpec:
    return make_spec(method="none", precision="fp32", retention_tokens=WINDOW_TOKENS + 20)


@pytest.fixture
def tokenizer(spec: RunSpec) -> Any:
    """The toy model's tokenizer, beginning each text with ``<bos>`` by itself."""
    found = load_tokenizer(spec)
    begins = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    found.backend_tokenizer.post_processor = begins
    return found


def test_training_and_held_out_items_begin_with_it(spec: RunSpec, tokenizer: Any) -> None:
    item = Item("12 + 34 =", "46")
    (plain,), (begun,) = tokenise([item], load_tokenizer(spec), 64), tokenise([item], tokenizer, 64)
    assert begun.tokens == (BOS, *plain.tokens) and begun.prompt_length == plain.prompt_length + 1
    (cut,) = tokenise([Item("x" * 100, "46")], tokenizer, 20)
    assert len(cut.tokens) == 20 and cut.tokens[0] == BOS and tokenizer.decode(cut.tokens).endswith("x 46<eos>")


def test_prose_is_scored_behind_it(spec: RunSpec, tokenizer: Any) -> None:
    """The same tokens count as without it, and no window loses its first one."""
    model = load_base(spec).eval()
    ids = tokenizer(prose(), add_special_tokens=False)["input_ids"][: spec.retention_tokens]
    nats = scored = 0.0
    for window in (ids[:WINDOW_TOKENS], ids[WINDOW_TOKENS:]):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[BOS, *window]])).logits[0].float()
        nats -= float(logits.log_softmax(-1)[range(1, len(window)), window[1:]].sum())
        scored += len(tokenizer.decode(window[1:]).encode())
    score = bits_per_byte(model, tokenizer, spec, "a run")
    assert score == pytest.approx(nats / math.log(2) / scored, rel=1e-5)
    assert bits_per_byte(model, load_tokenizer(spec), spec) != score
    # A model with the same logits at the beginning takes the score that was written.
    file = max(PROSE_FOLDER.iterdir(), key=lambda path: path.stat().st_mtime)
    for text, found in ((file.read_text(), score), ('{"bits_per_byte": 2}', 2.0), ('{"bits', score)):
        file.write_text(text)
        assert bits_per_byte(model, tokenizer, spec, "a run") == found
    file.write_text('{"bits_per_byte": 2}')
    assert bits_per_byte(model, tokenizer, spec, "another") == bits_per_byte(model, tokenizer, spec) == score
    model.model.norm.weight.data *= 1.001
    assert bits_per_byte(model, tokenizer, spec, "a run") not in (2.0, score)


def test_lm_eval_asks_behind_it(spec: RunSpec, tokenizer: Any) -> None:
    model = load_base(spec)
    begun, plain = (wrap(model, each, spec) for each in (tokenizer, load_tokenizer(spec)))
    asked = [each.tok_batch_encode(["12 + 34 ="])[0][0].tolist() for each in (begun, plain)]
    assert asked[0] == [BOS, *asked[1]]

"""What is scored beside the loss: greedy answers, how far a model moved, and the latency of an adapter."""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError

from peftscope.data.batching import Example, tokenise
from peftscope.data.tasks import read_split
from peftscope.evaluation import heldout, latency
from peftscope.evaluation.heldout import base_answers, heldout_nll, nll_and_shift
from peftscope.evaluation.updates import entropy
from peftscope.execution import way
from peftscope.record import RunRecord, Timing
from peftscope.training.build import build_model
from peftscope.training.load import attention, load_base, load_tokenizer

ANSWER = 4


@pytest.mark.parametrize(("method", "precision"), [("lora", "fp32"), ("qlora", "bf16")])
def test_an_answer_of_argmaxes_is_what_greedy_decoding_gives(method: str, precision: str, toy: Path, make_spec) -> None:
    """On 64 prompts: the held-out pass finds no 0 in what ``generate`` gave, and finds the token that was changed.

    But where two logits lie within two steps of bf16, either may be the larger one.
    """
    spec = make_spec(method=method, precision=precision)
    tokenizer = load_tokenizer(spec)
    trained = build_model(load_base(spec), spec).model.eval()
    with torch.no_grad():  # so that the adapter says something
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
    prompts = [e.tokens[: e.prompt_length] for e in tokenise(read_split(spec.task, "test")[:64], tokenizer, 64)]
    given, changed = [], []
    for prompt in prompts:
        asked = torch.tensor([prompt])
        options = {"max_new_tokens": ANSWER, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        tokens = trained.generate(input_ids=asked, attention_mask=torch.ones_like(asked), **options)[0].tolist()
        given.append(Example(tuple(tokens), len(prompt)))
        changed.append(Example((*tokens[:-1], (tokens[-1] + 1) % trained.config.vocab_size), len(prompt)))
    with attention(trained, spec.attention):
        right, wrong = (heldout_nll(trained, examples, spec, 0) for examples in (given, changed))
    unsure = []
    for number, example in enumerate(given):
        logits = trained(input_ids=torch.tensor([example.tokens])).logits[0, example.prompt_length - 1 : -1].float()
        first, second = logits.topk(2).values.T
        steps = (first - second) / 2.0 ** (first.abs().log2().floor() - 7)
        unsure += [number] * bool(spec.precision == "bf16" and (steps < 2).any())
    assert len(unsure) < len(given) / 2
    for number in set(range(len(given))) - set(unsure):
        assert right[number].argmax == "1" * right[number].tokens
        assert wrong[number].argmax == "1" * (wrong[number].tokens - 1) + "0"


def test_one_pass_gives_the_losses_and_the_shift_of_the_first_items(toy: Path, make_spec, monkeypatch) -> None:
    monkeypatch.setattr(heldout, "SHIFT_ITEMS", 10)  # which ends inside the third batch
    spec = make_spec(method="lora", precision="fp32", eval_batch_size=4)
    examples = tokenise(read_split(spec.task, "validation")[:18], load_tokenizer(spec), spec.seq_len)
    model = load_base(spec).eval()
    with attention(model, spec.attention):
        answers = base_answers(model, examples, spec, 0)
        unmoved = nll_and_shift(model, examples, spec, 0, answers)
        per_item, moved = nll_and_shift(model, examples, spec, 0, [2 * logits for logits in answers])
        assert per_item == heldout_nll(model, examples, spec, 0) and len(per_item) == 18
    assert len(answers) == 3 and sum(map(len, answers)) == sum(item.tokens for item in per_item[:10])
    assert unmoved == (per_item, {"from_base": 0.0, "to_base": 0.0})
    now = torch.cat(answers).log_softmax(dim=1)
    base = (2 * torch.cat(answers)).log_softmax(dim=1)
    for name, one, other in (("from_base", base, now), ("to_base", now, base)):
        expected = torch.nn.functional.kl_div(other, one, reduction="batchmean", log_target=True)
        assert moved[name] == pytest.approx(float(expected), rel=1e-4)


def run(make_spec, folder: Path, **values: Any) -> RunRecord:
    options = {"validation_items": 12, "validation_every": 3, "generation_items": 0, "retention_tokens": 0}
    return run_here(make_spec(**{**options, "probe_steps": 0, **values}), folder)


def test_a_run_that_is_followed_says_how_far_it_moved(toy: Path, make_spec, tmp_path: Path) -> None:
    still = run(make_spec, tmp_path / "still", method="lora", learning_rate=0)
    assert still.quality.shift == {"from_base": 0.0, "to_base": 0.0} and still.updates == {}
    moved = run(make_spec, tmp_path / "moved", method="lora", rank=2, learning_rate=1e-2)
    quality = moved.quality
    assert list(quality.shift_curve) == [3] and 0 < quality.shift_curve[3]["to_base"] < quality.shift["to_base"]
    assert quality.shift["from_base"] > 0
    rows = [json.loads(line) for line in (tmp_path / "moved" / "items.jsonl").read_text().splitlines()]
    assert all(len(row["argmax"]) == row["tokens"] for row in rows)
    hits = "".join(row["argmax"] for row in rows)
    assert quality.token_accuracy == hits.count("1") / len(hits)
    assert quality.greedy_match == sum("0" not in row["argmax"] for row in rows) / 16
    for kind in moved.updates.values():  # of two directions
        assert 0 < kind["entropy_values"] <= math.log(2) + 1e-3 and kind["rank_90"] <= 2 and kind["relative_size"] > 0


def test_a_run_that_is_not_followed_spends_nothing_on_it(toy: Path, make_spec, tmp_path: Path) -> None:
    record = run(make_spec, tmp_path, method="lora", validation_every=0)
    assert record.quality.shift == {} and record.updates == {} and record.quality.token_accuracy is not None


def test_entropy_is_largest_where_all_values_are_equal() -> None:
    even, odd = entropy(torch.ones(8)), entropy(torch.tensor([100.0, *[1.0] * 7]))
    assert even["entropy_values"] == even["entropy_energies"] == pytest.approx(math.log(8))
    assert odd["entropy_energies"] < odd["entropy_values"] < math.log(8)


# The latency of an adapter: of the base before, of the adapter apart, and merged.


def test_latency_is_that_of_the_base_the_adapter_and_what_was_merged(toy, make_spec, tmp_path, monkeypatch) -> None:
    seen: list[tuple[int, int, int]] = []

    def timed(model: Any, spec: Any) -> dict[str, Timing]:
        layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())

        def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
            cache = options.get("past_key_values")
            seen.append((layers, options["input_ids"].shape[1], cache.get_seq_length() if cache else 0))

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        times = latency.time_passes(model, spec)
        hook.remove()
        return times

    monkeypatch.setattr(way, "time_passes", timed)
    monkeypatch.setitem(latency.REPEATS, "cpu", 5)
    spec = make_spec(method="qlora", latency_tokens=8, generation_items=0, probe_steps=0)
    record = run_here(spec, tmp_path)
    # Around each of the seven linear layers of both blocks, and around nothing after merging; tokens see the prompt.
    assert set(seen) == {(n, *shape) for n in (0, 14) for shape in ((8, 0), (1, 8))}
    assert [key for key, _ in groupby(n for n, *_ in seen)] == [0, 14, 0]
    assert record.latency is not None and record.seconds.latency > 0
    assert set(record.latency) == {f"{s}_{p}" for s in ("base", "apart", "merged") for p in ("prompt", "token")}
    for timing in record.latency.values():
        assert timing.repeats >= 5
        assert 0 < timing.seconds_lower_quartile <= timing.seconds_median <= timing.seconds_upper_quartile


@pytest.mark.parametrize("method", ["full", "none", "prompt-tuning"])
def test_only_adapters_that_can_be_merged_have_a_latency(method: str, make_spec) -> None:
    spec = make_spec(method=method)
    with pytest.raises(ValidationError, match="compares an adapter that is apart with a merged one"):
        type(spec).model_validate(spec.model_dump() | {"latency_tokens": 8})

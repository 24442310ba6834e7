"""Texts begin with a token where the tokenizer puts one by itself, as Gemma's does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from peftscope.data.batching import tokenise
from peftscope.data.sources import Item
from peftscope.evaluation.answers import wrap
from peftscope.evaluation.retention import WINDOW_TOKENS, bits_per_byte, prose
from peftscope.sizing.lengths import count_tokens
from peftscope.spec import RunSpec
from peftscope.training.load import load_base, load_tokenizer

BOS = 0


@pytest.fixture
def spec(toy: Path, make_spec, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    monkeypatch.chdir(toy)
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
    assert bits_per_byte(model, tokenizer, spec) == pytest.approx(nats / math.log(2) / scored, rel=1e-5)
    assert bits_per_byte(model, load_tokenizer(spec), spec) != bits_per_byte(model, tokenizer, spec)


def test_lm_eval_asks_behind_it(spec: RunSpec, tokenizer: Any) -> None:
    model = load_base(spec)
    asked = [
        wrap(model, each, spec).tok_batch_encode(["12 + 34 ="])[0][0].tolist()
        for each in (tokenizer, load_tokenizer(spec))
    ]
    assert asked[0] == [BOS, *asked[1]]


def test_lengths_count_it(spec: RunSpec, tokenizer: Any, tmp_path: Path) -> None:
    (path := tmp_path / "items.jsonl").write_text(json.dumps({"prompt": "12 + 34 =", "response": " 46"}))
    plain, begun = (
        count_tokens(path, ("prompt", "response"), lambda each=each: each) for each in (load_tokenizer(spec), tokenizer)
    )
    assert begun == [plain[0] + 1]

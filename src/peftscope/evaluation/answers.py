"""Generated answers, scored by lm-eval on the suite's own task files."""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import patch

import lm_eval
import torch
from datasets import Dataset, DatasetDict
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from peftscope.data.scoring import read_scoring
from peftscope.data.tasks import read_split
from peftscope.spec import RunSpec

logging.getLogger("lm_eval").setLevel(logging.ERROR)


class _UncachedLM(HFLM):
    """Greedy decoding by whole forward passes, right-padded as in training.

    PEFT 0.21 with transformers 5.24 loses virtual tokens once there is a cache, without a word, and left padding puts
    a gap between them and the prompt: prompt tuning answered none of 64 sums at a held-out loss of 0.28 nats.
    """

    logit_offset = 0
    """Positions that the wrapper puts before the tokens."""

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Returns ``context`` (B x S, left-padded) followed by up to ``max_length`` - S new tokens of each row."""
        mask = generation_kwargs["attention_mask"].bool()
        rows = [tokens[kept].tolist() for tokens, kept in zip(context, mask, strict=True)]
        prompts = [len(row) for row in rows]
        for _ in range(max_length - context.shape[1]):
            open_rows = [i for i, row in enumerate(rows) if self.eot_token_id not in row[prompts[i] :]]
            if not open_rows:
                break
            width = max(len(rows[i]) for i in open_rows)
            tokens = torch.full((len(open_rows), width), self.tokenizer.pad_token_id, device=self.device)
            attended = torch.zeros_like(tokens)
            for place, i in enumerate(open_rows):
                tokens[place, : len(rows[i])] = torch.tensor(rows[i], device=self.device)
                attended[place, : len(rows[i])] = 1
            precision = self.mixed_precision_dtype
            with torch.no_grad(), torch.autocast(self.device.type, precision, enabled=precision is not None):
                logits = self.model(input_ids=tokens, attention_mask=attended, use_cache=False).logits
            for place, i in enumerate(open_rows):
                rows[i].append(int(logits[place, self.logit_offset + len(rows[i]) - 1].argmax()))
        new = [row[length:] for row, length in zip(rows, prompts, strict=True)]
        filled = torch.full((len(rows), max(map(len, new))), self.eot_token_id, device=self.device)
        for place, tokens_of_row in enumerate(new):
            filled[place, : len(tokens_of_row)] = torch.tensor(tokens_of_row, device=self.device)
        return torch.cat([context, filled], dim=1)


def score_answers(model: Any, tokenizer: Any, spec: RunSpec) -> list[dict[str, Any]]:
    """Returns one row for each of the first ``spec.generation_items`` test items: prompt, target, answer, correct.

    ``generate_until``, greedy, exact match after white space is removed; the batch size is the spec's, because bf16
    answers depend on it.
    """
    results = evaluate(
        model=wrap(model, tokenizer, spec),
        # As content, never as a file: lm-eval would run the Python that a file's `!function` names.
        tasks=[_task_config(spec.task)],
        task_manager=TaskManager(include_defaults=False),
        limit=spec.generation_items,
        log_samples=True,
    )
    return [
        {
            "item": sample["doc_id"],
            "prompt": sample["doc"]["prompt"],
            "target": sample["target"],
            "answer": sample["filtered_resps"][0],
            "correct": int(sample["exact_match"]),
        }
        for sample in sorted(results["samples"][spec.task], key=lambda sample: sample["doc_id"])
    ]


def evaluate(**options: Any) -> dict[str, Any]:
    """Returns what lm-eval finds, without intervals.

    Where there is no repository, git would say so on stderr: lm-eval asks for the commit, and a record has it anyway.
    """
    with patch("lm_eval.evaluator.get_git_commit_hash", str):
        return lm_eval.simple_evaluate(**options, bootstrap_iters=0, verbosity="ERROR")


def _task_config(task: str) -> dict[str, Any]:
    """Returns what lm-eval has to know of a task.

    Prompt and target are columns, not templates: a template is code of its own, and lm-eval makes a list of a target in
    brackets. The items are given, not a file, of which Arrow would read dates as times, which no answer matches.
    """
    scoring = read_scoring(task)

    def items(**_: Any) -> DatasetDict:
        rows = [{"prompt": i.prompt, "target": scoring.target_of(i.response)} for i in read_split(task, "test")]
        return DatasetDict({"test": Dataset.from_list(rows)})

    said = scoring.model_dump(exclude_none=True)
    return said | {"custom_dataset": items, "doc_to_text": "prompt", "doc_to_target": "target"}


def wrap(model: Any, tokenizer: Any, spec: RunSpec) -> HFLM:
    """Returns a run's model as lm-eval wants it."""
    language_model = (HFLM if spec.method.generates_from_cache else _UncachedLM)(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=spec.eval_batch_size,
        add_bos_token=False,
        # lm-eval opens an autocast context of its own, which would switch one around it off.
        mixed_precision_dtype=torch.bfloat16 if spec.precision == "amp" else None,
    )
    language_model.logit_offset = spec.method.logit_offset()
    return language_model

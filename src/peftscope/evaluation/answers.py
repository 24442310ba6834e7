"""Scores by lm-eval: of generated answers on the suite's own task files, and of its own benchmarks."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from datasets import Dataset, DatasetDict
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from peftscope.data.batching import Example, collate, first_tokens
from peftscope.data.benchmarks import write_task_file
from peftscope.data.scoring import read_scoring
from peftscope.data.sources import Item
from peftscope.spec import RunSpec

logging.getLogger("lm_eval").setLevel(logging.ERROR)

WORKED_EXAMPLES_SEED = 1234
"""Draws the worked examples before a benchmark's items. Source: lm-eval 0.4, ``simple_evaluate``."""


class _UncachedLM(HFLM):
    """Greedy decoding without a cache, on right-padded sequences as in training.

    With a cache, PEFT 0.21 and transformers 5.24 lose virtual tokens without a warning, and left padding puts a gap
    between them and the prompt: prompt tuning answered none of 64 sums at a held-out loss of 0.28 nats.
    """

    logit_offset = 0
    """The number of positions that the wrapper adds before the tokens."""

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
            examples = [Example(tuple(rows[i]), 0) for i in open_rows]
            batch = collate(examples, self.tokenizer.pad_token_id).to(str(self.device))
            asked = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            precision = self.mixed_precision_dtype
            with torch.no_grad(), torch.autocast(self.device.type, precision, enabled=precision is not None):
                logits = self.model(**asked, use_cache=False).logits
            for place, i in enumerate(open_rows):
                rows[i].append(int(logits[place, self.logit_offset + len(rows[i]) - 1].argmax()))
        new = [context.new_tensor(row[length:]) for row, length in zip(rows, prompts, strict=True)]
        filled = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=self.eot_token_id)
        return torch.cat([context, filled], dim=1)


def score_answers(model: Any, tokenizer: Any, spec: RunSpec, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Returns one row for each of the first ``spec.generation_items`` items: prompt, target, answer, correct.

    lm-eval generates greedily and scores by exact match after removing white space. The batch size is the spec's,
    because bf16 answers depend on it.
    """
    results = evaluate(
        wrap(model, tokenizer, spec),
        # The task is passed as content, because lm-eval runs the Python that `!function` names in a file.
        [_task_config(spec.task, items)],
        TaskManager(include_defaults=False),
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


def score_benchmarks(model: Any, tokenizer: Any, spec: RunSpec) -> dict[str, dict[str, float]]:
    """Returns each benchmark's scores by lm-eval's names (``METRIC,FILTER``), and the number of scored ``items``.

    Items are the first ``spec.benchmark_items`` of a benchmark's rows, which were fetched before the run, with
    lm-eval's own worked examples before them.
    """
    with tempfile.TemporaryDirectory(prefix="peftscope-benchmarks-") as folder:
        for name in spec.benchmarks:
            write_task_file(name, Path(folder))
        results = evaluate(
            wrap(model, tokenizer, spec),
            list(spec.benchmarks),
            TaskManager(include_path=folder, include_defaults=False),
            limit=spec.benchmark_items,
            log_samples=False,
        )
    scores = {}
    for name in spec.benchmarks:
        result = results["results"][name]
        scores[name] = {key: float(v) for key, v in result.items() if "," in key and "stderr" not in key}
        scores[name]["items"] = float(results["n-samples"][name]["effective"])
    return scores


def evaluate(
    model: HFLM, tasks: list[Any], manager: TaskManager, *, limit: int | None, log_samples: bool
) -> dict[str, Any]:
    """Returns lm-eval's results on the first ``limit`` items of each task, without intervals.

    ``lm_eval.simple_evaluate`` would give the same, but also ask git for the commit, which prints an error outside of a
    repository, and describe the machine. The record says both anyway.
    """
    loaded = manager.load(tasks)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=WORKED_EXAMPLES_SEED)
    return lm_eval.evaluate(
        lm=model, task_dict=loaded, limit=limit, log_samples=log_samples, bootstrap_iters=0, verbosity="ERROR"
    )


def _task_config(task: str, asked: Sequence[Item]) -> dict[str, Any]:
    """Returns the task's configuration for lm-eval.

    Prompt and target are columns, not templates, because a template is code, and because lm-eval turns a target in
    brackets into a list. The items are passed as objects: from a file, Arrow would read dates as times, which no answer
    matches.
    """
    scoring = read_scoring(task)

    def items(**_: Any) -> DatasetDict:
        rows = [{"prompt": i.prompt, "target": scoring.target_of(i.response)} for i in asked]
        return DatasetDict({"test": Dataset.from_list(rows)})

    config = scoring.model_dump(exclude_none=True)
    return config | {"custom_dataset": items, "doc_to_text": "prompt", "doc_to_target": "target"}


def wrap(model: Any, tokenizer: Any, spec: RunSpec) -> HFLM:
    """Returns a run's model in lm-eval's wrapper."""
    # lm-eval would tie the weights again, which were tied when the model was loaded. PEFT's trainable tokens, which put
    # tied modules into wrappers, cannot be tied twice.
    model.tie_weights = lambda: None
    language_model = (HFLM if spec.method.generates_from_cache else _UncachedLM)(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=spec.eval_batch_size,
        add_bos_token=bool(first_tokens(tokenizer)),
        # lm-eval opens an autocast context of its own, which would override ours.
        mixed_precision_dtype=torch.bfloat16 if spec.autocasts else None,
    )
    del model.tie_weights
    language_model.logit_offset = spec.method.logit_offset()
    return language_model

"""Generated answers, scored by lm-eval on the suite's own task files."""

from __future__ import annotations

import logging
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from peftscope.data.tasks import lm_eval_file
from peftscope.spec import RunSpec

logging.getLogger("lm_eval").setLevel(logging.ERROR)


def score_answers(model: Any, tokenizer: Any, spec: RunSpec) -> list[dict[str, Any]]:
    """Returns one row for each of the first ``spec.generation_items`` test items: prompt, target, answer, correct.

    ``generate_until``, greedy, exact match after white space is removed; the batch size is the spec's, because bf16
    answers depend on it.
    """
    manager = TaskManager(include_path=str(lm_eval_file(spec.task).parent), include_defaults=False)
    language_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=spec.eval_batch_size,
        add_bos_token=False,
        # lm-eval opens an autocast context of its own, which would switch one around it off.
        mixed_precision_dtype=torch.bfloat16 if spec.precision == "amp" else None,
    )
    results = lm_eval.simple_evaluate(
        model=language_model,
        tasks=[spec.task],
        task_manager=manager,
        limit=spec.generation_items,
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
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

"""Scores lm-eval's own benchmarks, on rows that were fetched before the run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from peftscope.data.benchmarks import write_task_file
from peftscope.evaluation.answers import evaluate, wrap
from peftscope.spec import RunSpec


def score_benchmarks(model: Any, tokenizer: Any, spec: RunSpec) -> dict[str, dict[str, float]]:
    """Returns each benchmark's scores by lm-eval's names (``METRIC,FILTER``), and the number of scored ``items``.

    These are the first ``spec.benchmark_items`` of each benchmark, with lm-eval's own worked examples before them.
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

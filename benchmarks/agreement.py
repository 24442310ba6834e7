"""How well the closed form agrees with the simulation, on random runs: ``python -m benchmarks.agreement``.

Writes the differences of each method, model and job, on average and at worst, beside the closed form, which quotes them
in its answers.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from typing import Any

from rich.console import Console
from rich.progress import track

from peftscope.errors import InputError
from peftscope.files.hub import without_hub_kernels
from peftscope.memory.answer import AGREEMENT_FILE, answer_by_formula
from peftscope.memory.base import Model
from peftscope.memory.beside import JOBS
from peftscope.memory.question import Question, ask
from peftscope.methods import METHODS
from peftscope.models.presets import PRESETS

ARCHITECTURES = (
    "llama-2-7b",
    "llama-3.2-1b",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "phi-3-mini",
    "gemma-2b",
    "gemma-2-2b",
    "gemma-3-1b",
    "mistral-7b",
    "olmo-2-1b",
    "smollm2-1.7b",
    "smollm3-3b",
    "granite-3.1-2b",
    "mixtral-8x7b",
    "qwen3-30b-a3b",
)
"""One for each kind of layer that closed forms know: grouped keys, biases, norms of queries and keys, fused layers,
soft caps, sliding windows, tied embeddings, norms after a layer, layers without positions, multipliers,
experts."""
FEWEST_LAYERS = {"smollm3-3b": 4, "gemma-3-1b": 6}
"""Models whose layers differ have one of each kind; the others have two to four layers."""

SAVED = (("embed_tokens",), ("embed_tokens", "lm_head"))
"""Modules that are trained beside an adapter."""

ROUNDS = 17
"""Each round asks about every method once."""
FULL_DEPTH = 20
"""The number of questions about whole models."""
OF_EACH_JOB = 8
"""The number of questions about each job other than supervised fine-tuning."""
TRAINED = [name for name, method in METHODS.items() if method.trains and method.closed_form]


def random_question(
    method: str | None, source: random.Random, whole: bool = False, job: dict[str, list[Any]] | None = None
) -> Question:
    """Returns a question about a method on one of the architectures, cut to few layers so that it is simulated fast.

    Without a method it is about any that goes with the job; ``job`` says what options may be for another one than
    supervised fine-tuning. A whole model has all its layers.
    """
    asked = method
    while True:
        method = asked or source.choice(TRAINED)
        name = source.choice(ARCHITECTURES)
        shape = PRESETS[name].shape
        if not whole:
            shape = shape.model_copy(update={"num_layers": FEWEST_LAYERS.get(name) or source.randint(2, 4)})
        options: dict[str, Any] = {
            "method": method,
            "batch_size": source.choice([1, 2, 4, 8]),
            "seq_len": source.choice([64, 128, 200, 512, 1024]),
            "precision": source.choice(["bf16", "bf16", "fp32", "amp"]),
            "optimizer": source.choice(["adamw", "adamw", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]),
            "loss_path": source.choice(["hf", "response_only"]),
            "keep_logits": source.choice([None, None, True, False]),
            "checkpointing": source.choice([False, True]),
            "packing": source.choice([False, False, True]),
            "padding": source.choice(["some", "some", "none"]),
            "gradient_accumulation": source.choice([1, 1, 2]),
        }
        options["autocast"] = options["precision"] == "bf16" and source.choice([False, False, True])
        if options["optimizer"] in ("adamw", "sgd"):
            options["optimizer_implementation"] = source.choice(["foreach", "fused", "single"])
        if name != "gemma-2-2b":
            options["attention"] = source.choice(["sdpa", "sdpa", "eager", "flash_attention_2"])
        rank = source.choice([2, 8, 32, 128])
        of_method = {
            "rank": rank,
            "init_r": rank,
            "target_r": rank // 2,
            "virtual_tokens": source.choice([4, 32]),
            "targets": source.choice(["minimal", "attention", "mlp", "all-linear"]),
            "dropout": source.choice([0.0, 0.0, 0.05]),
            "adapter_dtype": source.choice(["fp32", "fp32", "base"]),
            "kbit_preparation": source.choice(["none", "peft", "trl"]),
        }
        options |= {option: value for option, value in of_method.items() if option in METHODS[method].model_fields}
        if "targets" in METHODS[method].model_fields:
            # From a source of its own, so that what else is asked stays as it was.
            options["modules_to_save"] = random.Random(repr(options)).choice([(), (), ("lm_head",), *SAVED])
        options |= {option: source.choice(values) for option, values in (job or {}).items()}
        try:
            return ask(Model(name, shape.to_config(), shape), options, responses=source.randint(1, options["seq_len"]))
        except InputError:  # a combination that cannot be
            continue


def random_questions(seed: int, count: int = ROUNDS * len(TRAINED), whole: bool = False) -> Iterator[Question]:
    """Yields random questions, each method in turn; the seed decides all of them. Whole models have all layers."""
    source = random.Random(seed)
    for method in islice(cycle(TRAINED), count):
        yield random_question(method, source, whole)


def job_questions(seed: int) -> Iterator[Question]:
    """Yields random questions about the jobs other than supervised fine-tuning, the jobs in turn."""
    source = random.Random(seed)
    ways: dict[str, list[Any]] = {"loss_path": ["hf"], "packing": [False], "logprobs": [None, "chunked", "full"]}
    for job in islice(cycle([job for job in JOBS if job != "sft"]), OF_EACH_JOB * (len(JOBS) - 1)):
        references = [None, "copy", "disabled", "precomputed"] if JOBS[job].scored else [None]
        yield random_question(None, source, job={"job": [job], "reference": references, **ways})


@without_hub_kernels()
def differences(question: Question) -> dict[str, float]:
    """Returns (closed form / simulation - 1) of each phase, of the peak over all, and of the reserved bytes."""
    from peftscope.memory.simulate import answer_by_simulation

    formula, simulation = answer_by_formula(question), answer_by_simulation(question)
    phases = {phase: formula.phases[phase] / size - 1 for phase, size in simulation.phases.items()}
    return phases | {
        "peak": formula.peak_allocated_bytes / simulation.peak_allocated_bytes - 1,
        "reserved": formula.peak_reserved_bytes / simulation.peak_reserved_bytes - 1,
    }


def main() -> None:
    """Measures and writes the agreement."""
    asked = {
        "cut models": list(random_questions(seed=0)),
        "whole models": list(random_questions(0, FULL_DEPTH, whole=True)),
        "jobs": list(job_questions(seed=0)),
    }
    console, found = Console(stderr=True), dict[str, list[dict[str, float]]]()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name, questions in asked.items():
            found[name] = list(track(pool.map(differences, questions), name, len(questions), console=console))
    cut, of_cut = asked["cut models"], found["cut models"]
    content = {
        "questions": len(cut),
        "allocated_percent": _figures(of_cut)["allocated_percent"],
        "whole_models": _figures(found["whole models"]),
        "methods": _groups([question.spec.method.name for question in cut], of_cut),
        "models": _groups([question.model.name for question in cut], of_cut),
        "jobs": _groups([question.beside.job for question in asked["jobs"]], found["jobs"]),
    }
    AGREEMENT_FILE.write_text(json.dumps(content, indent=2) + "\n")


def _groups(names: Sequence[str], found: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Returns the figures of what has the same name."""
    groups = defaultdict(list)
    for name, one in zip(names, found, strict=True):
        groups[name].append(one)
    return {name: _figures(groups[name]) for name in sorted(groups)}


def _figures(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {
        "questions": len(found),
        "allocated_percent": _mean_and_worst(one["peak"] for one in found),
        "reserved_percent": _mean_and_worst(one["reserved"] for one in found),
    }


def _mean_and_worst(differences: Iterable[float]) -> dict[str, float]:
    """Returns the mean and the largest of the differences' sizes, in percent."""
    sizes = [abs(100 * difference) for difference in differences]
    return {"mean": round(sum(sizes) / len(sizes), 2), "worst": round(max(sizes), 2)}


if __name__ == "__main__":
    main()

"""How well the closed form agrees with the simulation, on random runs: ``python -m benchmarks.agreement``.

Writes each method's differences, on average and at worst, beside the closed form, which quotes them in its answers.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from typing import Any

from rich.console import Console
from rich.progress import track

from peftscope.errors import InputError
from peftscope.execution.libraries import without_hub_kernels
from peftscope.memory.answer import AGREEMENT_FILE, answer_by_formula
from peftscope.memory.base import Model
from peftscope.memory.question import Question, ask
from peftscope.methods import METHODS
from peftscope.models.presets import PRESETS

ARCHITECTURES = (
    "llama-2-7b",
    "llama-3.2-1b",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "phi-3-mini",
    "gemma-2-2b",
    "gemma-3-1b",
    "mistral-7b",
    "olmo-2-1b",
    "smollm2-1.7b",
    "smollm3-3b",
    "granite-3.1-2b",
)
"""One for each kind of layer that closed forms know: grouped keys, biases, norms of queries and keys, fused layers,
soft caps, sliding windows, tied embeddings, norms after a layer, layers without positions, multipliers."""
FEWEST_LAYERS = {"smollm3-3b": 4, "gemma-3-1b": 6}
"""Models whose layers differ have one of each kind; the others have two to four layers."""

SAVED = (("embed_tokens",), ("embed_tokens", "lm_head"))
"""Modules that are trained beside an adapter."""

ROUNDS = 17
"""Each round asks about every method once."""
FULL_DEPTH = 20
"""The number of questions about whole models."""


def random_question(method: str, source: random.Random, whole: bool = False) -> Question:
    """Returns a question about a method on one of the architectures, cut to few layers so that it is simulated fast."""
    while True:
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
        try:
            return ask(Model(name, shape.to_config(), shape), options, responses=source.randint(1, options["seq_len"]))
        except InputError:  # a combination that cannot be
            continue


def random_questions(seed: int, rounds: int = ROUNDS) -> Iterator[Question]:
    """Yields random questions, each method in turn; the seed decides all of them."""
    source = random.Random(seed)
    for _ in range(rounds):
        for method, description in METHODS.items():
            if description.trains and description.closed_form:
                yield random_question(method, source)


def whole_questions(seed: int) -> Iterator[Question]:
    """Yields random questions about models at their full depth, the methods in turn."""
    source = random.Random(seed)
    methods = cycle(name for name, description in METHODS.items() if description.trains and description.closed_form)
    for method in islice(methods, FULL_DEPTH):
        yield random_question(method, source, whole=True)


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
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    questions, wholes = list(random_questions(seed=0)), list(whole_questions(seed=0))
    console = Console(stderr=True)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        asked = track(pool.map(differences, questions), "simulating cut models", len(questions), console=console)
        for question, difference in zip(questions, asked, strict=True):
            found[question.spec.method.name].append(difference)
        whole = list(track(pool.map(differences, wholes), "whole models", len(wholes), console=console))
    methods: dict[str, dict[str, Any]] = {
        method: {
            "questions": len(found[method]),
            "allocated_percent": _mean_and_worst(one["peak"] for one in found[method]),
            "reserved_percent": _mean_and_worst(one["reserved"] for one in found[method]),
        }
        for method in sorted(found)
    }
    reserved = _mean_and_worst(one["reserved"] for ones in found.values() for one in ones)
    allocated = _mean_and_worst(one["peak"] for ones in found.values() for one in ones)
    content = {
        "questions": len(questions),
        "allocated_percent": allocated,
        "whole_models": {
            "questions": len(whole),
            "allocated_percent": _mean_and_worst(one["peak"] for one in whole),
            "reserved_percent": _mean_and_worst(one["reserved"] for one in whole),
        },
        "worst_percent": {method: figures["allocated_percent"]["worst"] for method, figures in methods.items()},
        "worst_reserved_percent": reserved["worst"],
        "mean_reserved_percent": reserved["mean"],
        "methods": methods,
    }
    AGREEMENT_FILE.write_text(json.dumps(content, indent=2) + "\n")


def _mean_and_worst(differences: Iterable[float]) -> dict[str, float]:
    """Returns the mean and the largest of the differences' sizes, in percent."""
    sizes = [abs(100 * difference) for difference in differences]
    return {"mean": round(sum(sizes) / len(sizes), 2), "worst": round(max(sizes), 2)}


if __name__ == "__main__":
    main()

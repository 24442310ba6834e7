"""The sharpness of the loss in an adapter's parameters before training."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from peftscope.analysis.study import StudyResults
from peftscope.claims.checks.training import _over_rates, _spearman
from peftscope.claims.measurement import Measurement, NotRunError, geometric_mean_of
from peftscope.claims.subjects import fetched, fetched_model, flat
from peftscope.data.batching import collate, tokenise
from peftscope.data.tasks import read_split, task_folder
from peftscope.planning.published import published_records
from peftscope.spec import RunSpec
from peftscope.training.build import seed_everything

Start = Literal["lora", "pissa"]


def sharpness_ratio(
    model: str, task: str, method: Start, against: Start, alpha: float, batches: int, items: int, steps: int
) -> Measurement:
    """Returns the largest eigenvalue of the loss's Hessian at one method's start over that at another's.

    The Hessian is that of the mean loss of response tokens, in all parameters of the adapters (rank 8 on all linear
    layers). The value is the geometric mean over batches, with its interval. Source: Lee et al. 2026, arXiv 2602.04998.

    Args:
        alpha: The alpha of both, so that both have one scale.
        steps: The steps of Lanczos' iteration; its largest value approaches the eigenvalue from below.
    """
    about, found = {"model": model, "task": task, "learning_rate": 1e-4}, {}
    for name in (method, against):
        spec = RunSpec.model_validate({**about, "method": {"name": name, "alpha": alpha}})
        found[name] = _sharpness(spec, batches, items, steps)
    logs = [math.log(a / b) for a, b in zip(found[method], found[against], strict=True)]
    evidence = {f"mean of {name}": sum(each) / len(each) for name, each in found.items()}
    return geometric_mean_of(logs, evidence=evidence, model=f"{model}, {task}")


def rate_with_sharpness(study: str, arms: list[str], batches: int, items: int, steps: int) -> Measurement:
    """Returns Spearman's correlation over arms of the best learning rate with the largest eigenvalue at the start.

    The eigenvalue is that of the Hessian in all parameters that an arm trains, before training, as in
    ``sharpness_ratio``. The best rate, and the interval, are those of ``training.learning_rate_ratio``. The study is a
    published one.
    """
    results, records = StudyResults(study), published_records(study)
    specs = {arm: json.loads(records[results.arm_runs(arm)["run_id"].iloc[0]])["spec"] for arm in arms}
    values = {
        arm: math.exp(statistics.fmean(map(math.log, _sharpness(RunSpec.model_validate(spec), batches, items, steps))))
        for arm, spec in specs.items()
    }
    sharpness = list(values.values())
    found = _over_rates(results, tuple(arms), lambda best: _spearman(sharpness, best.T), 2000, lambda value: value)
    return replace(found, evidence={**found.evidence, **{f"largest eigenvalue, {arm}": v for arm, v in values.items()}})


def _sharpness(spec: RunSpec, batches: int, items: int, steps: int) -> list[float]:
    """Returns the largest eigenvalue before training on each of some batches of the task."""
    if not (task_folder(spec.task) / "train.jsonl").is_file():
        raise NotRunError(f"the items of {spec.task} are missing; run `peftscope make-task {spec.task}`")
    tokenizer = AutoTokenizer.from_pretrained(fetched(spec.model), local_files_only=True, trust_remote_code=False)
    examples = tokenise(read_split(spec.task, "train")[: batches * items], tokenizer, 128)
    groups = [collate(examples[start : start + items], 0) for start in range(0, batches * items, items)]
    base = fetched_model(spec.model, "AutoModelForCausalLM")
    base.set_attn_implementation("eager")  # fused attention has no second derivative
    base.requires_grad_(False)
    seed_everything(0)
    adapted = spec.method.build(base, spec)
    return [_largest_eigenvalue(adapted, batch, steps) for batch in groups]


def _largest_eigenvalue(model: Any, batch: Any, steps: int) -> float:
    """Returns the largest Ritz value of the loss's Hessian in the trained parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))

    return largest_ritz_value(gradient, parameters, steps)


def largest_ritz_value(gradient: Any, parameters: list[Any], steps: int) -> float:
    """Returns the largest Ritz value of the Jacobian of a gradient, which approaches its largest eigenvalue from below.

    Lanczos' iteration starts from a random direction, and every new direction is made orthogonal to all before it.
    """
    vector = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0))
    basis = [vector / vector.norm()]
    rows = torch.zeros(steps, steps, dtype=torch.float64)
    for step in range(steps):
        image = flat(torch.autograd.grad(gradient @ basis[-1], parameters, retain_graph=True, materialize_grads=True))
        for index, other in enumerate(basis):
            rows[index, step] = rows[step, index] = float(image @ other)
        for other in basis:
            image = image - (image @ other) * other
        basis.append(image / image.norm())
    return float(torch.linalg.eigvalsh(rows)[-1])

"""Writes the experiment that checks advice: tuning, pairs and an A/A arm. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from peftscope.data.tasks import find_task
from peftscope.errors import InputError, Problem
from peftscope.hardware.device import Device
from peftscope.layout import EXPERIMENTS, check_experiment_name
from peftscope.methods import METHODS
from peftscope.models.catalog import find_model
from peftscope.planning.experiment import RESERVED_NAMES, experiment_names
from peftscope.planning.sweep import Sweep, expand
from peftscope.report.advice.advise import Advice
from peftscope.report.advice.options import Option
from peftscope.report.advice.rules import Standing

STAND_IN = "two-digit-sums"
"""The task of an experiment for which none was named."""
STAND_IN_ITEMS = 6000
"""The most training items that are asked of it. It has a few hundred more."""
PAIRS = 5
"""The pairs of seeds of an experiment for which no number was given."""
ARM_FIELDS = ("batch_size", "gradient_accumulation", "checkpointing", "precision", "optimizer", "shards")
"""The fields in which arms may differ beside their method."""


def write_experiment(
    advice: Advice, name: str, card: str, device: Device, task: str | None = None, pairs: int = PAIRS
) -> tuple[Path, Sweep]:
    """Writes an experiment file and returns its path and its runs.

    The first arm is the advised method. The second is the next one that fits without a known loss, if there is one.

    Args:
        advice: The advice.
        name: The experiment's name.
        card: The card as it was asked for.
        device: The device for which the runs are listed.
        task: A task of tasks.yaml; None takes one that stands in for the user's data.
        pairs: The pairs of seeds.

    Raises:
        InputError: Nothing fits, the name is taken, the task is unknown, or the model cannot be named in an
            experiment.
    """
    if not advice.options:
        raise InputError(Problem("--write", "nothing fits, so there is nothing to run", "; ".join(advice.nearest)))
    check_experiment_name(name)
    if name in experiment_names() or name in RESERVED_NAMES:
        raise InputError(Problem("--write", f"{name} exists already", "choose another name"))
    find_model(advice.situation.model.name)
    if task:
        find_task(task, "--task")
    path = EXPERIMENTS / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    content = experiment_of(advice, card, task, pairs)
    path.write_text(_comments(advice, name, task) + yaml.safe_dump(content, sort_keys=False, width=120))
    try:
        return path, expand(name, device, assume_rates=True)
    except InputError:
        path.unlink()
        raise


def experiment_of(advice: Advice, card: str, task: str | None = None, pairs: int = PAIRS) -> dict[str, Any]:
    """Returns the content of the experiment file."""
    best, situation = advice.options[0], advice.situation
    beside = next(
        (
            option
            for option in advice.options
            if option.method != best.method
            and option.standing <= Standing.PAPERS
            and option.question.spec.seq_len == best.question.spec.seq_len
        ),
        None,
    )
    arms = [best, *([beside] if beside else [])]
    judged = min(256, max(16, situation.examples // 10))
    retention = situation.priority == "retention"
    fixed: dict[str, Any] = {
        "model": situation.model.name,
        "task": task or STAND_IN,
        **_fields(best, situation.gpus),
        "seq_len": best.question.spec.seq_len,
        "steps": best.steps,
        "schedule": "linear",
        "warmup_steps": max(1, best.steps // 20) if best.steps > 1 else 0,
        "validation_items": judged,
        "validation_every": max(1, best.steps // 8),
        "heldout_items": judged,
        "generation_items": min(64, judged),
        "retention_tokens": 2048 if retention else 0,
        "eval_batch_size": best.question.spec.batch_size,
        "probe_steps": 0,
    }
    if task is None and situation.examples < STAND_IN_ITEMS:
        fixed["train_items"] = situation.examples
    if retention:
        fixed["retention_every"] = fixed["validation_every"]
    name = best.method
    return {
        "title": f"Advice for {situation.model.name} on {situation.gpu.name}",
        "card": card,
        "fixed": {key: value for key, value in fixed.items() if key not in ("precision", "shards")},
        "runs": [{"method": "none", **_base_weights(arms), "seed": 0, "validation_every": 0}],
        "study": {
            "arms": {option.method: _arm(option, best, situation.gpus) for option in arms},
            "learning_rates": {option.method: list(option.settings.lines["learning_rate"].choice) for option in arms},
            "tuning_seeds": [100],
            "tuning": {"generation_items": 0, "validation_every": 0, **({"retention_every": 0} if retention else {})},
            "seeds": list(range(pairs)),
            "a_a": name,
            "controls": {name: ["shuffled-labels"]},
            "control_seeds": [0],
        },
    }


def _base_weights(arms: Sequence[Option]) -> dict[str, str]:
    """Returns the weights of the untouched base: in 4 bits where all arms have them so, since others may not fit."""
    return {"base_weights": "nf4"} if all(option.question.spec.method.quantization() for option in arms) else {}


def _fields(option: Option, cards: int) -> dict[str, Any]:
    """Returns the fields of a run of this option, whose batch is that of all cards that share its weights.

    Copies of the model on several cards become one, which accumulates the batches of all: a step is the same.
    """
    spec, shards = option.question.spec, option.spread_over
    accumulation = option.accumulation * cards // shards
    batch = {"batch_size": spec.batch_size * shards, "gradient_accumulation": accumulation, "shards": shards}
    return {name: batch.get(name, getattr(spec, name)) for name in ARM_FIELDS}


def _arm(option: Option, first: Option, cards: int) -> dict[str, Any]:
    """Returns the fields of an arm: its method, and what differs from the first arm's."""
    method = option.question.spec.method
    own = {"method": option.method, **method.model_dump(mode="json", exclude={"name"}, exclude_unset=True)}
    fields, fixed = (_fields(each, cards) for each in (option, first))
    own |= {name: value for name, value in fields.items() if value != fixed[name] and name != "precision"}
    if METHODS[option.method].trains_base:
        own["precision"] = fields["precision"]
    return own | ({"shards": fields["shards"]} if fields["shards"] > 1 else {})


def _comments(advice: Advice, name: str, task: str | None) -> str:
    asked = advice.situation
    lines = [
        f"Written by `peftscope advise --model {asked.model.name} --examples {asked.examples} ... --write {name}`.",
        "Each arm is tuned on seeds of its own and compared in pairs of fresh seeds. The first arm enters twice (A/A):",
        "a difference that is no larger than its own means nothing.",
    ]
    if task is None:
        lines += [
            f"{STAND_IN} stands in for your data: name your task in tasks.yaml, as experiments/README.md says, and",
            "put its name here under `task`; leave `train_items` out then.",
        ]
    return "".join(f"# {line}\n" for line in lines)

"""Tries every tuner of PEFT on the toy model, and writes its options and what it cannot do: ``make tuners``.

The options go to ``src/peftscope/methods/tuner_options.json``, the limits to ``tuner_limits.json`` beside it, where the
method reads them, and into ``docs/tuners.md``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import AutoConfig

from benchmarks.page import write_blocks
from peftscope.data.batching import Batch, Example, tokenise, training_batches
from peftscope.data.tasks import make_task, read_split
from peftscope.execution.merge import base_of_adapter
from peftscope.files.atomic import write_json
from peftscope.memory.probe import probe_training
from peftscope.memory.simulate import simulate
from peftscope.methods import tuner_options
from peftscope.models.catalog import model_folder
from peftscope.models.fetch import fetch_model
from peftscope.planning.experiment import Experiment, experiment_path, read_experiment
from peftscope.planning.resolve import Resolver
from peftscope.spec import RunSpec
from peftscope.training.build import build_model, seed_everything
from peftscope.training.checkpoint import Checkpoints
from peftscope.training.load import attention, load_base, load_tokenizer
from peftscope.training.log import TrainingLog
from peftscope.training.loop import train
from peftscope.training.signals import Interrupted
from peftscope.training.step import TrainedModel, forward_loss

PAGE = Path("docs/tuners.md")
EXPERIMENT = "all-tuners"
STEPS, STOP = 6, 3

OURS = {
    "adalora": "its ranks are allotted between steps; use the method adalora",
    "xlora": "it mixes adapters that were trained before, which a run here does not have",
    "poly": "its forward pass needs the number of a task, which batches here do not have",
}
"""Tuners that need more than batches, and what."""


class Fault(Exception):
    """A check that ran and did not give what it must."""


def tuners() -> list[str]:
    """Returns the tuners without virtual tokens, by name."""
    return sorted(tuner for tuner, options in tuner_options.tuners().items() if options is not None)


def options_of_peft() -> dict[str, list[dict[str, Any]] | None]:
    """Returns the options of every tuner of the installed PEFT in PEFT's order; None for those with virtual tokens."""
    from peft import PeftConfig, PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    common = {field.name for field in dataclasses.fields(PeftConfig)}
    found: dict[str, list[dict[str, Any]] | None] = {}
    for kind, configuration in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        hints, options = get_type_hints(configuration), []
        for field in dataclasses.fields(configuration):
            spelled = spelled_type(hints[field.name])
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if field.name not in common and spelled and not hasattr(default, "__dataclass_fields__"):
                options.append({"name": field.name, "type": spelled, "default": default})
        found[kind.value.lower()] = None if issubclass(configuration, PromptLearningConfig) else options
    return found


def spelled_type(kind: Any) -> str:
    """Returns an annotation without classes of PEFT's own, whose values cannot be written in a file."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        known = filter(None, map(spelled_type, parts))
        # Sorted, because typing's cache gives a union in the order in which some other module wrote it first.
        return " | ".join(sorted(known, key=lambda part: (part == "None", part)))
    if get_origin(kind) is Literal:
        return f"Literal[{', '.join(map(repr, parts))}]"
    if parts:
        return f"{get_origin(kind).__name__}[{', '.join(map(spelled_type, parts))}]"
    if kind is NoneType:
        return "None"
    return str(kind.__name__) if kind in (bool, int, float, str, list, dict, tuple, set) else ""


def listed_fields(tuner: str) -> dict[str, Any]:
    """Returns the options and the learning rate that the experiment with all tuners gives one of them."""
    runs = {run.get("tuner"): run for run in read_experiment(experiment_path(EXPERIMENT)).runs}
    return {name: value for name, value in runs.get(tuner, {}).items() if name in ("options", "learning_rate")}


def spec_of(tuner: str, **values: Any) -> RunSpec:
    """Returns a short run of a tuner on the toy model."""
    short = {"model": "toy", "task": "two-digit-sums", "precision": "fp32", "steps": STEPS, "batch_size": 8}
    run = {"method": "peft", "tuner": tuner, "seed": 0, **listed_fields(tuner)}
    return Resolver(Experiment(), Path("tuners")).spec({**short, **run, **values}, "tuners")


@cache
def examples() -> tuple[list[Example], int]:
    """Returns the task's examples, and the padding token."""
    spec = spec_of("lora")
    tokenizer = load_tokenizer(spec)
    return tokenise(read_split(spec.task, "train"), tokenizer, spec.seq_len), tokenizer.pad_token_id


def batches_of(spec: RunSpec, count: int, seed: int = 0) -> list[Batch]:
    """Returns batches of different lengths."""
    items, pad = examples()
    return list(islice(training_batches(items, seed=seed, batch_size=spec.batch_size, pad_token_id=pad), count))


def trained(spec: RunSpec, folder: Path, stop: int | None = None) -> tuple[TrainedModel, list[float | None]]:
    """Returns a trained model and its losses; ``stop``: after so many steps, and started again from the checkpoint."""
    batches = batches_of(spec, 2) * spec.steps  # two batches, so that a loss that falls says something

    def attempt(after_step: Callable[[int], None]) -> tuple[TrainedModel, list[float | None]]:
        built, log = build_model(load_base(spec), spec), TrainingLog()
        seed_everything(spec.seed)
        train(built, iter(batches), spec, log, Checkpoints(folder, spec), after_step=after_step)
        return built, log.nll

    def interrupt(step: int) -> None:
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    if stop:
        with suppress(Interrupted):
            attempt(interrupt)
    return attempt(lambda step: None)


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """Returns the logits of a batch in evaluation mode."""
    model.eval()
    with torch.no_grad(), attention(model, "sdpa"):
        logits: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits.float()


def check_training(tuner: str, **values: Any) -> None:
    """Raises Fault unless the loss falls and the base keeps its values."""
    spec = spec_of(tuner, **values)
    with TemporaryDirectory() as folder:
        model, nll = trained(spec, Path(folder))
    if not min(nll[-2:]) < nll[0]:  # type: ignore[type-var]
        raise Fault(f"the loss does not fall: {nll[0]:.3f} to {nll[-1]:.3f}")
    fresh = build_model(load_base(spec), spec).model
    for (name, after), before in zip(model.model.named_parameters(), fresh.parameters(), strict=True):
        if not after.requires_grad and not torch.equal(after, before):
            raise Fault(f"the frozen {name} changes")


def check_four_bits(tuner: str) -> None:
    """Raises what stops training on a base in NF4, plain and with products in bf16."""
    try:
        check_training(tuner, precision="bf16", base_weights="nf4")
    except Exception:  # autocast alone joins an adapter in fp32 to a base that computes in bf16
        check_training(tuner, precision="bf16", base_weights="nf4", autocast=True)


def check_reload(tuner: str) -> None:
    """Raises Fault unless the saved adapter on its base gives the trained model's logits."""
    from peft import PeftModel

    spec = spec_of(tuner)
    with TemporaryDirectory() as folder:
        model = trained(spec, Path(folder) / "checkpoints")[0].model
        (batch,) = batches_of(spec, 1, seed=9)
        wanted = logits_of(model, batch)
        spec.method.save(model, Path(folder) / "adapter")
        reloaded = logits_of(PeftModel.from_pretrained(base_of_adapter(spec), Path(folder) / "adapter"), batch)
    if not torch.equal(reloaded, wanted):
        raise Fault(f"the loaded adapter gives other logits, by {float((reloaded - wanted).abs().max()):.1e}")


def check_resuming(tuner: str) -> None:
    """Raises Fault unless a run that was stopped ends as one that was not, to the last bit."""
    spec = spec_of(tuner)
    with TemporaryDirectory() as folder:
        whole, losses = trained(spec, Path(folder) / "whole")
        parts, losses_in_parts = trained(spec, Path(folder) / "parts", stop=STOP)
    if losses_in_parts != losses:
        raise Fault("the losses after the restart are others")
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        if not torch.equal(one, other):
            raise Fault(f"{name} differs after the restart")


def check_merging(tuner: str) -> None:
    """Raises Fault unless the merged model gives the trained model's logits."""
    spec = spec_of(tuner)
    with TemporaryDirectory() as folder:
        model = trained(spec, Path(folder))[0].model
    (batch,) = batches_of(spec, 1, seed=9)
    wanted = logits_of(model, batch)
    merged = logits_of(model.merge_and_unload(), batch)
    if (error := float((merged - wanted).norm() / wanted.norm())) > 1e-4:
        raise Fault(f"the merged model's logits differ by {error:.1%}")


def check_seed(tuner: str) -> None:
    """Raises Fault unless another seed draws another start."""

    def start(seed: int) -> list[torch.Tensor]:
        spec = spec_of(tuner, seed=seed)
        model = build_model(load_base(spec), spec).model
        return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]

    if all(torch.equal(one, other) for one, other in zip(start(0), start(1), strict=True)):
        raise Fault("every seed gives the same start")


def check_start(tuner: str) -> None:
    """Raises Fault unless the untrained model gives the base's logits."""
    spec = spec_of(tuner)
    (batch,) = batches_of(spec, 1)
    wanted = logits_of(load_base(spec), batch)
    start = logits_of(build_model(load_base(spec), spec).model, batch)
    if not torch.allclose(start, wanted, rtol=1e-4, atol=1e-4):
        raise Fault("the untrained adapter changes the outputs")


def check_recomputation(tuner: str) -> None:
    """Raises Fault unless every trained value gets the same gradient with recomputed activations."""

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        spec = spec_of(tuner, checkpointing=checkpointing)
        model = build_model(load_base(spec), spec).model
        model.train()
        seed_everything(spec.seed)
        forward_loss(model, batches_of(spec, 1)[0], spec).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    if plain.keys() != recomputed.keys():
        raise Fault("some values get no gradient")
    for name, gradient in plain.items():
        if not torch.allclose(gradient, recomputed[name], rtol=1e-4, atol=1e-6):
            raise Fault(f"{name} gets another gradient")


def check_simulation(tuner: str) -> None:
    """Raises Fault unless the simulated peaks are the tracked ones, to the byte."""
    spec = spec_of(tuner, probe_steps=2)
    (batch,) = batches_of(spec, 1)
    config = AutoConfig.from_pretrained(model_folder("toy"), local_files_only=True, trust_remote_code=False)
    simulated = {phase: peak.size for phase, peak in simulate(spec, config, [batch] * 2)[0].peaks().items()}
    tracked, _ = probe_training(build_model(load_base(spec), spec), batch, spec)
    for phase, size in tracked.items():
        if simulated[phase] != size:
            raise Fault(f"{phase}: {simulated[phase] / size - 1:+.1%} beside the tracked peak")


CHECKS: dict[str, Callable[[str], None]] = {
    "train": check_training,
    "bf16": lambda tuner: check_training(tuner, precision="bf16"),
    "4-bit": check_four_bits,
    "reload": check_reload,
    "resume": check_resuming,
    "merge": check_merging,
    "recompute": check_recomputation,
    "seed": check_seed,
    "start": check_start,
    "simulate": check_simulation,
}


def reason_of(error: BaseException) -> str:
    """Returns what went wrong, with the line of the library that stopped it."""
    if isinstance(error, Fault):
        return str(error)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if "site-packages" in frame.filename]
    own = [frame for frame in frames if "/peft/" in frame.filename] or frames
    place = ""
    if own:
        path = own[-1].filename.partition("site-packages/")[2]
        place = f" ({path}:{own[-1].lineno}: `{(own[-1].line or '').strip()}`)"
    text = re.sub(r"\s+", " ", str(cause) or type(cause).__name__)
    return f"{text[:160]}{place}"


def limits_of(tuner: str) -> dict[str, str]:
    """Returns what a tuner cannot do, with the reason. One that does not train is not asked for more."""
    if tuner in OURS:
        return {"train": OURS[tuner]}
    faults = {}
    for what, check in CHECKS.items():
        try:
            check(tuner)
        except Exception as error:  # any tuner may fail in its own way: that is the question
            faults[what] = reason_of(error)
            if what == "train":
                break
    return faults


def render(limits: dict[str, dict[str, str]], peft: str) -> str:
    """Returns the table of all tuners of a version of PEFT and, below it, the reason of each no."""
    lines = [f"| tuner | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    reasons = []
    for tuner in tuners():
        own = limits.get(tuner, {})
        cells = ["no" if what in own else "" if "train" in own else "yes" for what in CHECKS]
        lines.append(f"| `{tuner}` | {' | '.join(cells)} |")
        reasons += [f"- `{tuner}`, {what}: {own[what]}" for what in CHECKS if what in own]
    return "\n".join([f"Tried with PEFT {peft}.", "", *lines, "", *reasons])


def main() -> None:
    """Writes the options, tries the tuners that are named, or all, and writes limits and page."""
    warnings.simplefilter("ignore")
    write_json(tuner_options.OPTIONS_FILE, options_of_peft())
    fetch_model("toy")
    make_task("two-digit-sums")
    limits = dict(tuner_options.limits())
    tuner_options.limits().clear()  # what was found before refuses nothing now
    for tuner in sys.argv[1:] or tuners():
        limits[tuner] = limits_of(tuner)
        print(tuner, json.dumps(limits[tuner], indent=1), flush=True)
        known = {name: limits[name] for name in tuners() if limits.get(name)}
        write_json(tuner_options.LIMITS_FILE, {"peft": version("peft"), "tuners": known})
        write_blocks({"tuners": render(known, version("peft"))}, PAGE)


if __name__ == "__main__":
    main()

"""The API: what ``import peftscope`` gives. No torch, pandas or transformers until a function needs them.

Every function leaves the process as it found it, but for the libraries that it imported. Paths are relative to the
working folder; where that has no ``experiments/``, those are read that peftscope came with. What needs a package that
is not installed says so in an ``InputError``, with the extra that has it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscope.errors import InputError, Problem, close_match, needs, raise_any, shown
from peftscope.execution.libraries import offline, quiet_libraries
from peftscope.files.hub import without_hub_kernels
from peftscope.record import RunRecord
from peftscope.spec import RunSpec

if TYPE_CHECKING:
    import pandas as pd

    from peftscope.hardware.device import Device
    from peftscope.memory.answer import Answer
    from peftscope.sizing.fit import Fit

__all__ = ["InputError", "RunRecord", "RunSpec", "fit", "load_results", "memory", "run"]


@needs("train")
def run(spec: RunSpec | Mapping[str, Any], folder: str | Path) -> RunRecord:
    """Trains and measures one run in this process, and returns its record.

    The model, the task and the benchmarks are fetched into ``resources/`` if they are not there. A run that has ended
    in this folder is not made again, and one that was stopped goes on from its checkpoint.

    Args:
        spec: The run, or its fields as an experiment file has them: ``{"model": "toy", "method": "lora", "rank": 4}``.
            What they leave out comes from ``experiments/defaults.yaml``, the device from this machine.
        folder: The run's own; gets ``record.json``, ``spec.json``, ``items.jsonl`` (one row a test item) and
            ``adapter/``.

    Returns:
        The record, with losses in nats a token, memory in bytes, times in seconds from this call on. ``status`` is
        ``ok``, ``oom``, ``diverged`` or ``failed``, with a ``reason``. ``peak_resident_bytes`` is that of the whole
        process.

    Raises:
        InputError: The fields, this machine, or the files that the run reads are not as they should be, or another run
            has ended in this folder.
        KeyboardInterrupt: The run was stopped, after ``interrupted.json`` was written.
        OSError: The disk is full, or does not let the run write; ``interrupted.json`` says so where it could.
    """
    began = time.perf_counter()
    from peftscope.execution.job import check_cards
    from peftscope.files.atomic import write_json
    from peftscope.files.lock import locked
    from peftscope.hardware.bf16 import chosen_way
    from peftscope.hardware.device import detect_device
    from peftscope.planning.checks import check_run, inputs
    from peftscope.planning.resolve import spec_from
    from peftscope.record import Seconds, check_place, finished_record, state_folder, write_record
    from peftscope.spec import run_id
    from peftscope.training.signals import Interrupted

    if not isinstance(spec, RunSpec):
        if not isinstance(spec, Mapping):
            remedy = 'give fields, as in {"model": "toy", "method": "lora"}, or a RunSpec'
            raise InputError(Problem("spec", f"no fields of a run (got {shown(spec)})", remedy))
        spec = spec_from(dict(spec), Path("spec"), detect_device())
    if spec.shards > 1:
        message = f"a run of {spec.shards} processes cannot be made in one"
        raise InputError(Problem("shards", message, "use shards=1, or the command `peftscope run`"))
    chosen_way()  # raises for a wrong wish
    check_run(spec, "spec")
    folder = Path(folder)
    check_place(folder, run_id(spec))
    with quiet_libraries(), without_hub_kernels(), locked(state_folder(folder) / "lock"):
        write_json(folder / "spec.json", spec.model_dump(mode="json"))
        if record := finished_record(folder, run_id(spec)):
            write_record(folder / "record.json", record)
            return record
        with _generators_kept(spec.device):
            # Before libraries are kept offline: one that is first imported then would stay so.
            from peftscope.execution.phases import Phases
            from peftscope.execution.run import execute

            if spec.generation_items or spec.benchmarks:
                import peftscope.evaluation.answers  # noqa: F401
            if spec.device == "cuda":
                check_cards(1)
            resources = inputs(spec)
            for resource in resources:
                resource.fetch()
            verifying = time.perf_counter()
            for resource in resources:
                resource.verify()
            phases = Phases(spec.device, began, Seconds(verify=time.perf_counter() - verifying))
            try:
                with offline():
                    return execute(spec, folder, phases)
            except Interrupted as stopped:
                raise stopped.__cause__ or KeyboardInterrupt(str(stopped)) from None


@contextmanager
def _generators_kept(device: Device) -> Iterator[None]:
    """Puts the states of the random generators of Python, NumPy and torch back after this context."""
    import numpy
    import torch

    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(None if device == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


@needs("simulate")
def memory(
    model: str | Path,
    method: str = "lora",
    *,
    simulate: bool = False,
    response_len: int | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    **options: Any,
) -> Answer:
    """Returns what a training run takes on a card, without one, as ``peftscope memory`` does.

    Args:
        model: A preset (``llama-2-7b``, ...), the path of a ``config.json``, a name in models.yaml, or a hub id.
        method: ``full``, ``lora``, ``qlora``, ``dora``, ...
        simulate: Whether the training step itself is run on tensors without data, which loads torch and takes
            seconds; otherwise the closed form answers, where the method has one.
        response_len: Positions of a sequence that carry a loss, for ``loss_path="response_only"``; default: half.
        gpu: The card, for its CUDA context: ``rtx4090``, ``a100``, ..., or its memory, as in ``24GiB``.
        gpus: Cards over which weights, gradients and states are sharded.
        options: Fields of the method (``rank``, ``targets``, ...) and of a run (``batch_size``, ``seq_len``,
            ``precision``, ``optimizer``, ``checkpointing``, ...).

    Returns:
        The answer, with peaks in bytes, the phase in which the allocated one is, and its parts, which add up to it.

    Raises:
        InputError: An option is unknown or does not fit, or the closed form does not know the model's family.
    """
    from peftscope.hardware.cards import find_gpu
    from peftscope.memory.answer import answer_by_formula
    from peftscope.memory.base import describe_model
    from peftscope.memory.question import ask

    _check_options(options)
    card = None if gpu is None else find_gpu(_text("gpu", gpu))
    options["method"] = _text("method", method)
    question = ask(describe_model(_text("model", model)), options, responses=response_len, gpu=card, gpus=gpus)
    if not simulate and question.spec.method.closed_form is not None:
        return answer_by_formula(question)
    with quiet_libraries(), without_hub_kernels():
        from peftscope.memory.simulate import answer_by_simulation

        with offline():
            return answer_by_simulation(question)


@needs("simulate")
def fit(
    gpu: str,
    models: str | Path | Sequence[str | Path] | None = None,
    methods: str | Sequence[str] | None = None,
    *,
    gpus: int = 1,
    **options: Any,
) -> list[Fit]:
    """Returns which methods fit on a card, as ``peftscope fit`` does; some seconds for all methods of a model.

    Args:
        gpu: The card: ``rtx4090``, ``a100``, ..., or its memory, as in ``24GiB``.
        models: One model or several, as ``memory`` takes them; None: every preset.
        methods: One method or several; None: all that train and have a closed form.
        gpus: Cards over which weights, gradients and states are sharded.
        options: As of ``memory``; an option of a method goes only to methods that have it.

    Returns:
        One fit for each model and method, in their order, with peaks and headroom in bytes, the largest batch, length
        and rank that fit, and what would help where it does not.

    Raises:
        InputError: A name or an option is unknown, or nothing can run as asked.
    """
    from peftscope.hardware.cards import find_gpu
    from peftscope.memory.base import describe_model
    from peftscope.models.presets import PRESETS
    from peftscope.sizing.fit import fit_methods, known_methods

    _check_options(options)
    names = [models] if isinstance(models, str | Path) else list(PRESETS if models is None else models)
    chosen = known_methods(methods if methods is None or isinstance(methods, str) else ",".join(methods))
    described = [describe_model(_text("models", name)) for name in names]
    return list(fit_methods(described, chosen, options, find_gpu(_text("gpu", gpu)), gpus))


def _text(argument: str, value: object) -> str:
    """Returns an argument that is text or a path as text; it raises InputError for anything else."""
    if isinstance(value, str | Path):
        return str(value)
    remedy = {
        "method": 'name it, and give its fields as options, as in memory("llama-2-7b", "lora", rank=4)',
        "gpu": 'name the card or its memory, as in "rtx4090" or "24GiB"',
    }
    wrong = Problem(argument, f"not a text (got {shown(value)})", remedy.get(argument, 'name it, as in "llama-2-7b"'))
    raise InputError(wrong)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises InputError for names that are no field of a run or a method that memory depends on."""
    from peftscope.memory.question import BESIDE_OPTIONS, METHOD_OPTIONS

    apart = {"model", "task", "method", "device", "learning_rate"}
    known = {*METHOD_OPTIONS, *BESIDE_OPTIONS, *RunSpec.model_fields} - apart
    raise_any(Problem(name, "unknown option", close_match(name, known)) for name in options if name not in known)


@needs("report")
def load_results(name: str, comparison: str | None = None) -> pd.DataFrame:
    """Returns the runs of an experiment, one row each, from ``runs.csv``.

    Args:
        name: The experiment. The file is that of ``results/NAME/`` or, if there is none, of
            ``results/published/NAME/``, in the working folder or as peftscope came with it.
        comparison: Only the runs of this comparison: ``grid``, ``ladder-0-rank``, ``arm-lora``, ... A mean over a whole
            table mixes comparisons.

    Returns:
        The table. Units end the names of columns (``peak_tensor_bytes``, ``train_seconds``, ...); ``attrs["source"]``
        is the path of the file.

    Raises:
        InputError: There is no such file or comparison, the name cannot be an experiment's, or pandas is not installed
            (``pip install 'peftscope[report]'``).
    """
    from peftscope.analysis.collect import read_runs
    from peftscope.layout import folder_with, results_folder

    folder = folder_with(name, "runs.csv") or results_folder(name)
    runs = read_runs(name, folder)
    if comparison is not None:
        members = runs["comparisons"].str.split()
        known = sorted(members.explode().dropna().unique())
        if comparison not in known:
            path = str(folder / "runs.csv")
            raise InputError(Problem(path, f"no such comparison (got '{comparison}')", f"known: {', '.join(known)}"))
        runs = runs[[comparison in names for names in members]]
    runs.attrs["source"] = (folder / "runs.csv").as_posix()
    return runs

"""Executes one run, from its spec to its record: load, prepare, train, evaluate, save, probe.

A run writes a record however it ends, because a failure is a result too.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from peftscope.data.batching import (
    Batch,
    Example,
    digested,
    evaluation_batches,
    tokenise,
    training_batches,
    widest_batch,
)
from peftscope.data.sources import Item, RandomStringsSource
from peftscope.data.tasks import draw_items, find_task, read_split, shuffle_responses
from peftscope.errors import InputError
from peftscope.evaluation.heldout import base_answers, heldout_nll, mean_nll, nll_and_shift
from peftscope.evaluation.latency import time_passes
from peftscope.evaluation.retention import bits_per_byte
from peftscope.evaluation.updates import update_spectra, weights_before
from peftscope.execution.phases import Phases
from peftscope.execution.provenance import card_reading, provenance
from peftscope.execution.ranks import let_others_end_it, meeting_file, rank_folder
from peftscope.execution.scores import score_answers, score_benchmarks, write_items
from peftscope.execution.start import continue_adapter, merged_start, start_provenance
from peftscope.execution.unavailable import NOT_LIMITED, why_unavailable
from peftscope.files.manifest import file_sha256
from peftscope.files.storage import storage_problem
from peftscope.hardware.bf16 import bf16_products
from peftscope.hardware.meter import is_out_of_memory, limited_memory
from peftscope.memory.predict import predict_or_nothing
from peftscope.memory.probe import probe_evaluation, probe_training
from peftscope.memory.tracker import MemoryTracker, tensors_of
from peftscope.record import (
    FINAL,
    RESTORED,
    KeepWeights,
    RunRecord,
    Size,
    Status,
    clear_checkpoints,
    kept_path,
    state_folder,
    steps_at,
    write_record,
)
from peftscope.spec import RunSpec, run_id
from peftscope.training.build import build_model, compiled_layers, count_parameters, seed_everything
from peftscope.training.ceilings import measure_ceilings
from peftscope.training.checkpoint import Checkpoints
from peftscope.training.kept import write_kept
from peftscope.training.load import attention, load_base, load_tokenizer
from peftscope.training.log import TrainingLog
from peftscope.training.loop import Diverged, check_loss, train
from peftscope.training.shard import from_all, held_bytes, is_first, join, own_seed, shard, trained_state
from peftscope.training.signals import Interrupted
from peftscope.training.step import TrainedModel


@dataclass
class _Run:
    """The state of a run: its spec, where it writes, and what it has measured so far.

    Attributes:
        answers: What the base says on validation items, if the run is followed along its training.
        weights: The base's weights in that case, as far as updates can be told from them.
    """

    spec: RunSpec
    folder: Path
    phases: Phases
    checkpoints: Checkpoints
    record: RunRecord
    keep_weights: KeepWeights
    alone: bool
    keep_at: Sequence[float] = ()
    log: TrainingLog = field(default_factory=TrainingLog)
    answers: list[torch.Tensor] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Data:
    """The data of a run. ``heldout`` holds the tokenised ``items``."""

    tokenizer: Any
    training: list[Example]
    validation: list[Example]
    items: list[Item]
    heldout: list[Example]


@dataclass(frozen=True)
class _Widest:
    """The batches that take the most memory. ``training`` is None if nothing is trained."""

    training: Batch | None
    heldout: Batch


def _run_phases(run: _Run) -> None:
    """Runs all phases. Each one writes its measurements into the record."""
    phase, quality, trains = run.phases.phase, run.record.quality, run.spec.method.trains
    with phase("load"):
        data, base = _load(run)
    _time_latency(run, base, "base")
    if trains and run.spec.validation_every and run.spec.shards == 1:
        with phase("evaluate"), attention(base, run.spec.attention):
            run.answers = base_answers(base.eval(), data.validation, run.spec, data.tokenizer.pad_token_id)
    trained = _prepare(run, base)
    quality.retention_bits_per_byte_before = _score_retention(run, trained.model, data)
    with phase("predict"):
        widest = _predict(run, data)
    if trains:
        _train(run, trained, data, widest)
    with phase("evaluate"):
        _evaluate(run, trained, data)
        _save(run, trained.model)
    before = quality.retention_bits_per_byte_before
    quality.retention_bits_per_byte = _score_retention(run, trained.model, data) if trains else before
    _probe(run, trained, widest)
    _time_latency(run, trained.model, "apart", "merged")
    if trains and run.alone:
        # A model may leave no room on the card for this measurement. The run is valid without it.
        with phase("ceilings"), suppress(torch.OutOfMemoryError):
            run.record.ceilings = measure_ceilings(run.spec)


def execute(
    spec: RunSpec,
    folder: Path,
    phases: Phases,
    checkpoint_seconds: float = math.inf,
    rank: int = 0,
    keep_weights: KeepWeights = "adapters",
    alone: bool = True,
    keep_at: Sequence[float] = (),
) -> RunRecord:
    """Runs a spec and writes ``record.json``, ``items.jsonl`` and ``adapter/`` into ``folder``.

    Args:
        spec: The run.
        folder: The run's own folder. Outputs of an earlier attempt are removed.
        phases: The meter of the phases, started with the process, with imports already marked.
        checkpoint_seconds: The seconds between two checkpoints. An interrupted run resumes from the last one.
        rank: The rank of this process in a sharded run. All but the first write into a folder below.
        keep_weights: The trained weights to keep. Dropping them changes no measurement.
        alone: Whether no other run shares the machine. Only then are speed and the device's rates measured.
        keep_at: The shares of the training after which the trained weights are written. It changes no measurement.

    Returns:
        The record, with any status except ``interrupted``.

    Raises:
        Interrupted: A signal or a full disk stopped the run. ``interrupted.json`` is then written, and the job counts
            as not done.
        KeyboardInterrupt: The same, in a process that has Python's own handler of SIGINT.
    """
    meeting, folder = meeting_file(folder), rank_folder(folder, rank)
    for name in ("record.json", "interrupted.json", "items.jsonl"):
        (folder / name).unlink(missing_ok=True)
    (state_folder(folder) / RESTORED).unlink(missing_ok=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(run_id=run_id(spec), status="ok", spec=spec)
    checkpoints = Checkpoints(state_folder(folder), spec, checkpoint_seconds)
    run = _Run(spec, folder, phases, checkpoints, record, keep_weights, alone, keep_at)
    file = "record.json"
    try:
        record.provenance = provenance(spec, rank) | {"alone": alone, "start": start_provenance(spec)}
        if spec.shards > 1:
            join(spec, rank, meeting)
        with bf16_products(), _limited_memory(record):
            _run_phases(run)
    except (Interrupted, KeyboardInterrupt) as error:
        reason = str(error) or "stopped by SIGINT"
        record.status, record.reason, file = "interrupted", reason, "interrupted.json"
        raise
    except Diverged as error:
        record.status, record.reason = "diverged", str(error)
    except InputError as error:
        record.status, record.reason = "failed", str(error.problems[0])
        print(error, file=sys.stderr)
    except Exception as error:
        if reason := storage_problem(error):
            # The disk failed, not the run: once there is room, the run resumes from its last checkpoint.
            record.status, record.reason, file = "interrupted", reason, "interrupted.json"
            raise Interrupted(reason) from error
        traceback.print_exc()
        if spec.shards > 1 and rank == 0:
            record.status, record.reason, file = "interrupted", "stopped after a failure", "interrupted.json"
            let_others_end_it()
        status: Status = "oom" if is_out_of_memory(error) else "failed"
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        record.status, record.reason, file = status, reason, "record.json"
    finally:
        record.train_nll, record.train_loss = run.log.nll, run.log.loss
        record.quality.validation_curve = run.log.validation_nll
        record.quality.retention_curve = run.log.retention
        record.quality.shift_curve = run.log.shift
        if alone:
            run.log.write_speed(record.speed, spec)
        record.speed.matmul_share = _matmul_share(record)
        phases.finish()
        record.seconds, record.memory = phases.seconds, phases.memory
        record.memory.paged_state_bytes = run.log.paged_state_bytes
        record.unavailable = why_unavailable(record)
        if record.status in FINAL:
            # First into a folder that no rule declares: if the job is killed now, its retry only copies the record.
            write_record(state_folder(folder) / file, record)
        write_record(folder / file, record)
    if rank == 0:
        clear_checkpoints(folder)
    return record


@contextmanager
def _limited_memory(record: RunRecord) -> Iterator[None]:
    """Limits the run to the memory that its spec asks for, and says in the record what is left to tensors."""
    limit = record.spec.memory_limit_gib
    if limit is not None and record.spec.device == "cuda":
        with limited_memory(int(limit * 2**30)) as left:
            record.provenance["card"]["limited_to_bytes"] = left
            yield
        return
    if limit is not None:
        print(f"memory_limit_gib={limit:g}: {NOT_LIMITED}", file=sys.stderr)
    yield


def _load(run: _Run) -> tuple[_Data, Any]:
    """Returns the tokenised data and the base model."""
    spec = run.spec
    tokenizer = load_tokenizer(spec)
    task, quality = find_task(spec.task), run.record.quality
    examples = draw_items(read_split(spec.task, "train"), spec.train_items, spec.seed)
    if spec.shuffled_targets:
        examples = shuffle_responses(examples, spec.seed)
    items = (examples if task.judged_on == "train" else read_split(spec.task, "test"))[: spec.heldout_items]
    quality.judged_on, quality.judged_items = task.judged_on, len(items)
    if isinstance(task.source, RandomStringsSource):
        quality.judged_entropy_bits = len(items) * task.source.entropy_bits
    data = _Data(
        tokenizer=tokenizer,
        training=tokenise(examples, tokenizer, spec.seq_len) if spec.method.trains else [],
        validation=tokenise(read_split(spec.task, "validation")[: spec.validation_items], tokenizer, spec.seq_len),
        items=items,
        heldout=tokenise(items, tokenizer, spec.seq_len),
    )
    with _tracked_load(run) as loaded:
        base = load_base(spec)
        loaded.append(base)
    return data, base


def _prepare(run: _Run, base: Any) -> TrainedModel:
    """Returns the model to train, sharded if the run has several processes."""
    with run.phases.phase("initialise"), _tracked_load(run, base) as loaded:
        start = merged_start(base, run.spec)
        if run.answers:
            run.weights = weights_before(start, run.spec)
        trained = build_model(start, run.spec)
        continue_adapter(trained.model, run.spec)
        loaded.append(trained.model)
    trainable, total = count_parameters(trained.model)
    run.record.size = Size(initial_trainable_parameters=trainable, total_parameters=total)
    if run.spec.shards > 1:
        with run.phases.phase("initialise"):
            shard(trained.model, run.spec)
    return trained


def _score_retention(run: _Run, model: Any, data: _Data) -> float | None:
    model.eval()
    with run.phases.phase("evaluate"), attention(model, run.spec.attention):
        return bits_per_byte(model, data.tokenizer, run.spec) if run.spec.retention_tokens else None


def _predict(run: _Run, data: _Data) -> _Widest:
    """Writes the predicted peaks into the record, and returns the batches behind them."""
    spec, pad = run.spec, data.tokenizer.pad_token_id
    seen = islice(_batches(data, spec), spec.steps * spec.gradient_accumulation)
    training = widest_batch(seen) if spec.method.trains else None
    heldout = widest_batch(evaluation_batches(data.heldout, batch_size=spec.eval_batch_size, pad_token_id=pad))
    run.phases.memory.predicted = predict_or_nothing(spec, training, heldout)
    return _Widest(training, heldout)


def _train(run: _Run, trained: TrainedModel, data: _Data, widest: _Widest) -> None:
    spec, record = run.spec, run.record
    digest = hashlib.sha256()
    with run.phases.phase("train"), compiled_layers(trained.model, spec):
        seed_everything(own_seed(spec.seed if spec.init_seed is None else spec.init_seed, spec))
        rehearsal = widest.training if spec.device == "cuda" else None
        batches = digested(_batches(data, spec), digest)

        def after_step(step: int) -> None:
            _follow(run, trained, data, step)

        train(trained, batches, spec, run.log, run.checkpoints, rehearsal, after_step)
    if record.provenance["card"]:
        record.provenance["card"]["after_training"] = card_reading()
    record.train_batches_sha256 = digest.hexdigest()
    record.method_metrics = spec.method.metrics(trained.model)


def _follow(run: _Run, trained: TrainedModel, data: _Data, step: int) -> None:
    """Measures what the spec asks for along the training, and keeps weights, after a step.

    Raises:
        Diverged: The loss on the validation items is not finite, or far above that of a uniform guess, or the score on
            prose is not finite.
    """
    spec, model = run.spec, trained.model

    def is_due(every: int) -> bool:
        return bool(every) and step % every == 0 and step < spec.steps

    if is_due(spec.validation_every):
        with _evaluating(run, model):
            nll, run.log.shift[step] = _validate(run, trained, data)
        check_loss(nll, trained.vocab_size, spec, f"on validation items after step {step}")
        run.log.validation_nll[step] = nll
    if is_due(spec.retention_every):
        with _evaluating(run, model), attention(model, spec.attention):
            bits = bits_per_byte(model, data.tokenizer, spec)
        if not math.isfinite(bits):
            raise Diverged(f"the score on prose after step {step} is not a number")
        run.log.retention[step] = bits
    if step in steps_at(run.keep_at, spec.steps):
        with run.phases.aside("train", "evaluate"):
            write_kept(kept_path(run.folder, step), model)


@contextmanager
def _evaluating(run: _Run, model: Any) -> Iterator[None]:
    """Evaluates inside this context, in the middle of the training, and counts it to the phase ``evaluate``."""
    model.eval()
    with run.phases.aside("train", "evaluate"):
        yield
    model.train()


def _validate(run: _Run, trained: TrainedModel, data: _Data) -> tuple[float, dict[str, float]]:
    """Returns the mean nll of the validation items, in nats per response token, and how far their answers moved."""
    spec, pad = run.spec, data.tokenizer.pad_token_id
    with attention(trained.model, spec.attention):
        per_item, shift = nll_and_shift(trained.model, data.validation, spec, pad, run.answers)
    return mean_nll(per_item), shift


def _evaluate(run: _Run, trained: TrainedModel, data: _Data) -> None:
    """Writes the scores into the record, and the scores of each item into ``items.jsonl``."""
    spec, record, model = run.spec, run.record, trained.model
    pad = data.tokenizer.pad_token_id
    model.eval()
    if data.validation:
        record.quality.validation_nll, record.quality.shift = _validate(run, trained, data)
    if run.weights:
        record.updates = update_spectra(model, run.weights)
    with attention(model, spec.attention):
        per_item = heldout_nll(model, data.heldout, spec, pad)
        nll = mean_nll(per_item)
        if spec.method.trains:
            check_loss(nll, trained.vocab_size, spec, "on held-out items")
        answers = score_answers(model, data.tokenizer, spec, record, data.items)
        record.benchmarks = score_benchmarks(model, data.tokenizer, spec)
    write_items(run.folder / "items.jsonl", data.items, per_item, answers)
    quality = record.quality
    quality.heldout_nll, quality.heldout_tokens = nll, sum(item.tokens for item in per_item)
    quality.greedy_match = sum("0" not in item.argmax for item in per_item) / len(per_item)
    quality.token_accuracy = sum(item.argmax.count("1") for item in per_item) / quality.heldout_tokens


def _save(run: _Run, model: Any) -> None:
    """Writes the trained weights, and writes the checksums of the run's files into the record."""
    spec, record, adapter = run.spec, run.record, run.folder / "adapter"
    if spec.method.trains:
        state = trained_state(model) if spec.shards > 1 else None
        if is_first():
            spec.method.save(model, adapter, state)
        record.size.adapter_bytes = sum(path.stat().st_size for path in adapter.glob("*.safetensors"))
        record.size.trained_parameters = spec.method.final_trainable_parameters(model)
        keeps = run.keep_weights == "all" or (run.keep_weights == "adapters" and not spec.method.trains_base)
        record.weights = "kept" if keeps else "dropped"
        if not keeps:
            shutil.rmtree(adapter, ignore_errors=True)
    written = [run.folder / "items.jsonl", *sorted(adapter.glob("*.*"))]
    record.files = {path.relative_to(run.folder).as_posix(): file_sha256(path) for path in written}


def _probe(run: _Run, trained: TrainedModel, widest: _Widest) -> None:
    """Writes into the record what only a probe measures: the peaks of a step's parts, or each process's share."""
    spec, memory = run.spec, run.phases.memory
    if spec.shards > 1:
        run.phases.gather_ranks(held_bytes(trained.model), lambda mine: from_all(mine, spec))
        return
    if not spec.probe_steps:
        return
    on_cpu = spec.device == "cpu"
    # A full card may have no room for another optimizer; the run is good all the same.
    with run.phases.phase("probe"), nullcontext() if on_cpu else suppress(torch.OutOfMemoryError):
        if on_cpu:
            with attention(trained.model, spec.attention):
                memory.evaluate.peak_tensor_bytes = probe_evaluation(trained.model, widest.heldout, spec)
        if widest.training is not None and not spec.compile:
            peaks, memory.resident_tensor_bytes = probe_training(trained, widest.training, spec)
            if on_cpu:
                memory.train.peak_tensor_bytes = max(peaks.values())
            memory.forward_peak_tensor_bytes = peaks["forward"]
            memory.backward_peak_tensor_bytes = peaks["backward"]
            memory.optimizer_peak_tensor_bytes = peaks["optimizer"]


def _time_latency(run: _Run, model: Any, *states: str) -> None:
    """Puts the latency of a model into the record, as it is and merged; merging ends the model."""
    if not run.spec.latency_tokens:
        return
    latency = run.record.latency = run.record.latency or {}
    with run.phases.phase("latency"):
        for state in states:
            if state == "merged":
                with warnings.catch_warnings(action="ignore"):  # of 4-bit sums: here, only their time counts
                    model = model.merge_and_unload()
            latency |= {f"{state}_{name}": timing for name, timing in time_passes(model, run.spec).items()}


def _batches(data: _Data, spec: RunSpec) -> Iterator[Batch]:
    pack_to, pad = spec.seq_len if spec.packing else None, data.tokenizer.pad_token_id
    return training_batches(
        data.training, seed=spec.seed, batch_size=spec.batch_size, pad_token_id=pad, pack_to=pack_to
    )


@contextmanager
def _tracked_load(run: _Run, *alive: Any) -> Iterator[list[Any]]:
    """Tracks live bytes while the block makes a model. The block appends the model to the list to have it counted."""
    loaded: list[Any] = []
    if run.spec.device != "cpu":
        yield loaded
        return
    tracker = MemoryTracker(tensors_of(*alive))
    with tracker:
        yield loaded
    for tensor in tensors_of(*loaded):
        tracker.add(tensor)
    load = run.phases.memory.load
    load.peak_tensor_bytes = max(load.peak_tensor_bytes or 0, tracker.peak_bytes)


def _matmul_share(record: RunRecord) -> float | None:
    useful, rate = record.speed.useful_flops_per_second, record.ceilings.matmul_flops_per_second
    return useful / (rate * record.spec.shards) if useful is not None and rate else None

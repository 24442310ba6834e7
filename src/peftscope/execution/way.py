"""The way of a run through its phases. Each one takes what it needs and returns what it made."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from peftscope.data.batching import Batch, Example, evaluation_batches, tokenise, training_batches, widest_batch
from peftscope.data.sources import Item, RandomStringsSource
from peftscope.data.tasks import draw_items, find_task, read_split, shuffle_responses
from peftscope.evaluation.heldout import ItemLoss, base_answers, heldout_nll, mean_nll, nll_and_shift, write_items
from peftscope.evaluation.latency import time_passes
from peftscope.evaluation.retention import bits_per_byte
from peftscope.evaluation.updates import update_spectra, weights_before
from peftscope.execution.phases import Phases
from peftscope.execution.provenance import card_reading
from peftscope.execution.start import continue_adapter, merged_start
from peftscope.files.manifest import file_sha256
from peftscope.hardware.bf16 import chosen_way
from peftscope.hardware.device import processor_name
from peftscope.hardware.meter import if_room
from peftscope.memory.predict import code_digest, predict_or_nothing
from peftscope.memory.probe import probe_evaluation, probe_training
from peftscope.memory.tracker import MemoryTracker, tensors_of
from peftscope.record import Ceilings, KeepWeights, Quality, RunRecord, Size, Timing, kept_path, steps_at
from peftscope.spec import RunSpec
from peftscope.training.build import build_model, compiled_layers, count_parameters, seed_everything
from peftscope.training.ceilings import measure_ceilings
from peftscope.training.checkpoint import Checkpoints, write_kept
from peftscope.training.load import attention, load_base, load_tokenizer
from peftscope.training.log import TrainingLog
from peftscope.training.loop import Diverged, check_loss, train
from peftscope.training.shard import from_all, held_bytes, is_first, own_seed, shard, trained_state
from peftscope.training.step import TrainedModel


class _Data(NamedTuple):
    """The tokenised items of a run, and their tokenizer."""

    tokenizer: Any
    training: list[Example]
    validation: list[Example]
    heldout: list[Example]


class _Widest(NamedTuple):
    """The batches that take the most memory. ``training`` is None if nothing is trained."""

    training: Batch | None
    heldout: Batch


def run_phases(
    record: RunRecord,
    folder: Path,
    phases: Phases,
    log: TrainingLog,
    checkpoints: Checkpoints,
    keep_weights: KeepWeights,
    keep_at: Sequence[float],
) -> None:
    """Runs all phases. Each one returns what it made, and what is measured goes into the record as soon as it is known.

    So the record of a run that fails says what was measured until then.
    """
    spec, phase, trains, alone = record.spec, phases.phase, record.spec.method.trains, record.provenance["alone"]
    with phase("load"):
        tokenizer = load_tokenizer(spec)
        drawn, judged = _draw_items(spec)
        quality = record.quality = _describe_judged(spec, len(judged))
        data = _tokenise(spec, tokenizer, drawn, judged)
        with _tracked_load(spec, phases) as loaded:
            base = load_base(spec)
            loaded.append(base)
    timings: dict[str, Timing] = {}
    if spec.latency_tokens:
        record.latency = timings
    timings |= _time_latency(spec, phases, base, "base")
    answers = []
    if trains and spec.validation_every and spec.shards == 1:
        with phase("evaluate"), attention(base, spec.attention):
            answers = base_answers(base.eval(), data.validation, spec, tokenizer.pad_token_id)
    with phase("predict"):
        widest = _widest_batches(spec, data)
        phases.memory.predicted = predict_or_nothing(spec, *widest)
    # LoftQ's factors and the score of prose depend on the number of threads, so both belong to the turn.
    with phases.turn():
        trained, weights = _prepare(spec, phases, base, followed=bool(answers))
        model = trained.model
        trainable, total = count_parameters(model)
        record.size = Size(initial_trainable_parameters=trainable, total_parameters=total)
        if spec.shards > 1:
            with phase("initialise"):
                shard(model, spec)
        before = quality.retention_bits_per_byte_before = _score_retention(spec, phases, model, tokenizer, _alike(spec))
        if trains:

            def after_step(step: int) -> None:
                _follow(spec, phases, log, trained, data, answers, step)
                if step in steps_at(keep_at, spec.steps):
                    with phases.aside("train", "evaluate"):
                        write_kept(kept_path(folder, step), model)

            digest = _train(spec, phases, log, checkpoints, trained, data, widest, after_step)
            if phases.turns:
                record.ceilings = _measure_ceilings(spec, phases)
            if record.provenance["card"]:
                record.provenance["card"]["after_training"] = card_reading()
            record.train_batches_sha256 = digest
            record.method_metrics = spec.method.metrics(model)
        quality.retention_bits_per_byte = _score_retention(spec, phases, model, tokenizer) if trains else before
    with phase("evaluate"):
        model.eval()
        if data.validation:
            quality.validation_nll, quality.shift = _validate(spec, trained, data, answers)
        if weights:
            record.updates = update_spectra(model, weights)
        with attention(model, spec.attention):
            per_item = _score_heldout(spec, trained, data)
            generated: list[dict[str, Any]] = []
            if spec.generation_items:
                from peftscope.evaluation.answers import score_answers

                began = time.perf_counter()
                generated = score_answers(model, tokenizer, spec, judged)
                seconds = time.perf_counter() - began
                record.speed.generation_seconds = seconds if alone and not phases.turns else None
                quality.exact_match = sum(row["correct"] for row in generated) / len(generated)
                quality.exact_match_items = len(generated)
            if spec.benchmarks:
                from peftscope.evaluation.answers import score_benchmarks

                record.benchmarks = score_benchmarks(model, tokenizer, spec)
        write_items(folder / "items.jsonl", judged, per_item, generated)
        quality.heldout_nll, quality.heldout_tokens = mean_nll(per_item), sum(item.tokens for item in per_item)
        quality.greedy_match = sum("0" not in item.argmax for item in per_item) / len(per_item)
        quality.token_accuracy = sum(item.argmax.count("1") for item in per_item) / quality.heldout_tokens
        if trains:
            record.size.adapter_bytes = _save(spec, model, folder / "adapter")
            record.size.trained_parameters = spec.method.final_trainable_parameters(model)
            record.weights = _keep_or_drop(spec, folder / "adapter", keep_weights)
        record.files = _checksums(folder)
    _probe(spec, phases, trained, widest)
    for state in ("apart", "merged"):
        timings |= _time_latency(spec, phases, model, state)
    if trains and alone and not phases.turns:
        record.ceilings = _measure_ceilings(spec, phases)


def _measure_ceilings(spec: RunSpec, phases: Phases) -> Ceilings:
    """Returns the rates of the device; none where a model leaves no room on a card. The run is valid without them."""
    with phases.phase("ceilings"), if_room():
        return measure_ceilings(spec)
    return Ceilings()


def _draw_items(spec: RunSpec) -> tuple[list[Item], list[Item]]:
    """Returns the items to train on, and those that the run is judged on."""
    drawn = draw_items(read_split(spec.task, "train"), spec.train_items, spec.seed)
    if spec.shuffled_targets:
        drawn = shuffle_responses(drawn, spec.seed)
    judged = drawn if find_task(spec.task).judged_on == "train" else read_split(spec.task, "test")
    return drawn, judged[: spec.heldout_items]


def _describe_judged(spec: RunSpec, items: int) -> Quality:
    """Returns what so many judged items are; their scores come later."""
    task = find_task(spec.task)
    quality = Quality(judged_on=task.judged_on, judged_items=items)
    if isinstance(task.source, RandomStringsSource):
        quality.judged_entropy_bits = items * task.source.entropy_bits
    return quality


def _tokenise(spec: RunSpec, tokenizer: Any, drawn: list[Item], judged: list[Item]) -> _Data:
    return _Data(
        tokenizer=tokenizer,
        training=tokenise(drawn, tokenizer, spec.seq_len) if spec.method.trains else [],
        validation=tokenise(read_split(spec.task, "validation")[: spec.validation_items], tokenizer, spec.seq_len),
        heldout=tokenise(judged, tokenizer, spec.seq_len),
    )


def _prepare(
    spec: RunSpec, phases: Phases, base: Any, *, followed: bool
) -> tuple[TrainedModel, dict[str, torch.Tensor]]:
    """Returns the model to train, and the weights that its updates will be told from if it is followed."""
    weights = {}
    with phases.phase("initialise"), _tracked_load(spec, phases, base) as loaded:
        start = merged_start(base, spec)
        if followed:
            weights = weights_before(start, spec)
        trained = build_model(start, spec)
        continue_adapter(trained.model, spec)
        loaded.append(trained.model)
    return trained, weights


def _alike(spec: RunSpec) -> str:
    """Returns what decides the score of prose beside the first logits; nothing if others wait for this process."""
    run = spec.model, spec.revision, spec.retention_tokens, spec.start_from
    machine = processor_name(), torch.get_num_threads(), chosen_way(), code_digest()
    return repr((run, machine)) if spec.shards == 1 else ""


def _score_retention(spec: RunSpec, phases: Phases, model: Any, tokenizer: Any, alike: str = "") -> float | None:
    model.eval()
    with phases.phase("evaluate"), attention(model, spec.attention):
        return bits_per_byte(model, tokenizer, spec, alike) if spec.retention_tokens else None


def _widest_batches(spec: RunSpec, data: _Data) -> _Widest:
    seen = islice(_batches(data, spec), spec.steps * spec.gradient_accumulation)
    heldout = evaluation_batches(
        data.heldout, batch_size=spec.eval_batch_size, pad_token_id=data.tokenizer.pad_token_id
    )
    return _Widest(widest_batch(seen) if spec.method.trains else None, widest_batch(heldout))


def _train(
    spec: RunSpec,
    phases: Phases,
    log: TrainingLog,
    checkpoints: Checkpoints,
    trained: TrainedModel,
    data: _Data,
    widest: _Widest,
    after_step: Callable[[int], None],
) -> str:
    """Trains the model, and returns the SHA-256 of the batches."""
    digest = hashlib.sha256()
    with phases.phase("train"), compiled_layers(trained.model, spec):
        seed_everything(own_seed(spec.seed if spec.init_seed is None else spec.init_seed, spec))
        rehearsal = widest.training if spec.device == "cuda" else None
        batches = _digested(_batches(data, spec), digest)
        train(trained, batches, spec, log, checkpoints, rehearsal, after_step)
    return digest.hexdigest()


def _digested(batches: Iterator[Batch], digest: hashlib._Hash) -> Iterator[Batch]:
    """Yields the batches; the digest is that of their tokens in order."""
    for batch in batches:
        digest.update(batch.input_ids.numpy().tobytes())
        yield batch


def _follow(
    spec: RunSpec,
    phases: Phases,
    log: TrainingLog,
    trained: TrainedModel,
    data: _Data,
    answers: list[torch.Tensor],
    step: int,
) -> None:
    """Measures what the spec asks for along the training after a step, and writes it into the log.

    Raises:
        Diverged: The loss on the validation items is not finite, or far above that of a uniform guess, or the score on
            prose is not finite.
    """
    model = trained.model

    def is_due(every: int) -> bool:
        return bool(every) and step % every == 0 and step < spec.steps

    if is_due(spec.validation_every):
        with _evaluating(phases, model):
            nll, log.shift[step] = _validate(spec, trained, data, answers)
        check_loss(nll, trained.vocab_size, spec, f"on validation items after step {step}")
        log.validation_nll[step] = nll
    if is_due(spec.retention_every):
        with _evaluating(phases, model), attention(model, spec.attention):
            bits = bits_per_byte(model, data.tokenizer, spec)
        if not math.isfinite(bits):
            raise Diverged(f"the score on prose after step {step} is not a number")
        log.retention[step] = bits


@contextmanager
def _evaluating(phases: Phases, model: Any) -> Iterator[None]:
    """Evaluates inside this context, in the middle of the training, and counts it to the phase ``evaluate``."""
    model.eval()
    with phases.aside("train", "evaluate"):
        yield
    model.train()


def _validate(
    spec: RunSpec, trained: TrainedModel, data: _Data, answers: list[torch.Tensor]
) -> tuple[float, dict[str, float]]:
    """Returns the mean nll of the validation items, in nats per response token, and how far their answers moved."""
    model, pad = trained.model, data.tokenizer.pad_token_id
    with attention(model, spec.attention):
        per_item, shift = nll_and_shift(model, data.validation, spec, pad, answers)
    return mean_nll(per_item), shift


def _score_heldout(spec: RunSpec, trained: TrainedModel, data: _Data) -> list[ItemLoss]:
    """Returns the loss of each judged item.

    Raises:
        Diverged: Their mean is not finite, or far above that of a uniform guess, after a training.
    """
    per_item = heldout_nll(trained.model, data.heldout, spec, data.tokenizer.pad_token_id)
    if spec.method.trains:
        check_loss(mean_nll(per_item), trained.vocab_size, spec, "on held-out items")
    return per_item


def _save(spec: RunSpec, model: Any, adapter: Path) -> int:
    """Writes the trained weights into a folder, and returns their bytes."""
    state = trained_state(model) if spec.shards > 1 else None
    if is_first():
        spec.method.save(model, adapter, state)
    return sum(path.stat().st_size for path in adapter.glob("*.safetensors"))


def _keep_or_drop(spec: RunSpec, adapter: Path, keep_weights: KeepWeights) -> Literal["kept", "dropped"]:
    """Removes the trained weights if they are not to be kept, and returns whether they were."""
    if keep_weights == "all" or (keep_weights == "adapters" and not spec.method.trains_base):
        return "kept"
    shutil.rmtree(adapter, ignore_errors=True)
    return "dropped"


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of what a run wrote, by the path in its folder."""
    written = [folder / "items.jsonl", *sorted((folder / "adapter").glob("*.*"))]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in written}


def _probe(spec: RunSpec, phases: Phases, trained: TrainedModel, widest: _Widest) -> None:
    """Adds to the measured memory what only a probe measures: the peaks of a step's parts, or each process's share."""
    memory = phases.memory
    if spec.shards > 1:
        phases.gather_ranks(held_bytes(trained.model), lambda mine: from_all(mine, spec))
        return
    if not spec.probe_steps:
        return
    on_cpu = spec.device == "cpu"
    # A full card may have no room for another optimizer; the run is good all the same.
    with phases.phase("probe"), nullcontext() if on_cpu else if_room():
        if on_cpu:
            with attention(trained.model, spec.attention):
                memory.evaluate.peak_tensor_bytes = probe_evaluation(trained.model, widest.heldout, spec)
        if widest.training is not None and not spec.compile:
            peaks, memory.resident_tensor_bytes = probe_training(trained, widest.training.to(spec.device), spec)
            if on_cpu:
                memory.train.peak_tensor_bytes = max(peaks.values())
            memory.forward_peak_tensor_bytes = peaks["forward"]
            memory.backward_peak_tensor_bytes = peaks["backward"]
            memory.optimizer_peak_tensor_bytes = peaks["optimizer"]


def _time_latency(spec: RunSpec, phases: Phases, model: Any, state: str) -> dict[str, Timing]:
    """Returns a model's latency in a state, if the spec asks for it and there is room. ``merged`` ends the model."""
    if not spec.latency_tokens:
        return {}
    with phases.phase("latency"), if_room():
        if state == "merged":
            with warnings.catch_warnings(action="ignore"):  # of 4-bit sums: here, only their time counts
                model = model.merge_and_unload()
        return {f"{state}_{name}": timing for name, timing in time_passes(model, spec).items()}
    return {}


def _batches(data: _Data, spec: RunSpec) -> Iterator[Batch]:
    pack_to, pad = spec.seq_len if spec.packing else None, data.tokenizer.pad_token_id
    return training_batches(
        data.training, seed=spec.seed, batch_size=spec.batch_size, pad_token_id=pad, pack_to=pack_to
    )


@contextmanager
def _tracked_load(spec: RunSpec, phases: Phases, *alive: Any) -> Iterator[list[Any]]:
    """Tracks live bytes while the block makes a model. The block appends the model to the list to have it counted."""
    loaded: list[Any] = []
    if spec.device != "cpu":
        yield loaded
        return
    tracker = MemoryTracker(tensors_of(*alive))
    with tracker:
        yield loaded
    for tensor in tensors_of(*loaded):
        tracker.add(tensor)
    load = phases.memory.load
    load.peak_tensor_bytes = max(load.peak_tensor_bytes or 0, tracker.peak_bytes)

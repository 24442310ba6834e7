"""One run, from its spec to its record: load, initialise, train, evaluate, save, probe.

However it ends, a record is written: failure is data.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from peftscope.data.batching import Batch, Example, evaluation_batches, tokenise, training_batches
from peftscope.data.tasks import read_split, shuffle_responses
from peftscope.errors import InputError
from peftscope.evaluation.heldout import heldout_nll, mean_nll
from peftscope.evaluation.retention import bits_per_byte
from peftscope.execution.phases import Phases
from peftscope.execution.provenance import card_reading, provenance
from peftscope.execution.ranks import let_others_end_it, meeting_file, rank_folder
from peftscope.files.manifest import file_sha256
from peftscope.files.storage import storage_problem
from peftscope.hardware.bf16 import bf16_products
from peftscope.hardware.meter import is_out_of_memory
from peftscope.memory.predict import predict
from peftscope.memory.probe import probe_evaluation, probe_training
from peftscope.memory.tracker import MemoryTracker, tensors_of
from peftscope.record import (
    FINAL,
    Ceilings,
    PredictedMemory,
    RunRecord,
    Size,
    Status,
    clear_checkpoints,
    state_folder,
    write_record,
)
from peftscope.spec import RunSpec, run_id
from peftscope.training.build import build_model, compiled_layers, seed_everything
from peftscope.training.ceilings import measure_ceilings
from peftscope.training.checkpoint import Checkpoints
from peftscope.training.load import attention, load_base, load_tokenizer
from peftscope.training.loop import Diverged, TrainingLog, check_loss, train
from peftscope.training.shard import from_all, held_bytes, is_first, join, own_seed, shard, trained_state
from peftscope.training.signals import Interrupted


def execute(
    spec: RunSpec, folder: Path, phases: Phases, checkpoint_seconds: float = math.inf, rank: int = 0
) -> RunRecord:
    """Runs a spec and writes ``record.json``, ``items.jsonl`` and ``adapter/`` into ``folder``.

    Args:
        spec: What to run.
        folder: The run's own folder; what an earlier attempt left there is removed.
        phases: Started with the process, imports already marked.
        checkpoint_seconds: Between two checkpoints of the training, which an interrupted run goes on from.
        rank: Which of a sharded run's processes this is; all but the first write into a folder below.

    Returns:
        The record, whatever its status but ``interrupted``.

    Raises:
        Interrupted: After ``interrupted.json`` was written, so that the job counts as not done.
        KeyboardInterrupt: Likewise, where the process has Python's own handler of SIGINT.
    """
    meeting, folder = meeting_file(folder), rank_folder(folder, rank)
    for name in ("record.json", "interrupted.json", "items.jsonl"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(run_id=run_id(spec), status="ok", spec=spec)
    log = TrainingLog()
    checkpoints = Checkpoints(state_folder(folder), spec, checkpoint_seconds)
    file = "record.json"
    try:
        record.provenance = provenance(spec, rank)
        if spec.shards > 1:
            join(spec, rank, meeting)
        with bf16_products():
            _run(spec, folder, record, log, phases, checkpoints)
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
            # Nothing that the run did: once there is room, it goes on from its last checkpoint.
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
        record.train_nll, record.train_loss = log.nll, log.loss
        log.write_speed(record.speed, spec)
        record.speed.matmul_share = _matmul_share(record)
        phases.finish()
        record.seconds, record.memory = phases.seconds, phases.memory
        record.memory.paged_state_bytes = log.paged_state_bytes
        record.unavailable = _unavailable(record)
        if record.status in FINAL:
            # First where no rule declares it: a job that is killed now has nothing left to do but to copy it.
            write_record(state_folder(folder) / file, record)
        write_record(folder / file, record)
    if rank == 0:
        clear_checkpoints(folder)
    return record


def _run(
    spec: RunSpec, folder: Path, record: RunRecord, log: TrainingLog, phases: Phases, checkpoints: Checkpoints
) -> None:
    with phases.phase("load"):
        tokenizer = load_tokenizer(spec)
        pad = tokenizer.pad_token_id
        examples = read_split(spec.task, "train") if spec.method.trains else []
        if spec.shuffled_targets:
            examples = shuffle_responses(examples, spec.seed)
        training = tokenise(examples, tokenizer, spec.seq_len)
        validation = tokenise(read_split(spec.task, "validation")[: spec.validation_items], tokenizer, spec.seq_len)
        items = read_split(spec.task, "test")[: spec.heldout_items]
        heldout = tokenise(items, tokenizer, spec.seq_len)
        with _tracked_load(spec, phases) as loaded:
            base = load_base(spec)
            loaded.append(base)
        vocab_size = base.config.vocab_size
    with phases.phase("initialise"), _tracked_load(spec, phases, base) as loaded:
        model, loss_function = build_model(base, spec)
        loaded.append(model)
    record.size = _initial_size(model)
    if spec.shards > 1:
        with phases.phase("initialise"):
            shard(model, spec)

    def evaluate_retention() -> float | None:
        model.eval()
        with phases.phase("evaluate"), attention(model, spec.attention):
            return bits_per_byte(model, tokenizer, spec) if spec.retention_tokens else None

    record.quality.retention_bits_per_byte_before = evaluate_retention()
    with phases.phase("predict"):
        batches = islice(_batches(training, spec, pad), spec.steps * spec.gradient_accumulation)
        widest = _widest(batches) if spec.method.trains else None
        widest_heldout = _widest(evaluation_batches(heldout, batch_size=spec.eval_batch_size, pad_token_id=pad))
        phases.memory.predicted = _predicted(spec, widest, widest_heldout)
    if spec.method.trains:
        digest = hashlib.sha256()
        with phases.phase("train"), compiled_layers(model, spec):
            seed_everything(own_seed(spec.seed if spec.init_seed is None else spec.init_seed, spec))
            batches = _digested(_batches(training, spec, pad), digest)
            rehearsal = widest if spec.device == "cuda" else None
            train(model, batches, spec, loss_function, vocab_size, log, checkpoints, rehearsal)
        if record.provenance["card"]:
            record.provenance["card"]["after_training"] = card_reading()
        record.train_batches_sha256 = digest.hexdigest()
    record.method_metrics = spec.method.metrics(model)
    with phases.phase("evaluate"):
        model.eval()
        with attention(model, spec.attention):
            if validation:
                chosen_by = heldout_nll(model, validation, spec, pad)
                record.quality.validation_nll = mean_nll(chosen_by)
            per_item = heldout_nll(model, heldout, spec, pad)
            nll = mean_nll(per_item)
            if spec.method.trains:
                check_loss(nll, vocab_size, spec, "on held-out items")
            answers = _answers(model, tokenizer, spec, record)
            record.benchmarks = _benchmarks(model, tokenizer, spec)
        _write_items(folder / "items.jsonl", items, per_item, answers)
        record.quality.heldout_nll = nll
        record.quality.heldout_tokens = sum(count for _, count in per_item)
        _save(model, spec, folder, record)
        written = [folder / "items.jsonl", *sorted(folder.glob("adapter/*.*"))]
        record.files = {path.relative_to(folder).as_posix(): file_sha256(path) for path in written}
    before = record.quality.retention_bits_per_byte_before
    record.quality.retention_bits_per_byte = evaluate_retention() if spec.method.trains else before
    if spec.shards > 1:
        phases.gather_ranks(held_bytes(model), lambda mine: from_all(mine, spec))
    elif spec.device == "cpu" and spec.probe_steps:
        with phases.phase("probe"):
            with attention(model, spec.attention):
                phases.memory.evaluate.peak_tensor_bytes = probe_evaluation(model, widest_heldout, spec)
            if spec.method.trains and not spec.compile:
                assert widest is not None
                peaks = probe_training(model, widest, spec, loss_function)
                phases.memory.train.peak_tensor_bytes = max(peaks.values())
                phases.memory.forward_peak_tensor_bytes = peaks["forward"]
                phases.memory.backward_peak_tensor_bytes = peaks["backward"]
                phases.memory.optimizer_peak_tensor_bytes = peaks["optimizer"]
    if spec.method.trains:
        # A card that the model fills has no room for the largest product; the run is good all the same.
        with phases.phase("ceilings"), suppress(torch.OutOfMemoryError):
            record.ceilings = measure_ceilings(spec)


def _predicted(spec: RunSpec, widest: Batch | None, widest_heldout: Batch) -> PredictedMemory:
    """Returns the predicted peaks, or none: a model that cannot be simulated can still be trained."""
    if _not_simulated(spec):
        return PredictedMemory()
    try:
        return predict(spec, widest, widest_heldout)
    except Exception:
        traceback.print_exc()
        return PredictedMemory()


def _not_simulated(spec: RunSpec) -> str:
    """Returns why the simulator does not know runs of this kind; empty if it does."""
    if spec.shards > 1:
        return "the simulator knows a single process"
    return "the simulator does not know what compiled layers keep" if spec.compile else ""


def _batches(examples: Sequence[Example], spec: RunSpec, pad_token_id: int) -> Iterator[Batch]:
    pack_to = spec.seq_len if spec.packing else None
    return training_batches(
        examples, seed=spec.seed, batch_size=spec.batch_size, pad_token_id=pad_token_id, pack_to=pack_to
    )


def _widest(batches: Iterator[Batch]) -> Batch:
    """Returns the first of the batches with the longest sequence, and of these with the most logits."""
    return max(batches, key=lambda batch: (batch.input_ids.shape[1], batch.kept_positions.numel()))


def _digested(batches: Iterator[Batch], digest: hashlib._Hash) -> Iterator[Batch]:
    """Yields the batches; the digest is that of their tokens in order."""
    for batch in batches:
        digest.update(batch.input_ids.numpy().tobytes())
        yield batch


@contextmanager
def _tracked_load(spec: RunSpec, phases: Phases, *alive: Any) -> Iterator[list[Any]]:
    """Tracks live bytes while a model comes to be; the block appends it, so that its storages are counted."""
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


def _initial_size(model: Any) -> Size:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # A 4-bit parameter packs two values a byte; its quantisation state knows the real shape.
    total = sum(
        p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel()
        for p in model.parameters()
    )
    return Size(initial_trainable_parameters=trainable, total_parameters=total)


def _matmul_share(record: RunRecord) -> float | None:
    useful, rate = record.speed.useful_flops_per_second, record.ceilings.matmul_flops_per_second
    return useful / (rate * record.spec.shards) if useful is not None and rate else None


def _answers(model: Any, tokenizer: Any, spec: RunSpec, record: RunRecord) -> list[dict[str, Any]]:
    if not spec.generation_items:
        return []
    # Its import is slow, and only these runs need it.
    from peftscope.evaluation.answers import score_answers

    began = time.perf_counter()
    answers = score_answers(model, tokenizer, spec)
    record.speed.generation_seconds = time.perf_counter() - began
    record.quality.exact_match = sum(row["correct"] for row in answers) / len(answers)
    record.quality.exact_match_items = len(answers)
    return answers


def _benchmarks(model: Any, tokenizer: Any, spec: RunSpec) -> dict[str, dict[str, float]]:
    if not spec.benchmarks:
        return {}
    from peftscope.evaluation.benchmarks import score_benchmarks

    return score_benchmarks(model, tokenizer, spec)


def _write_items(path: Path, items: Any, per_item: Any, answers: list[dict[str, Any]]) -> None:
    by_item = {row["item"]: row for row in answers}
    rows = []
    for index, (item, (nll, tokens)) in enumerate(zip(items, per_item, strict=True)):
        row = {"item": index, "prompt": item.prompt, "target": item.response, "nll": nll, "tokens": tokens}
        answer = by_item.get(index)
        rows.append(row | ({"answer": answer["answer"], "correct": answer["correct"]} if answer else {}))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _save(model: Any, spec: RunSpec, folder: Path, record: RunRecord) -> None:
    if not spec.method.trains:
        return
    adapter = folder / "adapter"
    state = trained_state(model) if spec.shards > 1 else None
    if is_first():
        spec.method.save(model, adapter, state)
    record.size.adapter_bytes = sum(path.stat().st_size for path in adapter.glob("*.safetensors"))
    record.size.trained_parameters = spec.method.final_trainable_parameters(model)


def _unavailable(record: RunRecord) -> dict[str, str]:
    """Returns why each null field is null."""
    reasons: dict[str, str] = {}
    cpu = record.spec.device == "cpu"
    for phase in ("load", "train", "evaluate"):
        for field, value in getattr(record.memory, phase):
            if value is None:
                cuda_only = cpu and field in ("peak_reserved_bytes", "peak_device_bytes")
                reasons[f"memory.{phase}.{field}"] = "CUDA only" if cuda_only else _why_missing(record, phase, field)
    for phase in ("forward", "backward", "optimizer"):
        if getattr(record.memory, f"{phase}_peak_tensor_bytes") is None:
            missing = _why_missing(record, "train", "peak_tensor_bytes")
            reasons[f"memory.{phase}_peak_tensor_bytes"] = missing if cpu else "CPU only"
    failed = record.status == "ok" and all(value is None for _, value in record.memory.predicted)
    for field, value in record.memory.predicted:
        if failed:
            reason = _not_simulated(record.spec) or "the simulation failed, see train.log"
            reasons[f"memory.predicted.{field}"] = reason
        elif value is None:
            cuda_only = cpu and field.endswith(("reserved_bytes", "device_bytes"))
            reasons[f"memory.predicted.{field}"] = "CUDA only" if cuda_only else _why_missing(record, "train")
    if record.memory.paged_state_bytes is None:
        reasons["memory.paged_state_bytes"] = "CUDA only" if cpu else _why_missing(record, "train")
    for part in ("speed", "ceilings", "quality", "size"):
        for field, value in getattr(record, part):
            if value is None:
                reasons[f"{part}.{field}"] = _why_missing(record, "evaluate" if part == "quality" else "train", field)
    return reasons


def _why_missing(record: RunRecord, phase: str, field: str = "") -> str:
    if record.status != "ok":
        return f"the run ended: {record.status}"
    if field == "peak_device_bytes":
        return "NVML gave no answer"
    if phase == "train" and not record.spec.method.trains:
        return "nothing is trained"
    if field in ("matmul_share", *Ceilings.model_fields) and record.speed.timed_steps:
        return "the model left no room to measure the device's rates"
    if field == "peak_tensor_bytes" and record.spec.shards > 1:
        return "the byte tracker knows a single process"
    if field == "peak_tensor_bytes" and record.spec.compile:
        return "the byte tracker does not see into compiled layers"
    return "switched off in the spec"

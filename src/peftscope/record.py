"""RunRecord: the result of one run, written atomically and read by everything after it. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from peftscope.errors import InputError, Problem
from peftscope.files.atomic import write_json
from peftscope.files.manifest import damaged_files
from peftscope.spec import RunSpec

SCHEMA_VERSION = 1

Status = Literal["ok", "oom", "diverged", "failed", "interrupted"]
CHECKSUM = "sha256"
"""The key of a record's checksum, of all its other keys as compact JSON in order."""

FINAL: tuple[Status, ...] = ("ok", "oom", "diverged")
"""What another attempt would only find again."""


class Damaged(InputError):
    """A file is not what was written."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PhaseMemory(_Part):
    """Peaks of one phase, in bytes. None: this device cannot measure it.

    Attributes:
        peak_tensor_bytes: Live tensor bytes; on CUDA torch's ``max_memory_allocated``, on CPU the byte tracker. The
            tracker's evaluation is the widest held-out batch, CUDA's also covers generation and retention.
        peak_reserved_bytes: CUDA only, ``max_memory_reserved``.
        peak_device_bytes: CUDA only, by NVML: the whole card, whoever uses it.
        peak_resident_bytes: Largest resident size of the process on the host.
    """

    peak_tensor_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_bytes: int | None = None
    peak_resident_bytes: int | None = None


class PredictedMemory(_Part):
    """What the simulator said before the first step, in bytes; on CUDA with what kernels take inside.

    Reserved and device memory are CUDA's. AdaLoRA is predicted before it prunes, which frees nothing.
    """

    forward_peak_tensor_bytes: int | None = None
    backward_peak_tensor_bytes: int | None = None
    optimizer_peak_tensor_bytes: int | None = None
    train_peak_tensor_bytes: int | None = None
    train_peak_reserved_bytes: int | None = None
    train_peak_device_bytes: int | None = None
    evaluate_peak_tensor_bytes: int | None = None


class Memory(_Part):
    """Peaks by phase; initialisation counts as load. The three parts of a step are CPU-only (byte tracker).

    Attributes:
        paged_state_bytes: CUDA only: optimizer states in managed memory, which no peak of tensors counts.
        ranks: Each process of a sharded run; the peaks by phase are then the largest of them.
    """

    load: PhaseMemory = PhaseMemory()
    train: PhaseMemory = PhaseMemory()
    evaluate: PhaseMemory = PhaseMemory()
    forward_peak_tensor_bytes: int | None = None
    backward_peak_tensor_bytes: int | None = None
    optimizer_peak_tensor_bytes: int | None = None
    paged_state_bytes: int | None = None
    predicted: PredictedMemory = PredictedMemory()
    ranks: list[RankMemory] = []


class RankMemory(_Part):
    """What one process of a sharded run held, in bytes: its share of the parameters, and its peaks."""

    parameter_bytes: int
    load: PhaseMemory = PhaseMemory()
    train: PhaseMemory = PhaseMemory()
    evaluate: PhaseMemory = PhaseMemory()


class Seconds(_Part):
    """Wall seconds of each phase. They cover the job from its process's start to the writing of the record.

    ``verify`` is for the checksums of model and data, ``load`` includes reading and tokenising the data, ``evaluate``
    saving the adapter.
    """

    verify: float = 0.0
    importing: float = 0.0
    load: float = 0.0
    initialise: float = 0.0
    predict: float = 0.0
    train: float = 0.0
    evaluate: float = 0.0
    probe: float = 0.0
    ceilings: float = 0.0
    wall: float = 0.0


class Speed(_Part):
    """Step times after the warm-up steps; tokens per second at the median step.

    Attributes:
        useful_flops_per_second: What the mathematics asks for (``training.ceilings``) over the time; median.
        matmul_share: The same over the rate of a large matrix product on all devices of the run: the model's
            utilisation of floating-point operations.
    """

    timed_steps: int = 0
    step_seconds_median: float | None = None
    step_seconds_lower_quartile: float | None = None
    step_seconds_upper_quartile: float | None = None
    tokens_per_second: float | None = None
    padded_tokens_per_second: float | None = None
    useful_flops_per_second: float | None = None
    matmul_share: float | None = None
    data_seconds: float | None = None
    generation_seconds: float | None = None


class Ceilings(_Part):
    """What one device of the run does at best, measured after everything else.

    Attributes:
        dtype: Of the matrix product: what the run computes in.
        matmul_flops_per_second: Of a product of large square matrices.
        copy_bytes_per_second: Of a large copy; every byte is read and written.
    """

    dtype: str | None = None
    matmul_flops_per_second: float | None = None
    copy_bytes_per_second: float | None = None


class Quality(_Part):
    """Scores on the test split, on validation where a learning rate is chosen, and on English prose.

    nll is nats per response token.
    """

    heldout_nll: float | None = None
    validation_nll: float | None = None
    heldout_tokens: int | None = None
    exact_match: float | None = None
    exact_match_items: int | None = None
    retention_bits_per_byte_before: float | None = None
    retention_bits_per_byte: float | None = None


class Size(_Part):
    """Parameters and bytes; ``trained_parameters`` is at the final budget, for AdaLoRA."""

    initial_trainable_parameters: int | None = None
    trained_parameters: int | None = None
    total_parameters: int | None = None
    adapter_bytes: int | None = None


class RunRecord(_Part):
    """One run: its spec, how it ended, and everything that was measured.

    Attributes:
        train_nll: Mean nll of response tokens, step by step; None where it was not finite.
        train_loss: What was minimised: the nll and, for AdaLoRA, its orthogonality term.
        train_batches_sha256: Of all training tokens in order: equal for runs that saw the same batches.
        files: SHA-256 of the run's other files, by their place in its folder.
        benchmarks: Scores of lm-eval's own benchmarks, by its names for them, and ``items``.
        method_metrics: Figures that one method alone can give.
        unavailable: Why each null field is null.
    """

    schema_version: int = SCHEMA_VERSION
    run_id: str
    status: Status
    reason: str | None = None
    spec: RunSpec
    seconds: Seconds = Seconds()
    memory: Memory = Memory()
    speed: Speed = Speed()
    ceilings: Ceilings = Ceilings()
    quality: Quality = Quality()
    size: Size = Size()
    train_nll: list[float | None] = []
    train_loss: list[float | None] = []
    train_batches_sha256: str | None = None
    files: dict[str, str] = {}
    benchmarks: dict[str, dict[str, float]] = {}
    method_metrics: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    provenance: dict[str, Any] = {}


def state_folder(run: Path) -> Path:
    """Returns where a run's folder keeps what outlives a job: checkpoints, the finished record, the lock."""
    return run / "state"


def clear_checkpoints(run: Path) -> None:
    """Removes the checkpoints of a run that has ended, those of all its processes."""
    for pattern in ("checkpoint-*.pt", "checkpoint.unfinished"):
        for path in state_folder(run).rglob(pattern):
            path.unlink(missing_ok=True)


def write_record(path: Path, record: RunRecord) -> None:
    """Writes a record with its own checksum, atomically."""
    content = _finite(record.model_dump(mode="json"))
    write_json(path, content | {CHECKSUM: _content_sha256(content)})


def _content_sha256(content: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in content.items() if key != CHECKSUM}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(value: Any) -> Any:
    """Returns JSON content with None in the place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finished_record(run: Path, identity: str) -> RunRecord | None:
    """Returns the record of a run that ended in an earlier job, None if it did not or its files are damaged."""
    path = state_folder(run) / "record.json"
    if not path.is_file():
        return None
    try:
        record = read_record(path)
    except Damaged as error:
        print(f"{error}; the run is made anew", file=sys.stderr)
        return None
    except InputError:
        return None
    if record.run_id != identity or record.status not in FINAL:
        return None
    damaged = damaged_files(run, record.files)
    if damaged or (record.status == "ok" and not (run / "items.jsonl").is_file()):
        print(f"{run}: {', '.join(damaged) or 'items.jsonl'} damaged or missing; the run is made anew", file=sys.stderr)
        return None
    return record


def recover_record(path: Path) -> RunRecord:
    """Returns a run's record; a damaged one is set aside, and the sound copy in the run's state takes its place.

    Raises:
        Damaged: There is no sound copy, so that the run has to be made again.
        InputError: As ``read_record``.
    """
    try:
        return read_record(path)
    except Damaged as error:
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        record = finished_record(path.parent, path.parent.name)
        if record is None:
            remedy = "the same command again makes the run anew"
            raise Damaged(Problem(str(path), f"damaged, set aside as {aside.name}", remedy)) from None
        print(f"{error}; restored from its copy", file=sys.stderr)
        write_record(path, record)
        return record


def read_record(path: Path) -> RunRecord:
    """Returns a record.

    Raises:
        Damaged: It is no record, or not the one that was written.
        InputError: It is of another schema version.
    """
    again = "remove it to run again"
    try:
        content = json.loads(path.read_bytes())
        found = content.get("schema_version")
    except (ValueError, AttributeError, RecursionError):
        raise Damaged(Problem(str(path), "not a record", again)) from None
    if found != SCHEMA_VERSION:
        message = f"a record of version {found}, this is {SCHEMA_VERSION}"
        raise InputError(Problem(str(path), message, f"{again}, or use the version that wrote it"))
    # Records of before there were checksums have none.
    if content.pop(CHECKSUM, _content_sha256(content)) != _content_sha256(content):
        raise Damaged(Problem(str(path), "damaged: it is not what its checksum says", again))
    try:
        return RunRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise Damaged(Problem(f"{path}: {field}", f"not a record: {first['msg']}", again)) from None

"""RunRecord: what came out of one run. Written atomically, read everywhere after. No torch."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from peftscope.errors import InputError, Problem
from peftscope.spec import RunSpec

SCHEMA_VERSION = 1

Status = Literal["ok", "oom", "diverged", "failed", "interrupted"]
FINAL: tuple[Status, ...] = ("ok", "oom", "diverged")
"""What another attempt would only find again."""


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
    """Peaks by phase; initialisation counts as load. The three parts of a step are CPU-only (byte tracker)."""

    load: PhaseMemory = PhaseMemory()
    train: PhaseMemory = PhaseMemory()
    evaluate: PhaseMemory = PhaseMemory()
    forward_peak_tensor_bytes: int | None = None
    backward_peak_tensor_bytes: int | None = None
    optimizer_peak_tensor_bytes: int | None = None
    predicted: PredictedMemory = PredictedMemory()


class Seconds(_Part):
    """Wall seconds of each phase. They cover the job from its process's start to the writing of the record.

    ``load`` includes reading and tokenising the data, ``evaluate`` includes saving the adapter.
    """

    importing: float = 0.0
    load: float = 0.0
    initialise: float = 0.0
    predict: float = 0.0
    train: float = 0.0
    evaluate: float = 0.0
    probe: float = 0.0
    wall: float = 0.0


class Speed(_Part):
    """Step times after the warm-up steps; tokens per second at the median step."""

    timed_steps: int = 0
    step_seconds_median: float | None = None
    step_seconds_lower_quartile: float | None = None
    step_seconds_upper_quartile: float | None = None
    tokens_per_second: float | None = None
    padded_tokens_per_second: float | None = None
    data_seconds: float | None = None
    generation_seconds: float | None = None


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
    quality: Quality = Quality()
    size: Size = Size()
    train_nll: list[float | None] = []
    train_loss: list[float | None] = []
    train_batches_sha256: str | None = None
    benchmarks: dict[str, dict[str, float]] = {}
    method_metrics: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    provenance: dict[str, Any] = {}


def state_folder(run: Path) -> Path:
    """Returns where a run's folder keeps what outlives a job: checkpoints, the finished record, the lock."""
    return run / "state"


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_record(path: Path, record: RunRecord) -> None:
    """Writes a record, atomically."""
    write_json(path, _finite(record.model_dump(mode="json")))


def _finite(value: Any) -> Any:
    """Returns JSON content with None in the place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finished_record(run: Path, identity: str) -> RunRecord | None:
    """Returns the record of a run that ended in an earlier job, None if it did not or its files are not all there."""
    try:
        record = read_record(state_folder(run) / "record.json")
    except (InputError, OSError):
        return None
    whole = record.status != "ok" or (run / "items.jsonl").is_file()
    return record if record.run_id == identity and record.status in FINAL and whole else None


def read_record(path: Path) -> RunRecord:
    """Returns a record.

    Raises:
        InputError: It is of another schema version, or no record.
    """
    try:
        content = json.loads(path.read_text())
        found = content.get("schema_version")
    except (ValueError, AttributeError):
        raise InputError(Problem(str(path), "not a record", "remove it to run again")) from None
    if found != SCHEMA_VERSION:
        message = f"a record of version {found}, this is {SCHEMA_VERSION}"
        raise InputError(Problem(str(path), message, "remove it to run again, or use the version that wrote it"))
    return RunRecord.model_validate(content)

"""RunRecord: the result of one run, written atomically and read by everything after it. No torch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from peftscope.errors import InputError, Problem
from peftscope.files.atomic import finite, write_json
from peftscope.files.manifest import damaged_files
from peftscope.spec import RunSpec

SCHEMA_VERSION = 1

Status = Literal["ok", "oom", "diverged", "failed", "interrupted"]
KeepWeights = Literal["all", "adapters", "none"]
"""Which trained weights a finished run keeps: an adapter takes a few MB, a fully fine-tuned 135M model 514 MB."""
CHECKSUM = "sha256"
"""The key of a record's checksum, which covers all other keys as JSON in sorted order."""

RESTORED = "restored.json"
"""In a run's state: it says from which experiment's published results the run was restored."""

FINAL: tuple[Status, ...] = ("ok", "oom", "diverged")
"""The statuses that another attempt would only repeat."""

LIBRARIES = "torch", "transformers", "peft", "bitsandbytes", "accelerate", "lm_eval", "numpy", "tokenizers"
PACKAGES = (*LIBRARIES, "peftscope")
"""The packages whose versions a record names."""

TRY_AGAIN = "see its train.log; remove its record.json to try again (and state/, if it ran out of memory)"
"""The remedy for a run that failed."""


class Damaged(InputError):
    """A file differs from what was written."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PhaseMemory(_Part):
    """Peaks of one phase, in bytes. None means that this device cannot measure the value.

    Attributes:
        peak_tensor_bytes: Live tensor bytes: ``max_memory_allocated`` on CUDA, the byte tracker's on CPU. In the
            phase evaluate, the tracker covers only the widest held-out batch, CUDA also generation and retention.
        peak_reserved_bytes: CUDA only, ``max_memory_reserved``.
        peak_device_bytes: CUDA only, from NVML: the whole card, including other processes.
        peak_resident_bytes: The largest resident size of the process on the host.
    """

    peak_tensor_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_bytes: int | None = None
    peak_resident_bytes: int | None = None


class PredictedMemory(_Part):
    """The simulator's prediction before the first step, in bytes; on CUDA it includes the workspaces of kernels.

    Reserved and device memory exist on CUDA only. AdaLoRA is predicted before it prunes; pruning frees nothing.
    """

    forward_peak_tensor_bytes: int | None = None
    backward_peak_tensor_bytes: int | None = None
    optimizer_peak_tensor_bytes: int | None = None
    train_peak_tensor_bytes: int | None = None
    train_peak_reserved_bytes: int | None = None
    train_peak_device_bytes: int | None = None
    evaluate_peak_tensor_bytes: int | None = None


class Memory(_Part):
    """Peaks by phase; initialisation counts as load. Extra steps after the training give the three parts of a step.

    Attributes:
        resident_tensor_bytes: Live tensor bytes between two of these steps: weights, states, and what is not yet freed.
        paged_state_bytes: CUDA only: optimizer states in managed memory, which the peaks of tensors do not count.
        ranks: The processes of a sharded run; the peaks by phase are then the largest among them.
    """

    load: PhaseMemory = PhaseMemory()
    train: PhaseMemory = PhaseMemory()
    evaluate: PhaseMemory = PhaseMemory()
    forward_peak_tensor_bytes: int | None = None
    backward_peak_tensor_bytes: int | None = None
    optimizer_peak_tensor_bytes: int | None = None
    resident_tensor_bytes: int | None = None
    paged_state_bytes: int | None = None
    predicted: PredictedMemory = PredictedMemory()
    ranks: list[RankMemory] = []


class RankMemory(_Part):
    """The memory of one process of a sharded run, in bytes: its share of the parameters, and its peaks."""

    parameter_bytes: int
    load: PhaseMemory = PhaseMemory()
    train: PhaseMemory = PhaseMemory()
    evaluate: PhaseMemory = PhaseMemory()


class Seconds(_Part):
    """Wall seconds of each phase. Together they last from the start of the job's process to the writing of its record.

    ``verify`` compares the checksums of model and data. ``load`` includes reading and tokenising the data, and
    ``evaluate`` includes saving the adapter. ``wait`` was spent until others let this run be timed alone, or
    had been timed themselves.
    """

    verify: float = 0.0
    importing: float = 0.0
    load: float = 0.0
    initialise: float = 0.0
    predict: float = 0.0
    train: float = 0.0
    evaluate: float = 0.0
    probe: float = 0.0
    latency: float = 0.0
    ceilings: float = 0.0
    wait: float = 0.0
    wall: float = 0.0


class Speed(_Part):
    """Step times after the warm-up steps; tokens per second at the median step.

    Attributes:
        useful_flops_per_second: The useful work of a step (``training.ceilings``) divided by its time; the median.
        matmul_share: The same divided by the rate of a large matrix product on all devices of the run. This is the
            model's FLOP utilisation.
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


class Timing(_Part):
    """The seconds of one piece of work that was repeated: their median and quartiles."""

    repeats: int
    seconds_median: float
    seconds_lower_quartile: float
    seconds_upper_quartile: float


class Ceilings(_Part):
    """The best rates of one device of the run, measured after everything else.

    Attributes:
        dtype: The precision of the matrix product, which is that of the run's computations.
        matmul_flops_per_second: The rate at a product of large square matrices.
        copy_bytes_per_second: The rate of a large copy, which reads and writes every byte.
    """

    dtype: str | None = None
    matmul_flops_per_second: float | None = None
    copy_bytes_per_second: float | None = None


class Quality(_Part):
    """Scores on the test split, on the validation split if it chooses a learning rate, and on English prose.

    The unit of nll is nats per response token.

    Attributes:
        judged_on: The items of ``heldout_nll``: those of the test split or, where the task says so, those that the run
            trained on.
        judged_items: The number of these items.
        judged_entropy_bits: The entropy of all their responses; 0 where the task does not know it.
        validation_curve: The validation nll along the training, by the number of steps done.
        retention_curve: The bits per byte on prose along the training, by the number of steps done.
        greedy_match: The share of the judged items whose response greedy decoding gives exactly, from the held-out
            pass: each of its tokens and the end are the most likely ones after the right tokens before them.
        token_accuracy: The share of their response tokens that are.
        shift: The KL divergences between base and trained model on answers, see ``evaluation.heldout``.
        shift_curve: The same along the training, by the number of steps done.
    """

    judged_on: Literal["test", "train"] = "test"
    judged_items: int | None = None
    judged_entropy_bits: float = 0.0
    heldout_nll: float | None = None
    validation_nll: float | None = None
    validation_curve: dict[int, float] = {}
    heldout_tokens: int | None = None
    exact_match: float | None = None
    exact_match_items: int | None = None
    retention_bits_per_byte_before: float | None = None
    retention_bits_per_byte: float | None = None
    retention_curve: dict[int, float] = {}
    greedy_match: float | None = None
    token_accuracy: float | None = None
    shift: dict[str, float] = {}
    shift_curve: dict[int, dict[str, float]] = {}


class Size(_Part):
    """Parameters and bytes. For AdaLoRA, ``trained_parameters`` counts those of the final budget."""

    initial_trainable_parameters: int | None = None
    trained_parameters: int | None = None
    total_parameters: int | None = None
    adapter_bytes: int | None = None


class RunRecord(_Part):
    """One run: its spec, how it ended, and everything that was measured.

    Attributes:
        train_nll: The mean nll of response tokens of each step; None if it was not finite.
        train_loss: The minimised loss: the nll and, for AdaLoRA, its orthogonality term.
        train_batches_sha256: The hash of all training tokens in order; runs that saw the same batches have the same.
        weights: Whether the run's folder still has what was trained; None where nothing was.
        files: The SHA-256 of the run's other files, by their path in its folder.
        latency: The times of a forward pass by the model's state and what passes: ``base_prompt``, ``apart_prompt``,
            ``merged_prompt``, ``base_token``, ... None: the spec does not ask for them.
        benchmarks: The scores of lm-eval's own benchmarks by lm-eval's names, and the number of ``items``.
        method_metrics: Numbers that only one method has.
        updates: What the spectra of updates say, by kind of matrix; see ``evaluation.updates``.
        unavailable: The reason why a field is null, by field; in records of older versions alone.
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
    weights: Literal["kept", "dropped"] | None = None
    files: dict[str, str] = {}
    latency: dict[str, Timing] | None = None
    benchmarks: dict[str, dict[str, float]] = {}
    method_metrics: dict[str, float] = {}
    updates: dict[str, dict[str, float]] = {}
    unavailable: dict[str, str] = {}
    provenance: dict[str, Any] = {}


def state_folder(run: Path) -> Path:
    """Returns the folder of a run for files that outlive a job: checkpoints, the finished record, the lock."""
    return run / "state"


def is_restored(run: Path) -> bool:
    """Returns whether a run's folder was filled by ``peftscope restore``, and so has no weights."""
    return (state_folder(run) / RESTORED).is_file()


def steps_at(shares: Sequence[float], steps: int) -> list[int]:
    """Returns the steps at shares of a training, in ascending order and at least 1.

    >>> steps_at([0.25, 1], 160), steps_at([0.01, 0.02], 10)
    ([40, 160], [1])
    """
    return sorted({max(1, round(share * steps)) for share in shares})


def kept_path(run: Path, step: int) -> Path:
    """Returns the file of the trained weights that a run keeps after a step."""
    return run / "kept" / f"step-{step:06d}.safetensors"


def measured_path(run: Path) -> Path:
    """Returns the file of what was measured on the weights that a run keeps."""
    return run / "weights.csv"


def clear_checkpoints(run: Path) -> None:
    """Removes the checkpoints of all processes of a run that has ended."""
    for pattern in ("checkpoint-*.pt", "checkpoint.unfinished"):
        for path in state_folder(run).rglob(pattern):
            path.unlink(missing_ok=True)


def write_record(path: Path, record: RunRecord) -> None:
    """Writes a record and its checksum atomically."""
    content = finite(record.model_dump(mode="json"))
    write_json(path, content | {CHECKSUM: content_sha256(content)})


def content_sha256(content: dict[str, Any]) -> str:
    """Returns the checksum of JSON content, which covers all keys but the checksum's own."""
    text = json.dumps({key: value for key, value in content.items() if key != CHECKSUM}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def finished_record(run: Path, identity: str) -> RunRecord | None:
    """Returns the record of a run that an earlier job finished, or None if none did or its files are damaged."""
    path = state_folder(run) / "record.json"
    if not path.is_file():
        return None
    try:
        record = read_record(path)
    except Damaged as error:
        print(f"{error}; the run starts again", file=sys.stderr)
        return None
    except InputError:
        return None
    if record.run_id != identity or record.status not in FINAL:
        return None
    restored = is_restored(run)
    # A restored run has no weights and, from a wheel, no items.
    left = {name: digest for name, digest in record.files.items() if not restored or (run / name).is_file()}
    damaged = damaged_files(run, left)
    if damaged or (record.status == "ok" and not restored and not (run / "items.jsonl").is_file()):
        print(f"{run}: {', '.join(damaged) or 'items.jsonl'} damaged or missing; the run starts again", file=sys.stderr)
        return None
    return record


def check_place(run: Path, identity: str) -> None:
    """Raises InputError if this is no place for the run: a file, or the folder in which another run has ended."""
    if run.exists() and not run.is_dir():
        raise InputError(Problem(str(run), "is a file, and a run needs a folder", "name another one"))
    try:
        other = read_record(state_folder(run) / "record.json")
    except (InputError, OSError):
        return
    if other.run_id != identity:
        message = f"holds another run, {other.run_id}, with status {other.status}"
        raise InputError(Problem(str(run), message, "name another folder, or remove this one"))


def recover_record(path: Path) -> RunRecord:
    """Returns a run's record. A damaged record is quarantined, and the copy in the run's state replaces it.

    Raises:
        Damaged: There is no sound copy, so the run has to be repeated.
        InputError: The record has another schema version.
    """
    try:
        return read_record(path)
    except Damaged as error:
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        record = finished_record(path.parent, path.parent.name)
        if record is None:
            remedy = "repeat the same command to run it again"
            raise Damaged(Problem(str(path), f"damaged, moved to {aside.name}", remedy)) from None
        print(f"{error}; restored from its copy", file=sys.stderr)
        write_record(path, record)
        return record


def read_record(path: Path) -> RunRecord:
    """Returns the record in a file; it raises what ``parse_record`` raises."""
    return parse_record(path.read_bytes(), str(path))


def parse_record(text: str | bytes, where: str) -> RunRecord:
    """Returns a record from its JSON text; ``where`` names the text in messages.

    Raises:
        Damaged: The file is not a record, or differs from what was written.
        InputError: The record has another schema version.
    """
    remedy = "remove it to run again"
    try:
        content = json.loads(text)
        found = content.get("schema_version")
    except (ValueError, AttributeError, RecursionError):
        raise Damaged(Problem(where, "not a record", remedy)) from None
    if found != SCHEMA_VERSION:
        message = f"the record has version {found}, this program reads {SCHEMA_VERSION}"
        raise InputError(Problem(where, message, f"{remedy}, or use the version that wrote it"))
    # The first records were written without a checksum.
    if content.pop(CHECKSUM, content_sha256(content)) != content_sha256(content):
        raise Damaged(Problem(where, "damaged: its checksum does not match", remedy))
    try:
        return RunRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise Damaged(Problem(f"{where}: {field}", f"not a record: {first['msg']}", remedy)) from None

"""Predicted against measured memory on a CUDA card: ``make gpu-check``.

Every run is measured in a process of its own (``gpu_measure``); one that does not fit on the card by the closed form is
not tried. Results are kept after every run, so that the check can be stopped and go on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.gpu_measure import measure, predict, used_bytes
from peftscope.memory.hardware import Gpu
from peftscope.memory.question import Model, Question, ask, find_model, library_versions
from peftscope.memory.trace import PHASES
from peftscope.methods import METHODS
from peftscope.record import write_json
from peftscope.training.predict import found_card

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
DONE = ("ok", "too large")
"""Results with another status are tried again."""


@dataclass(frozen=True)
class Job:
    """One run to be checked; the label names it in results."""

    label: str
    question: Question


def make_job(model: Model, gpu: Gpu, options: dict[str, Any]) -> Job:
    """Returns the job of a model with options of ``ask``, one sequence where no ``batch_size`` is given."""
    question = ask(model, options, gpu=gpu)
    spec = question.spec
    named = ("method", "batch_size", "seq_len", "checkpointing")
    parts = [_short_name(model), spec.method.name]
    parts += [f"{spec.batch_size}x{spec.seq_len}"] + (["checkpointing"] if spec.checkpointing else [])
    parts += [str(value) for name, value in options.items() if name not in named]
    return Job("-".join(parts), question)


def _short_name(model: Model) -> str:
    """Returns a model's name without the folders of its file, if it is one."""
    return Path(model.name).stem if model.name.endswith(".json") else model.name


def card_jobs(gpu: Gpu) -> Iterator[Job]:
    """Yields the jobs for a card: every method on a 7B model, full fine-tuning on smaller ones too, and variants."""
    adapters = [name for name, cls in METHODS.items() if cls.trains and name != "full"]
    for method in adapters:
        yield make_job(find_model("llama-2-7b"), gpu, {"method": method, "seq_len": 512})
    for model in ("llama-2-7b", "llama-3.2-3b", "llama-3.2-1b", "qwen2.5-0.5b"):
        for seq_len, checkpointing in ((512, False), (1024, True)):
            options = {"method": "full", "seq_len": seq_len, "checkpointing": checkpointing}
            yield make_job(find_model(model), gpu, options)
    for method in adapters:
        options = {"method": method, "seq_len": 1024, "checkpointing": METHODS[method].supports_checkpointing}
        yield make_job(find_model("llama-2-7b"), gpu, options)
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        ("mistral-7b", {"method": "lora"}),
        ("qwen2.5-0.5b", {"method": "lora", "batch_size": 4}),
        ("llama-3.2-1b", {"method": "lora", "batch_size": 4, "loss_path": "response_only"}),
        ("llama-3.2-1b", {"method": "lora", "precision": "fp32"}),
        ("llama-3.2-1b", {"method": "lora", "precision": "amp"}),
        ("llama-3.2-1b", {"method": "lora", "attention": "eager"}),
        ("llama-3.2-1b", {"method": "lora", "dropout": 0.05}),
        ("llama-3.2-1b", {"method": "full", "optimizer": "sgd"}),
        ("llama-3.2-1b", {"method": "full", "optimizer": "adamw_8bit"}),
        ("llama-3.2-1b", {"method": "full", "optimizer_implementation": "fused"}),
    )
    for model, options in variants:
        yield make_job(find_model(model), gpu, options)


def method_jobs(model: Model, gpu: Gpu) -> Iterator[Job]:
    """Yields one small job of every method on one model: what a processor can do too."""
    for method, cls in METHODS.items():
        if cls.trains:
            yield make_job(model, gpu, {"method": method, "batch_size": 2, "seq_len": 32})


def slug(name: str) -> str:
    """Returns a name in lower case, fit for a folder.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def described(job: Job) -> dict[str, Any]:
    """Returns the first columns of a job's row."""
    spec, gpu = job.question.spec, job.question.gpu
    return {
        "spec": job.label,
        "model": _short_name(job.question.model),
        "method": spec.method.name,
        "batch_size": spec.batch_size,
        "seq_len": spec.seq_len,
        "checkpointing": spec.checkpointing,
        "precision": spec.precision,
        "optimizer": spec.optimizer,
        "optimizer_implementation": spec.optimizer_implementation,
        "attention": spec.attention,
        "loss_path": spec.loss_path,
        "card": gpu.name if gpu else None,
    }


@cache
def code_id() -> str:
    """Returns a short hash of the libraries' versions and of the calculator's own code, which decide a row."""
    digest = hashlib.sha256(library_versions().encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def compared(predicted: dict[str, Any], measured: dict[str, Any], used_before: int | None) -> dict[str, Any]:
    """Returns the columns that set predictions beside measurements, in bytes; errors in percent of what was measured.

    Args:
        predicted: From ``predict``.
        measured: From ``measure``.
        used_before: Bytes in use on the card before the measuring process began; None: not known.
    """
    used, reserved = measured.get("device"), measured.get("reserved")
    device = used - used_before if used is not None and used_before is not None else None
    pairs = {
        "allocated": (max(predicted["phases"].values()), max(measured["phases"].values())),
        "reserved": (predicted["reserved"], reserved),
        "device": (predicted["device"], device),
    }
    row: dict[str, Any] = {}
    for name, (expected, found) in pairs.items():
        row[f"predicted_{name}_bytes"], row[f"measured_{name}_bytes"] = expected, found
        row[f"{name}_error_percent"] = round(100 * (expected / found - 1), 3) if found else None
    row["context_bytes"] = device - reserved if device is not None and reserved is not None else None
    row["workspace_bytes"], row["requested_bytes"] = measured.get("workspace"), measured.get("requested")
    for phase in PHASES:
        row[f"predicted_{phase}_bytes"], row[f"measured_{phase}_bytes"] = (
            predicted["phases"][phase],
            measured["phases"][phase],
        )
    return row


def check_job(job: Job, device: str, used_before: int | None) -> dict[str, Any]:
    """Measures and predicts a job in this process, and returns its row."""
    began = time.perf_counter()
    measured = measure(job.question, device)
    seconds = round(time.perf_counter() - began, 2)
    row = described(job) | compared(predict(job.question), measured, used_before)
    return row | {"seconds": seconds, "status": "ok"} | {f"{name}_version": version(name) for name in PACKAGES}


def check_apart(job: Job, command: Sequence[str], device: str) -> dict[str, Any]:
    """Runs ``command`` for a job in a process of its own, unless the closed form says that it does not fit.

    Returns:
        Its row; where it did not fit, the predictions are the closed form's.
    """
    if device == "cuda":
        peaks, gpu = peaks_by_formula(job.question), job.question.gpu
        if gpu and peaks.device_bytes > gpu.memory_bytes:
            sizes = {
                "predicted_allocated_bytes": peaks.allocated_bytes,
                "predicted_reserved_bytes": peaks.reserved_bytes,
                "predicted_device_bytes": peaks.device_bytes,
            }
            return described(job) | sizes | {"status": "too large"}
    used_before = used_bytes() if device == "cuda" else None
    done = subprocess.run(
        [*command, "--one", job.label, "--used-before", json.dumps(used_before)], capture_output=True, text=True
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        return described(job) | {"status": f"failed: {lines[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def check_all(jobs: Sequence[Job], output: Path, minutes: float, check: Callable[[Job], dict[str, Any]]) -> int:
    """Checks the jobs that have no result of this code yet, and writes ``memory.json`` and ``memory.csv`` after each.

    Args:
        jobs: All jobs of the check, in the order of the table.
        output: The folder with earlier results.
        minutes: No job begins that may end later, if it takes as long as the longest so far.
        check: Returns the row of one.

    Returns:
        How many jobs are left.
    """
    file = output / "memory.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    rows = {job.label: rows[job.label] for job in jobs if rows.get(job.label, {}).get("code") == code_id()}
    waiting = [job for job in jobs if job.label not in rows or rows[job.label]["status"] not in DONE]
    began, longest = time.monotonic(), 0.0
    for number, job in enumerate(waiting):
        start = time.monotonic()
        if start - began + longest > 60 * minutes:
            return len(waiting) - number
        rows[job.label] = row = check(job) | {"code": code_id()}
        longest = max(longest, time.monotonic() - start)
        write_json(file, rows)
        _write_csv(output / "memory.csv", [rows[job.label] for job in jobs if job.label in rows])
        errors = [f"{row[key]:+.1f} %" for key in row if key.endswith("_error_percent") and row[key] is not None]
        print(f"{number + 1}/{len(waiting)} {job.label}: {row['status']} {', '.join(errors)}", file=sys.stderr)
    return 0


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Returns one line: how many were measured, and the mean and the worst absolute error of each kind of memory."""
    parts = []
    for name in ("allocated", "reserved", "device"):
        errors = [abs(row[key]) for row in rows if row.get(key := f"{name}_error_percent") is not None]
        if errors:
            parts.append(f"{name} {sum(errors) / len(errors):.2f} / {max(errors):.2f} %")
    measured = sum(row["status"] == "ok" for row in rows)
    return f"{measured} of {len(rows)} measured; mean / worst error: " + (", ".join(parts) or "none")


def main() -> None:
    """Checks what is left within the minutes, and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", help="every method on this one, 2 x 32 tokens; default: the list for a card")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output", type=Path, help="default results/gpu/CARD")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--used-before", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, model = arguments.device, arguments.model
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA card that this torch can use; --device cpu --model config.json does the same on a processor")
    if device == "cpu" and not model:
        sys.exit("--device cpu needs a small --model")
    gpu = found_card() if device == "cuda" else Gpu("cpu", psutil.virtual_memory().total, cublas_bytes=0)
    jobs = list(method_jobs(find_model(model), gpu) if model else card_jobs(gpu))
    if arguments.one:
        (job,) = (job for job in jobs if job.label == arguments.one)
        print(json.dumps(check_job(job, device, arguments.used_before)))
        return
    output = arguments.output or Path("results/gpu") / slug(gpu.name)
    command = [sys.executable, "-W", "ignore", "-m", "peftscope.memory.gpu_check", "--device", device]
    command += ["--model", model] if model else []
    left = check_all(jobs, output, arguments.minutes, lambda job: check_apart(job, command, device))
    rows = json.loads((output / "memory.json").read_text()) if (output / "memory.json").is_file() else {}
    failed = sum(row["status"] not in DONE for row in rows.values())
    print(summary(list(rows.values())) + (f"; {left} left, run it again" if left else ""))
    sys.exit(f"{failed} failed, see {output / 'memory.csv'}" if failed else 0)


if __name__ == "__main__":
    main()

"""Measurements on a CUDA card, beside what is predicted, and the claims that they decide: ``make gpu-check``.

Every job runs in a process of its own. One that cannot fit on the card by the closed form is not tried; one that runs
out of memory has its result. Results are kept after every job, so that the check can be stopped and go on.
On a processor the same jobs of a small model show the instrument; what it measures there decides nothing.
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
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from peftscope.analysis.cards import CARD_FILE, KINDS, read_facts, read_rows
from peftscope.execution.libraries import without_hub_kernels
from peftscope.files.atomic import write_json
from peftscope.gpu.fits import check_fit, fits
from peftscope.gpu.jobs import CardJob, card_jobs, in_order, predicted_bytes, small_jobs, why_not_tried
from peftscope.gpu.latency import latencies, measure_latency
from peftscope.gpu.memory import measure, predict, predict_by_formula, used_bytes
from peftscope.gpu.page import write_page
from peftscope.gpu.state import PACKAGES, measure_state, other_processes
from peftscope.gpu.steps import speed_of, time_steps
from peftscope.hardware.cards import Gpu
from peftscope.hardware.meter import is_out_of_memory
from peftscope.layout import CARDS_FOLDER
from peftscope.memory.predict import found_card
from peftscope.memory.question import describe_model, library_versions
from peftscope.memory.trace import PHASES
from peftscope.planning.estimate import spoken

DONE = ("ok", "out of memory", "too large", "card too small")
"""Results with another status are tried again."""
JOB_SECONDS = 300.0
"""A job that takes longer is ended."""
USUAL_SECONDS = {"cuda": 35.0, "cpu": 3.0}
"""The seconds that a job is expected to take before any was timed."""
NOT_DECISIVE = ("claims", "report", "cli")
"""Beginnings of what decides no row: a change there leaves results as they are."""


def slug(name: str) -> str:
    """Returns a name in lower case, fit for a folder.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def code_id() -> str:
    """Returns a short hash of the libraries' versions and of the code that decides a row."""
    digest, root = hashlib.sha256(library_versions().encode()), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(NOT_DECISIVE) and name not in ("gpu/page.py", "gpu/results.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def described(job: CardJob, device: str) -> dict[str, Any]:
    """Returns the first columns of a job's row."""
    spec, gpu, method = job.question.spec, job.question.gpu, job.question.spec.method
    row = {
        "spec": job.label,
        "model": Path(job.question.model.name).stem if job.question.model.name.endswith(".json") else spec.model,
        "method": method.name,
        "targets": getattr(method, "targets", None),
        "rank": getattr(method, method.rank_field, None),
        "batch_size": spec.batch_size,
        "seq_len": spec.seq_len,
        "checkpointing": spec.checkpointing,
        "precision": spec.precision,
        "optimizer": spec.optimizer,
        "optimizer_implementation": spec.optimizer_implementation,
        "attention": spec.attention,
        "loss_path": spec.loss_path,
        "device": device,
        "card": gpu.name if gpu else None,
    }
    return row | ({"limit": job.limit, "capacity_bytes": job.capacity_bytes} if job.limit else {})


def compared(predicted: dict[str, Any], measured: dict[str, Any], used_before: int | None) -> dict[str, Any]:
    """Returns the columns that set predictions beside measurements, in bytes; errors in percent of what was measured.

    Args:
        predicted: ``allocated``, ``reserved`` and ``device``, and ``phases`` if there are any.
        measured: The same; ``device`` is all that was in use on the card.
        used_before: Bytes in use on the card before the measuring process began; None: not known.
    """
    used, reserved = measured.get("device"), measured.get("reserved")
    device = used - used_before if used is not None and used_before is not None else None
    expected, found = (
        {"allocated": max(part.get("phases", {"": 0}).values())} | part for part in (predicted, measured)
    )
    row: dict[str, Any] = {}
    for name, value in (("allocated", found["allocated"]), ("reserved", reserved), ("device", device)):
        row[f"predicted_{name}_bytes"], row[f"measured_{name}_bytes"] = expected[name], value
        row[f"{name}_error_percent"] = round(100 * (expected[name] / value - 1), 3) if value else None
    row["context_bytes"] = device - reserved if device is not None and reserved is not None else None
    for name in ("workspace", "requested", "resident", "assumed_context_bytes"):
        if name in measured:
            row[name if name.endswith("bytes") else f"{name}_bytes"] = measured[name]
    for phase in PHASES if "phases" in measured else ():
        row[f"predicted_{phase}_bytes"], row[f"measured_{phase}_bytes"] = (
            predicted["phases"][phase],
            measured["phases"][phase],
        )
    return row


def _allocated(peaks: dict[str, Any]) -> int:
    return max(peaks["phases"].values()) if "phases" in peaks else peaks["allocated"]


def check_job(job: CardJob, device: str, used_before: int | None, matmul_rate: float | None = None) -> dict[str, Any]:
    """Measures and predicts a job in this process, and returns its row; running out of memory is a result.

    Args:
        job: What to measure.
        device: Where.
        used_before: Bytes in use on the card before this process began; None: not known.
        matmul_rate: Operations a second of a large matrix product there; None: not known.
    """
    began = time.perf_counter()
    try:
        row = _measured(job, device, used_before, matmul_rate) | {"status": "ok"}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        row = _predicted(job) | {"status": "out of memory", "reason": reason}
    if job.kind == "fits":
        row["fits"] = fits(job, row)
    versions = {f"{name}_version": version(name) for name in PACKAGES}
    return described(job, device) | row | {"seconds": round(time.perf_counter() - began, 2)} | versions


def _measured(job: CardJob, device: str, used_before: int | None, matmul_rate: float | None) -> dict[str, Any]:
    if job.kind == "latency":
        return latencies(measure_latency(job.question, device)["samples"])
    if job.kind == "steps":
        found = time_steps(job.question, device)
        return compared(_expected(job, device), found, used_before) | speed_of(found, matmul_rate)
    found = check_fit(job, device, used_before) if job.kind == "fits" else measure(job.question, device)
    return compared(_expected(job, device), found, used_before)


def _expected(job: CardJob, device: str) -> dict[str, Any]:
    """Returns the peaks to compare with: simulated, but on a card in closed form where memory is not all that counts.

    Simulating a large model takes longer than the job itself. Of small ones on a processor the closed form knows less.
    """
    if job.kind == "memory" or device == "cpu":
        expected = predict(job.question)
        if job.kind == "steps":
            expected["phases"].pop("evaluate")
        return expected
    return predict_by_formula(job.question) if job.kind == "fits" else predicted_bytes(job)


def _predicted(job: CardJob) -> dict[str, Any]:
    return {f"predicted_{name}_bytes": size for name, size in predicted_bytes(job).items()}


def check_apart(job: CardJob, command: Sequence[str], device: str) -> dict[str, Any]:
    """Runs ``command`` for a job in a process of its own, unless the closed form says that it does not fit.

    Returns:
        Its row; where it did not fit, the predictions are the closed form's.
    """
    if status := why_not_tried(job, device):
        return described(job, device) | _predicted(job) | {"status": status}
    others = {"other_processes": len(other_processes(device))}
    used_before = used_bytes() if device == "cuda" else None
    content, reason = run_apart(
        [*command, "--one", f"{job.kind}/{job.label}", "--used-before", json.dumps(used_before)]
    )
    return (content if content is not None else described(job, device) | {"status": f"failed: {reason}"}) | others


def check_here(job: CardJob, device: str, matmul_rate: float) -> dict[str, Any]:
    """Returns a job's row, measured in this process; an error is its status."""
    try:
        return check_job(job, device, None, matmul_rate)
    except Exception as error:
        traceback.print_exc()
        return described(job, device) | {"status": f"failed: {error}"}


def run_apart(command: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """Returns the JSON of a command's last line, None where it failed or took too long, and why."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=JOB_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"it took longer than {spoken(JOB_SECONDS)}"
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        return None, lines[-1]
    return json.loads(done.stdout.splitlines()[-1]), ""


def check_all(
    jobs: Sequence[CardJob], output: Path, minutes: float, check: Callable[[CardJob], dict[str, Any]], usual: float = 0
) -> int:
    """Checks the jobs that have no result of this code yet, and writes their kind's JSON and CSV after each.

    Args:
        jobs: All jobs of the check, in the order of the tables.
        output: The folder with earlier results.
        minutes: No job begins that may end later, if it takes as long as the longest so far.
        check: Returns the row of one.
        usual: Seconds of a job, for the first estimate.

    Returns:
        How many jobs are left.
    """
    rows = {kind: _current(read_rows(output / f"{kind}.json")) for kind in KINDS}
    waiting = [job for job in jobs if rows[job.kind].get(job.label, {}).get("status") not in DONE]
    began, longest = time.monotonic(), 0.0
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} done before", file=sys.stderr)
    for number, job in enumerate(waiting):
        start = time.monotonic()
        if start - began + longest > 60 * minutes:
            return len(waiting) - number
        mean = (start - began) / number if number else usual
        to_go = spoken(mean * (len(waiting) - number))
        print(f"{number + 1}/{len(waiting)} {job.kind} {job.label} (about {to_go} to go)", file=sys.stderr)
        rows[job.kind][job.label] = row = check(job) | {"code": code_id()}
        longest = max(longest, time.monotonic() - start)
        known = {other.label: None for other in jobs if other.kind == job.kind} | rows[job.kind]
        kept = {label: found for label, found in known.items() if found is not None}
        write_json(output / f"{job.kind}.json", kept)
        write_csv(output / f"{job.kind}.csv", list(kept.values()))
        print(f"  {outcome(row)}", file=sys.stderr)
    return 0


def _current(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {label: row for label, row in rows.items() if row.get("code") == code_id()}


def outcome(row: dict[str, Any]) -> str:
    """Returns one line about a row."""
    parts = [str(row["status"])]
    parts += [f"{row[key]:+.1f} %" for key in row if key.endswith("_error_percent") and row[key] is not None]
    parts += [f"fits: {'yes' if row['fits'] else 'no'}"] if "fits" in row else []
    parts += [f"{row['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in row else []
    parts += [f"apart over merged {row['token_apart_over_merged']:.3f}"] if "token_apart_over_merged" in row else []
    return ", ".join(parts)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows with the columns that any of them has, single measurements left out."""
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    columns = [name for name in columns if name != "samples"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
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


def card_facts(output: Path, measure_card: Callable[[], dict[str, Any] | None], device: str) -> dict[str, Any]:
    """Returns ``card.json``, measured where there is none of this code yet, and asks who else uses the card.

    Raises:
        SystemExit: The folder is another device's, or the card cannot be measured.
    """
    path = output / CARD_FILE
    facts = read_facts(path) if path.is_file() else {}
    if facts and facts.get("device") != device:
        sys.exit(f"{output} has results of device {facts.get('device')}; give --output")
    others = other_processes(device)
    if facts.get("code") != code_id():
        measured = measure_card()
        if measured is None:
            sys.exit("the card could not be measured")
        facts = measured | {"code": code_id()}
    facts["other_processes"] = list(
        {other["pid"]: other for other in [*facts.get("other_processes", []), *others]}.values()
    )
    write_json(path, facts)
    return facts


@without_hub_kernels()
def main() -> None:
    """Checks what is left within the minutes, writes the report, and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", help="small jobs on this one; default: the list for a card, toy on a processor")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of %(default)s, with commas")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this piece; the same command goes on")
    parser.add_argument("--output", type=Path, help="default results/gpu/CARD")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--used-before", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--matmul-rate", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    kinds = tuple(arguments.kinds.split(","))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        sys.exit(f"--kinds: no such kind (got {unknown[0]!r}); there are {', '.join(KINDS)}")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA card that this torch can use; make gpu-check DEVICE=cpu does the same on a small model")
    gpu = found_card() if device == "cuda" else Gpu("cpu", psutil.virtual_memory().total, cublas_bytes=0)
    model = arguments.model or ("toy" if device == "cpu" else None)
    every = list(small_jobs(describe_model(model), gpu) if model else card_jobs(gpu))
    if arguments.one == "card":
        print(json.dumps(measure_state(gpu, device)))
        return
    if arguments.one:
        (job,) = (job for job in every if f"{job.kind}/{job.label}" == arguments.one)
        print(json.dumps(check_job(job, device, arguments.used_before, arguments.matmul_rate)))
        return
    output = arguments.output or CARDS_FOLDER / slug(gpu.name)
    command = [sys.executable, "-W", "ignore", "-m", "peftscope.gpu.check", "--device", device]
    command += ["--model", model] if model else []
    if device == "cpu":
        # Tensors are tracked one by one, so that jobs can share a process, and its imports.
        torch.set_num_threads(1)
        facts = card_facts(output, lambda: measure_state(gpu, device), device)
    else:
        facts = card_facts(output, lambda: run_apart([*command, "--one", "card"])[0], device)
    rate = facts["ceilings"]["matmul_flops_per_second"]
    command += ["--matmul-rate", str(rate)]

    def check(job: CardJob) -> dict[str, Any]:
        return check_here(job, device, rate) if device == "cpu" else check_apart(job, command, device)

    left = check_all(in_order(iter(every), kinds), output, arguments.minutes, check, USUAL_SECONDS[device])
    page = write_page(output, [(job.kind, job.label) for job in in_order(iter(every))])
    rows = [row for kind in KINDS for row in _current(read_rows(output / f"{kind}.json")).values()]
    failed = sum(row["status"] not in DONE for row in rows)
    print(summary(rows) + (f"; {left} left, run it again" if left else ""))
    print(f"The report: {page.resolve()}")
    sys.exit(f"{failed} failed, see {output}" if failed else 0)


if __name__ == "__main__":
    main()

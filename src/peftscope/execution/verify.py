"""Runs published runs again, and compares what they give with what was published, to the last digit."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from peftscope.errors import InputError, Problem, close_match
from peftscope.execution.sweep import run_apart
from peftscope.hardware.device import detect_device
from peftscope.layout import published_paths
from peftscope.planning.checks import check_starts
from peftscope.planning.published import RECORDS, published_records
from peftscope.record import FINAL, RunRecord, parse_record, read_record

COMPARED = ("losses", "scores", "weights", "peaks")
"""Compared are the losses of all steps, the scores, the saved adapter, the tracked and the predicted peaks."""


@dataclass(frozen=True)
class Repeat:
    """A published run beside the same run made here.

    Attributes:
        run: The run's id.
        experiment: The experiment whose published runs have it.
        equal: Whether each of ``COMPARED`` is equal; what either side lacks is missing.
        largest: The largest relative difference of a number, by each of ``COMPARED`` that holds numbers.
        elsewhere: What differs between the machines and versions of both, as ``published -> here``.
        seconds: The wall seconds of the run made here.
    """

    run: str
    experiment: str
    equal: Mapping[str, bool]
    largest: Mapping[str, float]
    elsewhere: Mapping[str, str]
    seconds: float

    @property
    def is_equal(self) -> bool:
        """Whether everything that both sides have is equal."""
        return all(self.equal.values())

    @property
    def is_failure(self) -> bool:
        """Whether something differs although the machine and the versions are the same."""
        return not self.is_equal and not self.elsewhere


def choose_published(experiments: list[str], count: int | None, seed: int) -> list[tuple[str, RunRecord]]:
    """Returns published runs of this machine's device, each with an experiment that has it.

    Without experiments they are of all that are published. ``count`` of them are drawn at random; None takes all.

    Raises:
        InputError: An experiment has no published runs, or none of them can run here.
    """
    known = [path.parent.name for path in published_paths(RECORDS)]
    for name in experiments:
        if name not in known:
            raise InputError(Problem(name, "has no published runs", close_match(name, known)))
    found: dict[str, tuple[str, RunRecord]] = {}
    for name in experiments or known:
        for run, text in published_records(name).items():
            record = parse_record(text, run)
            if record.status in FINAL and record.spec.device == detect_device():
                found.setdefault(run, (name, record))
    if not found:
        raise InputError(Problem(", ".join(experiments) or "published runs", f"none is of device={detect_device()}"))
    runs = sorted(found.values(), key=lambda entry: entry[1].run_id)
    return runs if count is None or count >= len(runs) else random.Random(seed).sample(runs, count)


def lacks_start(published: RunRecord) -> bool:
    """Returns whether a run starts from another one whose weights are not in the store."""
    return bool(check_starts({published.run_id: published.spec}, published.run_id, planned=False))


def repeat_runs(runs: list[tuple[str, RunRecord]]) -> Iterator[Repeat]:
    """Yields each run beside the same run made here, in a folder that is removed afterwards.

    The runs have as many threads as the published ones had.

    Raises:
        InputError: A run was refused, or the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="peftscope-verify-") as place:
        for experiment, published in runs:
            folder, began = Path(place) / published.run_id, time.monotonic()
            threads, beside = (published.provenance.get(name) or 0 for name in ("threads", "threads_beside"))
            options = ["--threads", str(beside or threads), "--timed-threads", str(threads if beside else 0)]
            run_apart(published.spec, folder, *options, "--shared")
            path = folder / "record.json"
            if not path.is_file():
                raise InputError(Problem(str(folder), "the run left no record", "repeat the command"))
            yield compare_records(experiment, published, read_record(path), time.monotonic() - began)


def compare_records(experiment: str, published: RunRecord, here: RunRecord, seconds: float = 0.0) -> Repeat:
    """Returns what is equal in two records of one run, and by how much the rest differs."""
    sides = [_compared(record) for record in (published, here)]
    equal, largest = {}, {}
    for name in COMPARED:
        # Older records lack some of today's fields, and a run that kept no weights lacks those.
        common = [key for key in sides[0][name] if key in sides[1][name]]
        values = [[side[name][key] for key in common] for side in sides]
        if common:
            equal[name] = values[0] == values[1] and published.status == here.status
            numbers = [pair for pair in zip(*values, strict=True) if all(isinstance(v, float | int) for v in pair)]
            if numbers:
                largest[name] = max(_relative(*pair) for pair in numbers)
    machines = [_machine(record) for record in (published, here)]
    elsewhere = {
        name: f"{machines[0].get(name)} -> {machines[1].get(name)}"
        for name in machines[0]
        if machines[0][name] is not None and machines[0].get(name) != machines[1].get(name)
    }
    return Repeat(published.run_id, experiment, equal, largest, elsewhere, seconds)


def _compared(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Returns what a record has to compare, flat, without what it lacks."""
    peaks = _flat(record.memory.model_dump(include={"load", "train", "evaluate", "predicted"}))
    found = {
        "losses": {
            f"{name}.{i}": v for name in ("train_nll", "train_loss") for i, v in enumerate(getattr(record, name))
        },
        "scores": _flat(record.quality.model_dump()),
        "weights": {name: digest for name, digest in record.files.items() if name.endswith(".safetensors")},
        "peaks": {name: value for name, value in peaks.items() if name.endswith("_tensor_bytes")},
    }
    return {name: {key: v for key, v in fields.items() if v is not None} for name, fields in found.items()}


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    return pd.json_normalize(fields).to_dict("records")[0]


def _relative(published: float, here: float) -> float:
    """Returns the distance of two numbers over the larger one.

    >>> _relative(2.0, 1.0), _relative(0, 0)
    (0.5, 0.0)
    """
    scale = max(abs(published), abs(here))
    return abs(published - here) / scale if scale and math.isfinite(scale) else 0.0


def _machine(record: RunRecord) -> dict[str, Any]:
    """Returns what decides the last digits of a run: the processor or card, how products are computed, the versions."""
    facts, hardware = record.provenance, record.provenance.get("hardware", {})
    packages = {
        name: version for name, version in facts.get("packages", {}).items() if name not in ("peftscope", "lm_eval")
    }
    return {
        "processor": hardware.get("cpu") if record.spec.device == "cpu" else hardware.get("gpu"),
        "bf16 products": facts.get("bf16_products"),
        "threads": facts.get("threads"),
        **packages,
    }

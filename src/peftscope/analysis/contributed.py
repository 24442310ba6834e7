"""Results from the cards of others: packed into a file without names and paths, and checked when read. No torch.

A file is ``results/contributed/CARD/EXPERIMENT-DIGEST.json``. Whoever reads one gets only what passed every check.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field, ValidationError

from peftscope.analysis.collect import row_of
from peftscope.data.tasks import find_task
from peftscope.errors import InputError, Problem, raise_any, shown
from peftscope.files.atomic import finite, write_json
from peftscope.files.content import Strict, parse_json, read_text
from peftscope.layout import CONTRIBUTED_RESULTS, MODELS_FILE, NAME_PATTERN, record_path, run_folder
from peftscope.models.catalog import find_model
from peftscope.planning.published import LARGEST_BYTES, all_published_records
from peftscope.planning.sweep import expand
from peftscope.record import (
    CHECKSUM,
    FINAL,
    PACKAGES,
    SCHEMA_VERSION,
    PhaseMemory,
    RunRecord,
    content_sha256,
    is_restored,
    parse_record,
    read_record,
)
from peftscope.spec import run_id
from peftscope.words import spoken_bytes

TENSOR_FACTOR, DEVICE_FACTOR = 1.5, 2.0
"""How far a measured peak may lie from its prediction, up or down: of tensors, and of reserved and device memory.

A smaller distance is an error of the calculator, which is a finding. A larger one was no peak of this run so far.
"""
FIRST_LOSS_SHARE = 0.02
"""How far the first losses of two cards may differ: they come from the same weights and batch, rounded differently."""
LARGEST_NLL = 100.0
"""Nats per token. Random weights give about the logarithm of the vocabulary, which is below 13."""
LARGEST_SHARE = 1.2
"""The largest share of the card's own rate at a matrix product that a step may have reached."""
CARD_SLACK = 1.05
"""NVML counts the driver's part of a card's memory, which torch's total lacks."""
LONGEST_TEXT = 200
DIGEST_DIGITS = 8
"""The digits of the checksum that end a file's name."""

_READINGS = ("sm_clock_mhz", "memory_clock_mhz", "power_watts", "power_limit_watts", "temperature_celsius")
_CARD = ("used_bytes", "other_processes", "allocator_settings", "limited_to_bytes")

SHARED: dict[str, Any] = {
    **dict.fromkeys(("started_at", "python", "threads", "bf16_products", "alone", "prose_sha256")),
    "code": dict.fromkeys(("commit", "dirty")),
    "packages": dict.fromkeys(PACKAGES),
    "hardware": dict.fromkeys(("cpu", "cores", "memory_bytes", "system", "gpu", "gpu_memory_bytes", "cuda")),
    "environment": dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")),
    "card": {**dict.fromkeys(_CARD), "at_start": dict.fromkeys(_READINGS), "after_training": dict.fromkeys(_READINGS)},
    "model": dict.fromkeys(("name", "revision")),
    "task": dict.fromkeys(("name", "revision")),
}
"""The part of a record's provenance that is shared; None stands for one number, text or truth value."""

_PLACE = re.compile(r"""(?:^|[\s"'=:(,;])(?:~?/[\w.~-]|[A-Za-z]:[\\/]|\\\\\w)|://|\w@\w""")
"""A path, an address of the web, or one of mail."""


class Contribution(Strict):
    """The finished runs of one experiment on one card, by its driver's name, without what ``anonymous`` leaves out."""

    contribution_version: Literal[1] = 1
    experiment: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
    card: Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]
    records: Annotated[list[RunRecord], Field(min_length=1)]

    def content(self) -> dict[str, Any]:
        """Returns what the file holds, its checksum included."""
        content: dict[str, Any] = finite(self.model_dump(mode="json"))
        return content | {CHECKSUM: content_sha256(content)}

    def path(self, checksum: str = "") -> Path:
        """Returns the file's place in the working folder; without a checksum, that of ``content`` counts."""
        digest = (checksum or self.content()[CHECKSUM])[:DIGEST_DIGITS]
        return CONTRIBUTED_RESULTS / card_folder(self.card) / f"{self.experiment}-{digest}.json"

    def runs(self) -> pd.DataFrame:
        """Returns one row per run, with the columns of ``runs.csv``."""
        return pd.DataFrame([{"run_id": record.run_id, **row_of(record.spec, record)} for record in self.records])


def card_folder(card: str) -> str:
    """Returns the name of a card's folder.

    >>> card_folder("NVIDIA GeForce RTX 4090")
    'geforce-rtx-4090'
    """
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-").removeprefix("nvidia-") or "card"


def anonymous(record: RunRecord) -> RunRecord:
    """Returns a record without what could name a person, a machine or a place, and with the day of its start alone."""
    facts = _kept(record.provenance, SHARED)
    if started := facts.get("started_at"):
        facts["started_at"] = str(started)[:10]
    if "other_processes" in facts.get("card", {}):
        others = record.provenance["card"]["other_processes"]
        facts["card"]["other_processes"] = len(others) if isinstance(others, list) else others
    return record.model_copy(update={"provenance": facts, "reason": None})


def _kept(facts: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the wanted ones of facts, without a section that is none, and null for what is no plain value."""
    kept: dict[str, Any] = {}
    for name, inner in wanted.items():
        value = facts.get(name)
        if inner is None and name in facts:
            plain = int if name.endswith("_bytes") else bool | int | float | str
            kept[name] = value if isinstance(value, plain) else None
        elif inner is not None and isinstance(value, Mapping):
            kept[name] = _kept(value, inner)
    return kept


def pack(experiment: str) -> list[Contribution]:
    """Returns what an experiment left in the store, by card: the runs that ended, on a card, and were not restored.

    Raises:
        InputError: There are none, a record is damaged, or the result would not pass the checks of ``check``.
    """
    by_card: dict[str, list[RunRecord]] = {}
    for run in expand(experiment, "cuda").runs:
        if record_path(run).is_file() and not is_restored(run_folder(run)):
            record = read_record(record_path(run))
            card = record.provenance.get("hardware", {}).get("gpu")
            if record.status in FINAL and card:
                by_card.setdefault(card, []).append(anonymous(record))
    if not by_card:
        remedy = "run `make gpu-check` on a machine with a CUDA card"
        raise InputError(Problem(experiment, "no run of it has ended on a card here", remedy))
    packed = [Contribution(experiment=experiment, card=card, records=found) for card, found in by_card.items()]
    for contribution in packed:
        check(contribution, str(contribution.path()))
    return packed


def write(contribution: Contribution) -> Path:
    """Writes a contribution, removes older files of which it has every run, and returns the path.

    Raises:
        InputError: The file would be too large to commit.
    """
    path = contribution.path()
    own = [record.model_dump() for record in contribution.records]
    for older in sorted(path.parent.glob(f"{contribution.experiment}-*.json")):
        if older != path and all(record.model_dump() in own for record in read_contribution(older).records):
            older.unlink()
    write_json(path, contribution.content())
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        path.unlink()
        raise InputError(Problem(str(path), f"would have {size:,} bytes, more than the {LARGEST_BYTES:,} to commit"))
    return path


def read_contribution(path: Path) -> Contribution:
    """Returns a checked contribution.

    Raises:
        InputError: The file cannot be read, was changed, has another schema, names a place, or is not plausible.
    """
    where, remedy = str(path), "make it again with `peftscope contribute`"
    content = parse_json(read_text(path, LARGEST_BYTES), where)
    if not isinstance(content, dict) or content.get("contribution_version") != 1:
        raise InputError(Problem(where, "not a contribution of version 1", remedy))
    checksum = content.pop(CHECKSUM, "")
    if checksum != content_sha256(content) or finite(content) != content:
        raise InputError(Problem(where, "damaged: its checksum does not match", remedy))
    try:
        contribution = Contribution.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(Problem(f"{where}: {field}", f"not a contribution: {first['msg']}", remedy)) from None
    place = contribution.path(checksum)
    if path.parts[-2:] != place.parts[-2:]:
        raise InputError(Problem(where, "not the name that its card and content give", f"move it to {place}"))
    check(contribution, where)
    return contribution


def read_contributions(folder: Path = CONTRIBUTED_RESULTS) -> dict[Path, Contribution]:
    """Returns all contributions by their path, checked one by one and against each other.

    Raises:
        InputError: One does not pass, or has other losses than another card gave.
    """
    found: dict[Path, Contribution] = {}
    problems: list[Problem] = []
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        try:
            found[path] = read_contribution(path)
        except InputError as error:
            problems += error.problems
    problems += _disagreements(found)
    raise_any(problems)
    return found


def check(contribution: Contribution, where: str) -> None:
    """Raises InputError with everything in a contribution that names a place or is not plausible."""
    problems = [Problem(f"{where}: {field}", message) for field, message in _unfit_texts(contribution.content())]
    runs = [record.run_id for record in contribution.records]
    twice = sorted({run for run in runs if runs.count(run) > 1})
    problems += [Problem(f"{where}: {run}", "stands twice") for run in twice]
    for record in contribution.records:
        rules = (_wrong_origin, _wrong_losses, _wrong_peaks, _wrong_speed)
        if record != anonymous(record):
            problems.append(Problem(f"{where}: {record.run_id}", "its provenance or reason has what is not shared"))
        else:
            messages = [message for rule in rules for message in rule(record, contribution.card)]
            problems += [Problem(f"{where}: {record.run_id}", message) for message in messages]
    raise_any(problems)


def _unfit_texts(content: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yields the field of every text that is long, cannot be printed, or names a place, with what is wrong."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _unfit_texts(name, field)
            yield from _unfit_texts(value, f"{field}.{name}".lstrip("."))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _unfit_texts(value, f"{field}[{number}]")
    elif isinstance(content, str):
        if len(content) > LONGEST_TEXT or not content.isprintable():
            yield field, f"a text of over {LONGEST_TEXT} characters, or one that cannot be printed"
        elif _PLACE.search(content):
            yield field, f"a path or an address does not belong here (got {shown(content)})"


def _wrong_origin(record: RunRecord, card: str) -> Iterator[str]:
    """Yields what a rerun would miss of a run: its whole spec, a known model, known data, the card."""
    if record.schema_version != SCHEMA_VERSION:
        yield f"the record has version {record.schema_version}, this program reads {SCHEMA_VERSION}"
    if record.run_id != run_id(record.spec):
        yield f"its spec is another run's, {run_id(record.spec)}"
    if record.spec.device != "cuda" or record.status not in FINAL:
        yield f"not a finished run on a card (device={record.spec.device}, status={record.status})"
    if record.provenance.get("hardware", {}).get("gpu") != card:
        yield f"ran on another card than {card}"
    if "/" in record.spec.model:
        yield f"the model {record.spec.model} has no name in {MODELS_FILE}"
    try:
        find_model(record.spec.model)
        find_task(record.spec.task)
    except InputError as error:
        yield from (problem.message for problem in error.problems)


def _wrong_losses(record: RunRecord, card: str) -> Iterator[str]:
    """Yields why a rerun could not repeat a run's losses."""
    steps = record.spec.steps if record.spec.method.trains else 0
    losses = record.train_nll
    if len(losses) > steps or (record.status == "ok" and len(losses) < steps):
        yield f"{len(losses)} losses for {steps} steps"
    if record.status == "ok" and not all(value is not None and 0 <= value <= LARGEST_NLL for value in losses):
        yield f"a loss of a finished run is missing, negative or over {LARGEST_NLL:g} nats a token"
    if record.status == "ok" and steps and not re.fullmatch("[0-9a-f]{64}", record.train_batches_sha256 or ""):
        yield "the hash of its batches is missing"


def _wrong_peaks(record: RunRecord, card: str) -> Iterator[str]:
    """Yields measured peaks that no run on this card can have had, or that lie far from what was predicted for it."""
    total = record.provenance.get("hardware", {}).get("gpu_memory_bytes")
    if not isinstance(total, int) or total <= 0:
        yield "the memory of its card is missing"
        return
    memory = record.memory
    for phase in ("load", "train", "evaluate"):
        peaks: PhaseMemory = getattr(memory, phase)
        kinds = [peaks.peak_tensor_bytes, peaks.peak_reserved_bytes, peaks.peak_device_bytes]
        known = [value for value in kinds if value is not None]
        if None not in kinds[:2] and known[0] > known[1]:
            yield f"the tensors of {phase} took {spoken_bytes(known[0])}, of {spoken_bytes(known[1])} reserved"
        if known and not 0 < max(known) <= CARD_SLACK * total:
            yield f"a peak of {phase} is {spoken_bytes(max(known))}, on a card of {spoken_bytes(total)}"
    if record.status != "ok":
        return
    if record.spec.method.trains and memory.train.peak_tensor_bytes is None:
        yield "the peak of its training is missing"
    before = record.provenance.get("card", {}).get("used_bytes") or 0
    for kind, factor in (("tensor", TENSOR_FACTOR), ("reserved", DEVICE_FACTOR), ("device", DEVICE_FACTOR)):
        measured = getattr(memory.train, f"peak_{kind}_bytes")
        predicted = getattr(memory.predicted, f"train_peak_{kind}_bytes")
        if measured is None or predicted is None:
            continue
        measured -= before if kind == "device" else 0
        if not predicted / factor <= measured <= predicted * factor:
            said = f"{spoken_bytes(measured)}, predicted were {spoken_bytes(predicted)}"
            yield f"the {kind} peak of its training is {said}: over {factor:g} times apart"


def _wrong_speed(record: RunRecord, card: str) -> Iterator[str]:
    """Yields measured times and rates that no run can have had."""
    speed = record.speed
    times = [speed.step_seconds_lower_quartile, speed.step_seconds_median, speed.step_seconds_upper_quartile]
    known = [value for value in times if value is not None]
    if known != sorted(known) or any(value <= 0 for value in known):
        yield "the quartiles of its step times are not in order, or not above 0"
    if speed.matmul_share is not None and not 0 < speed.matmul_share <= LARGEST_SHARE:
        yield f"its steps reached {speed.matmul_share:.0%} of the card's rate at a matrix product"


def _disagreements(contributions: Mapping[Path, Contribution]) -> Iterator[Problem]:
    """Yields runs whose batches or first loss differ from those of the same run in our or others' results."""
    records = [(str(path), record) for path, each in contributions.items() for record in each.records]
    wanted = {record.run_id for _, record in records}
    if wanted:
        published = [(name, run, text) for name, run, text in all_published_records() if run in wanted]
        records = [(name, parse_record(text, run)) for name, run, text in published] + records
    seen: dict[str, tuple[str, float, str | None]] = {}
    for where, record in records:
        loss = record.train_nll[0] if record.train_nll else None
        if loss is None:
            continue
        batches = record.train_batches_sha256
        other, its_loss, its_batches = seen.setdefault(record.run_id, (where, loss, batches))
        if batches and its_batches and batches != its_batches:
            yield Problem(f"{where}: {record.run_id}", f"saw other batches than in {other}")
        elif abs(loss - its_loss) > FIRST_LOSS_SHARE * max(loss, its_loss):
            said = f"its first loss is {loss:.4f}, in {other} it is {its_loss:.4f}"
            yield Problem(f"{where}: {record.run_id}", f"{said}: over {FIRST_LOSS_SHARE:.0%} apart")

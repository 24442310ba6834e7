"""Collects records into ``runs.csv`` with one row per run, and ``losses.csv`` with one row per step. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from peftscope.analysis.stats import edits
from peftscope.data.tasks import symbols_of
from peftscope.errors import InputError, Problem, raise_any
from peftscope.layout import how_to_run, record_path, results_folder, run_folder, tuned_path
from peftscope.planning.cells import FINE, TUNING
from peftscope.planning.published import RETENTION, SHIFT, TRAINING, VALIDATION, loss_rows
from peftscope.planning.sweep import Sweep
from peftscope.record import TRY_AGAIN, Damaged, Quality, RunRecord, read_record, recover_record
from peftscope.spec import RunSpec

BENCHMARK = "benchmark_"
"""The prefix of the columns of benchmarks; the benchmark's name and the unit follow."""

WRONG_SYMBOLS = "wrong_symbols_fraction"
"""The column of the error rate of symbols, of tasks whose answers are lists of them."""

MAIN_SCORES = ("acc_norm,none", "acc,none", "exact_match,flexible-extract", "exact_match,none")
"""A table shows the first of these scores that a benchmark has. For GSM8K, that is the score of the last number of an
answer, in whatever words the answer announces it."""


def main_metric(names: Iterable[str]) -> str | None:
    """Returns the first of ``MAIN_SCORES`` among some names, or else the first name; None if there is none."""
    known = [name for name in names if name != "items"]
    return next((name for name in MAIN_SCORES if name in known), known[0] if known else None)


def main_score(scores: dict[str, float]) -> float | None:
    """Returns the score of a benchmark that a table shows.

    >>> main_score({"items": 8, "acc,none": 0.25, "acc_norm,none": 0.5})
    0.5
    """
    name = main_metric(scores)
    return None if name is None else scores[name]


def collect_experiment(sweep: Sweep) -> None:
    """Writes ``runs.csv`` and ``losses.csv`` of an experiment; runs without a record have the status ``missing``.

    Raises:
        InputError: Records are damaged, or belong to other runs or versions. The damaged ones were quarantined.
    """
    folder = results_folder(sweep.name)
    member: dict[str, list[str]] = {identity: [] for identity in sweep.runs}
    for comparison in sweep.comparisons:
        for identity in comparison.runs:
            member[identity].append(comparison.name)
    earlier = _earlier_tuning(sweep)
    member |= earlier
    rows, losses, problems = [], [], []
    for identity, spec in (sweep.runs | {run: read_record(record_path(run)).spec for run in earlier}).items():
        try:
            record = _find_record(run_folder(identity))
        except Damaged as error:
            problems += error.problems
            continue
        row = {"run_id": identity, "comparisons": " ".join(member[identity]), **row_of(spec, record)}
        rows.append(row | _wrong_symbols(identity, spec))
        along = loss_rows(record.model_dump(mode="json")) if record else []
        losses += [{"run_id": identity, **row} for row in along]
    raise_any(problems)
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    columns = ["run_id", "step", TRAINING, VALIDATION, RETENTION, SHIFT]
    pd.DataFrame(losses, columns=columns).to_csv(folder / "losses.csv", index=False)


def _wrong_symbols(run: str, spec: RunSpec) -> dict[str, float]:
    """Returns the share of wrong symbols in a run's generated answers, if those of its task are lists of symbols.

    It is the fewest edits that make answers right, over the symbols of the right ones. Greedy answers may be too long.
    """
    path = run_folder(run) / "items.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if symbols_of(spec.task) and path.is_file() else ()
    pairs = [(row["target"].split(), row["answer"].split()) for row in rows if row.get("answer") is not None]
    if not pairs:
        return {}
    return {WRONG_SYMBOLS: sum(edits(*pair) for pair in pairs) / sum(len(target) for target, _ in pairs)}


def _earlier_tuning(sweep: Sweep) -> dict[str, list[str]]:
    """Returns the runs in the store by which an earlier version chose a study's rates, and their comparisons."""
    study, path = sweep.experiment.study, tuned_path(sweep.name)
    chosen = study.chosen_rates if study else {}
    arms = json.loads(path.read_text())["arms"] if chosen and path.is_file() else {}
    found: dict[str, list[str]] = {}
    for arm in (each.name for each in (study.entrants if study else ()) if each.name in arms.keys() & chosen.keys()):
        for tried in arms[arm]["tried"]:
            for run in tried["run_ids"]:
                if run not in sweep.runs and record_path(run).is_file():
                    found.setdefault(run, []).append((FINE if tried.get("fine") else TUNING) + arm)
    return found


def read_runs(experiment: str, folder: Path | None = None) -> pd.DataFrame:
    """Returns ``runs.csv`` of an experiment's results or of another folder, including columns without any value.

    Raises:
        InputError: The file does not exist.
    """
    path = (folder or results_folder(experiment)) / "runs.csv"
    if not path.is_file():
        raise InputError(Problem(str(path), "no such file", how_to_run(experiment)))
    # The copy is contiguous; without it, pandas warns when a column is added to more than a hundred.
    return pd.read_csv(path, dtype={"comparisons": str}).fillna({"comparisons": ""}).copy()


def failures(runs: pd.DataFrame) -> InputError:
    """Returns the error of runs that did not end well."""
    return InputError(
        Problem(str(run_folder(str(run["run_id"]))), f"{run['status']}: {run['reason']}", TRY_AGAIN)
        for run in runs.to_dict("records")
    )


def _find_record(folder: Path) -> RunRecord | None:
    for name in ("record.json", "interrupted.json"):
        if (folder / name).is_file():
            record = recover_record(folder / name)
            if record.run_id != folder.name:
                raise InputError(Problem(str(folder / name), f"a record of another run, {record.run_id}", "remove it"))
            return record
    return None


def row_of(spec: RunSpec, record: RunRecord | None) -> dict[str, Any]:
    """Returns the columns of a run that do not depend on the experiment; None: it has no record yet."""
    fields = spec.model_dump(mode="json", exclude={"method"})
    row: dict[str, Any] = {
        "status": record.status if record else "missing",
        "reason": record.reason if record else "no record yet",
        "label": spec.method.full_label(),
        "method": spec.method.name,
    }
    row |= fields | {"benchmarks": " ".join(fields["benchmarks"])} | spec.method.columns()
    if record is None:
        record = RunRecord(run_id="", status="interrupted", spec=spec)
    row |= {f"{phase}_seconds": value for phase, value in record.seconds}
    for phase in ("load", "train", "evaluate"):
        row |= {f"{phase}_{name}": value for name, value in getattr(record.memory, phase)}
    row |= {name: value for name, value in record.memory if name.endswith("_bytes")}
    row |= {f"predicted_{name}": value for name, value in record.memory.predicted}
    row |= dict(record.speed)
    for name, timing in (record.latency or {}).items():
        row |= {f"latency_{name}_{field}": value for field, value in timing}
    quality = record.quality
    row |= {
        "judged_on": quality.judged_on,
        "judged_items": quality.judged_items,
        "judged_entropy_bits": quality.judged_entropy_bits,
        "heldout_nll_nats_per_token": quality.heldout_nll,
        "heldout_tokens": quality.heldout_tokens,
        VALIDATION: quality.validation_nll,
        "lowest_validation_nll_nats_per_token": _lowest(quality),
        "exact_match_fraction": quality.exact_match,
        "exact_match_items": quality.exact_match_items,
        "greedy_match_fraction": quality.greedy_match,
        "token_accuracy_fraction": quality.token_accuracy,
        SHIFT: quality.shift.get("from_base"),
        "shift_to_base_nats": quality.shift.get("to_base"),
        "retention_bits_per_byte_before": quality.retention_bits_per_byte_before,
        RETENTION: quality.retention_bits_per_byte,
    }
    row |= dict(record.size)
    row |= {f"{BENCHMARK}{name}_fraction": main_score(scores) for name, scores in record.benchmarks.items()}
    row |= record.method_metrics
    row["train_batches_sha256"] = record.train_batches_sha256
    code, hardware = record.provenance.get("code", {}), record.provenance.get("hardware", {})
    row |= {
        "git_commit": code.get("commit"),
        "git_dirty": code.get("dirty"),
        "started_at": record.provenance.get("started_at"),
        "threads": record.provenance.get("threads"),
        "bf16_products": _bf16_products(record),
        "cpu": hardware.get("cpu"),
        "cores": hardware.get("cores"),
        "host_memory_bytes": hardware.get("memory_bytes"),
        "gpu": hardware.get("gpu"),
        "compute_capability": hardware.get("compute_capability"),
        "system": hardware.get("system"),
        "gpu_memory_bytes": hardware.get("gpu_memory_bytes"),
        "gpu_used_before_bytes": (record.provenance.get("card") or {}).get("used_bytes"),
        "torch": record.provenance.get("packages", {}).get("torch"),
    }
    return row


def _lowest(quality: Quality) -> float | None:
    """Returns the lowest validation loss along a run, its end included; None if none was measured along it."""
    curve = list(quality.validation_curve.values())
    return min([*curve, quality.validation_nll]) if curve and quality.validation_nll is not None else None


def _bf16_products(record: RunRecord) -> str | None:
    """Returns how a processor computed bf16 products. Records without the field are older than the fp32 way."""
    has_none = record.spec.device != "cpu" or record.spec.precision == "fp32" or not record.provenance
    return None if has_none else record.provenance.get("bf16_products", "native")


def paired(first: pd.DataFrame, second: pd.DataFrame, values: pd.Series | str) -> pd.DataFrame:
    """Returns one row for each seed that both have finished, with the columns ``first`` and ``second``.

    Both arms have one row per seed; ``values`` names a column, or has the values by run id.
    """
    columns = {}
    for name, runs in (("first", first), ("second", second)):
        by_seed = runs.set_index("seed")
        columns[name] = by_seed[values] if isinstance(values, str) else by_seed["run_id"].map(values)
    return pd.DataFrame(columns).dropna()

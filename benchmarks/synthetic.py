"""Experiments of any size that look finished, for measuring what comes after the runs. No torch.

Records are those of published runs with other settings and with values drawn from a seed: nothing was trained, and what
they say about methods means nothing.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from peftscope.analysis.tuning import choose_rates
from peftscope.data.tasks import task_folder
from peftscope.layout import MEMORY_FOLDER, run_folder
from peftscope.models.catalog import model_folder
from peftscope.planning.experiment import read_yaml
from peftscope.planning.published import published_records
from peftscope.planning.sweep import ROUNDS, expand
from peftscope.record import RunRecord, parse_record
from peftscope.spec import RunSpec, run_id

SWEEP, STUDY = "sweep", "variants-60"
"""The two experiments; the claims' checks read a study of that name."""
PUBLISHED = Path("results/published")
STEPS = 60
METHODS = ("full", "lora", "qlora", "dora", "adalora", "loftq")
RANKS = (8, 16, 4, 32, 2, 64, 1, 12, 6, 24, 48, 3)
RATES = (1e-3, 3e-4, 3e-3, 5e-4, 2e-3, 2e-4, 4e-3, 1e-4, 6e-3, 1.5e-3)
GRIDS = {50: (2, 1, 5), 500: (2, 5, 10), 5000: (12, 10, 10)}
"""Ranks, learning rates and seeds by the size of the grid. Two methods have no rank: 4 * ranks + 2 settings a rate."""
BASE_LOSS = 3.7


def make_workspace(folder: Path, repository: Path) -> None:
    """Makes a folder in which the workflow works, with what belongs to no experiment already made."""
    shutil.copytree(repository / "experiments", folder / "experiments")
    for name in ("Snakefile", "profiles", "src"):
        (folder / name).symlink_to(repository / name)
    (folder / "results").mkdir()
    (folder / PUBLISHED).symlink_to(repository / PUBLISHED)
    shutil.copytree(repository / PUBLISHED / "memory", folder / MEMORY_FOLDER)


def make_sweep(size: int) -> int:
    """Makes a finished sweep in the current workspace, and returns its number of runs.

    The size of its grid is a key of ``GRIDS``; its ladders are part of the grid, and the base is one run more.
    """
    ranks, rates, seeds = GRIDS[size]
    axes = {"rank": sorted(RANKS[:ranks]), "learning_rate": sorted(RATES[:rates])}
    content = {
        "title": f"A sweep of {size} runs",
        "description": "Nothing was trained: made up, to measure how the suite grows.",
        "fixed": {"model": "smollm2-135m", "task": "two-digit-sums", "steps": STEPS},
        "axes": {"method": list(METHODS), **axes},
        "seeds": list(range(seeds)),
        "runs": [{"method": "none"}],
        "ladders": [{"centre": {"method": "lora"}, "axes": axes}],
    }
    _write_experiment(SWEEP, content)
    return _write_runs(SWEEP, unlucky=0.02)


def make_study(size: int) -> int:
    """Makes a finished study in the current workspace, and returns its number of runs.

    It is the repository's own study with more seeds and with rates to choose. About ``size`` runs come out, more where
    best rates lie at an end.
    """
    content = read_yaml(Path("experiments") / f"{STUDY}.yaml")
    study = content["study"]
    study["learning_rates"] = {arm: [rate / 3, rate, 3 * rate] for arm, rate in study.pop("chosen_rates").items()}
    arms, controls = len(study["arms"]), sum(map(len, study["controls"].values()))
    seeds = max(2, size * 3 // 4 // (3 * arms + controls))
    study["tuning_seeds"] = list(range(seeds, seeds + max(1, size // 4 // (3 * arms))))
    study["seeds"] = list(range(seeds))
    _write_experiment(STUDY, content)
    for number in range(ROUNDS + 1):
        _write_runs(STUDY)
        choose_rates(expand(STUDY), number)
    return _write_runs(STUDY)


def _write_experiment(name: str, content: dict[str, Any]) -> None:
    Path("experiments", f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def _write_runs(experiment: str, unlucky: float = 0.0) -> int:
    """Writes what the rules before ``collect`` would have made and is not there, and returns the number of runs."""
    runs = expand(experiment).runs
    for identity, spec in runs.items():
        record = draw_record(spec, unlucky)
        folder = run_folder(identity)
        _write_missing(model_folder(spec.model, spec.revision) / "manifest.json", record.provenance["model"])
        _write_missing(task_folder(spec.task) / "manifest.json", record.provenance["task"])
        _write_missing(folder / "spec.json", spec.model_dump(mode="json"))
        _write_missing(folder / "record.json", record.model_dump(mode="json"))
    return len(runs)


def _write_missing(path: Path, content: dict[str, Any]) -> None:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@lru_cache
def _example(method: str) -> dict[str, Any]:
    """Returns the content of a published record of the method."""
    records = published_records("quick")
    run = min(run for run in records if run.startswith(f"{method}-"))
    return parse_record(records[run], run).model_dump(mode="json")


def draw_record(spec: RunSpec, unlucky: float = 0.0) -> RunRecord:
    """Returns a record that the run could have had; the same for the same spec.

    Its method must be among those of the published ``quick`` experiment. Of all runs the share ``unlucky`` run out of
    memory or diverge, half each.
    """
    example = _example(spec.method.name)
    identity = run_id(spec)
    source = random.Random(identity)
    ending = source.random()
    if ending < unlucky / 2:
        parts = {"status": "oom", "reason": "killed by SIGKILL, most likely because the host ran out of memory"}
        return RunRecord(run_id=identity, spec=spec, provenance=example["provenance"], **parts)
    curve = _draw_curve(spec, source)
    memory, speed = example["memory"], example["speed"]
    growth = 1 + 0.004 * (getattr(spec.method, "rank", 8) - 8)
    slowness = source.lognormvariate(0, 0.1)
    record = {
        **example,
        "run_id": identity,
        "spec": spec,
        "seconds": {name: value * slowness for name, value in example["seconds"].items()},
        "memory": _scaled(memory, growth),
        "speed": {name: value and value / slowness for name, value in speed.items()} | {"timed_steps": STEPS - 3},
        "train_nll": curve,
        "train_loss": curve,
        "train_batches_sha256": f"{spec.seed:064x}",
    }
    if ending < unlucky:
        half = [*curve[: STEPS // 2], None]
        record |= {"status": "diverged", "reason": "the loss is not finite"}
        record |= {"train_nll": half, "train_loss": half, "quality": {}}
        return RunRecord.model_validate(record)
    final = curve[-1] if curve else BASE_LOSS
    record["quality"] = {
        **example["quality"],
        "heldout_nll": final + source.gauss(0, 0.02) * bool(curve),
        "validation_nll": final + source.gauss(0, 0.02) * bool(curve),
        "exact_match": max(0, round(64 * (1.2 - final + source.gauss(0, 0.05)))) / 64,
    }
    return RunRecord.model_validate(record)


def _draw_curve(spec: RunSpec, source: random.Random) -> list[float]:
    """Returns losses that fall from the base's to one that is lowest near the method's usual learning rate."""
    if not spec.method.trains:
        return []
    if spec.learning_rate == 0:
        return [BASE_LOSS * source.lognormvariate(0, 0.05) for _ in range(spec.steps)]
    best = {"full": 1e-4, "adalora": 3e-3}.get(spec.method.name, 1e-3)
    end = 0.5 + 0.5 * math.log10(spec.learning_rate / best) ** 2 + source.gauss(0, 0.03) + spec.shuffled_targets
    drop = [math.exp(-step / 8) for step in range(spec.steps)]
    return [(end + (BASE_LOSS - end) * left) * source.lognormvariate(0, 0.08) for left in drop]


def _scaled(value: Any, factor: float) -> Any:
    """Returns bytes times a factor, in the structure in which they stand."""
    if isinstance(value, dict):
        return {key: _scaled(item, factor) for key, item in value.items()}
    return value and round(value * factor)

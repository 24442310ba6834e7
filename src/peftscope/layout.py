"""Every path of experiments, resources, results and reports, relative to the working folder."""

from __future__ import annotations

import re
from pathlib import Path

from peftscope.errors import InputError, Problem

EXPERIMENTS = Path("experiments")
DEFAULTS = EXPERIMENTS / "defaults.yaml"
MODELS_FILE = EXPERIMENTS / "models.yaml"
TASKS_FILE = EXPERIMENTS / "tasks.yaml"
CLAIMS_FILE = EXPERIMENTS / "claims.yaml"

RESOURCES = Path("resources")
MODELS_FOLDER = RESOURCES / "models"
TASKS_FOLDER = RESOURCES / "tasks"
BENCHMARKS_FOLDER = RESOURCES / "benchmarks"
"""Rows of lm-eval's own benchmarks."""

RESULTS = Path("results")
REPORTS = Path("reports")
PUBLISHED_RESULTS = RESULTS / "published"
PUBLISHED_REPORTS = REPORTS / "published"
MEMORY_FOLDER = RESULTS / "memory"
"""What follows from the code alone: memory curves, bars, a chapter's table."""
CARDS_FOLDER = RESULTS / "gpu"
"""What ``make gpu-check`` measured, in one folder a card."""

REPOSITORY = Path(__file__).parent.parent.parent
"""The repository, if this package is an editable install of it."""

NAME_PATTERN = r"[a-z0-9][a-z0-9-]{0,63}"


def shipped(path: Path) -> Path:
    """Returns where a file of experiments/ is: in the working folder or, if that has no defaults, in the repository.

    The repository is that of an editable install, so that a run can be asked for in any folder.

    Raises:
        InputError: There are no defaults in either.
    """
    for root in (Path(), REPOSITORY):
        if (root / DEFAULTS).is_file():
            return root / path
    remedy = "run from the repository's root, or install the repository: pip install --editable ."
    raise InputError(Problem(str(EXPERIMENTS), f"there is no {DEFAULTS} here", remedy))


def check_experiment_name(name: str) -> None:
    """Raises InputError for what cannot be an experiment's name, such as a path."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise InputError(Problem(f"experiment={name}", "not a name for an experiment", f"use {NAME_PATTERN}"))


def results_folder(experiment: str) -> Path:
    """Returns the folder of an experiment's results.

    Raises:
        InputError: It cannot be an experiment's name.
    """
    check_experiment_name(experiment)
    return RESULTS / experiment


def run_folder(experiment: str, run: str) -> Path:
    """Returns the folder of one run of an experiment."""
    return results_folder(experiment) / "runs" / run


def record_path(experiment: str, run: str) -> Path:
    """Returns where the record of a finished run is."""
    return run_folder(experiment, run) / "record.json"


def record_paths() -> list[Path]:
    """Returns the records of all experiments that were run here."""
    return sorted(RESULTS.glob("*/runs/*/record.json"))


def published_record_paths() -> list[Path]:
    """Returns the published records of all experiments."""
    return sorted(PUBLISHED_RESULTS.glob("*/runs/*/record.json"))


def tuned_path(experiment: str) -> Path:
    """Returns where the learning rates are that a study has chosen."""
    return results_folder(experiment) / "tuned.json"


def report_path(experiment: str) -> Path:
    """Returns where an experiment's report is."""
    return REPORTS / experiment / "report.html"


def claims_path(experiment: str) -> Path:
    """Returns where the page of an experiment's claims is."""
    return REPORTS / experiment / "claims.html"

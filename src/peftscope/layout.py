"""Every path of experiments, resources, results and reports, relative to the working folder.

What the suite comes with, its experiments and published results, is read from the working folder if it is there, and
otherwise from the clone or the wheel that peftscope was installed from.
"""

from __future__ import annotations

import re
from pathlib import Path

from peftscope.errors import InputError, Problem

EXPERIMENTS = Path("experiments")
STUDIES = EXPERIMENTS / "studies"
METHOD_FILES = EXPERIMENTS / "methods"
"""The folder of methods from single files."""
DEFAULTS = EXPERIMENTS / "defaults.yaml"
MODELS_FILE = EXPERIMENTS / "models.yaml"
TASKS_FILE = EXPERIMENTS / "tasks.yaml"
CLAIMS_FILE = EXPERIMENTS / "claims.yaml"
CLAIMS_HISTORY = EXPERIMENTS / "claims-history.yaml"
ANSWERS_FILE = EXPERIMENTS / "answers.yaml"
ADVICE_FILE = EXPERIMENTS / "advice.yaml"

RESOURCES = Path("resources")
MODELS_FOLDER = RESOURCES / "models"
TASKS_FOLDER = RESOURCES / "tasks"
BENCHMARKS_FOLDER = RESOURCES / "benchmarks"
"""The folder with the rows of lm-eval's own benchmarks."""

PREDICTIONS_FOLDER = RESOURCES / "predictions"
"""Predicted memory, with one file for all runs of one code that take the same."""
PROSE_FOLDER = RESOURCES / "prose"
"""Scores of prose before training, with one file for all runs of one code that begin alike."""

RESULTS = Path("results")
RUNS = RESULTS / "runs"
"""The store, with one folder per run. Experiments list the ids of their runs."""
REPORTS = Path("reports")
PUBLISHED_RESULTS = RESULTS / "published"
PUBLISHED_REPORTS = REPORTS / "published"

MEMORY_FOLDER = RESULTS / "memory"
"""The folder of results that need no run: memory curves and bars."""

CLAIMS_RESULTS = RESULTS / "claims.json"
CLAIMS_PAGE = REPORTS / "claims.html"
"""The claims page. Its Markdown version is in the same folder."""
CHAPTER_PAGE = REPORTS / "chapter.md"
FINDINGS_PAGE = REPORTS / "findings.md"
STUDIES_PAGE = REPORTS / "studies.md"

REPOSITORY = Path(__file__).parent.parent.parent
"""The repository, if this package is an editable install of it."""
PACKAGED = Path(__file__).parent / "shipped"
"""The copy of the repository's folders in a wheel, which setup.py makes."""

NAME_PATTERN = r"[a-z0-9][a-z0-9-]{0,63}"


def how_to_run(experiment: str) -> str:
    """Returns what runs an experiment and reports it: Snakemake in a clone, elsewhere one run after the other."""
    if Path("Makefile").is_file() and Path("Snakefile").is_file():
        return f"make report EXPERIMENT={experiment}"
    return f"peftscope sweep {experiment} && peftscope report {experiment}"


def shipped(path: Path) -> Path:
    """Returns the path of a file that the suite comes with, under the first root that has ``experiments/``.

    The roots are the working folder, the repository of an editable install, and the copy in a wheel.

    Raises:
        InputError: None of them has defaults.
    """
    for root in (Path(), REPOSITORY, PACKAGED):
        if (root / DEFAULTS).is_file():
            return root / path
    remedy = "run from the repository's root, or install peftscope again"
    raise InputError(Problem(str(EXPERIMENTS), f"there is no {DEFAULTS} here", remedy))


def check_experiment_name(name: str) -> None:
    """Raises InputError if a text, such as a path, cannot be the name of an experiment."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise InputError(Problem(f"experiment={name}", "not a name for an experiment", f"use {NAME_PATTERN}"))


def results_folder(experiment: str) -> Path:
    """Returns the folder of an experiment's results.

    Raises:
        InputError: The text cannot be the name of an experiment.
    """
    check_experiment_name(experiment)
    return RESULTS / experiment


def why_not_read(path: Path) -> str:
    """Returns the end of a remedy: why the working folder's own file is not read, or nothing."""
    if not path.is_file() or DEFAULTS.is_file():
        return ""
    return f"; {path} is not read without {DEFAULTS}: copy what it lacks from {shipped(EXPERIMENTS)}"


def run_folder(run: str) -> Path:
    """Returns the folder of a run, whichever experiments list it."""
    return RUNS / run


def record_path(run: str) -> Path:
    """Returns the path of the record of a finished run."""
    return run_folder(run) / "record.json"


def record_paths() -> list[Path]:
    """Returns the paths of the records of all runs in the store."""
    return sorted(RUNS.glob("*/record.json"))


def sources(*patterns: str) -> list[str]:
    """Returns the source files of the package that runs whose paths in it match, as in ``report/*.py``.

    They are relative to the working folder where it has them, as in a clone.
    """
    package, here = Path(__file__).parent, Path.cwd()
    found = [path for pattern in patterns for path in package.glob(pattern)]
    return sorted(str(path.relative_to(here) if path.is_relative_to(here) else path) for path in found)


def published(name: str) -> Path:
    """Returns the path of a published file, or of the folder of an experiment's.

    It is that of the working folder if it is there, and otherwise one that the suite comes with.
    """
    own = PUBLISHED_RESULTS / name
    return own if own.exists() else shipped(own)


def folder_with(experiment: str, file: str, *, is_published: bool = False) -> Path | None:
    """Returns the folder of an experiment's results that has a file: this workspace's, or else the published one.

    None if neither has it. If ``is_published``, results of this workspace do not count.
    """
    folders = [published(experiment)] if is_published else [results_folder(experiment), published(experiment)]
    return next((folder for folder in folders if (folder / file).is_file()), None)


def published_paths(name: str) -> list[Path]:
    """Returns the published files with this name, one per experiment that has it."""
    root = PUBLISHED_RESULTS if PUBLISHED_RESULTS.is_dir() else shipped(PUBLISHED_RESULTS)
    return sorted(root.glob(f"*/{name}"))


def rates_path(experiment: str, number: int) -> Path:
    """Returns the path of the rates at which a study's arms run, after the listed ones or after one more of them."""
    return results_folder(experiment) / f"rates-{number}.json"


def tuned_path(experiment: str) -> Path:
    """Returns the path of the learning rates that a study has chosen."""
    return results_folder(experiment) / "tuned.json"


def directions_path(experiment: str) -> Path:
    """Returns the path of what claims have measured on a study's adapters."""
    return results_folder(experiment) / "directions.json"


def report_path(experiment: str) -> Path:
    """Returns the path of an experiment's report."""
    return REPORTS / experiment / "report.html"

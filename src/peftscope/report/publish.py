"""Publishing: the small files of a finished experiment, copied to where they are committed.

No rule of the workflow writes or reads these folders, so a fresh clone runs the experiment instead of finding it done.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from peftscope.analysis.cards import CARD_FILE, is_of_card
from peftscope.analysis.collect import collect_experiment, read_runs
from peftscope.errors import InputError, Problem
from peftscope.files.atomic import write_json
from peftscope.layout import PUBLISHED_REPORTS, PUBLISHED_RESULTS, claims_path, report_path, results_folder, tuned_path
from peftscope.planning.estimate import spoken
from peftscope.planning.experiment import experiment_path
from peftscope.planning.sweep import expand
from peftscope.record import read_record

LARGEST_BYTES = 5_000_000
CLAIMS = "claims.json"
README = Path("README.md")
COMPLETE = {"memory": ("grid.png", "bars.png", "chapter.csv"), "gpu": ("*/card.json",)}
"""Folders of results that belong to no experiment, and the files without which they are not finished."""
MADE_BY = {"memory": "make report", "gpu": "make gpu-check"}


def publish(name: str) -> list[Path]:
    """Publishes an experiment, or the results of none: those of ``memory``, and of the ``gpu`` check.

    Raises:
        InputError: There is nothing to publish yet, or a file is too large to commit.
    """
    return publish_folder(name) if name in COMPLETE else publish_experiment(name)


def publish_folder(name: str) -> list[Path]:
    """Copies tables and figures to where they are committed, and returns the folders that were replaced.

    Each card of the ``gpu`` check has a folder of its own; those of other cards stay. A processor's is not published.

    Raises:
        InputError: They are not finished, or one is too large to commit.
    """
    source, target = results_folder(name), PUBLISHED_RESULTS / name
    missing = [pattern for pattern in COMPLETE[name] if not list(source.glob(pattern))]
    if missing:
        raise InputError(Problem(str(source), f"not finished: no {', '.join(missing)}", f"run {MADE_BY[name]}"))
    folders = [source] if name != "gpu" else sorted(p.parent for p in source.glob(f"*/{CARD_FILE}") if is_of_card(p))
    if not folders:
        raise InputError(
            Problem(str(source), "only a processor's results, which decide nothing", f"run {MADE_BY[name]}")
        )
    replaced = []
    for folder in folders:
        wanted = [path for path in sorted(folder.rglob("*")) if path.suffix in (".csv", ".json", ".png", ".html")]
        _check_sizes(wanted)
        replaced.append(target / folder.relative_to(source))
        _copy(wanted, folder, replaced[-1])
    return replaced


def publish_experiment(experiment: str) -> list[Path]:
    """Copies records, items, tables, figures, report and claims, updates the README, and returns the two folders.

    Raises:
        InputError: The experiment is not finished, or a file is too large to commit.
    """
    experiment_path(experiment)
    source, page = results_folder(experiment), report_path(experiment)
    if tuned_path(experiment).is_file() and not (source / "all-runs-ended-well").is_file():
        return _publish_unfinished(experiment)
    if not (source / "all-runs-ended-well").is_file():
        raise InputError(Problem(str(source), "the experiment is not finished", f"make report EXPERIMENT={experiment}"))
    wanted = [
        source / "runs.csv",
        source / "losses.csv",
        *sorted(source.glob("tables/*.csv")),
        *sorted(source.glob("tables/*.md")),
        *sorted(source.glob("figures/*")),
    ]
    for run in read_runs(experiment)["run_id"]:
        wanted += [source / "runs" / run / "record.json", *(source / "runs" / run).glob("items.jsonl")]
    pages = [page]
    if tuned_path(experiment).is_file():
        wanted.append(tuned_path(experiment))
    claims = [claims_path(experiment), claims_path(experiment).with_suffix(".md")]
    if (source / CLAIMS).is_file():
        wanted.append(source / CLAIMS)
        pages += claims
    results, report = PUBLISHED_RESULTS / experiment, PUBLISHED_REPORTS / experiment
    _check_sizes([*pages, *wanted])
    # Claims are measured on their own, and seldom: those of before stay until there are new ones.
    _copy(pages, page.parent, report, keep=[path.name for path in claims])
    _copy(wanted, source, results, keep=[CLAIMS])
    _update_readme(experiment, results)
    return [results, report]


def _publish_unfinished(experiment: str) -> list[Path]:
    """Publishes the runs that a study has made so far, without report: ``restore`` lets it go on elsewhere."""
    collect_experiment(expand(experiment))
    source, results = results_folder(experiment), PUBLISHED_RESULTS / experiment
    lost = {path.parent.name for path in results.glob("runs/*/record.json")} - {
        path.parent.name for path in source.glob("runs/*/record.json")
    }
    if lost:
        message = f"{len(lost)} published runs are not among these, {min(lost)} for one"
        raise InputError(Problem(str(source), message, f"peftscope restore {experiment}"))
    wanted = [source / "runs.csv", source / "losses.csv", tuned_path(experiment)]
    wanted += sorted(source.glob("runs/*/record.json")) + sorted(source.glob("runs/*/items.jsonl"))
    _check_sizes(wanted)
    _copy(wanted, source, results, keep=[CLAIMS])
    return [results]


def restore(experiment: str) -> int:
    """Puts the published runs of an experiment back among its results, and returns how many were published.

    A run that is there already is left alone.

    Only on demand, for a study that goes on in another sitting: the workflow itself never reads published files.

    Raises:
        InputError: None were published, or there is no such experiment.
    """
    experiment_path(experiment)
    source, target = PUBLISHED_RESULTS / experiment / "runs", results_folder(experiment) / "runs"
    records = sorted(source.glob("*/record.json"))
    if not records:
        raise InputError(Problem(str(source), "no published runs"))
    for path in records:
        folder = target / path.parent.name
        if (folder / "record.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "spec.json", read_record(path).spec.model_dump(mode="json"))
        for file in sorted(path.parent.iterdir()):
            shutil.copyfile(file, folder / file.name)
    return len(records)


def _check_sizes(paths: list[Path]) -> None:
    large = [path for path in paths if path.stat().st_size > LARGEST_BYTES]
    if large:
        raise InputError(Problem(str(path), f"over {LARGEST_BYTES} bytes, too large to commit") for path in large)


def _copy(paths: list[Path], source: Path, target: Path, keep: Sequence[str] = ()) -> None:
    """Puts files of one folder into another, in place of what was there but for files whose names are to be kept."""
    for old in target.iterdir() if target.is_dir() else ():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name not in keep:
            old.unlink()
    for path in paths:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _update_readme(experiment: str, results: Path) -> None:
    """Puts the table, a figure and the machine between the README's markers for this experiment, if it has them."""
    begin, end = f"<!-- published:{experiment} -->\n", f"<!-- /published:{experiment} -->"
    text = README.read_text()
    if begin not in text:
        return
    runs = pd.read_csv(results / "runs.csv")
    first = runs.iloc[0]
    work = spoken(float(runs["wall_seconds"].sum()))
    shown = (
        f"![Quality against memory](results/published/{experiment}/figures/pareto.png)\n\n"
        + (results / "tables" / "methods.md").read_text()
        + f"\n{len(runs)} runs on {first['model']}, made on {first['cpu']}, {first['cores']:g} cores, "
        f"{first['host_memory_bytes'] / 2**30:.0f} GiB, {first['gpu'] if pd.notna(first['gpu']) else 'no GPU'}, "
        f"torch {first['torch']}, in {work} of work.\n"
    )
    before, _, rest = text.partition(begin)
    README.write_text(before + begin + shown + end + rest.partition(end)[2])

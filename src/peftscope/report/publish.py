"""Copies the small files of what has run of an experiment into the published folders, which are committed.

No rule of the workflow writes or reads these folders, so a fresh clone runs the experiment and does not find it done.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from peftscope.analysis.collect import collect_experiment, read_runs
from peftscope.analysis.study import StudyResults
from peftscope.analysis.tuning import choose_for_finished
from peftscope.analysis.weights import measured_runs, weights_path
from peftscope.claims.ledger import read_history, read_ledger
from peftscope.claims.stored import read_findings, unexplained_changes
from peftscope.errors import InputError, Problem, raise_any
from peftscope.files.atomic import write_json
from peftscope.hardware.cards import PRETENDED
from peftscope.hardware.device import detect_device
from peftscope.layout import (
    CHAPTER_PAGE,
    CLAIMS_HISTORY,
    CLAIMS_PAGE,
    CLAIMS_RESULTS,
    FINDINGS_PAGE,
    MEMORY_FOLDER,
    PUBLISHED_REPORTS,
    PUBLISHED_RESULTS,
    RUNS,
    STUDIES_PAGE,
    directions_path,
    published,
    record_path,
    report_path,
    results_folder,
    run_folder,
)
from peftscope.planning.experiment import WORLDS, experiment_path, read_experiment
from peftscope.planning.plan import Plan
from peftscope.planning.published import LARGEST_BYTES, RECORDS, published_items, published_records, write_runs
from peftscope.planning.sweep import expand
from peftscope.record import RESTORED, measured_path, parse_record, state_folder
from peftscope.report.answers import Sources, check_answers_on, read_answers, stale
from peftscope.report.findings import write_findings
from peftscope.report.front import show_claims, show_study
from peftscope.report.page import write_all
from peftscope.report.worlds import show_worlds

MEMORY_FILES = ("grid.svg", "bars.svg")
"""The files that finished results without a run must have."""


def publish(name: str) -> list[Path]:
    """Publishes an experiment, or one of the results that belong to none: ``claims`` and ``memory``.

    Raises:
        InputError: There is nothing to publish yet, or a file is too large to commit.
    """
    if name == "claims":
        return publish_claims()
    return publish_memory() if name == MEMORY_FOLDER.name else publish_experiment(name)


def publish_claims() -> list[Path]:
    """Copies the verdicts and their pages to where they are committed, updates the README, and returns the copies.

    Raises:
        InputError: They were not measured yet, one is too large to commit, or a claim is decided otherwise than in the
            published file and its history does not say why, or an answer no longer agrees with them.
    """
    pages = [CLAIMS_PAGE, CLAIMS_PAGE.with_suffix(".md"), CHAPTER_PAGE, FINDINGS_PAGE, STUDIES_PAGE]
    targets = {CLAIMS_RESULTS: PUBLISHED_RESULTS, **dict.fromkeys(pages, PUBLISHED_REPORTS)}
    if not all(path.is_file() for path in targets):
        raise InputError(Problem(str(CLAIMS_RESULTS), "not finished", "run make claims"))
    _check_sizes(list(targets))
    ledger, verdicts = read_ledger(), PUBLISHED_RESULTS / CLAIMS_RESULTS.name
    changed = unexplained_changes(ledger, read_history(), read_findings(verdicts)) if verdicts.is_file() else ()
    message, remedy = "is decided otherwise than in the published file", f"say why in {CLAIMS_HISTORY}"
    raise_any(Problem(claim, message, remedy) for claim in changed)
    raise_any(stale(Sources(read_findings(CLAIMS_RESULTS))))
    copies = [Path(shutil.copyfile(path, folder / path.name)) for path, folder in targets.items()]
    findings = read_findings(verdicts)
    show_claims(findings, read_answers().first)
    write_findings(ledger, findings, PUBLISHED_REPORTS)
    return copies


def publish_memory() -> list[Path]:
    """Copies the tables and figures that need no run into the published folder, and returns it.

    Raises:
        InputError: The results are not finished, or a file is too large to commit.
    """
    missing = [name for name in MEMORY_FILES if not (MEMORY_FOLDER / name).is_file()]
    if missing:
        raise InputError(Problem(str(MEMORY_FOLDER), f"not finished: no {', '.join(missing)}", "run make report"))
    kinds = (".csv", ".json", ".png", ".svg", ".html")
    wanted = [path for path in sorted(MEMORY_FOLDER.rglob("*")) if path.suffix in kinds]
    _check_sizes(wanted)
    _copy(wanted, MEMORY_FOLDER, PUBLISHED_RESULTS / MEMORY_FOLDER.name)
    return [PUBLISHED_RESULTS / MEMORY_FOLDER.name]


def publish_experiment(experiment: str) -> list[Path]:
    """Copies runs, tables, figures and report, and returns the two folders, which a card's results share with no other.

    Of an unfinished study these are what its finished runs and arms give, so that ``restore`` can continue it. Of an
    experiment on a card they are what has ended.

    Raises:
        InputError: Nothing has run, a published run or figure is missing here, a file is too large to commit, or an
            answer that rests on the study no longer agrees with it.
    """
    experiment_path(experiment)
    source, page = results_folder(experiment), report_path(experiment)
    if not (source / "all-runs-ended-well").is_file():
        _write_unfinished(experiment)
    ended = read_runs(experiment).query("status not in ['missing', 'interrupted']")
    if ended["gpu"].astype(str).str.startswith(PRETENDED).any():
        remedy = "run it on a card; what stands in for one in tests proves nothing"
        raise InputError(Problem(str(source), "its card is a pretended one", remedy))
    if read_experiment(experiment_path(experiment)).study:
        check_answers_on(StudyResults(experiment))
    name = "-".join([experiment, *(re.sub(r"\W+", "-", card.lower()) for card in sorted(set(ended["gpu"].dropna())))])
    results, report = PUBLISHED_RESULTS / name, PUBLISHED_REPORTS / name
    directions = directions_path(experiment)
    if (before := results / directions.name).is_file() and not directions.is_file():
        shutil.copyfile(before, directions)  # what claims measured on a study's adapters, which are not here
    wanted = [
        source / "runs.csv",
        *_chosen_rates(source),
        *filter(Path.is_file, [directions]),
        *(path for kind in ("csv", "parquet", "md") for path in sorted(source.glob(f"tables/*.{kind}"))),
        *sorted(source.glob("figures/*.svg")),
    ]
    runs = [run_folder(run) for run in ended["run_id"]]
    if gone := [run for run in runs if not (run / "record.json").is_file()]:
        remedy = f"remove {source} and {page.parent}, then make report EXPERIMENT={experiment}"
        raise InputError(Problem(str(gone[0]), "this run is missing here", remedy))
    _check_sizes([page, *wanted])
    _copy([page], page.parent, report)
    _copy(wanted, source, results)
    write_runs(results, runs)
    show_study(experiment)
    if experiment in WORLDS.values():
        show_worlds()
    return [results, report]


def _write_unfinished(experiment: str) -> None:
    """Collects the finished runs, chooses the rates that follow from them in a study, and writes the page."""
    device = detect_device()
    sweep = expand(experiment, device)
    in_parts = sweep.experiment.study or device == "cuda"
    if not in_parts or not any(record_path(run).is_file() for run in sweep.runs):
        message, remedy = "the experiment is not finished", f"make report EXPERIMENT={experiment}"
        raise InputError(Problem(str(results_folder(experiment)), message, remedy))
    sweep = choose_for_finished(sweep)
    collect_experiment(sweep)
    before = published_records(experiment) if (PUBLISHED_RESULTS / experiment / RECORDS).is_file() else {}
    if lost := {run for run in before if not record_path(run).is_file()}:
        message = f"{len(lost)} published runs are missing here, such as {min(lost)}"
        raise InputError(Problem(str(RUNS), message, f"peftscope restore {experiment}"))
    drawn = results_folder(experiment) / "figures"
    shutil.rmtree(drawn, ignore_errors=True)  # those of before may lack runs that have joined since
    write_all(Plan(sweep))
    for path in sorted(PUBLISHED_RESULTS.glob(f"{experiment}/figures/*.svg")):
        if not (drawn / path.name).is_file():
            remedy = f"make report EXPERIMENT={experiment}, or remove it"
            raise InputError(Problem(str(path), "what is here is not enough to draw it", remedy))


def _chosen_rates(folder: Path) -> list[Path]:
    """Returns the files in a folder of results that say which learning rates a study chose."""
    return [*sorted(folder.glob("rates-*.json")), *folder.glob("tuned.json")]


def restore(experiment: str) -> int:
    """Copies the published runs of an experiment into the store, and returns how many were published.

    They count as done, without weights. The learning rates that a study chose come too, and what was measured on
    weights, but not from a wheel. What is there already is left alone. Only on demand, for an experiment that continues
    in another checkout: the workflow itself never reads published files.

    Raises:
        InputError: None were published, or there is no such experiment.
    """
    experiment_path(experiment)
    records, items = published_records(experiment), published_items(experiment)
    measured = measured_runs(weights_path(published(experiment)))
    for run, text in records.items():
        folder = run_folder(run)
        if (folder / "record.json").is_file():
            continue
        record = parse_record(text, f"{published(experiment) / RECORDS}: {run}")
        write_json(folder / "spec.json", record.spec.model_dump(mode="json"))
        if run in items:
            (folder / "items.jsonl").write_text(items[run])
        if run in measured:
            measured[run].to_csv(measured_path(folder), index=False)
        state = state_folder(folder)
        write_json(state / RESTORED, {"experiment": experiment})
        for path in (state / "record.json", folder / "record.json"):
            path.write_text(text)
    for chosen in _chosen_rates(published(experiment)):
        path = results_folder(experiment) / chosen.name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(chosen, path)
    return len(records)


def _check_sizes(paths: list[Path]) -> None:
    large = [path for path in paths if path.stat().st_size > LARGEST_BYTES]
    raise_any(Problem(str(path), f"over {LARGEST_BYTES} bytes, too large to commit") for path in large)


def _copy(paths: list[Path], source: Path, target: Path) -> None:
    """Replaces the content of a folder by files of another one."""
    shutil.rmtree(target, ignore_errors=True)
    for path in paths:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)

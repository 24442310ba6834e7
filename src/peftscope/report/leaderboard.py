"""Renders the leaderboard: a table for each world, with what studies say of their finished arms. No torch.

Studies whose reference arm has the same runs were judged on the same task with the same seeds, and share a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from peftscope.analysis.compare import MARGIN
from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError
from peftscope.layout import LEADERBOARD, PUBLISHED_REPORTS, REPORTS, RESULTS, published, published_paths, report_path
from peftscope.planning.experiment import A_A, WORLDS
from peftscope.report.contrasts import contrasts, controls, readable_difference, told
from peftscope.report.rendering import asset, write_page
from peftscope.report.spoken import spoken_worlds
from peftscope.report.study import EARLIER_MARGIN
from peftscope.report.tables import PREDICTED_PEAK, markdown, pooled, settings, spoken_settings
from peftscope.spec import RunSpec
from peftscope.words import MIB, formatted

SHOWN_ELSEWHERE = ("init_seed", "learning_rate", "file_sha256")
"""The settings that have a column of their own, or say nothing to a reader."""


@dataclass(frozen=True)
class Entry:
    """One row: an arm against the reference, the reference itself, or an A/A control against its own arm.

    Attributes:
        label: Its name.
        runs: Its runs, one row per seed.
        ahead: How far it is ahead, in nats per token.
        numbers: Its comparison as text, by column, as its study's report has it; none of the reference.
        said: What each study that it stands in says of it, by the study's name.
        is_control: Whether it is an arm that entered again (A/A).
    """

    label: str
    runs: pd.DataFrame
    ahead: float
    numbers: dict[str, str]
    said: dict[str, str]
    is_control: bool = False

    @property
    def outcome(self) -> str:
        """What its studies say of it; each with its name if they disagree, because each corrects for its own arms."""
        said = dict.fromkeys(self.said.values())
        if len(said) == 1:
            return next(iter(said))
        return "; ".join(
            f"{each} ({', '.join(name for name, words in self.said.items() if words == each)})" for each in said
        )


Section = list[Entry]
"""The arms that were compared with one reference on one task, by their estimates, A/A rows last."""


def reference_of(section: Section) -> Entry:
    """Returns the row that the others are compared with."""
    return next(entry for entry in section if not entry.numbers)


def subject_of(section: Section) -> str:
    """Returns the model, the task, the number of steps, the batch, the seeds and the first of the studies."""
    reference = reference_of(section)
    runs, names = reference.runs, list(reference.said)
    first = runs.iloc[0]
    world = spoken_worlds([f"{first['model']}, {first['task']}"])
    studies = f"{names[0]} and {more} more" if (more := len(names) - 1) else names[0]
    return (
        f"{world}, {first['steps']} steps of "
        f"{first['batch_size'] * first['gradient_accumulation']}, seeds {runs['seed'].min()} to "
        f"{runs['seed'].max()} ({studies})"
    )


def read_sections(folder: Path = REPORTS) -> tuple[list[Section], dict[str, str]]:
    """Returns the sections, and the studies that are left out, each with the reason.

    Args:
        folder: The folder of the page. That of published reports shows published studies only.
    """
    is_published = folder == PUBLISHED_REPORTS
    own = [] if is_published else list(RESULTS.glob("*/runs.csv"))
    worlds: dict[frozenset[str], dict[tuple[Any, ...], Entry]] = {}
    left_out = {}
    names = {path.parent.name for path in [*own, *published_paths("runs.csv")]}
    for name in sorted(names, key=lambda name: (name not in WORLDS.values(), name)):  # those of several rates first
        try:
            study = StudyResults(name, is_published=is_published)
            if not study.arms:
                continue  # an experiment without arms is no study
            entries = list(_entries(study))
        except InputError as error:
            left_out[name] = error.problems[0].message
            continue
        if all(entry.is_control for entry in entries[1:]):
            left_out[name] = "it has no finished arm beside its reference"
            continue
        rows = worlds.setdefault(frozenset(entries[0].runs["run_id"]), {})
        for entry in entries:
            key = (frozenset(entry.runs["run_id"]), *entry.numbers.values())
            rows.setdefault(key, entry).said.update(entry.said)
    return [_section(list(rows.values())) for rows in worlds.values()], left_out


def _entries(study: StudyResults) -> Iterator[Entry]:
    """Yields the rows of a study, the reference first."""
    labels, reference = study.labels, study.reference
    yield Entry(labels[reference], study.arm_runs(reference), 0.0, {}, {study.name: "the reference"})
    for row in _contrasts(study).to_dict("records"):
        if row["against"] == reference:
            arm, said = row["arm"], {study.name: told(row)}
            numbers = readable_difference(row, "the reference")
            yield Entry(labels[arm], study.arm_runs(arm), row["difference"], numbers, said, arm.endswith(A_A))
    if any(control == "a-a" for control, _ in study.controls):
        for row in controls(study).to_dict("records"):
            if row["control"] == "a-a" and row["n"] > 1:
                label, runs = f"{labels[row['arm']]} against itself (A/A)", study.control_runs("a-a", row["arm"])
                numbers = readable_difference(row, "the reference")
                yield Entry(label, runs, row["difference"], numbers, {study.name: "-"}, is_control=True)


def _contrasts(study: StudyResults) -> pd.DataFrame:
    """Returns a study's comparisons: as they were published, or of this workspace as they are now."""
    path = study.folder / "tables" / "contrasts.csv"
    if study.folder == published(study.name) and path.is_file():
        return pd.read_csv(path)
    study.require_finished()
    return contrasts(study)


def _section(entries: list[Entry]) -> Section:
    names = [entry.label for entry in entries]
    entries = [
        replace(each, label=f"{each.label} ({next(iter(each.said))})") if names.count(each.label) > 1 else each
        for each in entries
    ]
    return sorted(entries, key=lambda each: (each.is_control, -each.ahead))


def table(section: Section) -> pd.DataFrame:
    """Returns the rows of a section as text, with what an arm costs; without columns that are empty in every row."""
    reference = pooled(reference_of(section).runs).iloc[0]
    empty = {column: "-" for entry in section for column in entry.numbers}
    rows = []
    for entry in section:
        costs = entry.runs.reindex(columns=["trained_parameters", PREDICTED_PEAK, "step_seconds_median"]).median()
        rows.append(
            {
                "method": entry.label,
                "its study says": entry.outcome,
                **empty,
                **entry.numbers,
                "learning rate": f"{entry.runs['learning_rate'].iloc[0]:g}",
                "trained parameters": formatted(costs["trained_parameters"], ",.0f"),
                "predicted peak (MiB)": formatted(costs[PREDICTED_PEAK], ",.0f", MIB),
                "step (s)": formatted(costs["step_seconds_median"], ".2f"),
                "study": ", ".join(entry.said),
                "settings other than the reference's": _settings(entry, reference) or "-",
            }
        )
    frame = pd.DataFrame(rows)
    return frame.loc[:, (frame != "-").any()]


def _settings(entry: Entry, reference: pd.Series) -> str:
    """Returns the settings in which an arm differs from the reference; of the reference, those of its method."""
    row = pooled(entry.runs).iloc[0]
    fields = [field for field in settings(entry.runs) if field not in SHOWN_ELSEWHERE]
    if not entry.numbers:
        return spoken_settings(row, [field for field in fields if field not in RunSpec.model_fields])
    return spoken_settings(row, [field for field in fields if row[field] != reference.get(field)])


def _links(entry: Entry, folder: Path, form: str) -> str:
    """Returns the names of an arm's studies, as links in this form where their reports lie below the page's folder."""
    links = []
    for name in entry.said:
        reports = [path for path in (report_path(name), PUBLISHED_REPORTS / name / "report.html") if path.is_file()]
        below = [form.format(path.relative_to(folder), name) for path in reports if path.is_relative_to(folder)]
        links.append(next(iter(below), name))
    return Markup(", ").join(links)


def write_leaderboard(sections: list[Section], left_out: dict[str, str], folder: Path = REPORTS) -> Path:
    """Writes the page, as HTML and Markdown, into the folder of reports or of published ones, and returns its path."""
    content: dict[str, Any] = {
        "sections": [_content(section, folder) for section in sections],
        "left_out": left_out,
        "confidence": f"{100 * CONFIDENCE:g}",
        "margin": f"{100 * MARGIN:g}",
        "earlier_margin": f"{100 * EARLIER_MARGIN:g}",
        "style": asset("report.css"),
    }
    write_page(folder / f"{LEADERBOARD}.md", "leaderboard.md.j2", **content)
    return write_page(folder / f"{LEADERBOARD}.html", "leaderboard.html.j2", **content)


def _content(section: Section, folder: Path) -> dict[str, Any]:
    def linked(form: str) -> pd.DataFrame:
        links = [_links(entry, folder, form) for entry in section]
        return shown.assign(study=pd.Series(links, dtype=object))  # pandas' own dtype for text forgets markup

    shown = table(section)
    return {
        "subject": subject_of(section),
        "reference": reference_of(section).label,
        "columns": list(shown.columns),
        "rows": linked(Markup('<a href="{}">{}</a>')).to_numpy().tolist(),
        "markdown": Markup(markdown(linked("[{1}]({0})"))),
    }

"""Renders the leaderboard: the methods of all finished studies, with intervals and groups. No torch.

Studies whose reference arm has the same runs were judged on the same task with the same seeds, and share a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from markupsafe import Markup

from peftscope.analysis.compare import Difference, compare
from peftscope.analysis.ranking import Ranking, rank, trust
from peftscope.analysis.scores import LOSS, NATS, Scored
from peftscope.analysis.stats import CONFIDENCE, mean_interval
from peftscope.analysis.study import ACCURACY, HELDOUT, MARGIN, StudyResults, paired
from peftscope.errors import MIB, InputError
from peftscope.layout import LEADERBOARD, PUBLISHED_REPORTS, REPORTS, RESULTS, published_paths, report_path
from peftscope.planning.experiment import A_A
from peftscope.report.plots import GREY, arm_looks
from peftscope.report.rendering import asset, rendered
from peftscope.report.sentences import spoken_outcome
from peftscope.report.study import EARLIER_MARGIN, contrasts, cut_at
from peftscope.report.svg import INK, STYLE, in_page, svg_of
from peftscope.report.tables import (
    PREDICTED_PEAK,
    formatted,
    markdown,
    pooled,
    settings,
    spoken_settings,
)
from peftscope.spec import RunSpec

SHOWN_ELSEWHERE = ("init_seed", "learning_rate", "file_sha256")
"""The settings that have a column of their own, or say nothing to a reader."""
LEAD = (
    "Every method of a finished study, at the learning rate in its row, on the same task and the same seeds as the "
    "others in its table. A place in a list is no result here: what counts is the interval and the group."
)
POINTS = (
    "Rows that share a letter cannot be told apart. Rows that share none can, after Holm's correction for all pairs of "
    "a table. Rows with the same letters stand in the order of the alphabet, which says nothing of them.",
    f"Differences are means over pairs of seeds, with {100 * CONFIDENCE:g} % intervals that include the tuning of both "
    "arms. Above zero is better. “Within” is the smallest margin at which two one-sided tests call two arms the same. "
    "The A/A rows are an arm that entered twice, against itself. Exact match has an interval over seeds.",
    f"“Its study says” calls arms the same within {100 * MARGIN:g} % of what the task teaches; studies were planned "
    f"for {100 * EARLIER_MARGIN:g} %, so that many cannot tell. Holm's correction counts the arms of that study alone. "
    "So a row may differ from the reference there and still share its letter here.",
    "A table holds for its model and its task, and for its number of steps and its batch unless a row's settings name "
    "others. The test items are taken as they are: other items, "
    "tasks and larger models are not covered by the intervals.",
    "Peaks are those of live tensors, as predicted. Step times are empty where runs shared the machine.",
)
"""What the tables can and cannot say."""


@dataclass(frozen=True)
class Entry:
    """One row: an arm against the reference, or an A/A control against its own arm.

    Attributes:
        label: Its name.
        arm: The arm whose learning rate it has.
        study: The study that judged it.
        runs: Its runs, one row per seed.
        difference: How far it is ahead of the other, in nats per token; None for the reference itself.
        outcomes: What each study that it stands in says of it, by the study's name.
        is_control: Whether it is an arm that entered again (A/A).
    """

    label: str
    arm: str
    study: StudyResults
    runs: pd.DataFrame
    difference: Difference | None
    outcomes: dict[str, str]
    is_control: bool

    @property
    def names(self) -> list[str]:
        """All studies that it stands in."""
        return list(self.outcomes)

    @property
    def outcome(self) -> str:
        """What its studies say of it; each with its name if they disagree, because each corrects for its own arms."""
        said = dict.fromkeys(self.outcomes.values())
        if len(said) == 1:
            return next(iter(said))
        return "; ".join(
            f"{each} ({', '.join(name for name, outcome in self.outcomes.items() if outcome == each)})" for each in said
        )


@dataclass(frozen=True)
class Section:
    """The methods that were compared with one reference on one task.

    Attributes:
        entries: One per row, in an order that claims nothing among rows of one group.
        ranking: Of all but the controls.
    """

    entries: list[Entry]
    ranking: Ranking

    @property
    def reference(self) -> Entry:
        """The row that the others are compared with."""
        return next(entry for entry in self.entries if entry.difference is None)

    @property
    def subject(self) -> str:
        """The model, the task, the number of steps, the seeds and the first of the studies."""
        runs = self.reference.runs
        first, last = int(runs["seed"].min()), int(runs["seed"].max())
        studies = f"{self.names[0]} and {more} more" if (more := len(self.names) - 1) else self.names[0]
        return f"{self.reference.study.subject}, {runs['steps'].iloc[0]} steps, seeds {first} to {last} ({studies})"

    @property
    def groups(self) -> dict[str, str]:
        """The letters of each method's groups; those of no control."""
        return dict(zip(self.ranking.systems, map("".join, self.ranking.letters), strict=True))

    @property
    def names(self) -> list[str]:
        """The names of the studies."""
        return sorted({name for entry in self.entries for name in entry.names})


def read_sections(folder: Path = REPORTS) -> tuple[list[Section], dict[str, str]]:
    """Returns the sections, and the studies that are left out, each with the reason.

    Args:
        folder: The folder of the page. That of published reports shows published studies only.
    """
    own = [] if folder == PUBLISHED_REPORTS else list(RESULTS.glob("*/runs.csv"))
    together: dict[frozenset[str], dict[frozenset[str], Entry]] = {}
    left_out = {}
    for name in sorted({path.parent.name for path in [*own, *published_paths("runs.csv")]}):
        try:
            study = StudyResults(name)
            if not study.arms:
                continue  # an experiment without arms is no study
            study.require_finished()
            if all(arm.removesuffix(A_A) == study.reference for arm in study.arms):
                left_out[name] = "it compares nothing with its reference"
                continue
            entries = list(_entries(study))
        except InputError as error:
            left_out[name] = error.problems[0].message
            continue
        rows = together.setdefault(frozenset(study.arm_runs(study.reference)["run_id"]), {})
        for entry in entries:
            known = rows.setdefault(frozenset(entry.runs["run_id"]), entry)
            if known is not entry:
                known.outcomes[name] = entry.outcomes[name]
    return [_section(list(rows.values())) for rows in together.values()], left_out


def _entries(study: StudyResults) -> Iterator[Entry]:
    table = contrasts(study)
    labels, own = study.labels, table[table["against"] == study.reference].set_index("arm")
    for arm in study.arms:
        is_first = arm == study.reference
        difference = None if is_first else study.difference(arm, study.reference)
        said = "the reference" if is_first else spoken_outcome(own.loc[arm, "outcome"], own.loc[arm, "difference"])
        outcome = {study.name: said}
        yield Entry(labels[arm], arm, study, study.arm_runs(arm), difference, outcome, arm.endswith(A_A))
    for control, arm in study.controls:
        runs = study.control_runs(control, arm)
        if control == "a-a" and len(runs) > 1:
            both = paired(runs, study.arm_runs(arm))
            difference = compare(list(both["second"] - both["first"]), MARGIN * study.yardstick)
            label = f"{labels[arm]} against itself (A/A)"
            said = spoken_outcome(difference.outcome, difference.mean)
            yield Entry(label, arm, study, runs, difference, {study.name: said}, True)


def _section(entries: list[Entry]) -> Section:
    names = [entry.label for entry in entries]
    twice = {name for name in names if names.count(name) > 1}
    entries = [
        replace(each, label=f"{each.label} ({each.study.name})") if each.label in twice else each for each in entries
    ]
    ranking = rank({each.label: list(_scored(each)) for each in entries if not each.is_control})
    section = Section(entries, ranking)
    groups = section.groups
    entries.sort(key=lambda each: (each.is_control, groups.get(each.label, ""), each.label.casefold()))
    return section


def _scored(entry: Entry) -> Iterator[Scored]:
    for run in entry.runs.to_dict("records"):
        items = pd.DataFrame({"value": [run[HELDOUT]], "weight": 1.0, "content": ""})
        study = (entry.study.name, entry.arm)
        yield Scored(entry.label, str(run["run_id"]), int(run["seed"]), LOSS, NATS, items, study=study)


def sentences(section: Section) -> Iterator[str]:
    """Yields what the rows of a section can say, and what they cannot."""
    ranking, chances = section.ranking, trust(section.ranking)
    names = zip(ranking.systems, ranking.places, strict=True)
    unbeaten = sorted((name for name, (best, _) in names if best == 1), key=str.casefold)
    groups = len({letter for letters in ranking.letters for letter in letters})
    alike = ranking.undecided(corrected=True)
    yield (
        f"{len(ranking.systems)} methods, {groups} group{'s' if groups > 1 else ''}: {alike} of {ranking.pairs} "
        "pairs cannot be told apart. No method is shown to be better than "
        + (f"any of these {len(unbeaten)}: {'; '.join(unbeaten)}." if len(unbeaten) > 1 else f"{unbeaten[0]}.")
    )
    yield (
        f"A ranking by one seed of each would name the wrong best method in {100 * (1 - chances.winner):.0f} of 100 "
        f"cases, and would be wrong somewhere in {100 * (1 - chances.order):.0f} of 100."
    )
    for entry in section.entries:
        if entry.is_control and entry.difference is not None:
            doubt = ". It differs from itself, so that other rows may differ by as much for no reason"
            said = _told(entry.difference, *_unit(section))
            yield (
                f"{entry.label}: {said}, {entry.outcome}{doubt if entry.difference.differs else ''}. A "
                "smaller difference of a method means nothing."
            )


def _unit(section: Section) -> tuple[float, str]:
    """Returns the unit of a section's figure and sentences: a factor for nats per token, and its name."""
    gain = section.reference.study.yardstick
    return (1.0, "nats per token") if math.isnan(gain) else (100 / gain, "% of the task gain")


def _told(difference: Difference, scale: float = 1.0, unit: str = "") -> str:
    """Returns a difference with its interval."""
    form = ".1f" if scale > 1 else ".4f"
    low, high = difference.interval()
    said = f"{scale * difference.mean:+{form}} [{scale * low:+{form}}, {scale * high:+{form}}]".replace("-", "−")
    return f"{said} {unit}".rstrip()


def table(section: Section, links: dict[str, str]) -> pd.DataFrame:
    """Returns the rows of a section as text, with what a method costs; without columns that are empty in every row.

    Args:
        section: The section.
        links: What stands for the name of each study.
    """
    reference, groups = section.reference, section.groups
    rows = []
    for entry in section.entries:
        difference, runs, study = entry.difference, entry.runs, entry.study
        costs = runs.reindex(columns=["trained_parameters", PREDICTED_PEAK, "step_seconds_median"]).median()
        diverged = int((runs["status"] == "diverged").sum())
        rate = study.rate(entry.arm)
        tried = len({*rate.curve, *rate.losses})
        scale = 100 / study.yardstick
        rows.append(
            {
                "method": entry.label,
                "group": groups.get(entry.label, "A/A"),
                f"ahead of {reference.label} by (% of the task gain)": (
                    "-" if difference is None or math.isnan(scale) else _told(difference, scale)
                ),
                "within (%)": "-" if difference is None else formatted(scale * difference.bound, ".1f"),
                "by (nats/token)": _told(difference) if difference else "-",
                "its study says": entry.outcome,
                "pairs": f"{len(runs)}" + (f", {diverged} diverged" if diverged else ""),
                "exact match (%)": _exact_match(entry),
                "trained parameters": formatted(costs["trained_parameters"], ",.0f"),
                "predicted peak (MiB)": formatted(costs[PREDICTED_PEAK], ",.0f", MIB),
                "step (s)": formatted(costs["step_seconds_median"], ".2f"),
                "learning rate": f"{runs['learning_rate'].iloc[0]:g}",
                "rates tried": str(tried) if tried > 1 else "given",
                "study": Markup(", ").join(links[name] for name in entry.names),
                f"settings other than {reference.label}'s": _settings(entry, reference) or "-",
            }
        )
    frame = pd.DataFrame(rows, dtype=object)  # pandas' own dtype for text forgets that a link is markup
    return frame.loc[:, (frame != "-").any()]


def _settings(entry: Entry, reference: Entry) -> str:
    """Returns the settings in which an arm differs from the reference; of the reference, those of its method."""
    row, other = pooled(entry.runs).iloc[0], pooled(reference.runs).iloc[0]
    fields = [field for field in settings(entry.runs) if field not in SHOWN_ELSEWHERE]
    if entry is reference:
        return spoken_settings(row, [field for field in fields if field not in RunSpec.model_fields])
    return spoken_settings(row, [field for field in fields if row[field] != other.get(field)])


def _exact_match(entry: Entry) -> str:
    """Returns the share of right answers with its interval; a run that diverged counts as the untouched base."""
    if ACCURACY not in entry.runs or entry.runs[ACCURACY].isna().all():
        return "-"
    interval = mean_interval(list(100 * entry.runs[ACCURACY].fillna(entry.study.base_accuracy())))
    assert interval is not None  # an arm has two runs or more
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.1f}"
    # A Student interval may reach beyond the bounds of a share.
    return f"{interval.mean:.1f} [{max(0.0, interval.low):.1f}, {min(100.0, interval.high):.1f}]"


def _figure(section: Section, name: str) -> Markup:
    """Returns the differences with their intervals as SVG, in the order of the table."""
    scale, unit = _unit(section)
    entries, groups = section.entries, section.groups
    styles = arm_looks({each.label: each.label for each in entries})
    with sns.axes_style("whitegrid"), plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 1.1 + 0.34 * len(entries)), layout="constrained")
        for y, entry in enumerate(entries):
            colour, marker = (GREY, "o") if entry.is_control else styles[entry.label][:2]
            mean, reach = (entry.difference.mean, entry.difference.half_width()) if entry.difference else (0, 0)
            axes.errorbar(
                scale * mean, y, xerr=scale * reach, fmt=marker, ms=8, mec=INK, mew=0.8, capsize=4, color=colour
            )
        for side in () if math.isnan(section.reference.study.yardstick) else (-1, 1):
            axes.axvline(side * 100 * MARGIN, color=INK, linestyle="--", linewidth=0.9)
        axes.axvline(0, color=INK, linewidth=0.9)
        cut_at(axes, [scale * pd.Series(each.difference.interval() if each.difference else [0.0]) for each in entries])
        axes.set_yticks(range(len(entries)), [f"{each.label}  {groups.get(each.label, '')}" for each in entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_xlabel(
            f"ahead of {section.reference.label} by, in held-out loss ({unit}); further right is better", loc="right"
        )
        alt = f"Differences from {section.reference.label} with intervals, as in the table"
        return in_page(svg_of(figure, name), alt)


def _linked(names: list[str], folder: Path, form: Any) -> dict[str, str]:
    """Returns each study's name, as a link from the page's folder in this form if a report lies below that folder."""
    linked = {}
    for name in names:
        reports = [path for path in (report_path(name), PUBLISHED_REPORTS / name / "report.html") if path.is_file()]
        links = [form.format(path.relative_to(folder), name) for path in reports if path.is_relative_to(folder)]
        linked[name] = next(iter(links), name)
    return linked


def write_leaderboard(sections: list[Section], left_out: dict[str, str], folder: Path = REPORTS) -> Path:
    """Writes the page, as HTML and Markdown, into the folder of reports or of published ones, and returns its path."""
    content: dict[str, Any] = {
        "sections": [_content(section, f"section-{number}", folder) for number, section in enumerate(sections)],
        "left_out": left_out,
        "lead": LEAD,
        "points": POINTS,
        "style": asset("report.css"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{LEADERBOARD}.html"
    for suffix in (".html", ".md"):
        page.with_suffix(suffix).write_text(rendered(f"{LEADERBOARD}{suffix}.j2", **content))
    return page


def _content(section: Section, name: str, folder: Path) -> dict[str, Any]:
    reference = section.reference
    shown = table(section, _linked(section.names, folder, Markup('<a href="{}">{}</a>')))
    return {
        "subject": section.subject,
        "reference": reference.label,
        "seeds": len(reference.runs),
        "sentences": list(sentences(section)),
        "figure": _figure(section, name),
        "columns": list(shown.columns),
        "rows": shown.to_numpy().tolist(),
        "markdown": Markup(markdown(table(section, _linked(section.names, folder, "[{1}]({0})")))),
    }

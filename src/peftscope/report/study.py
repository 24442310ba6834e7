"""The figures of a study and the facts of its section: what it answers, and whether it could. No torch."""

from __future__ import annotations

import math
from itertools import zip_longest
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from peftscope.analysis.compare import MARGIN
from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import LOWEST, PLANNED, StudyResults
from peftscope.layout import results_folder
from peftscope.planning.experiment import A_A, STEP, Study
from peftscope.report import contrasts
from peftscope.report.answers import answer_of, headline
from peftscope.report.looks import BLUE, GREEN, GREY, RED, arm_looks
from peftscope.report.plots import LABEL_WIDTH, draw_figure, new_figure, plain_ticks
from peftscope.report.spoken import spoken_worlds
from peftscope.report.svg import INK
from peftscope.report.tables import FEWEST_FOR_MEANS, write_table
from peftscope.words import formatted, listed, signed

EARLIER_MARGIN, MARGIN_SINCE = 0.05, "November 2026"
"""The margin that was declared when most studies were planned, and when it fell to ``MARGIN``, after their results."""
PANELS_BESIDE = 3
"""The most panels in a row of the figure of learning rates."""
TITLE_WIDTH = 78
"""The most letters in a line of a figure's title."""
VERDICTS = {contrasts.AHEAD: GREEN, contrasts.SAME: BLUE, contrasts.OPEN: GREY, contrasts.BEHIND: RED}
"""The colour of each word on a difference."""
FARTHEST = 5.0
"""How many times as far as in the median row a point may lie for the figure of differences to show all of it."""


def draw_tuning(path: Path, study: StudyResults) -> None:
    """Draws the losses of each arm over its learning rates, a panel each, beside those of the reference in grey.

    Filled points are means over the seeds of the study, and a ring marks the best rate. Small points are the losses of
    seeds that served for tuning alone. An arm whose rate was given has no panel.
    """
    styles, rates = arm_looks(study.labels), {arm: study.rate(arm) for arm in study.arms}
    arms = [arm for arm, rate in rates.items() if rate.is_tuned or any(y is not None for y in rate.curve.values())]
    rows, columns = math.ceil(len(arms) / PANELS_BESIDE) or 1, min(PANELS_BESIDE, len(arms)) or 1
    shares = {"nrows": rows, "sharex": True, "sharey": True, "squeeze": False}
    with new_figure(path, 1 + 2.2 * max(2, columns), 0.8 + 1.7 * rows, columns, **shares) as panels:
        for i, (axes, arm) in enumerate(zip_longest(panels.flat, arms)):
            if arm is None:
                axes.set_axis_off()
                panels.flat[i - columns].tick_params(labelbottom=True)
                continue
            for shown, colour in ((study.reference, GREY), (arm, styles[arm].colour)):
                rate = rates[shown]
                reached = {x: y for x, y in rate.curve.items() if y is not None}
                axes.plot(list(reached), list(reached.values()), "o-", ms=2, color=colour, lw=0.7)
                axes.plot(list(rate.losses), list(rate.losses.values()), "o-", ms=4, color=colour)
                if shown == arm:
                    axes.plot(rate.best, rate.losses[rate.best], "o", ms=10, mfc="none", mec=colour, mew=1.6)
            axes.set(xscale="log", yscale="log", ymargin=0.12)  # the lowest points have a ring
            axes.set_title(fill(study.labels[arm], LABEL_WIDTH), fontsize="medium")
            plain_ticks(axes.yaxis)
        panels[0, 0].figure.supxlabel("learning rate")
        panels[0, 0].figure.supylabel("NLL (nats/token)" if rows == 1 else "NLL (nats per response token)")


def draw_differences(axes: plt.Axes, study: StudyResults, table: pd.DataFrame) -> None:
    """Draws how far each arm is ahead of the reference, in the blocks of the table: seeds, mean, interval, the margin.

    The colour is the verdict. A mean and its interval stand there from three pairs on. An arm far beyond the others has
    its mean at the edge. The title is the first sentence of the typed answer, if there is one.
    """
    has_gain = not math.isnan(study.yardstick)
    scale = 100 / study.yardstick if has_gain else 1.0
    rows = contrasts.in_blocks(table).to_dict("records")
    samples = [scale * study.pairs(row["arm"], row["against"]) for row in rows]
    for y, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        word = contrasts.word_of(row)
        axes.plot(sample, [y] * len(sample), "o", ms=4, color=VERDICTS[word], alpha=0.45)
        if len(sample) >= FEWEST_FOR_MEANS:
            ends = [
                [scale * (row["difference"] - row["difference_low"])],
                [scale * (row["difference_high"] - row["difference"])],
            ]
            style = {"fmt": "o", "ms": 9, "mec": INK, "mew": 0.8, "capsize": 4, "color": VERDICTS[word]}
            axes.errorbar(scale * row["difference"], y, xerr=ends, **style)
        if y and row["against"] != rows[y - 1]["against"]:
            axes.axhline(y - 0.5, color=GREY, linewidth=0.9)
    if has_gain:
        axes.axvspan(-100 * MARGIN, 100 * MARGIN, color=GREY, alpha=0.22, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.9)
    cut_at(axes, samples)
    names = [contrasts.compared_label(row["arm"], row["against"], study.reference, study.labels) for row in rows]
    axes.set_yticks(range(len(rows)), [fill(name, LABEL_WIDTH, break_on_hyphens=False) for name in names])
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    unit = "% of the task gain" if has_gain else "nats per response token"
    axes.set(xlabel=f"ahead by, in held-out loss\n({unit}); further right is better")
    title = headline(study, table) or f"Against {contrasts.reference_label(study)}"
    axes.figure.suptitle(fill(title, TITLE_WIDTH), x=0.01, ha="left", fontsize="medium", fontweight="bold")
    shown = {contrasts.word_of(row) for row in rows}
    marks = [
        plt.Line2D([], [], color=VERDICTS[word], marker="o", lw=0, label=word) for word in VERDICTS if word in shown
    ]
    axes.figure.legend(
        handles=marks, loc="outside lower center", ncols=len(marks) or 1, fontsize="small", frameon=False
    )


def cut_at(axes: plt.Axes, samples: list[pd.Series]) -> None:
    """Cuts the axis where a few rows reach so far that the others could not be seen, and writes their means there."""
    reaches = [float(sample.abs().max()) for sample in samples]
    edge = FARTHEST * median(reaches) if reaches else math.inf
    if max(reaches, default=0.0) <= edge:
        return
    axes.set_xlim(-edge, edge)
    for y, sample in enumerate(samples):
        if abs(mean := float(sample.mean())) > edge:
            text = f"{signed(mean, '.0f')} " + ("→" if mean > 0 else "←")
            axes.annotate(text, (math.copysign(edge, mean), y), ha="right" if mean > 0 else "left", va="bottom")


def power(study: StudyResults) -> dict[str, Any]:
    """Returns what the study could see: its yardstick, the half-widths of its intervals, and the arms that miss."""
    names = [contrasts.compared_label(*pair, study.reference, study.labels) for pair in study.compared]
    found = {name: study.difference(*pair) for name, pair in zip(names, study.compared, strict=True)}
    reached = {name: 100 * difference.half_width() / study.yardstick for name, difference in found.items()}
    widths, of_sameness = reached.values(), 2 * CONFIDENCE - 1
    narrow = {name: 100 * one.half_width(of_sameness) / study.yardstick for name, one in found.items()}
    return {
        "task_gain": formatted(study.yardstick, ".3f"),
        "is_lowest": LOWEST in study.table and bool(study.table[LOWEST].notna().any()),
        "margin": f"{100 * MARGIN:g}",
        "margin_nats": formatted(MARGIN * study.yardstick, ".4f"),
        "changed": MARGIN_SINCE,
        "earlier": f"{100 * EARLIER_MARGIN:g}",
        "planned": f"{100 * PLANNED:g}",
        "widths": " to ".join(dict.fromkeys(f"{end(widths):.1f}" for end in (min, max) if widths)),
        "median": f"{median(widths):.1f}" if len(widths) > 1 else "",
        "of_sameness": f"{100 * of_sameness:g}",
        "narrow": "; ".join(f"{name} ±{width:.2f} %" for name, width in narrow.items()),
        "missed": "; ".join(f"{name} (±{width:.1f} %)" for name, width in reached.items() if width > 100 * PLANNED),
    }


def study_facts(study: StudyResults, settings: Study) -> dict[str, Any]:
    """Returns the values for the sentences of the study's section."""
    labels, table = study.labels, contrasts.contrasts(study)
    rows = table.to_dict("records")
    a_a = [row for row in rows if row["arm"].endswith(A_A)]
    given = [labels[arm] for arm in (*settings.given_rates, *settings.borrowed_rates) if arm in study.arms]
    rates = {arm: study.rate(arm) for arm in study.arms}
    broken = contrasts.tuning(study).query("is_best and steep > 0").to_dict("records")
    return {
        "first": labels[study.reference],
        "against": contrasts.reference_label(study),
        "subject": spoken_worlds([study.subject]),
        "answer": answer_of(study, table, contrasts.counted_line(table, contrasts.reference_label(study))),
        "compares": bool(rows),
        "no_gain": math.isnan(study.yardstick) and any(name == "shuffled-labels" for name, _ in study.controls),
        "a_a_fails": any(row["difference_low"] > 0 or row["difference_high"] < 0 for row in a_a),
        "power": power(study) if not math.isnan(study.yardstick) else None,
        "given": listed(given, "; "),
        "controls_of": sorted({control for control, _ in study.controls}),
        "fewest_rates": min((len(rates) or 3 for rates in settings.learning_rates.values()), default=0),
        "steep": contrasts.STEEP,
        "chosen_by": settings.chosen_by,
        "has_tuning": any(rate.is_tuned or rate.regret for rate in rates.values()),
        "step": f"√{STEP**2:.0f}",
        "tuning_seeds": listed(
            sorted({seed + arm.shift for arm in settings.entrants for seed in settings.tuning_seeds})
        ),
        "seeds": len(settings.seeds),
        "more_seeds": "; ".join(
            f"{labels[arm]} on {len(settings.seeds_of(arm))}" for arm in settings.more_seeds if arm in study.arms
        ),
        "chosen": "; ".join(f"{labels[arm]} {r.best:g}" for arm, r in rates.items() if r.curve or r.is_tuned),
        "at_an_end": "; ".join(labels[arm] for arm in study.arms_at_an_end),
        "left_out": contrasts.told_left_out(study),
        "base_loss": f"{study.base_loss:.3f}",
        "broken": "; ".join(f"{labels[row['arm']]} {row['steep']} of {row['n']}" for row in broken),
        "smallest_p": f"{2 / 2 ** max((row['n'] for row in rows), default=len(settings.seeds)):.3g}",
    }


def study_sentences(facts: dict[str, Any]) -> dict[str, str]:
    """Returns what each figure of a study shows in words, from its facts."""
    several = facts["seeds"] >= FEWEST_FOR_MEANS
    large = f", large ones their means with {100 * CONFIDENCE:g} % intervals" * several
    large += ", which include the tuning of both arms" * (several and facts["has_tuning"])
    differences = f"Points right of the line are better than {facts['against']}. Small points are seeds{large}."
    if facts["power"]:
        differences += " The grey band is the margin of sameness."
    tuning = f"Each arm is drawn beside {facts['first']}, which is grey. Small points are of seeds that only tuned. "
    tuning += f"Rings mark what was chosen: {facts['chosen']}. A rate at which training diverged has no point."
    return {"differences": differences, "tuning": tuning} if facts["compares"] else {"tuning": tuning}


def write_study(experiment: str) -> None:
    """Writes contrasts, controls and tuning (csv, html), and draws the tuning and the differences.

    Raises:
        InputError: The study is not finished.
    """
    study = StudyResults(experiment)
    study.require_finished()
    tables = {}
    for name, make, readable in (
        ("contrasts", contrasts.contrasts, contrasts.readable_contrasts),
        ("controls", contrasts.controls, contrasts.readable_controls),
        ("tuning", contrasts.tuning, contrasts.readable_tuning),
    ):
        tables[name] = frame = make(study)
        write_table(experiment, name, frame, readable(frame, study.labels))
    figures = results_folder(experiment) / "figures"
    draw_tuning(figures / "tuning.svg", study)
    if study.compared:
        draw_figure(figures / "differences.svg", lambda axes: draw_differences(axes, study, tables["contrasts"]))

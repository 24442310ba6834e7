"""The tables and figures of a study: its learning rates, the differences between its arms, its controls. No torch."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from peftscope.analysis.stats import (
    CONFIDENCE,
    bootstrap_interval,
    false_positives,
    holm,
    mean_interval,
    paired_p,
    sign_flip_p,
)
from peftscope.analysis.study import HELDOUT, StudyResults, paired
from peftscope.layout import results_folder
from peftscope.planning.experiment import Study
from peftscope.report.plots import draw_figure, method_colours, plain_ticks
from peftscope.report.sentences import listed
from peftscope.report.tables import formatted, html

CONTROLS = {
    "a-a": "another initialisation seed (A/A)",
    "zero-lr": "a learning rate of zero",
    "shuffled-labels": "trained on shuffled answers",
}
ENDS = ("", "_low", "_high")
STATISTICS = ("n", "diverged", "gain", "gain_low", "gain_high", "bootstrap_low", "bootstrap_high", "t_p", "sign_flip_p")


def contrasts(study: StudyResults) -> pd.DataFrame:
    """Returns one row per arm: how much lower its held-out loss is than that of the first arm, in nats per token.

    Differences are paired by seed. ``holm_p`` is the p of the t test after Holm's correction for the number of arms.
    """
    first, *others = study.arms
    rows = [{"arm": arm, "against": first, **_statistics(study.arm_runs(arm), study.arm_runs(first))} for arm in others]
    table = pd.DataFrame(rows, columns=["arm", "against", *STATISTICS])
    tested = table["t_p"].notna()
    return table.assign(holm_p=pd.Series(holm(list(table.loc[tested, "t_p"])), table.index[tested], dtype=float))


def controls(study: StudyResults) -> pd.DataFrame:
    """Returns one row per control: its gain over its arm, and the gain of both over the base, in nats per token.

    The row of an A/A control also says how often the t test would call the two different over resampled pairs, and the
    range of this rate that chance allows.
    """
    rows = []
    for control, arm in study.controls:
        runs, own = study.control_runs(control, arm), study.arm_runs(arm)
        row: dict[str, Any] = {"arm": arm, "control": control, **_statistics(runs, own)}
        row["control_over_base"] = study.base_loss - float(runs[HELDOUT].mean())
        row["arm_over_base"] = study.base_loss - float(own[HELDOUT].mean())
        found = false_positives(gains(runs, own)) if control == "a-a" else None
        if found is not None:
            row |= {
                f"called_different{end}": v for end, v in zip(ENDS, (found.rate, found.low, found.high), strict=True)
            }
        rows.append(row)
    columns = ["control_over_base", "arm_over_base", *(f"called_different{end}" for end in ENDS)]
    return pd.DataFrame(rows, columns=["arm", "control", *STATISTICS, *columns])


def gains(runs: pd.DataFrame, against: pd.DataFrame) -> list[float]:
    """Returns for each seed how much lower the held-out loss is than that of other runs, in nats per token."""
    both = paired(runs, against)
    return [float(value) for value in both["second"] - both["first"]]


def _statistics(runs: pd.DataFrame, against: pd.DataFrame) -> dict[str, Any]:
    differences = gains(runs, against)
    interval = mean_interval(differences)
    assert interval is not None  # a study has two seeds or more
    diverged = sum(int((side["status"] == "diverged").sum()) for side in (runs, against))
    found: dict[str, Any] = {"n": interval.n, "diverged": diverged, "gain": interval.mean}
    below, above = bootstrap_interval(differences)
    return found | {
        "gain_low": interval.mean if interval.low is None else interval.low,
        "gain_high": interval.mean if interval.high is None else interval.high,
        "bootstrap_low": below,
        "bootstrap_high": above,
        "t_p": paired_p(differences),
        "sign_flip_p": sign_flip_p(differences),
    }


def readable_contrasts(table: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Returns the contrasts as text for people."""
    rows = [
        {
            "arm": labels[row["arm"]],
            "pairs": f"n = {row['n']}" + (f", {row['diverged']} diverged" if row["diverged"] else ""),
            f"gain over {labels[row['against']]} (nats/token)": _interval(row, "gain"),
            "bootstrap": _bounds(row, "bootstrap"),
            "p, t test": formatted(row["t_p"], ".3g"),
            "p, after Holm": formatted(row["holm_p"], ".3g"),
            "p, sign flips": formatted(row["sign_flip_p"], ".3g"),
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=None if rows else ["arm"])


def readable_controls(table: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Returns the controls as text for people."""
    rows = [
        {
            "control": f"{labels[row['arm']]}, {CONTROLS[row['control']]}",
            "pairs": f"n = {row['n']}" + (f", {row['diverged']} diverged" if row["diverged"] else ""),
            "gain over the arm (nats/token)": _interval(row, "gain"),
            "gain over the base": formatted(row["control_over_base"], ".4f"),
            "the arm's own": formatted(row["arm_over_base"], ".4f"),
            "called different (%)": formatted(row["called_different"], ".1f", 0.01),
            "chance allows (%)": "-"
            if pd.isna(row["called_different"])
            else " to ".join(formatted(row[f"called_different{end}"], ".1f", 0.01) for end in ENDS[1:]),
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=None if rows else ["control"])


def _interval(row: dict[Any, Any], name: str) -> str:
    return f"{formatted(row[name], '+.4f')} {_bounds(row, name)}".strip()


def _bounds(row: dict[Any, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if pd.isna(low) else f"[{low:+.4f}, {high:+.4f}]"


def draw_tuning(axes: plt.Axes, study: StudyResults) -> None:
    """Draws the validation loss of each arm over its learning rates. A ring marks the chosen rate."""
    colours = _colours(study)
    for arm, label in study.labels.items():
        rate = study.rate(arm)
        reached = {x: y for x, y in rate.curve.items() if y is not None}
        axes.plot(list(reached), list(reached.values()), "o-", ms=4, color=colours[arm], label=label)
        axes.plot(rate.best, rate.curve[rate.best], "o", ms=11, mfc="none", mec=colours[arm], mew=1.6)
    axes.set(xscale="log", yscale="log", title="Learning rates that were tried")
    axes.set(xlabel="learning rate", ylabel="validation NLL (nats per response token)")
    plain_ticks(axes.yaxis)
    axes.legend(fontsize=8)


def draw_differences(axes: plt.Axes, study: StudyResults) -> None:
    """Draws each arm's gain over the first arm, and the A/A controls: a point per seed, and the mean's interval."""
    labels, colours = study.labels, _colours(study)
    first, *others = study.arms
    rows = [(labels[arm], colours[arm], gains(study.arm_runs(arm), study.arm_runs(first))) for arm in others]
    rows += [
        (f"{labels[arm]} against itself (A/A)", "0.45", gains(study.control_runs(control, arm), study.arm_runs(arm)))
        for control, arm in study.controls
        if control == "a-a"
    ]
    for y, (_, colour, differences) in enumerate(rows):
        # If there are hundreds of points, they fade, so that their mean stands out.
        alpha = min(0.6, max(0.08, 10 / len(differences)))
        axes.plot(differences, [y] * len(differences), ".", ms=9, color=colour, alpha=alpha)
        interval = mean_interval(differences)
        if interval is not None:
            low, high = interval.low, interval.high
            bars = None if low is None or high is None else [[interval.mean - low], [high - interval.mean]]
            axes.errorbar(interval.mean, y, xerr=bars, fmt="D", ms=6, capsize=4, color=colour)
    axes.axvline(0, color="0.3", linewidth=0.9)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="held-out loss below the other's (nats per response token)", title=f"Gain over {labels[first]}")


def _colours(study: StudyResults) -> dict[str, Any]:
    own, spare = method_colours(), sns.color_palette("husl", len(study.arms))
    return {arm: own.get(label, spare[i]) for i, (arm, label) in enumerate(study.labels.items())}


def study_facts(study: StudyResults, settings: Study) -> dict[str, Any]:
    """Returns the values for the sentences of the study's section."""
    labels = study.labels
    return {
        "first": labels[study.arms[0]],
        "fewest_rates": min(len(rates) for rates in settings.learning_rates.values()),
        "tuning_seeds": listed(settings.tuning_seeds),
        "seeds": len(settings.seeds),
        "chosen": ", ".join(f"{label} {study.rate(arm).best:g}" for arm, label in labels.items()),
        "at_an_end": ", ".join(labels[arm] for arm in study.arms_at_an_end),
        "left_out": ", ".join(f"{arm} ({reason})" for arm, reason in study.left_out.items()),
        "base_loss": f"{study.base_loss:.3f}",
        "nominal": f"{100 * (1 - CONFIDENCE):.0f}",
        "smallest_p": f"{2 / 2 ** len(settings.seeds):.3g}",
    }


def write_study(experiment: str) -> None:
    """Writes the contrasts and controls (csv, html), and draws the tuning and the differences.

    Raises:
        InputError: The study is not finished.
    """
    study = StudyResults(experiment)
    study.require_finished()
    tables, figures = (results_folder(experiment) / name for name in ("tables", "figures"))
    tables.mkdir(parents=True, exist_ok=True)
    found, checked = contrasts(study), controls(study)
    for name, frame, shown in (
        ("contrasts", found, readable_contrasts(found, study.labels)),
        ("controls", checked, readable_controls(checked, study.labels)),
    ):
        frame.to_csv(tables / f"{name}.csv", index=False)
        (tables / f"{name}.html").write_text(html(shown, name))
    draw_figure(figures / "tuning.png", lambda axes: draw_tuning(axes, study))
    draw_figure(figures / "differences.png", lambda axes: draw_differences(axes, study))

"""The tables of a study, its comparisons, controls and rates, as numbers and as text. No torch."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import pandas as pd

from peftscope.analysis.collect import WRONG_SYMBOLS, paired
from peftscope.analysis.compare import MARGIN, Outcome
from peftscope.analysis.exact_match import ARGMAX, GREEDY, has_whole_split, points
from peftscope.analysis.stats import bootstrap_interval, mean_interval, sign_flip_p, where_reached
from peftscope.analysis.study import HELDOUT, VALIDATION, StudyResults
from peftscope.data.tasks import symbols_of
from peftscope.planning.experiment import A_A
from peftscope.report.sentences import spoken_outcome, spoken_side
from peftscope.words import formatted, grouped, interval, quoted, signed, spoken_bound

AHEAD, BEHIND, SAME, OPEN = "ahead", "behind", "the same", "not told apart"
"""The words on a difference."""
CONTROLS = {
    "a-a": "another initialisation seed (A/A)",
    "zero-lr": "a learning rate of zero",
    "shuffled-labels": "trained on shuffled answers",
}
EXPLAINED = (
    "Above zero is better. Holm's correction is for all comparisons of the study: it may leave open what one "
    "interval would decide. “Within” is the smallest margin at which two one-sided tests call two the same, rounded up."
)
STEEP = 1.5
"""A run that ended on the steep rise has more than so many times the median loss at its rate, or at the best below."""
FEWEST_FOR_BOOTSTRAP = 8
"""Pairs below which the bootstrap is too narrow to be shown, see ``analysis.stats``."""


def contrasts(study: StudyResults) -> pd.DataFrame:
    """Returns one row per comparison: how far an arm is ahead, in nats, % of the task gain and points of exact match.

    Differences are paired by seed. Intervals and p include what the tuning of both arms adds, where it is known.
    ``holm_p`` is the p after Holm's correction for all comparisons, A/A apart, and decides whether arms differ.
    ``bound_percent`` is the smallest margin at which two one-sided tests call the two the same, not corrected.
    ``tunings`` is of comparisons with a reference at several rates: 2 where its A/A counts with it, else 1.
    """
    rows = [_contrast(study, *pair) for pair in study.compared]
    return pd.DataFrame(rows, columns=None if rows else ["arm"])


def _contrast(study: StudyResults, arm: str, against: str) -> dict[str, Any]:
    difference, holm_p = study.difference(arm, against), study.corrected_p(arm, against)
    mine, other = study.arm_runs(arm), study.arm_runs(against)
    outcome = difference.outcome_at(difference.p if holm_p is None else holm_p)
    correction = holm_p / difference.p if holm_p and difference.p else 1.0
    scale = 100 / study.yardstick
    low, high = difference.interval()
    sample, symbols = study.pairs(arm, against), symbols_of(study.table["task"].iloc[0])
    row: dict[str, Any] = {
        "arm": arm,
        "against": against,
        "n": difference.n,
        "diverged": sum(int((side["status"] == "diverged").sum()) for side in (mine, other)),
        "difference": difference.mean,
        "difference_low": low,
        "difference_high": high,
        "percent": scale * difference.mean,
        "percent_low": scale * low,
        "percent_high": scale * high,
        "margin_percent": 100 * MARGIN,
        "bound_percent": scale * difference.bound,
        "tuning_error_percent": scale * difference.tuning_error,
        "spread": difference.spread,
        "outcome": str(outcome),
        "pairs_to_decide": (outcome == Outcome.OPEN and difference.pairs_to_decide(correction)) or math.nan,
        "t_p": difference.p,
        "holm_p": math.nan if holm_p is None else holm_p,
        "sign_flip_p": sign_flip_p(sample),
    }
    if difference.n >= FEWEST_FOR_BOOTSTRAP:
        row["bootstrap_low"], row["bootstrap_high"] = bootstrap_interval(sample)
    if (accuracy := mean_interval(points(study, arm, against, ARGMAX if symbols else ""))) is not None:
        row |= {"accuracy": accuracy.mean, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
        row["is_whole_split"] = bool(symbols) or has_whole_split(study, arm, against)
        row |= {"points_of": "argmax tokens"} if symbols else {}
    score = WRONG_SYMBOLS if symbols else GREEDY
    if all(score in side and side[score].notna().any() for side in (mine, other)):
        means = [100 * study.mean_of(arm, against)(list(side[score].dropna())) for side in (mine, other)]
        row |= {
            "score_of": f"wrong {symbols}" if symbols else "exact match",
            "score": means[0],
            "score_against": means[1],
        }
    losses = list(other[VALIDATION].dropna()) if VALIDATION in other else []
    target = study.mean_of(against)(losses) + MARGIN * study.yardstick if losses else math.nan
    if math.isfinite(target) and (samples := samples_to(study, target, arm)):
        row["samples_to_reference"] = median(samples)
    if study.reference == against and study.has_several_rates(against):
        row["tunings"] = len(study.entries(arm, against)[1])
    return row


def samples_to(study: StudyResults, loss: float, arm: str) -> list[float]:
    """Returns for each seed of an arm how many samples it saw before its validation loss reached another.

    Losses between two measurements are interpolated; infinite if the loss was not reached.
    """
    curves = study.losses
    if VALIDATION not in curves or curves[VALIDATION].isna().all():
        return []
    runs = study.arm_runs(arm).set_index("run_id")
    reached = []
    for run, row in runs.iterrows():
        curve = curves.loc[run, VALIDATION].dropna()
        curve.loc[int(row["steps"])] = row[VALIDATION]
        step = where_reached(curve, curve.index, loss) if len(curve) > 1 else math.nan
        reached.append(math.inf if math.isnan(step) else step * row["batch_size"] * row["gradient_accumulation"])
    return reached


def told_left_out(study: StudyResults) -> str:
    """Returns the arms that a study leaves out, with the reasons; empty if there are none."""
    reasons = grouped((reason, quoted(study.labels[arm])) for arm, reason in study.left_out.items())
    return "; ".join(f"{', '.join(arms)} ({reason})" for reason, arms in reasons.items())


def at_one_rate(study: StudyResults) -> str:
    """Returns the sentence that leads what a study says of arms at one rate each; empty where they ran at several."""
    return "" if study.has_several_rates(*study.arms) else "Each arm ran at one rate. "


def controls(study: StudyResults) -> pd.DataFrame:
    """Returns one row per control: how far it is ahead of its arm, and both of the base, in nats per token."""
    rows = []
    for control, arm in study.controls:
        runs, own = study.control_runs(control, arm), study.arm_runs(arm)
        pairs = paired(runs, own, HELDOUT)
        interval = mean_interval(list(pairs["second"] - pairs["first"]))
        assert interval is not None  # a control has one seed or more
        rows.append(
            {
                "arm": arm,
                "control": control,
                "n": interval.n,
                "diverged": int((runs["status"] == "diverged").sum()),
                "difference": interval.mean,
                "difference_low": interval.mean if interval.low is None else interval.low,
                "difference_high": interval.mean if interval.high is None else interval.high,
                "control_over_base": study.base_loss - float(runs[HELDOUT].mean()),
                "arm_over_base": study.base_loss - float(own[HELDOUT].mean()),
            }
        )
    return pd.DataFrame(rows, columns=None if rows else ["arm", "control"])


def tuning(study: StudyResults) -> pd.DataFrame:
    """Returns one row per arm and rate on the seeds of the study: its held-out losses, and whether it is the best.

    Of a task whose answers are lists of symbols, it has the shares of the tokens that are the argmax and of the symbols
    that are wrong, without runs that diverged, and without the best and the worst seed of an arm at several rates.
    """
    rows, symbols = [], symbols_of(study.table["task"].iloc[0])
    scores = {"argmax_tokens": ARGMAX, f"wrong_{symbols}": WRONG_SYMBOLS} if symbols else {}
    for arm in study.arms:
        rate, runs, mean = study.rate(arm), study.rate_runs(arm), study.mean_of(arm)
        for tried, loss in rate.losses.items():
            here = runs[runs["learning_rate"] == tried]
            typical = runs[runs["learning_rate"] == min(tried, rate.best)]
            rows.append(
                {
                    "arm": arm,
                    "listed": len(rate.curve),
                    "learning_rate": tried,
                    "is_best": tried == rate.best,
                    "n": len(here),
                    "trimmed_mean": loss,
                    "mean": float(here[HELDOUT].mean()),
                    "steep": int((here[HELDOUT] > STEEP * float(typical[HELDOUT].median())).sum()),
                    "diverged": int((here["status"] == "diverged").sum()),
                }
                | {
                    f"{name}_percent": 100 * mean(list(here[column].dropna()))
                    for name, column in scores.items()
                    if column in here and here[column].notna().any()
                }
            )
    return pd.DataFrame(rows)


def told(row: dict[Any, Any], other: str = "") -> str:
    """Returns what a comparison says, and that a correction says it where the interval alone would say more."""
    is_corrected = row["outcome"] == Outcome.OPEN and row["difference_low"] * row["difference_high"] > 0
    return spoken_outcome(row["outcome"], row["difference"], other=other) + " after Holm's correction" * is_corrected


def word_of(row: dict[Any, Any]) -> str:
    """Returns the word on a comparison."""
    words = {Outcome.SAME: SAME, Outcome.OPEN: OPEN}
    return words.get(Outcome(row["outcome"])) or spoken_side(row["difference"])


def in_brackets(row: dict[Any, Any], name: str, spec: str) -> str:
    """Returns a number of a comparison with its sign, and with its interval in brackets."""
    return interval(row[name], row[f"{name}_low"], row[f"{name}_high"], lambda value: signed(value, spec))


def in_blocks(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the contrasts in blocks, one for each arm that others are compared with, the best first, the A/A last."""
    if table.empty:
        return table
    keys = {
        "block": pd.factorize(table["against"])[0],
        "is_a_a": table["arm"].str.endswith(A_A),
        "lag": -table["difference"],
    }
    return table.loc[table.assign(**keys).sort_values(list(keys), kind="stable").index]


def readable_contrasts(table: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Returns the contrasts as text for people, in blocks."""
    rows, table = [], in_blocks(table)
    several = len(table) and table["against"].nunique() > 1
    for row in table.to_dict("records"):
        against = of_tunings(labels[row["against"]], row.get("tunings", math.nan))
        text = {
            "arm": labels[row["arm"]],
            **({"against": against} if several else {}),
            "what it says": told(row),
            **readable_difference(row, "" if several else labels[row["against"]]),
            "pairs that would decide": formatted(row["pairs_to_decide"], ",.0f"),
            "standard error of tuning (%)": formatted(row["tuning_error_percent"] or math.nan, ".1f"),
        }
        if "samples_to_reference" in row:
            samples = formatted(row["samples_to_reference"], ",.0f").replace("inf", "not reached")
            text["samples to the reference's loss and the margin"] = samples
        text |= {} if several else {"against": against}
        text |= {
            "p, t test": formatted(row["t_p"], ".3g"),
            "p, after Holm": formatted(row["holm_p"], ".3g"),
            "p, sign flips": formatted(row["sign_flip_p"], ".3g"),
        }
        if "bootstrap_low" in row:
            text["bootstrap"] = f"[{signed(row['bootstrap_low'], '.4f')}, {signed(row['bootstrap_high'], '.4f')}]"
        rows.append(text)
    return pd.DataFrame(rows, columns=None if rows else ["arm"])


def reference_label(study: StudyResults) -> str:
    """Returns the label of the reference, and at several rates whether its A/A counts with it."""
    label = study.labels[study.reference]
    return of_tunings(label, len(study.tunings)) if study.has_several_rates(study.reference) else label


def of_tunings(label: str, tunings: float) -> str:
    """Returns the label of a reference with how many times it was tuned; if not a number, as it is."""
    return label + (" alone" if tunings == 1 else " and its A/A" if tunings == 2 else "")


def readable_difference(row: dict[Any, Any], reference: str) -> dict[str, str]:
    """Returns how far an arm is ahead of another as text, by column, with the other's label in a heading if given."""
    has_gain, has_score = math.isfinite(row.get("percent", math.nan)), pd.notna(row.get("score"))
    of = f" of {reference}" * bool(reference)
    points = f"by (points of {row.get('points_of', 'exact match')})"
    mark = "" if row.get("is_whole_split", True) else " *"
    return {
        "pairs": _pairs(row),
        f"ahead{of} by (% of the task gain)": in_brackets(row, "percent", ".1f") if has_gain else "-",
        "within (%)": spoken_bound(row.get("bound_percent")),
        points: in_brackets(row, "accuracy", ".1f") + mark if pd.notna(row.get("accuracy")) else "-",
        **({f"{row['score_of']} (%)": f"{row['score']:.1f} against {row['score_against']:.1f}"} if has_score else {}),
        "by (nats/token)": in_brackets(row, "difference", ".4f"),
    }


def compared_label(arm: str, against: str, reference: str, labels: dict[str, str]) -> str:
    """Returns the label of an arm, with what it is compared with unless that is the reference."""
    return labels[arm] if against == reference else f"{labels[arm]} against {labels[against]}"


def readable_controls(table: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Returns the controls as text for people."""
    rows = [
        {
            "control": f"{labels[row['arm']]}, {CONTROLS[row['control']]}",
            "pairs": _pairs(row),
            "ahead of the arm by (nats/token)": in_brackets(row, "difference", ".4f"),
            "gain over the base": formatted(row["control_over_base"], ".4f"),
            "the arm's own": formatted(row["arm_over_base"], ".4f"),
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=None if rows else ["control"])


def readable_tuning(table: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Returns the rates of each arm as text for people."""
    rows = [
        {
            "arm": labels[row["arm"]],
            "learning rate": f"{row['learning_rate']:g}" + (", the best" if row["is_best"] else ""),
            "seeds": f"n = {row['n']}",
            "loss without best and worst seed (nats per token)": formatted(row["trimmed_mean"], ".4f"),
            "mean loss (nats per token)": formatted(row["mean"], ".4f"),
            "on the steep rise": str(row["steep"]),
            "diverged": str(row["diverged"]),
        }
        for row in table.to_dict("records")
    ]
    scores = table.filter(like="_percent").map(formatted, form=".1f")
    return pd.DataFrame(rows).join(scores.rename(columns=lambda name: name.replace("_", " ").replace("percent", "(%)")))


def _pairs(row: dict[Any, Any]) -> str:
    return f"n = {row['n']}" + (f", {row['diverged']} diverged" if row["diverged"] else "")


def counted_line(table: pd.DataFrame, reference: str) -> str:
    """Returns how many arms are ahead of the reference, the same, and so on, in one line; empty without any.

    Args:
        table: The contrasts of a study.
        reference: The label of the reference.
    """
    if table.empty:
        return ""
    is_arm = ~table["arm"].str.endswith(A_A) & (table["against"] == table["against"].iloc[0])
    tested = table[is_arm & table["percent"].notna()].to_dict("records")
    said = sorted(tested, key=lambda row: list(Outcome).index(row["outcome"]))
    each = grouped((told(row), row["arm"]) for row in said)
    return f"Beside {reference}: {', '.join(f'{len(arms)} {word}' for word, arms in each.items())}." if each else ""

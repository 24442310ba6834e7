"""Says what each figure shows, from its data: no number is typed here."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from peftscope.analysis.compare import MARGIN, Outcome
from peftscope.analysis.stats import CONFIDENCE
from peftscope.report import tables
from peftscope.words import MIB, capitalised, formatted, plain

NOTHING = "No finished run has measured this."

SEEDS_NEEDED = 5
"""A study of today's design begins with five seeds."""


def sentence(figure: str, runs: pd.DataFrame, losses: pd.DataFrame) -> str:
    """Returns the sentence for a figure, which is named as in ``FIGURES`` or ``ladder-FIELD``."""
    if figure.startswith("ladder-"):
        said = _ladder(runs, figure.removeprefix("ladder-"))
    else:
        said = FIGURES[figure](runs, losses)
    return capitalised(said) if said else NOTHING


def spoken_side(difference: float) -> str:
    """Returns on which side of another an arm is."""
    return "ahead" if difference > 0 else "behind"


def spoken_outcome(outcome: str, difference: float, margin: str = "", other: str = "") -> str:
    """Returns what a comparison says.

    Args:
        outcome: The outcome.
        difference: How far the one is ahead of the other; only its sign counts.
        margin: The margin of sameness, in words; empty for that of studies.
        other: What is compared with; empty if it is understood.

    >>> spoken_outcome("same, but differs", 0.1), spoken_outcome("open", 0.1, other="LoRA")
    ('ahead, by less than 2.5 % of the task gain', 'not told apart from LoRA')
    """
    margin, side = margin or f"{100 * MARGIN:g} % of the task gain", spoken_side(difference)
    place = f"{side} of {other}" if other and side == "ahead" else f"{side} {other}".rstrip()
    return {
        Outcome.SAME: f"the same as {other}" if other else "the same",
        Outcome.SAME_BUT_DIFFERS: f"{place}, by less than {margin}",
        Outcome.MORE: f"{place} by more than {margin}",
        Outcome.DIFFERS: place,
        Outcome.OPEN: f"not told apart from {other}" if other else "not told apart",
    }[Outcome(outcome)]


def _pareto(runs: pd.DataFrame, losses: pd.DataFrame) -> str:
    """Returns the methods with the lowest loss and with the least and most memory, among those that train."""
    trained, base = _trained(runs)
    if trained.empty:
        return ""
    best, n = trained.loc[trained["heldout_nll"].idxmin()], int(trained["n"].min())
    untouched = f"{base['heldout_nll'].iloc[0]:.3f}" if len(base) else "not run"
    reached = "the lowest held-out loss," if len(trained) > 1 else "a held-out loss of"
    said = f"Lower and further left is better: {best['label']} reached {reached} "
    said += f"{best['heldout_nll']:.3f} nats per token (the untouched base: {untouched})"
    (largest, most), (leanest, least) = _extremes(trained)
    if least != most:
        said += f"; {leanest} trained in the least memory, {least} MiB, against {most} MiB for {largest}"
    said += ". "
    if tables.is_crowded(tables.method_summary(runs)):
        said += "Each point is a setting, the mean of its runs; colours are methods. "
    elif n == tables.FEWEST_FOR_MEANS - 1:
        said += "Points are runs. "
    elif n >= tables.FEWEST_FOR_MEANS:
        said += f"Points are means, bars {100 * CONFIDENCE:g} % intervals over {n} seeds (cut at the frame). "
    if trained["is_predicted"].any():
        said += "Hollow points stand at the predicted peak, because no run was probed for its memory. "
    if n < SEEDS_NEEDED:
        said += f"n = {n} is too few to call a difference: this figure ranks nothing."
    return said.rstrip()


def _memory(runs: pd.DataFrame, losses: pd.DataFrame) -> str:
    """Returns the methods with the least and the most memory in training."""
    trained, _ = _trained(runs)
    if trained.empty:
        return ""
    (largest, most), (leanest, least) = _extremes(trained)
    if least == most:
        said = f"{largest} needs {most} MiB of live tensors in training. "
    else:
        factor = trained["peak"].max() / trained["peak"].min()
        said = f"{largest} needs the most memory in training, {most} MiB of live tensors; "
        said += f"{leanest} the least, {least} MiB, a factor of {factor:.1f}. "
    said += "Loading includes the method's initialisation."
    if trained["is_predicted"].any():
        said += " Hatched bars are predicted peaks, because no run was probed for its memory."
    if tables.is_crowded(tables.grid_runs(runs)):
        said += " Bars are means over the runs of a method; lines go from its least to its most."
    return said


def _throughput(runs: pd.DataFrame, losses: pd.DataFrame) -> str:
    """Returns the fastest and the slowest method."""
    trained, _ = _trained(runs)
    # A run whose steps are all untimed has no speed.
    trained = trained if trained.empty else trained.dropna(subset=["tokens_per_second"])
    if trained.empty:
        return ""
    speed = trained["tokens_per_second"]
    fast, slow = trained.loc[speed.idxmax(), "label"], trained.loc[speed.idxmin(), "label"]
    means = ", upright lines are means" if int(trained["n"].max()) >= tables.FEWEST_FOR_MEANS else ""
    return (
        f"{fast} trained fastest, {speed.max():,.0f} tokens per second in the median; {slow} slowest, "
        f"{speed.min():,.0f}. Each point is a run{means}. Padding is not counted."
    )


def _losses(runs: pd.DataFrame, losses: pd.DataFrame) -> str:
    """Returns the methods with the lowest and the highest training loss at the last step, averaged over seeds."""
    grid = tables.grid_runs(runs)
    grid = grid.assign(variant=tables.variants(grid))
    curves = losses.merge(grid[["run_id", "variant"]], on="run_id").dropna(subset=["nll_nats_per_token"])
    if curves.empty:
        return ""
    last = curves[curves["step"] == curves.groupby("run_id")["step"].transform("max")]
    final = last.groupby("variant")["nll_nats_per_token"].mean()
    lowest, highest = final.idxmin(), final.idxmax()
    same_batches = (grid.groupby("seed")["train_batches_sha256"].nunique() == 1).all()
    said = "Every run of one seed saw the same batches in the same order. " if same_batches else ""
    if lowest == highest:
        said += f"On the last step the training loss of {lowest} was {final.min():.3f} nats per token; "
    else:
        said += f"On the last step {lowest} had the lowest training loss, {final.min():.3f} nats per token, "
        said += f"and {highest} the highest, {final.max():.3f}; "
    if tables.is_crowded(grid):
        return f"{said}lines are medians over the runs of a method, bands hold their middle half."
    several = grid.groupby("variant")["seed"].nunique().max() >= tables.FEWEST_FOR_MEANS
    return said + ("lines are means, bands span the seeds." if several else "each line is a run.")


def _prediction(runs: pd.DataFrame, losses: pd.DataFrame) -> str:
    """Returns the errors of the predicted training peaks, in percent."""
    found = tables.predictions(runs)
    training = found[found["peak"] == "training"]
    if training.empty:
        return ""
    errors = training["error_percent"].abs()
    return (
        "The simulator predicted the peak of each run before its first step, from shapes alone; the run then measured "
        f"it. Over {len(training)} runs, the predicted peaks of training were off by {errors.mean():.3f} % on average "
        f"and by {errors.max():.3f} % at worst ({training.loc[errors.idxmax(), 'label']}). On the line, prediction and "
        "measurement are equal."
    )


def _ladder(runs: pd.DataFrame, field: str) -> str:
    """Returns the best and the worst rung of a ladder."""
    ladder = tables.ladder_summary(runs)
    ladder = ladder[ladder["field"] == field].dropna(subset=["heldout_nll"])
    if ladder.empty:
        return ""
    values, name = ladder["heldout_nll"].astype(float), field.replace("_", " ")
    best, worst = (plain(ladder.loc[place, "value"]) for place in (values.idxmin(), values.idxmax()))
    said = f"Only {name} varies" if len(tables.ladders(runs)[field]) == 1 else f"Each ladder varies {name} alone"
    judged = "loss on the trained items" if tables.is_judged_on_training(runs) else "held-out loss"
    said += f", all else stays at the centre. The lowest {judged} was {values.min():.3f} nats per token at "
    said += f"{best}, the highest {values.max():.3f} at {worst}. "
    n, most = int(ladder["n"].min()), int(ladder["n"].max())
    if most == 1:
        return f"{said}Each rung has one seed (n = {most}), so there is no interval and no verdict."
    if n == most:
        return f"{said}Each rung has n = {n} seeds."
    return f"{said}Rungs have {n} to {most} seeds; bars are drawn from {tables.FEWEST_FOR_MEANS} on."


FIGURES: dict[str, Callable[[pd.DataFrame, pd.DataFrame], str]] = {
    "pareto": _pareto,
    "memory": _memory,
    "throughput": _throughput,
    "losses": _losses,
    "prediction": _prediction,
}
"""The figures that every report has, each with what says in words what it shows. The ladders follow them."""


def _trained(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    methods = tables.method_summary(runs)
    if methods.empty:
        return methods, methods
    methods = tables.with_peaks(methods.assign(label=tables.variants(methods)))
    is_base = methods["label"].str.startswith("base")
    counts = ~is_base & ~methods["label"].str.contains("(A/A)", regex=False)
    return methods[counts].dropna(subset=["heldout_nll", "peak"]), methods[is_base]


def _extremes(methods: pd.DataFrame) -> tuple[tuple[str, str], tuple[str, str]]:
    """Returns the method with the largest and that with the smallest peak, each with its peak in MiB."""
    rows = [methods.loc[place] for place in (methods["peak"].idxmax(), methods["peak"].idxmin())]
    largest, leanest = ((str(row["label"]), formatted(row["peak"], ",.0f", MIB)) for row in rows)
    return largest, leanest

"""Renders the sentence under each figure from the data. The templates hold words, never numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

from peftscope.analysis.compare import Outcome
from peftscope.analysis.stats import CONFIDENCE
from peftscope.analysis.study import MARGIN
from peftscope.report.tables import (
    FEWEST_FOR_MEANS,
    MIB,
    grid_runs,
    is_crowded,
    is_judged_on_training,
    ladder_summary,
    ladders,
    method_summary,
    predictions,
    variants,
    with_peaks,
)

NOTHING = "No finished run has measured this."

PARETO = (
    "Lower and further left is better: {{ best }} reached the lowest held-out loss, {{ best_nll }} nats per token "
    "(the untouched base: {{ base_nll }})"
    "{% if leanest_mib != largest_mib %}; {{ leanest }} trained in the least memory, {{ leanest_mib }} MiB, against "
    "{{ largest_mib }} MiB for {{ largest }}{% endif %}. "
    "{% if crowded %}Each point is a setting, the mean of its runs; colours are methods. "
    "{% elif n == needed_for_means - 1 %}Points are runs. "
    "{% elif n >= needed_for_means %}Points are means, bars {{ confidence }} % intervals over {{ n }} seeds (cut at "
    "the frame). {% endif %}"
    "{% if predicted %}Hollow points stand at the predicted peak, because no run was probed for its memory. {% endif %}"
    "{% if n < needed %}n = {{ n }} is too few to call a difference: this figure ranks nothing.{% endif %}"
)
MEMORY = (
    "{% if leanest_mib == largest_mib %}{{ largest }} needs {{ largest_mib }} MiB of live tensors in training. "
    "{% else %}{{ largest }} needs the most memory in training, {{ largest_mib }} MiB of live tensors; {{ leanest }} "
    "the least, {{ leanest_mib }} MiB, a factor of {{ factor }}. {% endif %}"
    "Loading includes the method's initialisation."
    "{% if predicted %} Hatched bars are predicted peaks, because no run was probed for its memory.{% endif %}"
    "{% if crowded %} Bars are means over the runs of a method; lines go from its least to its most.{% endif %}"
)
THROUGHPUT = (
    "{{ fastest }} trained fastest, {{ fastest_rate }} tokens per second in the median; {{ slowest }} slowest, "
    "{{ slowest_rate }}. "
    "Each point is a run{% if n >= needed_for_means %}, upright lines are means{% endif %}. Padding is not counted."
)
LOSSES = (
    "{% if same_batches %}Every run of one seed saw the same batches in the same order. {% endif %}"
    "On the last step {% if lowest == highest %}the training loss of {{ lowest }} was {{ lowest_nll }} nats per "
    "token; {% else %}{{ lowest }} had the lowest training loss, {{ lowest_nll }} nats per token, and {{ highest }} "
    "the highest, {{ highest_nll }}; {% endif %}"
    "{% if crowded %}lines are medians over the runs of a method, bands hold their middle half."
    "{% elif n >= needed_for_means %}lines are means, bands span the seeds.{% else %}each line is a run.{% endif %}"
)
LADDER = (
    "{% if ladders == one %}Only {{ field }} varies{% else %}Each ladder varies {{ field }} alone{% endif %}, all else "
    "stays at the centre. The lowest {{ loss }} was {{ best_nll }} nats per "
    "token at {{ best }}, the highest {{ worst_nll }} at {{ worst }}. "
    "{% if most == one %}Each rung has one seed (n = {{ most }}), so there is no interval and no verdict."
    "{% elif n == most %}Each rung has n = {{ n }} seeds."
    "{% else %}Rungs have {{ n }} to {{ most }} seeds; bars are drawn from {{ needed }} on.{% endif %}"
)
PREDICTION = (
    "The simulator predicted the peak of each run before its first step, from shapes alone; the run then measured it. "
    "Over {{ runs }} runs, the predicted peaks of training were off by {{ mean }} % on average and by {{ worst }} % at "
    "worst ({{ worst_run }}). On the line, prediction and measurement are equal."
)
MOST_LISTED = 12
SEEDS_NEEDED = 6
"""With fewer than six seeds, an exact paired sign-flip test cannot reach p < 0.05 (two-sided: 2 / 2^n)."""

_jinja = Environment(undefined=StrictUndefined, autoescape=False)


def sentence(figure: str, runs: pd.DataFrame, losses: pd.DataFrame) -> str:
    """Returns the sentence for a figure, which is named as in ``_FIGURES`` or ``ladder-FIELD``."""
    if figure.startswith("ladder-"):
        template, facts = LADDER, ladder_facts(runs, figure.removeprefix("ladder-"))
    else:
        template, compute = _FIGURES[figure]
        facts = compute(runs, losses)
    if not facts:
        return NOTHING
    return capitalised(_jinja.from_string(template).render(facts, needed_for_means=FEWEST_FOR_MEANS).strip())


def capitalised(text: str) -> str:
    """Returns a sentence with a capital letter, but for a first word that has a small one on purpose.

    >>> capitalised("full fine-tuning trains all."), capitalised("rsLoRA scales.")
    ('Full fine-tuning trains all.', 'rsLoRA scales.')
    """
    return text[0].upper() + text[1:] if text.split()[0].islower() else text


def listed(values: Iterable[Any], separator: str = ", ") -> str:
    """Returns the values in a row, with a separator between two; of many, only the first ones.

    >>> listed([1, 2, 3]), listed(range(100))
    ('1, 2, 3', '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 88 more')
    """
    names = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    more = len(names) - MOST_LISTED
    return separator.join(names[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def signed(value: float, spec: str) -> str:
    """Returns a number with its sign.

    >>> signed(0.25, ".1f"), signed(-0.25, ".2f")
    ('+0.2', '−0.25')
    """
    return format(value, f"+{spec}").replace("-", "−")


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


def pareto_facts(runs: pd.DataFrame, losses: pd.DataFrame) -> dict[str, Any] | None:
    """Returns the methods with the lowest loss and with the least and most memory, among those that train."""
    trained, base = _trained(runs)
    if trained.empty:
        return None
    best = trained.loc[trained["heldout_nll"].idxmin()]
    return {
        **_extremes(trained, "peak"),
        "predicted": bool(trained["is_predicted"].any()),
        "best": best["label"],
        "best_nll": f"{best['heldout_nll']:.3f}",
        "base_nll": f"{base['heldout_nll'].iloc[0]:.3f}" if len(base) else "not run",
        "crowded": is_crowded(method_summary(runs)),
        "n": int(trained["n"].min()),
        "needed": SEEDS_NEEDED,
        "confidence": f"{100 * CONFIDENCE:g}",
    }


def memory_facts(runs: pd.DataFrame, losses: pd.DataFrame) -> dict[str, Any] | None:
    """Returns the methods with the least and the most memory in training."""
    trained, _ = _trained(runs)
    if trained.empty:
        return None
    return {
        **_extremes(trained, "peak"),
        "predicted": bool(trained["is_predicted"].any()),
        "crowded": is_crowded(grid_runs(runs)),
    }


def throughput_facts(runs: pd.DataFrame, losses: pd.DataFrame) -> dict[str, Any] | None:
    """Returns the fastest and the slowest method."""
    trained, _ = _trained(runs)
    # A run whose steps are all untimed has no speed.
    trained = trained if trained.empty else trained.dropna(subset=["tokens_per_second"])
    if trained.empty:
        return None
    fast, slow = (
        trained.loc[pick] for pick in (trained["tokens_per_second"].idxmax(), trained["tokens_per_second"].idxmin())
    )
    return {
        "fastest": fast["label"],
        "fastest_rate": f"{fast['tokens_per_second']:,.0f}",
        "slowest": slow["label"],
        "slowest_rate": f"{slow['tokens_per_second']:,.0f}",
        "n": int(trained["n"].max()),
    }


def losses_facts(runs: pd.DataFrame, losses: pd.DataFrame) -> dict[str, Any] | None:
    """Returns the methods with the lowest and the highest training loss at the last step, averaged over seeds."""
    grid = grid_runs(runs)
    grid = grid.assign(variant=variants(grid))
    curves = losses.merge(grid[["run_id", "variant"]], on="run_id").dropna(subset=["nll_nats_per_token"])
    if curves.empty:
        return None
    last = curves[curves["step"] == curves.groupby("run_id")["step"].transform("max")]
    final = last.groupby("variant")["nll_nats_per_token"].mean()
    return {
        "crowded": is_crowded(grid),
        "n": int(grid.groupby("variant")["seed"].nunique().max()),
        "same_batches": bool((grid.groupby("seed")["train_batches_sha256"].nunique() == 1).all()),
        "lowest": final.idxmin(),
        "lowest_nll": f"{final.min():.3f}",
        "highest": final.idxmax(),
        "highest_nll": f"{final.max():.3f}",
    }


def prediction_facts(runs: pd.DataFrame, losses: pd.DataFrame) -> dict[str, Any] | None:
    """Returns the errors of the predicted training peaks, in percent."""
    found = predictions(runs)
    training = found[found["peak"] == "training"]
    if training.empty:
        return None
    errors = training["error_percent"].abs()
    return {
        "runs": len(training),
        "mean": f"{errors.mean():.3f}",
        "worst": f"{errors.max():.3f}",
        "worst_run": training.loc[errors.idxmax(), "label"],
    }


def ladder_facts(runs: pd.DataFrame, field: str) -> dict[str, Any] | None:
    """Returns the best and the worst rung of a ladder."""
    ladder = ladder_summary(runs)
    ladder = ladder[ladder["field"] == field].dropna(subset=["heldout_nll"])
    if ladder.empty:
        return None
    values = ladder["heldout_nll"].astype(float)
    best, worst = ladder.loc[values.idxmin()], ladder.loc[values.idxmax()]
    return {
        "field": field.replace("_", " "),
        "best": _value(best["value"]),
        "best_nll": f"{best['heldout_nll']:.3f}",
        "worst": _value(worst["value"]),
        "worst_nll": f"{worst['heldout_nll']:.3f}",
        "n": int(ladder["n"].min()),
        "most": int(ladder["n"].max()),
        "needed": FEWEST_FOR_MEANS,
        "ladders": len(ladders(runs)[field]),
        "loss": "loss on the trained items" if is_judged_on_training(runs) else "held-out loss",
        "one": 1,
    }


_FIGURES: dict[str, tuple[str, Callable[[pd.DataFrame, pd.DataFrame], dict[str, Any] | None]]] = {
    "pareto": (PARETO, pareto_facts),
    "memory": (MEMORY, memory_facts),
    "throughput": (THROUGHPUT, throughput_facts),
    "losses": (LOSSES, losses_facts),
    "prediction": (PREDICTION, prediction_facts),
}


def _trained(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    methods = method_summary(runs)
    if methods.empty:
        return methods, methods
    methods = with_peaks(methods.assign(label=variants(methods)))
    is_base = methods["label"].str.startswith("base")
    return methods[~is_base].dropna(subset=["heldout_nll", "peak"]), methods[is_base]


def _extremes(methods: pd.DataFrame, column: str) -> dict[str, str]:
    largest, leanest = methods.loc[methods[column].idxmax()], methods.loc[methods[column].idxmin()]
    return {
        "largest": largest["label"],
        "largest_mib": f"{largest[column] / MIB:,.0f}",
        "leanest": leanest["label"],
        "leanest_mib": f"{leanest[column] / MIB:,.0f}",
        "factor": f"{largest[column] / leanest[column]:.1f}",
    }


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)

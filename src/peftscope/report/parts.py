"""What a report contains: one list for ``peftscope report``, the page and the findings. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftscope.analysis.weights import weights_path
from peftscope.layout import results_folder
from peftscope.planning.plan import Plan
from peftscope.report import benchmarks, capacity, forgetting, overfitting, plots, shares, study, tables, weights


@dataclass(frozen=True)
class Part:
    """What one function writes into an experiment's folders of tables and figures.

    Attributes:
        write: The function, which takes the experiment. That of an answer takes the axes before it, and draws the
            figure.
        belongs: Returns whether the report of an experiment has it.
        of_study: Whether it needs a finished study.
        answer: The figure that carries the answer of an experiment that has it; empty without one.
        sentence: The function that says what this figure shows; it takes the experiment.
    """

    write: Callable[..., None]
    belongs: Callable[[Plan], object] = lambda plan: True
    of_study: bool = False
    answer: str = ""
    sentence: Callable[[str], str] = lambda experiment: ""


PARTS = (
    Part(tables.write_tables),
    Part(benchmarks.write_benchmarks),
    Part(plots.write_figures),
    Part(study.write_study, lambda plan: plan.is_study, of_study=True),
    Part(capacity.write_capacity, lambda plan: plan.measures_capacity),
    Part(shares.draw_shares, lambda plan: plan.varied, True, "shares", shares.shares_sentence),
    Part(
        weights.draw_updates,
        lambda plan: weights_path(results_folder(plan.name)).is_file(),
        answer="updates",
        sentence=weights.updates_sentence,
    ),
    Part(
        forgetting.draw_forgetting, lambda plan: plan.follows_prose, True, "forgetting", forgetting.forgetting_sentence
    ),
    Part(
        overfitting.draw_overfitting,
        lambda plan: plan.limits_examples,
        True,
        "overfitting",
        overfitting.overfitting_sentence,
    ),
)

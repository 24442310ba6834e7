"""The parts of a report: one list for ``peftscope report``, the page and the findings. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftscope.analysis.weights import weights_path
from peftscope.layout import results_folder
from peftscope.planning.plan import Plan
from peftscope.report import benchmarks, capacity, forgetting, overfitting, plots, shares, study, tables, weights


@dataclass(frozen=True)
class Part:
    """The files that one function writes into an experiment's folders of tables and figures.

    Attributes:
        write: The function, which takes the experiment. That of an answer takes the axes before it, and draws the
            figure.
        belongs: Returns whether the report of an experiment has it.
        of_study: Whether it needs a study of which arms can be compared.
        answer: The figure that carries the answer of an experiment that has it; empty without one.
        sentence: The function that says what this figure shows; it takes the experiment.
    """

    write: Callable[..., None]
    belongs: Callable[[Plan], object] = lambda plan: True
    of_study: bool = False
    answer: str = ""
    sentence: Callable[[str], str] = lambda experiment: ""


def _has_weights(plan: Plan) -> bool:
    return weights_path(results_folder(plan.name)).is_file()


PARTS = (
    Part(tables.write_tables),
    Part(benchmarks.write_benchmarks),
    Part(plots.write_figures),
    Part(study.write_study, lambda p: p.is_study, of_study=True),
    Part(capacity.write_capacity, lambda p: p.measures_capacity),
    Part(shares.draw_shares, lambda p: p.varied, True, "shares", shares.shares_sentence),
    Part(weights.draw_updates, _has_weights, False, "updates", weights.updates_sentence),
    Part(forgetting.draw_forgetting, lambda p: p.follows_prose, True, "forgetting", forgetting.forgetting_sentence),
    Part(overfitting.draw_overfitting, lambda p: p.few_examples, True, "overfitting", overfitting.overfitting_sentence),
)

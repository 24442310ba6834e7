"""What a report contains: one list for ``peftscope report``, the page and the findings. No torch.

The functions are named and not imported here, because what draws takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from peftscope.analysis.weights import weights_path
from peftscope.layout import results_folder
from peftscope.planning.plan import Plan


@dataclass(frozen=True)
class Part:
    """What one function writes into an experiment's folders of tables and figures.

    Attributes:
        writer: The function, as ``MODULE.NAME`` of this room. It takes the experiment. That of an answer takes the axes
            before it, and draws the figure.
        belongs: Returns whether the report of an experiment has it.
        of_study: Whether it needs a finished study.
        answer: The figure that carries the answer of an experiment that has it; empty without one.
        sentence: The function that says what this figure shows, as ``MODULE.NAME``. It takes the experiment.
    """

    writer: str
    belongs: Callable[[Plan], object] = lambda plan: True
    of_study: bool = False
    answer: str = ""
    sentence: str = ""


def function_of(name: str) -> Callable[..., Any]:
    """Returns a function of this room by its name, ``MODULE.NAME``."""
    module, _, function = name.partition(".")
    return getattr(import_module(f"{__package__}.{module}"), function)


PARTS = (
    Part("tables.write_tables"),
    Part("benchmarks.write_benchmarks"),
    Part("plots.write_figures"),
    Part("study.write_study", lambda plan: plan.is_study, of_study=True),
    Part("capacity.write_capacity", lambda plan: plan.measures_capacity),
    Part("shares.draw_shares", lambda plan: plan.varied, True, "shares", "shares.shares_sentence"),
    Part(
        "weights.draw_updates",
        lambda plan: weights_path(results_folder(plan.name)).is_file(),
        answer="updates",
        sentence="weights.updates_sentence",
    ),
    Part(
        "forgetting.draw_forgetting",
        lambda plan: plan.follows_prose,
        True,
        "forgetting",
        "forgetting.forgetting_sentence",
    ),
    Part(
        "overfitting.draw_overfitting",
        lambda plan: plan.limits_examples,
        True,
        "overfitting",
        "overfitting.overfitting_sentence",
    ),
)

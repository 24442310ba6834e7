"""The figure of a study that scores prose along the training: what is forgotten against what is learned. No torch."""

from __future__ import annotations

from statistics import fmean

import matplotlib.pyplot as plt
import pandas as pd

from peftscope.analysis.forgetting import curves, less_at_equal_loss
from peftscope.analysis.study import StudyResults
from peftscope.report.looks import arm_looks
from peftscope.report.plots import beside
from peftscope.words import signed


def mean_curves(study: StudyResults) -> dict[str, pd.DataFrame]:
    """Returns the mean curve over seeds of each arm, by its label."""
    found = {study.labels[arm]: [curve for _, curve in curves(study, study.arm_runs(arm))] for arm in study.arms}
    return {name: sum(each) / len(each) for name, each in found.items() if each}


def draw_forgetting(axes: plt.Axes, experiment: str) -> None:
    """Draws the rise on prose against the loss on the task: a line for each arm, from the base on the left to the end.

    Raises:
        InputError: The study did not score both along the training.
    """
    means = mean_curves(StudyResults(experiment))
    styles = arm_looks({name: name for name in means})
    for name, curve in means.items():
        axes.plot(curve["task"], curve["rise"], markersize=4, label=name, **styles[name].line)
        axes.plot(curve["task"].iloc[-1], curve["rise"].iloc[-1], markersize=10, **styles[name].line)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.invert_xaxis()
    axes.set_xlabel("validation loss on the task (nats per response token)")
    axes.set_ylabel("English prose, rise (bits per byte)")
    beside(axes)


def forgetting_sentence(experiment: str) -> str:
    """Returns what the figure says in words: the rise on prose at the end, and against another arm at equal loss.

    The other arm is full fine-tuning, or the reference in a study without it.
    """
    study = StudyResults(experiment)
    ends = {name: curve["rise"].iloc[-1] for name, curve in mean_curves(study).items()}
    said = ", ".join(f"{signed(rise, '.3f')} ({name})" for name, rise in ends.items())
    return (
        "What is forgotten against what is learned, along the training from the base on the left: the mean over seeds, "
        "with a large mark at the end. From the base to there, the bits that a byte of English prose takes change by "
        f"{said}.{_at_equal_loss(study)} Above zero, more is forgotten."
    )


def _at_equal_loss(study: StudyResults) -> str:
    other = study.whole
    less = {arm: less_at_equal_loss(study, arm, other) for arm in study.arms if arm != other}
    said = ", ".join(f"{signed(0.0 - fmean(each), '.3f')} ({study.labels[arm]})" for arm, each in less.items() if each)
    return f" At the same loss on the task, the difference from {study.labels[other]} is {said}." if said else ""

"""The figure of a study of few examples: the loss on others and on those that are trained, by step. No torch."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from peftscope.analysis.study import VALIDATION, StudyResults
from peftscope.planning.experiment import A_A
from peftscope.planning.published import TRAINING
from peftscope.report.looks import arm_looks
from peftscope.report.plots import beside, plain_ticks
from peftscope.words import listed, signed


def mean_losses(study: StudyResults) -> dict[str, pd.DataFrame]:
    """Returns the losses by step, mean over seeds, of the reference and of each arm that trains on part of the items.

    Arms that do not score along their training are left out.
    ``validation`` is that on validation items. ``training`` is the mean over the steps since the one before, because
    a single batch is too noisy. Runs that diverged are left out.
    """
    along, found = study.losses, {}
    for arm in study.arms:
        curves = []
        if arm != study.reference and (arm.endswith(A_A) or study.arm_runs(arm)["train_items"].isna().any()):
            continue
        for row in study.arm_runs(arm).query("status == 'ok'").to_dict("records"):
            losses = along.loc[row["run_id"]]
            validation = losses[VALIDATION].dropna()
            validation.loc[losses.index[-1]] = row[VALIDATION]
            step = pd.cut(losses.index, [0, *validation.index], labels=validation.index)
            training = losses[TRAINING].groupby(step, observed=True).mean()
            curves.append(pd.DataFrame({"validation": validation, "training": training}))
        if curves and len(curves[0]) > 1:
            found[arm] = sum(curves) / len(curves)
    return found


def draw_overfitting(axes: plt.Axes, experiment: str) -> None:
    """Draws the validation loss along the training of each arm, and the training loss beneath."""
    study = StudyResults(experiment)
    curves = mean_losses(study)
    grid = axes.figure.add_gridspec(2, 1)
    axes.set_subplotspec(grid[0])
    beneath = axes.figure.add_subplot(grid[1], sharex=axes)
    styles = arm_looks({arm: study.labels[arm] for arm in curves})
    for arm, curve in curves.items():
        line = styles[arm].line | {"markersize": 4}
        axes.plot(curve.index, curve["validation"], **line)
        beneath.plot(curve.index, curve["training"], label=study.labels[arm], **line)
    for panel, loss in ((axes, "validation"), (beneath, "training")):
        panel.set(yscale="log", ylabel=f"{loss} loss\n(nats per token)")
        plain_ticks(panel.yaxis)
    axes.tick_params(labelbottom=False)
    beneath.set(xlabel="step")
    beside(beneath)


def overfitting_sentence(experiment: str) -> str:
    """Returns what the figure says: how far the validation loss of each arm ends above its lowest."""
    study = StudyResults(experiment)
    curves = {study.labels[arm]: curve for arm, curve in mean_losses(study).items()}
    rises = {name: curve["validation"].iloc[-1] - curve["validation"].min() for name, curve in curves.items()}
    risen = listed([f"{rise:.3f} ({name})" for name, rise in rises.items() if round(rise, 3) > 0])
    gaps = [f"{signed((c['validation'] - c['training']).iloc[-1], '.3f')} ({name})" for name, c in curves.items()]
    rise = f"On validation items the mean ends {risen} nats per token above its lowest. " if risen else ""
    return (
        "The loss on validation items along the training, and beneath it the loss on the examples that are trained: "
        f"means over seeds. {rise}The validation loss minus the training loss, at the end, in nats per token: "
        f"{listed(gaps)}."
    )

"""Reads the results of a study: learning rates, paired differences between tuned arms, and controls. No torch.

With the same seed, all arms of a study see the same batches, so differences are paired by seed. Losses are nats per
response token of held-out items. A run that diverged stays in its pair with the loss of the untouched base, because
to leave it out would favour its arm.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from peftscope.errors import InputError, Problem
from peftscope.layout import PUBLISHED_RESULTS, results_folder
from peftscope.planning.published import LOSSES
from peftscope.planning.sweep import ARM, CONTROL, TUNING

HELDOUT = "heldout_nll_nats_per_token"
VALIDATION = "validation_nll_nats_per_token"


@dataclass(frozen=True)
class Rate:
    """An arm's best learning rate, its neighbours among the rates that were tried, and the losses of all of them.

    If the best rate is the lowest or highest of its list, which a study may allow, it is its own neighbour.
    """

    below: float
    best: float
    above: float
    curve: dict[float, float | None]
    """The validation loss by learning rate; None if the run diverged."""


class StudyResults:
    """The results of one study, from this workspace or from the published files.

    Args:
        name: The name of the study's experiment.

    Raises:
        InputError: There are no results, neither here nor published.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        for folder in (results_folder(name), PUBLISHED_RESULTS / name):
            if (folder / "runs.csv").is_file():
                self._folder = folder
                return
        raise self._unfinished("not run")

    def _unfinished(self, what: str) -> InputError:
        return InputError(Problem(f"the study `{self.name}`", what, f"make report EXPERIMENT={self.name}"))

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table of all runs, one row per run."""
        table = pd.read_csv(self._folder / "runs.csv", dtype={"comparisons": str}).copy()
        return table.fillna({"comparisons": ""})

    def _chosen(self, arm: str) -> dict[str, Any]:
        path = self._folder / "tuned.json"
        if not path.is_file():
            raise self._unfinished("its learning rates are not chosen")
        arms: dict[str, Any] = json.loads(path.read_text())["arms"]
        if arm not in arms:
            raise self._unfinished(f"it has no arm `{arm}`")
        return arms[arm]

    @cached_property
    def left_out(self) -> dict[str, str]:
        """The arms that could not be tuned, each with the reason. It is empty until the tuning is done."""
        path = self._folder / "tuned.json"
        arms = json.loads(path.read_text())["arms"] if path.is_file() else {}
        return {arm: chosen["reason"] for arm, chosen in arms.items() if chosen["learning_rate"] is None}

    @property
    def arms(self) -> list[str]:
        """The names of the arms that could be tuned, in the order of the experiment file."""
        names = dict.fromkeys(name for cell in self.table["comparisons"] for name in cell.split())
        arms = [name.removeprefix(TUNING) for name in names if name.startswith(TUNING)]
        return [arm for arm in arms if arm not in self.left_out]

    @property
    def labels(self) -> dict[str, str]:
        """The label of each arm: that of its method, followed by the arm's name if another arm has the same method."""
        found: dict[str, str] = {}
        for arm in self.arms:
            method = str(self.tuning_runs(arm)["label"].iloc[0])
            found[arm] = f"{method}, {arm}" if method in found.values() else method
        return found

    @property
    def subject(self) -> str:
        """The model and the task of the study."""
        return f"{self.table['model'].iloc[0]}, {self.table['task'].iloc[0]}"

    def rate(self, arm: str) -> Rate:
        """Returns the learning rate of an arm, with its neighbours."""
        chosen = self._chosen(arm)
        curve = {tried["learning_rate"]: tried["validation_nll"] for tried in chosen["tried"]}
        rates = list(curve)
        best = rates.index(chosen["learning_rate"])
        return Rate(rates[max(0, best - 1)], rates[best], rates[min(best + 1, len(rates) - 1)], curve)

    @property
    def arms_at_an_end(self) -> list[str]:
        """The arms whose best rate was the lowest or highest of its list, so that a better one may lie beyond."""
        found = {arm: self.rate(arm) for arm in self.arms}
        return [arm for arm, rate in found.items() if rate.best in (rate.below, rate.above)]

    def tuning_runs(self, arm: str, learning_rate: float | None = None) -> pd.DataFrame:
        """Returns the tuning runs of an arm, one row per run: all of them, or those at one rate."""
        tried = self._chosen(arm)["tried"]
        names = [run for t in tried if learning_rate in (None, t["learning_rate"]) for run in t["run_ids"]]
        table = self.table.set_index("run_id", drop=False)
        if not set(names) <= set(table.index):
            raise self._unfinished("its learning rates were chosen under other settings")
        return table.loc[names]

    def arm_runs(self, arm: str) -> pd.DataFrame:
        """Returns the runs of an arm at its chosen rate, one row per seed.

        Raises:
            InputError: Some runs are missing. An unfinished study supports no conclusion.
        """
        return self._finished(f"{ARM}{arm}")

    def control_runs(self, control: str, arm: str) -> pd.DataFrame:
        """Returns the runs of a control of an arm, one row per seed.

        Raises:
            InputError: Some runs are missing.
        """
        runs = self._finished(f"{CONTROL}{control}-{arm}")
        return runs[~runs["run_id"].isin(self.arm_runs(arm)["run_id"])]

    @property
    def controls(self) -> list[tuple[str, str]]:
        """The controls of the study, each paired with its arm."""
        names = dict.fromkeys(name for cell in self.table["comparisons"] for name in cell.split())
        return [tuple(name.split("-", 2)[1:]) for name in names if name.startswith(CONTROL)]

    def _finished(self, comparison: str) -> pd.DataFrame:
        runs = self.table[self.table["comparisons"].str.split().map(lambda names: comparison in names)]
        ended = runs["status"].isin(["ok", "diverged"])
        if not ended.all() or runs.empty:
            done = f"{ended.sum()} of {len(runs)} runs done" if len(runs) else "its last runs have not begun"
            raise self._unfinished(f"not finished ({done})")
        return runs.fillna({HELDOUT: self.base_loss})

    def require_finished(self) -> None:
        """Raises InputError if runs are missing, because an unfinished study supports no conclusion."""
        for arm in self.arms:
            self.arm_runs(arm)
        for control, arm in self.controls:
            self.control_runs(control, arm)

    @property
    def base_loss(self) -> float:
        """The held-out loss of the untouched base."""
        weights = self.table.get("base_weights")
        runs = self.table[(self.table["method"] == "none") & (weights == "full")]
        if runs[HELDOUT].isna().all():
            raise self._unfinished("no run of the untouched base")
        return float(runs[HELDOUT].iloc[0])

    @property
    def full_gain(self) -> float:
        """The mean gain of full fine-tuning over the base, in which differences are expressed.

        Raises:
            InputError: Full fine-tuning gains nothing, so there is no yardstick.
        """
        gain = self.base_loss - float(self.arm_runs("full")[HELDOUT].mean())
        if gain <= 0:
            raise self._unfinished(f"full fine-tuning is no better than the base ({gain:.3g} nats per token)")
        return gain

    def training_losses(self) -> pd.Series:
        """Returns the training losses of all runs, indexed by run id and step."""
        published = self._folder / LOSSES
        losses = pd.read_parquet(published) if published.is_file() else pd.read_csv(self._folder / "losses.csv")
        return losses.set_index(["run_id", "step"])["nll_nats_per_token"]


def paired(first: pd.DataFrame, second: pd.DataFrame, values: pd.Series | str = HELDOUT) -> pd.DataFrame:
    """Returns one row for each seed that both have finished, with the columns ``first`` and ``second``.

    Args:
        first: The runs of one arm, one row per seed.
        second: The runs of the arm to compare with.
        values: The name of a column, or the values by run id.
    """
    columns = {}
    for name, runs in (("first", first), ("second", second)):
        by_seed = runs.set_index("seed")
        columns[name] = by_seed[values] if isinstance(values, str) else by_seed["run_id"].map(values)
    return pd.DataFrame(columns).dropna()

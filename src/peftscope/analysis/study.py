"""Reads the results of a study: learning rates, paired differences between tuned arms, and controls. No torch.

With the same seed, all arms of a study see the same batches, so differences are paired by seed. Losses are nats per
response token of held-out items. A run that diverged stays in its pair with the loss of the untouched base, because
to leave it out would favour its arm.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, reduce
from itertools import chain
from statistics import fmean
from typing import Any, get_args

import pandas as pd

from peftscope.analysis.collect import failures, read_runs
from peftscope.analysis.compare import MARGIN, Difference, compare, pair_values
from peftscope.analysis.stats import holm, trimmed_mean
from peftscope.analysis.tuning import Rate, mean_or_none
from peftscope.errors import InputError, Problem
from peftscope.layout import folder_with, how_to_run
from peftscope.planning.cells import ARM, CONTROL, RATES, TUNING
from peftscope.planning.experiment import (
    A_A,
    Control,
    Study,
    experiment_names,
    experiment_path,
    no_study,
    read_experiment,
)
from peftscope.planning.published import LOSSES, VALIDATION, loss_rows, published_records
from peftscope.words import grouped

HELDOUT = "heldout_nll_nats_per_token"
LOWEST = "lowest_validation_nll_nats_per_token"
UNFINISHED = "not finished"
"""The reason for which an arm without a best rate is left out."""
PLANNED = 0.02
"""The half-width of the interval of a difference that a study plans for, as a share of the task gain."""


_RANK = re.compile(r"(?:(.+)-)?r(\d+)")
_CONTROL = re.compile(rf"{CONTROL}({'|'.join(get_args(Control))})-(.+)")


class StudyResults:
    """The results of one study, from this workspace or the published files; if ``is_published``, from these alone.

    Raises:
        InputError: There are no results, neither here nor published.
    """

    def __init__(self, name: str, *, is_published: bool = False) -> None:
        self.name = name
        folder = folder_with(name, "runs.csv", is_published=is_published)
        if folder is None:
            raise self._unfinished("not run")
        self.folder = folder

    @cached_property
    def settings(self) -> Study | None:
        """The settings in the study's file; None if the results are all that is left of it."""
        return read_experiment(experiment_path(self.name)).study if self.name in experiment_names() else None

    def _unfinished(self, what: str) -> InputError:
        return InputError(Problem(f"the study `{self.name}`", what, how_to_run(self.name)))

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table of all runs, one row per run."""
        return read_runs(self.name, self.folder)

    @cached_property
    def _tuned(self) -> dict[str, Any] | None:
        path = self.folder / "tuned.json"
        return json.loads(path.read_text())["arms"] if path.is_file() else None

    @property
    def _chosen(self) -> dict[str, Any]:
        """The rates that were tried and chosen for each arm that was tuned."""
        if self._tuned is None and self.settings and self.settings.learning_rates:
            raise self._unfinished("its learning rates are not chosen")
        return self._tuned or {}

    def _tuning_of(self, arm: str) -> dict[str, Any]:
        if arm not in self._chosen:
            what = "was not tuned: its rate was given" if arm in self._entered else "is not in it"
            what = f"is left out ({self.left_out[arm]})" if arm in self.left_out else what
            raise self._unfinished(f"the arm `{arm}` {what}")
        return self._chosen[arm]

    @cached_property
    def left_out(self) -> dict[str, str]:
        """The arms without a rate, each with the reason. It is empty until a rate is chosen."""
        if self._tuned is None:
            return {}
        waiting = dict.fromkeys((arm for arm in self._entered if f"{ARM}{arm}" not in self._places), UNFINISHED)
        return waiting | {arm: rate["reason"] for arm, rate in self._tuned.items() if not rate["learning_rate"]}

    @property
    def arms(self) -> list[str]:
        """The names of the arms that have a rate, in the order of the experiment file."""
        return [arm for arm in self._entered if not {arm, arm.removesuffix(A_A)} & set(self.left_out)]

    @cached_property
    def _entered(self) -> list[str]:
        """The arms that were tuned, and after them those whose rates were given."""
        places = self._places
        entered = [name.removeprefix(stage) for stage in (TUNING, ARM) for name in places if name.startswith(stage)]
        return list(dict.fromkeys(entered))

    @property
    def reference(self) -> str:
        """The arm that the others are compared with: the first.

        Raises:
            InputError: It could not be tuned, or the experiment is no study.
        """
        named = [self.settings.reference] if self.settings else []
        first = next((arm for arm in [*named, *self._entered] if arm in self._entered), "")
        if not first:
            raise no_study(self.name)
        if first in self.left_out:
            raise self._unfinished(f"its reference arm `{first}` is left out ({self.left_out[first]})")
        return first

    @property
    def whole(self) -> str:
        """The arm of full fine-tuning, or else the reference."""
        return next((arm for arm in self.arms if self.arm_runs(arm)["method"].iloc[0] == "full"), self.reference)

    @property
    def labels(self) -> dict[str, str]:
        """The label of each arm, whether it is compared or left out.

        It is that of its method if no other arm has the same, or if the arm is named after the method. Otherwise the
        arm's name follows, without the method's name before it unless another arm is called what is left.
        """
        firsts = {arm: self._members(TUNING + arm, ARM + arm).iloc[0] for arm in self._entered}
        named = [first["label"] for arm, first in firsts.items() if not arm.endswith(A_A)]
        found: dict[str, str] = {}
        for arm, first in firsts.items():
            method, label = first["method"], str(first["label"])
            is_plain = arm == method or named.count(label) == 1
            if arm.endswith(A_A):
                found[arm] = f"{found[arm.removesuffix(A_A)]} against itself (A/A)"
            else:
                own = arm.removeprefix(f"{method}-")
                found[arm] = label if is_plain else f"{label}, {_in_words(arm if own in firsts else own)}"
        return found

    @property
    def compared(self) -> list[tuple[str, str]]:
        """The arms that are compared: each with the reference, then the contrasts that the study's file adds."""
        return self._pairs_of(self.arms)

    def _pairs_of(self, arms: list[str]) -> list[tuple[str, str]]:
        added = [pair for pair in self.settings.contrasts if set(pair) <= set(arms)] if self.settings else []
        return [(arm, self.reference) for arm in arms if arm != self.reference] + added

    @cached_property
    def _corrected(self) -> dict[frozenset[str], float]:
        def p(arm: str, against: str) -> float:
            try:
                return self.difference(arm, against).p
            except InputError:  # an arm is unfinished
                return 1.0

        counted = [arm for arm in self._entered if self.left_out.get(arm, UNFINISHED) == UNFINISHED]
        tested = [pair for pair in self._pairs_of(counted) if not (pair[0].endswith(A_A) or self._home_of(*pair))]
        corrected = holm([p(*pair) for pair in tested])
        return dict(zip(map(frozenset, tested), corrected, strict=True))

    def corrected_p(self, arm: str, against: str) -> float | None:
        """Returns the p of a difference after Holm's correction for all comparisons, the A/A apart.

        A comparison that is unfinished counts with a p of 1, with which those of the others are the largest that they
        can become. It is None for the A/A, and for arms that the study does not compare. What another study corrects
        is quoted.
        """
        home = self._home_of(arm, against)
        return home.corrected_p(arm, against) if home else self._corrected.get(frozenset((arm, against)))

    @cached_property
    def _home(self) -> StudyResults | None:
        name = self.settings.home if self.settings else None
        with suppress(InputError):  # it has not run
            return StudyResults(name) if name and name != self.name else None
        return None

    def _home_of(self, arm: str, against: str) -> StudyResults | None:
        """Returns the other study that makes the same comparison, of the same runs, and corrects it; None: this one."""
        home = self._home
        if not home or {arm, against} not in map(set, home.compared):
            return None
        mine, other = (
            [set(study._members(*(ARM + entry for entry in side))["run_id"]) for side in study.entries(arm, against)]
            for study in (self, home)
        )
        return home if mine == other else None

    @property
    def subject(self) -> str:
        """The model and the task of the study."""
        return f"{self.table['model'].iloc[0]}, {self.table['task'].iloc[0]}"

    def rate(self, arm: str) -> Rate:
        """Returns the learning rate of an arm, with what was tried.

        An arm at the rate that was chosen for another one has borrowed it, with the error of that choice. At a multiple
        of it, or at a rate that was given, it has no such error.
        """
        losses = self.losses_by_rate(arm)
        by_rate = {float(rate): trimmed_mean(list(losses[rate])) for rate in losses}
        if f"{ARM}{arm}" in self._places and arm not in self._chosen:
            borrowed = self.settings.borrowed_rates.get(arm) if self.settings else None
            lender = self._tuning_of(borrowed.arm) if borrowed and borrowed.times == 1 else {}
            return Rate(next(iter(by_rate)), {}, by_rate, lender.get("regret_rms", 0.0))
        chosen = self._tuning_of(arm)
        tried = grouped((entry["learning_rate"], entry["validation_nll"]) for entry in chosen["tried"])
        curve = {rate: mean_or_none(tried[rate]) for rate in sorted(tried)}
        return Rate(chosen["learning_rate"], curve, by_rate, chosen.get("regret_rms", 0.0))

    @property
    def arms_at_an_end(self) -> list[str]:
        """The arms whose best of several rates lies at an end of them."""
        return [arm for arm in self.arms if self.rate(arm).is_at_an_end]

    def rate_runs(self, arm: str) -> pd.DataFrame:
        """Returns the runs of an arm at all its rates, one row for each rate and seed.

        Raises:
            InputError: Some runs are missing.
        """
        return self._finished(f"{RATES if self.has_several_rates(arm) else ARM}{arm}")

    def has_several_rates(self, *arms: str) -> bool:
        """Returns whether one of some arms runs at several rates with the seeds of the study."""
        return any(f"{RATES}{arm}" in self._places for arm in arms)

    def losses_by_rate(self, arm: str) -> pd.DataFrame:
        """Returns the held-out losses of an arm: a row for each seed, a column for each rate, ascending."""
        return self.rate_runs(arm).pivot_table(HELDOUT, "seed", "learning_rate")

    def tuning_runs(self, arm: str) -> pd.DataFrame:
        """Returns the runs of an arm on the seeds that only tune, one row per run."""
        names = [run for tried in self._tuning_of(arm)["tried"] for run in tried["run_ids"]]
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

    def mean_of(self, *arms: str) -> Callable[[Sequence[float]], float]:
        """Returns what makes one number of the seeds of some arms."""
        return trimmed_mean if self.has_several_rates(*arms) else fmean

    def loss(self, arm: str) -> float:
        """Returns the held-out loss of an arm at its best rate."""
        return self.mean_of(arm)(list(self.arm_runs(arm)[HELDOUT]))

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
        return [(match[1], match[2]) for name in self._places if (match := _CONTROL.fullmatch(name))]

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        """The comparisons in the order of the table, each with the places of its runs there."""
        cells = enumerate(self.table["comparisons"])
        return grouped((name, place) for place, cell in cells for name in dict.fromkeys(cell.split()))

    def _members(self, *comparisons: str) -> pd.DataFrame:
        """Returns the runs of some comparisons."""
        return self.table.iloc[sorted({place for name in comparisons for place in self._places.get(name, [])})]

    def _finished(self, comparison: str) -> pd.DataFrame:
        runs = self._members(comparison)
        ended, is_bad = runs["status"].isin(["ok", "diverged"]), runs["status"].isin(["failed", "oom"])
        if is_bad.any():
            raise failures(runs[is_bad])
        if not ended.all() or runs.empty:
            done = f"{ended.sum()} of {len(runs)} runs done" if len(runs) else "its last runs have not begun"
            raise self._unfinished(f"not finished ({done})")
        return runs.fillna({HELDOUT: self.base_loss})

    def require_finished(self) -> None:
        """Raises InputError if the reference has no rate, or runs of an arm with a rate or of a control are missing."""
        for arm in self._entered and [self.reference, *self.arms]:
            self.arm_runs(arm)
        for control, arm in self.controls:
            self.control_runs(control, arm)

    @property
    def base_runs(self) -> pd.DataFrame:
        """The runs of the untouched base, or of its 4-bit copy if the study has no other."""
        runs = self.table[self.table["method"] == "none"]
        by_weights = {weights: runs[runs["base_weights"] == weights] for weights in ("full", "nf4") if len(runs)}
        return next((chosen for chosen in by_weights.values() if len(chosen)), runs)

    @cached_property
    def base_loss(self) -> float:
        """The held-out loss of the untouched base."""
        runs = self.base_runs
        if runs[HELDOUT].isna().all():
            raise self._unfinished("no run of the untouched base")
        return float(runs[HELDOUT].iloc[0])

    @cached_property
    def task_gain(self) -> float:
        """The gain of the shuffled-labels control's arm by the task itself, in nats per token: the yardstick.

        It is the loss after training on shuffled labels less that on the right ones. Of the shuffled runs the lowest
        loss along the training counts, if it was measured, because with epochs they learn wrong answers.

        Raises:
            InputError: The study has no such control, or the arm learned no more than the form of an answer.
        """
        if self._gain <= 0:
            message = f"it learned no more than shuffled labels teach ({self._gain:.3g} nats per token)"
            remedy = "train for more steps, or take a task that the base can learn"
            raise InputError(Problem(f"the study `{self.name}`", message, remedy))
        return self._gain

    @property
    def yardstick(self) -> float:
        """The task gain; not a number without a control on shuffled labels, or if nothing but the form was learned."""
        has_control = any(control == "shuffled-labels" for control, _ in self.controls)
        return self._gain if has_control and self._gain > 0 else math.nan

    @cached_property
    def _gain(self) -> float:
        for control, arm in self.controls:
            if control == "shuffled-labels":
                shuffled, own = self.control_runs(control, arm), self.arm_runs(arm)
                is_along = LOWEST in shuffled and shuffled[LOWEST].notna().all()
                columns = (LOWEST, VALIDATION) if is_along else (HELDOUT, HELDOUT)
                mean = self.mean_of(arm)
                return mean(list(shuffled[columns[0]])) - mean(list(own[columns[1]]))
        message = "it has no control on shuffled labels, so that its task gain is not known"
        remedy = "add controls: {ARM: [shuffled-labels]} to its file"
        raise InputError(Problem(f"the study `{self.name}`", message, remedy))

    def tuning_error(self, *arms: str) -> float:
        """Returns the standard error that the choice of the learning rates of some arms adds, in nats per token."""
        return math.hypot(*(self.rate(arm).regret for arm in arms))

    def difference(self, arm: str, against: str, margin: float = MARGIN) -> Difference:
        """Returns how far an arm is ahead of another, in held-out loss over pairs of seeds, in nats per token.

        Above 0 the arm is the better one. The margin, of sameness, is a share of the task gain.
        """
        return compare(self.pairs(arm, against), margin * self.yardstick, self.tuning_error(arm, against))

    @property
    def tunings(self) -> list[str]:
        """The entries that stand for the reference: if it was tuned anew, at several rates too, its A/A as well."""
        again = self.reference + A_A
        return [self.reference] + [again] * (again in self.arms and self.has_several_rates(again))

    def entries(self, arm: str, against: str) -> list[list[str]]:
        """Returns the entries that stand for each of two arms."""
        tunings = self.tunings
        whole = not {arm, against} <= set(tunings)  # the A/A itself is compared with the reference alone
        return [tunings if whole and one == self.reference else [one] for one in (arm, against)]

    def pairs(self, arm: str, against: str) -> pd.Series:
        """Returns how far an arm is ahead of another, for each seed of all their entries; see ``pair_values``."""
        sides = [[self.losses_by_rate(entry) for entry in side] for side in self.entries(arm, against)]
        seeds = reduce(pd.Index.intersection, (losses.index for losses in chain(*sides)))
        first, second = ([losses.loc[seeds].to_numpy().T.tolist() for losses in side] for side in sides)
        return pd.Series(pair_values(first, second), seeds)

    @cached_property
    def losses(self) -> pd.DataFrame:
        """The losses of all runs, indexed by run id and step."""
        index, here, published = ["run_id", "step"], self.folder / "losses.csv", self.folder / LOSSES
        if here.is_file() or published.is_file():
            return (pd.read_csv(here) if here.is_file() else pd.read_parquet(published)).set_index(index)
        records = published_records(self.folder.name).items()  # of a wheel, which leaves their losses out
        rows = [{"run_id": run, **row} for run, text in records for row in loss_rows(json.loads(text))]
        return pd.DataFrame(rows).set_index(index)


def _in_words(arm: str) -> str:
    """Returns the name of an arm that names a rank, or a place and a rank, in words.

    >>> _in_words("mlp-r13"), _in_words("r4"), _in_words("alpha-8")
    ('feed-forward at rank 13', 'rank 4', 'alpha-8')
    """
    if not (named := _RANK.fullmatch(arm)):
        return arm
    place = {"mlp": "feed-forward"}.get(named[1], named[1])
    return (f"{place} at " if place else "") + f"rank {named[2]}"

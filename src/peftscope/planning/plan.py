"""The questions of the Snakefile: the runs of experiments, and the files, options and resources of each. No torch."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from peftscope.data.tasks import find_task
from peftscope.errors import InputError, Problem, close_match, raise_any
from peftscope.files.storage import STORAGE_REMEDIES
from peftscope.hardware.bf16 import chosen_way
from peftscope.hardware.device import Device, detect_device
from peftscope.layout import record_path, run_folder, tuned_path
from peftscope.models.catalog import model_folder
from peftscope.planning.cells import ARM, RATES
from peftscope.planning.checks import check_compiler, check_runs, check_starts, check_unchanged, inputs
from peftscope.planning.disk import check_disk
from peftscope.planning.experiment import experiment_path
from peftscope.planning.sweep import ROUNDS, Sweep, expand, runs_to_choose_from
from peftscope.record import measured_path
from peftscope.spec import RunSpec

DEFAULT_EXPERIMENT = "quick"
MOST_THREADS = 1024


class Plan:
    """One experiment: its runs, and what of its report depends on its kind."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.name = sweep.name
        self._assumed: tuple[Sweep | None, Plan] = None, self

    @property
    def run_ids(self) -> list[str]:
        """Every run of the experiment, as far as it is known: a study's last ones follow from its first."""
        return list(self.sweep.runs)

    @property
    def is_study(self) -> bool:
        """Whether the experiment tunes learning rates and compares arms at them."""
        return self.sweep.experiment.study is not None

    @property
    def shares_machine(self) -> bool:
        """Whether its runs share a processor and measure no speed: those of studies, and of random strings."""
        on_cpu = all(spec.device == "cpu" for spec in self.sweep.runs.values())
        return on_cpu and (self.is_study or self.measures_capacity)

    @cached_property
    def measures_capacity(self) -> bool:
        """Whether the experiment measures what is stored of random strings."""
        sources = {find_task(task).source.kind for task in {spec.task for spec in self.sweep.runs.values()}}
        return "random_strings" in sources

    @property
    def is_tuned(self) -> bool:
        """Whether the experiment is a study that looks for learning rates."""
        return self.sweep.experiment.study is not None and bool(self.sweep.experiment.study.learning_rates)

    def keep_at(self, run: str) -> list[float]:
        """Returns the shares of its training after which a run keeps its weights: of a study, not if it tunes."""
        spec, shares = self.sweep.runs.get(run), self.sweep.experiment.keep_at
        if not shares or spec is None or not spec.method.trains:
            return []
        groups = [c.name for c in self.sweep.comparisons if run in c.runs]
        kept = not self.is_study or any(name == "runs" or name.startswith((ARM, RATES)) for name in groups)
        return shares if kept else []

    def keeps_all_weights(self, run: str) -> bool:
        """Returns whether a run keeps all its weights whatever a profile says, because other runs start from them."""
        return run in {spec.start_from for spec in self.sweep.runs.values()}

    @property
    def measured_runs(self) -> list[str]:
        """The runs whose weights are kept and measured, as far as they are known."""
        return [run for run in self.run_ids if self.keep_at(run)]

    @property
    def follows_prose(self) -> bool:
        """Whether the experiment is a study that scores prose along its runs."""
        return self.is_study and bool(self.sweep.experiment.fixed.get("retention_every"))

    @property
    def few_examples(self) -> bool:
        """Whether the experiment is a study with arms that train on a part of the examples, and scores them along."""
        study, fixed = self.sweep.experiment.study, self.sweep.experiment.fixed
        arms = study.arms.values() if study else ()
        return any("train_items" in arm and (fixed | arm).get("validation_every") for arm in arms)

    @property
    def varied(self) -> str | None:
        """The field of which a study compares three values or more, if it does; see ``Study.varied``."""
        return self.sweep.experiment.study.varied if self.sweep.experiment.study else None

    def assumed(self) -> Plan:
        """Returns the plan with all runs of a study, those whose rates are not chosen yet at rates that are likely.

        Another thread may ask while the experiment is expanded again, so what was assumed remembers of which sweep.
        """
        of, assumed = self._assumed
        if of is not self.sweep:
            of = self.sweep
            assumed = Plan(expand(self.name, detect_device(), assume_rates=True)) if self.is_study else self
            self._assumed = of, assumed
        return assumed

    def expand_again(self) -> None:
        """Expands the experiment again, which adds the runs of a study whose rates were chosen in the meantime."""
        self.sweep = expand(self.name, detect_device())


class Workflow:
    """The experiments of one workflow as the Snakefile sees them.

    A run that several of them list is one job. ``runs`` has the specs of the runs that are known by now. Methods take
    Snakemake's wildcards and are cheap: one lookup each.
    """

    def __init__(self, plans: Iterable[Plan], cores: int | None = None) -> None:
        self.plans = {plan.name: plan for plan in plans}
        self.cores = cores
        self.runs: dict[str, RunSpec] = {}
        self._gather()

    def _gather(self) -> None:
        for plan in self.plans.values():
            self.runs |= plan.sweep.runs

    def later_runs(self) -> tuple[dict[str, RunSpec], int]:
        """Returns the runs that follow from learning rates which are not chosen yet, and of how many weights are kept.

        Runs that have ended are left out.
        """
        later: dict[str, RunSpec] = {}
        measured = set()
        for plan in self.plans.values():
            assumed = plan.assumed()
            new = {run for run in assumed.run_ids if run not in self.runs and not record_path(run).is_file()}
            later |= {run: assumed.sweep.runs[run] for run in new}
            measured |= new.intersection(assumed.measured_runs)
        return later, len(measured)

    def experiment_file(self, wildcards: Any) -> str:
        """Returns the file of an experiment."""
        return experiment_path(wildcards.experiment).as_posix()

    def rate_records(self, checkpoints: Any) -> Callable[[Any], list[str]]:
        """Returns a function that lists the records that the rates of a round are chosen from.

        Those of the first round are known; those of the others, and of the best rates, follow from the round before.
        """

        def records_of(wildcards: Any) -> list[str]:
            plan, number = self.plans[wildcards.experiment], int(getattr(wildcards, "round", ROUNDS))
            if number:
                before = checkpoints.rates.get(experiment=plan.name, round=number - 1).output[0]
                self._expand_again(plan)
                runs = [run for of_arm in runs_to_choose_from(plan.sweep, number).values() for run in of_arm]
                runs += [run for run, spec in plan.sweep.runs.items() if not spec.method.trains]
                return [before, *_records(runs)]
            return _records(run for of_arm in runs_to_choose_from(plan.sweep, 0).values() for run in of_arm)

        return records_of

    def records(self, checkpoints: Any) -> Callable[[Any], list[str]]:
        """Returns a function that lists an experiment's records; a study's are known after its ``tune`` checkpoint."""

        def records_of(wildcards: Any) -> list[str]:
            plan = self.plans[wildcards.experiment]
            if plan.is_tuned:
                checkpoints.tune.get(experiment=plan.name)
                self._expand_again(plan)
            return _records(plan.run_ids)

        return records_of

    def tuned(self, wildcards: Any) -> list[str]:
        """Returns the file of a study's best rates, if it looks for them."""
        plan = self.plans[wildcards.experiment]
        return [tuned_path(plan.name).as_posix()] if plan.is_tuned else []

    def measured(self, checkpoints: Any) -> Callable[[Any], list[str]]:
        """Returns a function that lists what is measured on the weights that an experiment's runs keep."""
        records = self.records(checkpoints)

        def measured_of(wildcards: Any) -> list[str]:
            plan = self.plans[wildcards.experiment]
            if not plan.sweep.experiment.keep_at:
                return []
            records(wildcards)
            return [measured_path(run_folder(run)).as_posix() for run in plan.measured_runs]

        return measured_of

    def _expand_again(self, plan: Plan) -> None:
        plan.expand_again()
        self._gather()

    def threads(self, wildcards: Any) -> int:
        """Returns the threads of a training job: one on a processor, where as many run at once as there are cores.

        Two runs of one thread do 28 % more steps a second than one run of two, with the same losses. Snakemake lowers
        the number of others to the cores that there are.
        """
        return 1 if self.shares_machine(wildcards.run_id) or self.timed_threads(wildcards) else MOST_THREADS

    def timed_threads(self, wildcards: Any) -> int:
        """Returns the threads of a job while others wait for it, as they do while it trains; 0: they need not.

        Beside a run that shares the machine nothing can be timed, and latency is timed before and after training.
        """
        spec = self.spec(wildcards)
        in_turns = spec.device == "cpu" and spec.shards == 1 and not spec.latency_tokens
        return (self.cores or 0) if in_turns and not any(plan.shares_machine for plan in self.plans.values()) else 0

    def options(self, wildcards: Any) -> str:
        """Returns the options of a run that shares the machine, or keeps more weights than others.

        They stand after ``--keep-weights`` of a profile: of an option that is given twice, the last counts.
        """
        run, plans = wildcards.run_id, self.plans.values()
        shares = sorted({share for plan in plans for share in plan.keep_at(run)})
        options = {
            "--shared": self.shares_machine(run),
            f"--keep-at {','.join(f'{share:g}' for share in shares)}": shares,
            "--keep-weights all": any(plan.keeps_all_weights(run) for plan in plans),
        }
        return " ".join(option for option, holds in options.items() if holds)

    def shares_machine(self, run: str) -> bool:
        """Returns whether a run has one thread, beside as many others as there are cores, and measures no speed.

        That holds if only experiments list it whose runs do.
        """
        return all(plan.shares_machine for plan in self.plans.values() if run in plan.sweep.runs)

    def gpus(self, wildcards: Any) -> int:
        """Returns how many cards a training job needs."""
        spec = self.spec(wildcards)
        return spec.shards if spec.device == "cuda" else 0

    def spec(self, wildcards: Any) -> RunSpec:
        """Returns the run's spec.

        Raises:
            InputError: No experiment has such a run.
        """
        if wildcards.run_id not in self.runs:
            for plan in self.plans.values():
                if plan.is_study:
                    self._expand_again(plan)
        try:
            return self.runs[wildcards.run_id]
        except KeyError:
            hint = close_match(wildcards.run_id, self.runs) if len(self.runs) < 100 else ""
            message = f"not a run of {', '.join(self.plans)}"
            raise InputError(Problem(f"run {wildcards.run_id}", message, hint)) from None

    def spec_json(self, wildcards: Any) -> str:
        """Returns the run's spec for the command line; a changed spec is a changed parameter."""
        return json.dumps(self.spec(wildcards).canonical(), sort_keys=True)

    def needed(self, wildcards: Any) -> list[str]:
        """Returns the files that say that what a run reads is there: its model, data and benchmarks, and its start."""
        spec = self.spec(wildcards)
        start = [spec.start_from] if spec.start_from else []
        return [*((one.folder / "manifest.json").as_posix() for one in inputs(spec)), *_records(start)]

    @cached_property
    def _models(self) -> dict[str, tuple[str, str | None]]:
        used = {(spec.model, spec.revision) for spec in self.runs.values()}
        return {model_folder(name, revision).name: (name, revision) for name, revision in used}

    def model_name(self, wildcards: Any) -> str:
        """Returns the model's name in models.yaml, or its hub id, for the folder in the wildcard."""
        return self._models[wildcards.model][0]

    def model_revision(self, wildcards: Any) -> str:
        """Returns the option that asks for the model's revision, if one was named."""
        revision = self._models[wildcards.model][1]
        return f"--revision {shlex.quote(revision)}" if revision else ""


def _records(runs: Iterable[str]) -> list[str]:
    return [record_path(run).as_posix() for run in runs]


def load_workflow(config: dict[str, Any], cores: int | None = None) -> Workflow:
    """Returns the workflow for ``--config experiment="NAME ..."`` (default: quick), checked.

    Args:
        config: What was said behind ``--config``.
        cores: The cores of this machine that its jobs have; None: each job has a machine or its own part of one.

    Raises:
        InputError: Everything that is wrong with the experiments on this machine.
    """
    names = str(config.get("experiment", "")).split() or [DEFAULT_EXPERIMENT]
    plans = [plan_experiment(name) for name in dict.fromkeys(names)]
    problems = []
    if not os.access(".", os.W_OK):
        problems.append(Problem(str(Path.cwd()), "cannot be written", STORAGE_REMEDIES[errno.EACCES]))
    runs = {identity: spec for plan in plans for identity, spec in plan.sweep.runs.items()}
    to_do = {identity: spec for identity, spec in runs.items() if not record_path(identity).is_file()}
    kept = {identity: max(len(plan.keep_at(identity)) for plan in plans) for identity in to_do}
    problems += check_disk(to_do, kept=kept)
    raise_any(problems)
    _loaded.append(Workflow(plans, cores))
    return _loaded[-1]


_loaded: list[Workflow] = []


def loaded_workflow() -> Workflow | None:
    """Returns the workflow that this process's Snakefile loaded; None: it loaded none."""
    return _loaded[-1] if _loaded else None


def plan_experiment(name: str, device: Device | None = None) -> Plan:
    """Returns an experiment's plan after the checks that need more than its file; for this machine's device, or one."""
    chosen_way()  # raises for a wrong wish before any run starts
    sweep = expand(name, device or detect_device())
    where = str(experiment_path(name))
    problems = check_runs(sweep.runs, where) + check_compiler(sweep.runs) + check_starts(sweep.runs, where)
    problems += [] if problems else check_unchanged(sweep.runs)
    raise_any(problems)
    return Plan(sweep)

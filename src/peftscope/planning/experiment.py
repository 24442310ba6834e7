"""Experiment files: what they may say, and reading them strictly. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from peftscope.errors import InputError, Problem, close_match
from peftscope.files.content import NUMBER, CountOrZero, Strict, read_yaml
from peftscope.files.problems import validated
from peftscope.layout import EXPERIMENTS, STUDIES, check_experiment_name, shipped
from peftscope.methods import METHODS
from peftscope.spec import MEASURING

RESERVED_NAMES = (
    *("published", "runs", "single", "memory", "processors"),
    *("peft-comparison", "scorecard", "speed"),
)
"""The names of other results, whose folders an experiment would mix with its own, or replace when it is published."""
NOT_EXPERIMENTS = ("defaults", "models", "tasks", "claims", "claims-history", "answers", "advice")
WORLDS = {"A": "sums", "B": "pronunciation", "C": "pronunciation-gemma"}
"""The worlds, each a model with a task, and the study of each."""

Values = Annotated[list[Any], Field(min_length=1)]


class Ladder(Strict):
    """One factor at a time around a centre: every axis is varied alone."""

    centre: dict[str, Any] = {}
    axes: Annotated[dict[str, Values], Field(min_length=1)]
    seeds: list[CountOrZero] | None = None


class Exclusion(Strict):
    """Combinations to leave out, and why."""

    match: Annotated[dict[str, Any], Field(min_length=1)]
    reason: Annotated[str, Field(min_length=1)]


STEP = 3**0.5
"""The factor between the rates at which an arm runs on all seeds; listed rates have factors of about 3."""

A_A = "-a-a"
"""Ends the name of the arm that enters a study a second time."""

A_A_SHIFT = 1000
"""Added to the seeds of an arm that enters again: its own tuning seeds, and other initialisation seeds."""

Control = Literal["a-a", "zero-lr", "shuffled-labels"]


class BorrowedRate(Strict):
    """The learning rate of another arm, whatever it will be.

    Attributes:
        arm: The arm whose chosen rate is taken.
        times: What it is multiplied by.
    """

    arm: str
    times: Annotated[float, Field(gt=0), NUMBER] = 1.0


RATES_OF_ARMS = ("learning_rates", "chosen_rates", "given_rates", "borrowed_rates")
"""The fields of a study of which one has the rate of an arm, or where to look for it."""

FORGOTTEN = ("centres", "more_seeds")
"""The fields of a study by arms of which null leaves out what the extended file says."""

VARIED, FEWEST_VALUES = ("rank", "alpha", "dimension"), 3
"""The fields over which a study may have a figure, and of how many values."""


class Study(Strict):
    """Arms that are compared at their own best learning rate.

    The listed rates of an arm run on a seed of their own. Around the best of them, the centre, the arm then runs at
    three rates a factor of ``STEP`` apart, all with the same seeds. Where the lowest loss lies at an end, one more rate
    follows beyond it, at most twice.

    Attributes:
        arms: Fields of each arm by its name, ``method`` among them. The first is the reference, which the others are
            compared with. A file that extends another leaves out an arm of that one, its rates and its controls with
            ``ARM: null``.
        learning_rates: What is tried for each arm that is tuned, in ascending order: three rates or more, or none if
            its centre is given.
        centres: The centres of arms for which they are known already; null: inherit no centre from the extended file.
        chosen_rates: The rate of each arm, and of the one that enters again, that an earlier version chose.
        chosen_by: How it did, for the study's page.
        given_rates: The rate of each arm that is compared at a rate that was given, as in a paper.
        borrowed_rates: The rate of each arm that is compared at the rate of another one.
        tuning_seeds: Runs that only choose the centres, by validation loss.
        seeds: Runs at three rates or more; the same seed gives every arm the same batches and test items.
        more_seeds: Further seeds of arms whose intervals are too wide. The reference runs on all of them as well.
        tuning: Fields of the tuning runs alone: what only the comparison needs is left out there.
        a_a: The reference, if it enters a second time as ``ARM-a-a``, tuned on seeds of its own and with other
            initialisation seeds. A difference between methods that is no larger than its own means nothing.
        controls: Controls of an arm at its chosen rate: ``a-a`` with other initialisation seeds, ``zero-lr`` at a
            learning rate of 0, ``shuffled-labels`` with the response of another prompt.
        control_seeds: The seeds that controls run on; null: all.
        contrasts: Arms that are compared with another one than the reference as well, each with that one.
        pilot: The study whose A/A pairs say beforehand what the planned pairs can see; null: this one.
        home: The study that corrects the comparisons which it makes of the same runs, and is quoted; null: this one.
    """

    arms: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], dict[str, Any]], Field(min_length=1)]
    learning_rates: dict[str, list[Annotated[float, Field(gt=0), NUMBER]]] = {}
    centres: dict[str, Annotated[float, Field(gt=0), NUMBER]] = {}
    chosen_rates: dict[str, Annotated[float, Field(gt=0), NUMBER]] = {}
    chosen_by: str = ""
    given_rates: dict[str, Annotated[float, Field(gt=0), NUMBER]] = {}
    borrowed_rates: dict[str, BorrowedRate] = {}
    tuning_seeds: Annotated[list[CountOrZero], Field(min_length=1)]
    seeds: Annotated[list[CountOrZero], Field(min_length=2)]
    more_seeds: dict[str, list[CountOrZero]] = {}
    tuning: dict[str, Any] = {}
    a_a: str | None = None
    controls: dict[str, list[Control]] = {}
    control_seeds: list[CountOrZero] | None = None
    contrasts: list[tuple[str, str]] = []
    pilot: str | None = None
    home: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_arms_left_out(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(arms := content.get("arms"), dict):
            return content
        left_out = {arm for arm, fields in arms.items() if fields is None}
        again = set() if content.get("a_a") else {arm + A_A for arm in arms}
        return {field: of for field, of in content.items() if field not in FORGOTTEN or of is not None} | {
            field: {arm: of for arm, of in content[field].items() if of is not None and arm not in without}
            for field, without in {
                **dict.fromkeys((*RATES_OF_ARMS, "arms", "controls"), left_out),
                **dict.fromkeys(("chosen_rates", *FORGOTTEN), left_out | {arm + A_A for arm in left_out} | again),
            }.items()
            if isinstance(content.get(field), dict)
        }

    @model_validator(mode="after")
    def _arms_match(self) -> Study:
        again = self.a_a + A_A if self.a_a else None
        named = [arm for field in RATES_OF_ARMS for arm in getattr(self, field) if arm != again]
        for wrong, what in (
            (set(named) - set(self.arms), "rates of what is no arm"),
            (set(self.arms) - set(named), "arms without a rate"),
            ({arm for arm in named if named.count(arm) > 1}, "arms with more than one rate"),
        ):
            if wrong:
                raise ValueError(
                    f"{what}: {', '.join(sorted(wrong))}; each arm ({', '.join(self.arms)}) stands once in "
                    f"{', '.join(RATES_OF_ARMS[:-1])} or {RATES_OF_ARMS[-1]}"
                )
        if unknown := (set(self.controls) | ({self.a_a} if self.a_a else set())) - set(self.arms):
            raise ValueError(f"controls and a_a name no arm: {', '.join(sorted(unknown))}")
        if reserved := [arm for arm in self.arms if arm.endswith(A_A)]:
            raise ValueError(f"arms {', '.join(reserved)}: names that end in {A_A} are those of the A/A pairs")
        if self.reference not in (*self.learning_rates, *self.chosen_rates):
            raise ValueError(f"learning_rates must have the reference, the first arm {self.reference}")
        if again and (again in self.chosen_rates) != (self.a_a in self.chosen_rates):
            raise ValueError(f"chosen_rates must have both {self.a_a} and {again}, or neither")
        if lost := {rate.arm for rate in self.borrowed_rates.values()} - {*self.learning_rates, *self.chosen_rates}:
            raise ValueError(f"borrowed_rates take the rate of an arm that is not tuned: {', '.join(sorted(lost))}")
        tuned = {entrant.name for entrant in self.entrants if entrant.arm in self.learning_rates}
        if lost := set(self.centres) - tuned:
            raise ValueError(f"centres of what is not tuned: {', '.join(sorted(lost))}")
        without = {entrant.arm for entrant in self.entrants if entrant.name not in self.centres}
        for arm, rates in self.learning_rates.items():
            if len(rates) < 3 and (rates or arm in without):
                raise ValueError(f"learning_rates of {arm} must be three or more, or none beside a rate in centres")
        unsorted = [arm for arm, rates in self.learning_rates.items() if rates != sorted(set(rates))]
        if unsorted:
            raise ValueError(f"learning_rates of {', '.join(unsorted)} must ascend")
        for name, seeds in (("tuning_seeds", self.tuning_seeds), ("seeds", self.seeds)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{name} must differ")
        if unknown := set(self.more_seeds) - {entrant.name for entrant in self.entrants}:
            raise ValueError(f"more_seeds name no arm: {', '.join(sorted(unknown))}")
        for name, more in self.more_seeds.items():
            if len({*self.seeds, *self.tuning_seeds, *more}) < len(self.seeds) + len(self.tuning_seeds) + len(more):
                raise ValueError(f"more_seeds of {name} must differ, and be none of seeds and tuning_seeds")
        if set(self.tuning_seeds) & set(self.seeds):
            raise ValueError("tuning_seeds and seeds must not overlap: no run chooses the centre and is judged as well")
        if strange := set(self.control_seeds or ()) - set(self.seeds):
            raise ValueError(f"control_seeds must be among the seeds (got {', '.join(map(str, sorted(strange)))})")
        if unknown := {arm for pair in self.contrasts for arm in pair} - set(self.arms):
            raise ValueError(f"contrasts name no arm: {', '.join(sorted(unknown))}")
        # Every arm is compared with the reference, and none with itself.
        known = [{arm, other} for arm in self.arms for other in (arm, self.reference)]
        for pair in self.contrasts:
            if set(pair) in known:
                raise ValueError(f"contrasts: {' and '.join(pair)} are compared already, or are one arm")
            known.append(set(pair))
        if self.a_a and self.a_a != self.reference:
            raise ValueError(f"a_a must be the reference, the first arm {self.reference} (got {self.a_a})")
        for name, fields in self.arms.items():
            if "learning_rate" in fields or "seed" in fields:
                raise ValueError(f"arm {name}: learning_rate and seed are the study's to set")
        if others := set(self.tuning) - set(MEASURING):
            raise ValueError(
                f"tuning may only change what is measured ({', '.join(MEASURING)}), or its rates would be those of "
                f"another training (got {', '.join(sorted(others))})"
            )
        return self

    @property
    def varied(self) -> str | None:
        """The field in ``VARIED`` over which the study has a figure, or None.

        It has one if at least three arms at rates of their own differ in nothing but that field, wherever one names it.
        """
        return next((f for f in VARIED if min(map(len, self.levels(f)), default=0) >= FEWEST_VALUES), None)

    def levels(self, field: str) -> list[list[str]]:
        """Returns the groups of arms that differ in nothing that trains but a field, if one of them names it."""
        groups: dict[str, list[str]] = {}
        for arm in [arm for arm in (*self.learning_rates, *self.chosen_rates) if arm in self.arms]:
            others = {name: value for name, value in self.arms[arm].items() if name not in (field, *MEASURING)}
            groups.setdefault(repr(sorted(others.items())), []).append(arm)
        return [arms for arms in groups.values() if any(field in self.arms[arm] for arm in arms)]

    @property
    def reference(self) -> str:
        """The arm that the others are compared with: the first."""
        return next(iter(self.arms))

    def seeds_of(self, name: str) -> list[int]:
        """Returns the seeds of an arm, or of the one that enters again."""
        more = [self.more_seeds[arm] for arm in self.more_seeds if name in (arm, self.reference)]
        return list(dict.fromkeys([*self.seeds, *(seed for seeds in more for seed in seeds)]))

    def rates_beside(self, tuned: dict[str, float | None]) -> dict[str, float | None]:
        """Returns the rate of each arm that is not tuned; None where it follows from one that is not chosen."""
        lent = {arm: ((self.chosen_rates | tuned)[rate.arm], rate.times) for arm, rate in self.borrowed_rates.items()}
        fixed = self.chosen_rates | self.given_rates
        return fixed | {arm: rate and rounded(rate * times) for arm, (rate, times) in lent.items()}

    @property
    def entrants(self) -> list[Entrant]:
        """All that is tuned and compared: the arms, and the one that enters again."""
        arms = [Entrant(arm, arm, fields) for arm, fields in self.arms.items()]
        return arms + ([Entrant(self.a_a + A_A, self.a_a, self.arms[self.a_a], A_A_SHIFT)] if self.a_a else [])


def rounded(rate: float) -> float:
    """Returns a learning rate with two significant digits.

    >>> rounded(0.00057735)
    0.00058
    """
    return float(f"{rate:.1e}")


def around(centre: float) -> list[float]:
    """Returns the three rates at which an arm runs on all seeds.

    >>> around(1e-3)
    [0.00058, 0.001, 0.0017]
    """
    return [rounded(centre / STEP), centre, rounded(centre * STEP)]


@dataclass(frozen=True)
class Entrant:
    """One that is tuned and compared in a study.

    Attributes:
        name: Its name in results.
        arm: The arm of the file.
        fields: The arm's fields.
        shift: Added to its tuning seeds and, for the initialisation alone, to its seeds.
    """

    name: str
    arm: str
    fields: dict[str, Any]
    shift: int = 0


class Experiment(Strict):
    """The content of an experiment file."""

    title: str = ""
    description: str = ""
    extends: str | None = None
    card: Annotated[str | None, Field(description="the card that it is made for, for `expand` without one")] = None
    fixed: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}
    axes: dict[str, Values] = {}
    linked: list[Annotated[list[dict[str, Any]], Field(min_length=1)]] = []
    ladders: list[Ladder] = []
    runs: list[dict[str, Any]] = []
    card_runs: Annotated[list[dict[str, Any]], Field(description="more runs, which only a CUDA card can do")] = []
    study: Study | None = None
    exclude: list[Exclusion] = []
    seeds: Annotated[list[CountOrZero], Field(min_length=1)] = [0]
    keep_at: Annotated[
        list[Annotated[float, Field(gt=0, le=1), NUMBER]],
        Field(description="shares of the training after which a study's pairs, and single runs, keep their weights"),
    ] = []

    @model_validator(mode="after")
    def _study_has_its_base(self) -> Experiment:
        """Raises ValueError without a base. One in 4 bits is enough where all arms have it so: 16 bits may not fit."""
        weights = [run.get("base_weights", "full") for run in self.runs if run.get("method") == "none"]
        in_4_bits = self.study and all(_is_in_4_bits(arm.get("method")) for arm in self.study.arms.values())
        if self.study and not {"full", *(["nf4"] if in_4_bits else [])} & set(weights):
            raise ValueError("a study needs the untouched base, from which gains are counted: runs: [{method: none}]")
        return self


def _is_in_4_bits(method: Any) -> bool:
    """Returns whether a method's base is in 4 bits. A method that is not known is refused elsewhere."""
    known = isinstance(method, str) and method in METHODS
    return known and METHODS[method].model_validate({"name": method}).quantization() is not None


def no_study(name: str) -> InputError:
    """Returns the error of an experiment that is asked for what only studies have."""
    return InputError(Problem(f"the experiment `{name}`", "is no study: it has no arms", "name a study"))


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns ``base`` with ``over`` laid on it; nested mappings are merged, lists are replaced.

    >>> deep_merge({"a": {"x": 1, "y": 2}}, {"a": {"x": 3}})
    {'a': {'x': 3, 'y': 2}}
    """
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = deep_merge(merged[key], value) if both else value
    return merged


def experiment_path(name: str) -> Path:
    """Returns the file of an experiment: the working folder's own, or else the one that the suite comes with.

    Raises:
        InputError: The name is reserved or unknown.
    """
    if name in RESERVED_NAMES:
        raise InputError(Problem(f"experiment={name}", "a reserved name", "rename the experiment file"))
    check_experiment_name(name)
    for folder in (EXPERIMENTS, STUDIES):
        for path in (folder / f"{name}.yaml", shipped(folder / f"{name}.yaml")):
            if path.is_file() and name not in NOT_EXPERIMENTS:
                return path
    missing = f"no file {shipped(EXPERIMENTS / f'{name}.yaml')}"
    raise InputError(Problem(f"experiment={name}", missing, close_match(name, experiment_names())))


def experiment_names() -> list[str]:
    """Returns the names of all experiment files, the working folder's own among them."""
    roots = [root for folder in (EXPERIMENTS, STUDIES) for root in (folder, shipped(folder))]
    return sorted({path.stem for root in roots for path in root.glob("*.yaml")} - {*NOT_EXPERIMENTS})


def read_experiment(path: Path, _children: tuple[Path, ...] = ()) -> Experiment:
    """Returns a file's experiment, merged onto what it extends.

    Raises:
        InputError: Every problem of the file's structure.
    """
    content = read_yaml(path)
    parent = content.get("extends")
    if isinstance(parent, str):
        try:
            parent_path = experiment_path(parent)
        except InputError as error:
            raise InputError(replace(problem, where=f"{path}: extends") for problem in error.problems) from None
        if parent_path in (path, *_children):
            raise InputError(Problem(f"{path}: extends", f"`{parent}` extends itself"))
        base = read_experiment(parent_path, (path, *_children)).model_dump(exclude_unset=True)
        content = deep_merge(base, content)
    return validated(Experiment, content, path, Experiment.model_fields)

"""The allowed content of the ledger of claims, ``experiments/claims.yaml``, and its strict reader. No torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, ValidationError, ValidationInfo, create_model, field_validator, model_validator

from peftscope.claims.checks import known_checks
from peftscope.claims.verdict import Rule, Verdict
from peftscope.errors import InputError, Problem, close_match, raise_any, shown
from peftscope.files.content import CountOrZero, Strict, read_yaml
from peftscope.files.problems import dotted, problems_of, validated
from peftscope.layout import CLAIMS_FILE, CLAIMS_HISTORY, shipped
from peftscope.planning.experiment import WORLDS, experiment_path, read_experiment

Kind = Literal["software", "arithmetic", "numerics", "sampling", "simulation", "training", "gpu", "literature"]
DETERMINISTIC: tuple[Kind, ...] = ("software", "arithmetic", "numerics", "sampling", "simulation")
"""The kinds whose checks give the same quantity on every run of one machine."""
Role = Literal["assertion", "condition", "beside"]
"""An assertion tests words of the claim. A condition tests them elsewhere, on a grid that was declared before any
measurement. What stands beside decides nothing."""


def _checks_of(part: Any) -> list[str]:
    """Returns the names of the checks in a part as it stands in the file: its keys with a dot."""
    return [name for name in part if "." in name] if isinstance(part, dict) else []


def _rows_of(check: str) -> tuple[str, str]:
    """Returns the names under which the file says what parts with this check have in common, the wider one first."""
    return check.partition(".")[0], check


class Part(Strict):
    """One quantity of a claim: how it is measured and when the claim holds, or why it is not measured.

    An answer may hold the value as ``{found}``, without its sign as ``{size}``, or as ``{lead}``, with “ahead of” or
    “behind” in place of the sign.
    """

    kind: Kind
    quotes: Annotated[str, Field(description="the words of the source that this part tests, if it decides")] = ""
    declared: Annotated[str, Field(description="where a condition was declared before it was measured")] = ""
    measures: Annotated[str, Field(min_length=1, description="the quantity, in words")]
    check: Annotated[str, Field(alias="its.check", description="module.function below peftscope.claims.checks")] = ""
    with_: Annotated[dict[str, Any], Field(alias="its.parameters", description="the function's parameters")] = {}
    rule: Rule | None = None
    unit: str = ""
    answers: Annotated[dict[Verdict, str], Field(description="what the value answers, by verdict or for all")] = {}
    scope: Annotated[str, Field(description="where the verdict holds, if narrower than the claim's scope")] = ""
    general: Annotated[bool, Field(description="of a training: false for a toy model, or one that is named")] = True
    waits_for: Annotated[str, Field(description="what has to be run first")] = ""

    @model_validator(mode="before")
    @classmethod
    def _with_its_check(cls, part: Any, info: ValidationInfo) -> Any:
        """Returns the fields of a part: its check is the key with a dot, and may give it a kind and a unit."""
        named = _checks_of(part)
        if not named:
            return part
        if len(named) > 1:
            raise ValueError(f"must have one check (got {', '.join(named)})")
        (check,) = named
        own = {name: value for name, value in part.items() if name != check}
        found = {"its.check": check, "its.parameters": part[check]}
        for name in _rows_of(check):
            found |= (info.context or {}).get(name, {})
        if "kind" not in found | own:
            raise ValueError(f"has no kind, and `checks` gives none to {check}")
        return found | own

    @field_validator("answers", mode="before")
    @classmethod
    def _by_verdict(cls, answers: Any) -> Any:
        return dict.fromkeys(Verdict, answers) if isinstance(answers, str) else answers

    @model_validator(mode="after")
    def _measured_or_excused(self) -> Part:
        if bool(self.check) == bool(self.waits_for):
            raise ValueError("must have one of: a check (module.function: its parameters), waits_for")
        if bool(self.check) != (self.rule is not None):
            raise ValueError("a check needs a rule, and a rule a check")
        if self.declared and not self.quotes:
            raise ValueError("a condition quotes the words that it tests")
        for text in self.answers.values():
            try:
                text.format(found="", size="", lead="")
            except (IndexError, KeyError, ValueError):
                raise ValueError(f"an answer may hold {{found}}, {{size}} and {{lead}} only: {shown(text)}") from None
        return self

    @property
    def role(self) -> Role:
        """Returns what the part is to its claim, which follows from what it quotes and from where it was declared."""
        if self.declared:
            return "condition"
        return "assertion" if self.quotes else "beside"

    @property
    def asks_of_worlds(self) -> bool:
        """Whether the part asks training, or what is measured on a task's items, on models and tasks at large."""
        return self.general and (self.kind == "training" or "task" in self.with_)

    @property
    def decides(self) -> bool:
        """Whether the claim's verdict rests on this part."""
        return self.role != "beside"


class Change(Strict):
    """A change of what decides a claim."""

    claim: str
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    was: Annotated[str, Field(min_length=1, description="what decided, and its verdict if one was published")]
    verdict: Annotated[Verdict | None, Field(description="the verdict that was published before, if any")] = None
    became: Annotated[str, Field(min_length=1)]
    why: Annotated[str, Field(min_length=1)]
    named: Annotated[bool, Field(description="whether it was named before the runs that decide since")] = False


class Claim(Strict):
    """One claim of the literature."""

    id: Annotated[str, Field(alias="its.id", pattern=r"^[SP]\d{1,3}$")]
    statement: Annotated[str, Field(min_length=1, description="what is claimed, in our words")]
    sentence: Annotated[str, Field(description="the source's own words, if they are not the statement")] = ""
    source: Annotated[str, Field(min_length=1, description="section of the chapter, or paper with table")]
    section: Annotated[str, Field(alias="its.section", min_length=1, description="heading on the page")]
    claimed: Annotated[str, Field(min_length=1, description="the figure, or the word, that is claimed")]
    scope: Annotated[str, Field(min_length=1, description="model, task and setting that the verdict holds for")]
    note: Annotated[str, Field(description="what was tested where the source contradicts itself; what we found")] = ""
    correction: Annotated[str, Field(description="what to remember instead, if the claim turns out wrong")] = ""
    to_decide: Annotated[str, Field(description="what would decide it while it is open or not run, and its price")] = ""
    advice: Annotated[dict[Verdict, str], Field(description="by verdict, what it means for people who train")] = {}
    parts: Annotated[tuple[Part, ...], Field(min_length=1, description="all assertions and conditions decide")]

    @model_validator(mode="before")
    @classmethod
    def _with_its_rule(cls, claim: Any) -> Any:
        """Returns the fields of a claim. Its rule is that of every check without one of its own."""
        if not isinstance(claim, dict) or "rule" not in claim or not isinstance(claim.get("parts"), list):
            return claim
        rule = {"rule": claim["rule"]}
        parts = [rule | part if _checks_of(part) else part for part in claim["parts"]]
        if parts == claim["parts"]:
            raise ValueError("no part takes the claim's rule: every check has one of its own")
        return {name: value for name, value in claim.items() if name != "rule"} | {"parts": parts}

    @model_validator(mode="after")
    def _decided_by_its_words(self) -> Claim:
        if not any(part.role == "assertion" for part in self.parts):
            raise ValueError("needs an assertion: a part with `quotes`, and without `declared`")
        for part in self.parts:
            if part.quotes not in (self.sentence or self.statement):
                raise ValueError(f"these words are not in the source's sentence: {shown(part.quotes)}")
        return self


_WRITTEN = {name for model in (Claim, Part, Rule) for name, field in model.model_fields.items() if not field.alias}
"""The fields that an entry of the file may have."""


class _Shared(Strict):
    kind: Kind | None = None
    unit: str = ""


class _Ledger(Strict):
    checks: dict[str, _Shared] = {}
    topics: dict[str, list[str]] = {}
    claims: dict[str, dict[str, dict[str, Any]]]


class _History(Strict):
    changes: list[Change]

    @field_validator("changes", mode="before")
    @classmethod
    def _of_each_claim(cls, changes: Any) -> Any:
        """Returns one change for each claim of an entry whose ``claims`` give the verdict that each had."""
        if not isinstance(changes, list):
            return changes
        each = []
        for change in changes:
            if isinstance(change, dict) and isinstance(claims := change.get("claims"), dict):
                rest = {name: value for name, value in change.items() if name != "claims"}
                each += [{**rest, "claim": claim, "verdict": verdict} for claim, verdict in claims.items()]
            else:
                each.append(change)
        return each


def read_ledger(path: Path | None = None, checks: bool = True) -> tuple[Claim, ...]:
    """Returns all claims of a file in their order. The default file is ``experiments/claims.yaml``.

    Args:
        path: The file.
        checks: Whether to look at the checks that the claims name, which imports the libraries that they measure with.

    Raises:
        InputError: The file has problems; the error lists all of them.
    """
    path = path or shipped(CLAIMS_FILE)
    ledger = validated(_Ledger, read_yaml(path), path, _Ledger.model_fields)
    shared = {name: row.model_dump(exclude_unset=True) for name, row in ledger.checks.items()}
    topics = {name: topic for topic, names in ledger.topics.items() for name in names}
    claims: dict[str, Claim] = {}
    problems: list[Problem] = []
    for section, entries in ledger.claims.items():
        for name, entry in entries.items():
            if name in claims:
                problems.append(Problem(f"{path}: {section}.{name}", "stands in two sections", "give it its own id"))
            try:
                headings = {"its.id": name, "its.section": topics.get(name, section)}
                claims[name] = Claim.model_validate(entry | headings, context=shared)
            except ValidationError as error:
                problems += problems_of(error, partial(_place, path, name, entry), _WRITTEN)
    lost = [name for name in topics if name not in claims]
    problems += [Problem(f"{path}: topics", f"no such claim (got {name})", close_match(name, claims)) for name in lost]
    used: set[str] = set()
    for claim in claims.values():
        for index, part in enumerate(claim.parts):
            if part.check:
                used.update(_rows_of(part.check))
                problems += _problems_of_check(part, f"{path}: {claim.id}.parts[{index}]") if checks else []
    problems = problems or [
        Problem(f"{path}: checks.{name}", "no part has such a check", close_match(name, used))
        for name in shared
        if name not in used
    ]
    raise_any(problems)
    return tuple(claims.values())


def _place(path: Path, name: str, entry: dict[str, Any], location: tuple[Any, ...]) -> str:
    """Returns where a problem of a claim stands in the file. A rule that a part took from its claim stands there."""
    if location[:3:2] == ("parts", "rule") and "rule" not in entry["parts"][location[1]]:
        location = location[2:]
    return f"{path}: {dotted((name, *location))}"


def read_history(path: Path | None = None) -> tuple[Change, ...]:
    """Returns all changes of what decides claims. The default file is ``experiments/claims-history.yaml``.

    Raises:
        InputError: The file has problems; the error lists all of them.
    """
    path = path or shipped(CLAIMS_HISTORY)
    return tuple(validated(_History, read_yaml(path), path, Change.model_fields).changes)


@cache
def _parameters(check: str) -> type[Strict]:
    """Returns a pydantic model of a check's parameters from its signature. Whole numbers must not be negative."""
    function = known_checks()[check]
    types = get_type_hints(function)
    fields: dict[str, Any] = {
        name: (
            CountOrZero if types[name] is int else types[name],
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for name, parameter in inspect.signature(function).parameters.items()
    }
    return create_model(check, __base__=Strict, **fields)


def _problems_of_check(part: Part, where: str) -> list[Problem]:
    known = known_checks()
    where = f"{where}.{part.check}"
    if part.check not in known:
        return [Problem(where, "no such check", close_match(part.check, known))]
    parameters = _parameters(part.check)
    try:
        parameters.model_validate(part.with_)
    except ValidationError as error:
        return problems_of(error, lambda location: f"{where}.{dotted(location)}", set(parameters.model_fields))
    named = next((name for name in ("experiment", "study") if name in part.with_), None)
    return _problems_of_experiment(part, named, where) if named else []


def elsewhere(claim: Claim) -> Iterator[list[Part]]:
    """Yields for each world but A, which the ledger names, what the claim says of training, as it is asked there.

    It is asked of the same arms or, of a list of arms, of those that run there. A world in which one of the claim's
    assertions cannot be asked has no say.
    """
    asked = [part for part in claim.parts if part.role == "assertion" and part.asks_of_worlds]
    for world in list(WORLDS.values())[1:]:
        experiment = read_experiment(experiment_path(world))
        arms = {entrant.name for entrant in experiment.study.entrants} if experiment.study else set()
        place = {"study": world, **{name: experiment.fixed[name] for name in ("model", "task")}}
        parts = [there for part in asked if (there := _there(part, place, arms))]
        if asked and len(parts) == len(asked):
            yield parts


def _there(part: Part, place: dict[str, Any], arms: set[str]) -> Part | None:
    """Returns a part as it is asked of a world with these arms; None if it lacks arms, or the check cannot be asked."""
    lists = {name: _within(part.with_[name], arms) for name in ("arms", "ranks") if name in part.with_}
    named = [arm for name in NAME_ARMS if name not in lists for arm in _items(part.with_.get(name, ()))]
    # One arm of a list says something only if it is compared with another.
    enough = all(len(found) > (isinstance(found, list) and "against" not in part.with_) for found in lists.values())
    can_be_asked = part.check.startswith(("training.", "forgetting.")) or "task" in part.with_
    if not (can_be_asked and "base_weights" not in part.with_ and arms.issuperset(named) and enough):
        return None
    here = {name: place[name] for name in place.keys() & part.with_.keys()}
    return part.model_copy(update={"with_": {**part.with_, **lists, **here}, "scope": ""})


def _within(value: Any, arms: set[str]) -> Any:
    if isinstance(value, dict):
        return {arm: other for arm, other in value.items() if arms.issuperset(_items({arm: other}))}
    return [arm for arm in value if arm in arms]


NAME_ARMS = ("arms", "arm", "against", "first", "second", "ranks")
"""The parameters of checks that name arms of a study: one, several, or a mapping of them."""


def arms_named_in(*asked: dict[str, Any]) -> list[Any]:
    """Returns the arms that some checks' parameters name, each once."""
    named = [arm for parameters in asked for name in NAME_ARMS for arm in _items(parameters.get(name, ()))]
    return list(dict.fromkeys(named))


def _items(value: Any) -> list[Any]:
    """Returns the names in a parameter of a check.

    >>> _items("lora"), _items(["r1", "r4"]), _items({"loftq": "qlora"}), _items({"r4": 4})
    (['lora'], ['r1', 'r4'], ['loftq', 'qlora'], ['r4'])
    """
    if isinstance(value, dict):
        return [*value, *(name for name in value.values() if not isinstance(name, int))]
    return list(value) if isinstance(value, list | tuple) else [value]


def _problems_of_experiment(part: Part, key: str, where: str) -> list[Problem]:
    """Returns a problem if the experiment or study does not exist, and one for every arm that a study does not have."""
    try:
        study = read_experiment(experiment_path(str(part.with_[key]))).study
    except InputError as error:
        return [Problem(f"{where}.{key}", str(problem)) for problem in error.problems]
    if key == "experiment":
        return []
    if study is None:
        return [Problem(f"{where}.study", f"{part.with_['study']} is an experiment without a study")]
    named = arms_named_in(part.with_)
    arms = [entrant.name for entrant in study.entrants]
    return [
        Problem(where, f"{part.with_['study']} has no such arm (got {shown(arm)})", close_match(str(arm), arms))
        for arm in named
        if not isinstance(arm, str) or arm not in arms
    ]

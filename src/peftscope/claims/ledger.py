"""The allowed content of the ledger of claims, ``experiments/claims.yaml``, and its strict reader. No torch."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from peftscope.claims import checks
from peftscope.claims.measurement import Measurement
from peftscope.claims.verdict import Rule, Verdict
from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.files.content import read_yaml
from peftscope.files.problems import dotted, problems_of
from peftscope.layout import CLAIMS_FILE, CLAIMS_HISTORY, shipped
from peftscope.planning.experiment import experiment_path, read_experiment

Content = TypeVar("Content", bound=BaseModel)
Kind = Literal["software", "arithmetic", "numerics", "sampling", "simulation", "training", "gpu", "literature"]
DETERMINISTIC: tuple[Kind, ...] = ("software", "arithmetic", "numerics", "sampling", "simulation")
"""The kinds whose checks give the same quantity on every run of one machine."""
Role = Literal["assertion", "condition", "beside"]
"""An assertion tests words of the claim. A condition tests them elsewhere, on a grid that was declared before any
measurement. What stands beside decides nothing."""


class Part(BaseModel):
    """One quantity of a claim: how it is measured and when the claim holds, or why it is not measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    role: Role = "beside"
    quotes: Annotated[str, Field(description="the words of the source that this part tests, if it decides")] = ""
    declared: Annotated[str, Field(description="where a condition was declared before it was measured")] = ""
    measures: Annotated[str, Field(min_length=1, description="the quantity, in words")]
    check: Annotated[str, Field(description="module.function below peftscope.claims.checks")] = ""
    with_: Annotated[dict[str, Any], Field(alias="with", description="the function's parameters")] = {}
    rule: Rule | None = None
    unit: str = ""
    answers: Annotated[
        dict[Verdict, str],
        Field(
            description="what the value answers in the claim's terms, by verdict or for all; {found} or {size} is it"
        ),
    ] = {}
    scope: Annotated[str, Field(description="where the verdict holds, if narrower than the claim's scope")] = ""
    general: Annotated[bool, Field(description="of a training: false for a toy model, or one that is named")] = True
    waits_for: Annotated[str, Field(description="what has to be run first")] = ""

    @field_validator("answers", mode="before")
    @classmethod
    def _by_verdict(cls, answers: Any) -> Any:
        return dict.fromkeys(Verdict, answers) if isinstance(answers, str) else answers

    @model_validator(mode="after")
    def _measured_or_excused(self) -> Part:
        if bool(self.check) == bool(self.waits_for):
            raise ValueError("must have one of: check, waits_for")
        if bool(self.check) != (self.rule is not None):
            raise ValueError("a check needs a rule, and a rule a check")
        if bool(self.quotes) != self.decides:
            raise ValueError("an assertion or a condition quotes the words that it tests, and no other part does")
        for text in self.answers.values():
            try:
                text.format(found="", size="")
            except (IndexError, KeyError, ValueError):
                raise ValueError(f"an answer may hold {{found}} and {{size}} only: {shown(text)}") from None
        if bool(self.declared) != (self.role == "condition"):
            raise ValueError("a condition says where it was declared, and no other part does")
        return self

    @property
    def decides(self) -> bool:
        """Whether the claim's verdict rests on this part."""
        return self.role != "beside"


class Change(BaseModel):
    """A change of what decides a claim."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    claim: str
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    was: Annotated[str, Field(min_length=1, description="what decided, and its verdict if one was published")]
    verdict: Annotated[Verdict | None, Field(description="the verdict that was published before, if there was one")] = (
        None
    )
    became: Annotated[str, Field(min_length=1)]
    why: Annotated[str, Field(min_length=1)]


class Claim(BaseModel):
    """One claim of the literature."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[SP]\d{1,3}$")]
    slug: Annotated[str, Field(pattern=r"^[A-Za-z0-9]+(-[A-Za-z0-9]+)*$")]
    statement: Annotated[str, Field(min_length=1, description="what is claimed, in our words")]
    sentence: Annotated[str, Field(description="the source's own words, if they are not the statement")] = ""
    source: Annotated[str, Field(min_length=1, description="section of the chapter, or paper with table")]
    section: Annotated[str, Field(min_length=1, description="heading on the page")]
    claimed: Annotated[str, Field(min_length=1, description="the figure, or the word, that is claimed")]
    scope: Annotated[str, Field(min_length=1, description="model, task and setting that the verdict holds for")]
    note: Annotated[str, Field(description="what was tested where the source contradicts itself; what we found")] = ""
    correction: Annotated[str, Field(description="what to remember instead, if the claim turns out wrong")] = ""
    advice: Annotated[
        dict[Verdict, str], Field(description="by verdict, what it means for someone who trains a model")
    ] = {}
    parts: Annotated[tuple[Part, ...], Field(min_length=1, description="all assertions and conditions decide")]

    @model_validator(mode="after")
    def _decided_by_its_words(self) -> Claim:
        if not any(part.role == "assertion" for part in self.parts):
            raise ValueError("needs a part with the role assertion")
        for part in self.parts:
            if part.quotes not in (self.sentence or self.statement):
                raise ValueError(f"these words are not in the source's sentence: {shown(part.quotes)}")
        return self


class _Ledger(BaseModel):
    model_config = ConfigDict(extra="forbid")

    claims: list[Claim]


class _History(BaseModel):
    model_config = ConfigDict(extra="forbid")

    changes: list[Change]

    @field_validator("changes", mode="before")
    @classmethod
    def _of_each_claim(cls, changes: Any) -> Any:
        """Returns one change for each claim of an entry with ``claims``, the verdict that each had."""
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
    known = set(Claim.model_fields) | {field.alias or name for name, field in Part.model_fields.items()}
    claims = _read(path, _Ledger, known | set(Rule.model_fields)).claims
    problems = [
        Problem(f"{path}: claims", f"{field} `{value}` appears {count} times", "give every claim its own")
        for field in ("id", "slug")
        for value, count in Counter(getattr(claim, field) for claim in claims).items()
        if count > 1
    ]
    for claim in claims if checks else ():
        for index, part in enumerate(claim.parts):
            if part.check:
                problems += _problems_of_check(part, f"{path}: {claim.id}.parts[{index}]")
    if problems:
        raise InputError(problems)
    return tuple(claims)


def read_history(path: Path | None = None) -> tuple[Change, ...]:
    """Returns all changes of what decides claims. The default file is ``experiments/claims-history.yaml``.

    Raises:
        InputError: The file has problems; the error lists all of them.
    """
    return tuple(_read(path or shipped(CLAIMS_HISTORY), _History, set(Change.model_fields)).changes)


def _read(path: Path, content: type[Content], known: set[str]) -> Content:
    try:
        return content.model_validate(read_yaml(path))
    except ValidationError as error:
        raise InputError(problems_of(error, lambda loc: f"{path}: {dotted(loc)}", known)) from None


def find_check(name: str) -> Callable[..., Measurement]:
    """Returns the check with the name ``module.function``.

    Raises:
        KeyError: There is no such check.
    """
    return _known_checks()[name]


@cache
def _known_checks() -> dict[str, Callable[..., Measurement]]:
    found: dict[str, Callable[..., Measurement]] = {}
    for module in pkgutil.iter_modules(checks.__path__):
        content = importlib.import_module(f"{checks.__name__}.{module.name}")
        for name, function in inspect.getmembers(content, inspect.isfunction):
            if function.__module__ == content.__name__ and not name.startswith("_"):
                found[f"{module.name}.{name}"] = function
    return found


@cache
def _parameters(check: str) -> type[BaseModel]:
    """Returns a pydantic model of a check's parameters from its signature. Whole numbers must not be negative."""
    function = _known_checks()[check]
    types = get_type_hints(function)
    fields: dict[str, Any] = {
        name: (
            NonNegativeInt if types[name] is int else types[name],
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for name, parameter in inspect.signature(function).parameters.items()
    }
    return create_model(check, **fields)


def _problems_of_check(part: Part, where: str) -> list[Problem]:
    known = _known_checks()
    if part.check not in known:
        return [Problem(f"{where}.check", f"no such check (got {shown(part.check)})", close_match(part.check, known))]
    signature = inspect.signature(known[part.check])
    try:
        signature.bind(**part.with_)
    except TypeError as error:
        remedy = f"{part.check} takes {', '.join(signature.parameters)}"
        return [Problem(f"{where}.with", str(error), remedy)]
    try:
        _parameters(part.check).model_validate(part.with_)
    except ValidationError as error:
        return problems_of(error, lambda location: f"{where}.with.{dotted(location)}", set(signature.parameters))
    if "experiment" in part.with_:
        return _problems_of_name(part.with_["experiment"], f"{where}.with.experiment")
    return _problems_of_study(part, f"{where}.with") if "study" in part.with_ else []


NAME_ARMS = ("arms", "arm", "against", "first", "second", "ranks")
"""The parameters of checks that name arms of a study: one, several, or a mapping of them."""


def _items(value: Any) -> list[Any]:
    """Returns the names in a parameter of a check.

    >>> _items("lora"), _items(["r1", "r4"]), _items({"loftq": "qlora"}), _items({"r4": 4})
    (['lora'], ['r1', 'r4'], ['loftq', 'qlora'], ['r4'])
    """
    if isinstance(value, dict):
        return [*value, *(name for name in value.values() if not isinstance(name, int))]
    return list(value) if isinstance(value, list | tuple) else [value]


def _problems_of_name(experiment: Any, where: str) -> list[Problem]:
    """Returns a problem if there is no such experiment."""
    try:
        experiment_path(str(experiment))
    except InputError as error:
        return [Problem(where, str(problem)) for problem in error.problems]
    return []


def _problems_of_study(part: Part, where: str) -> list[Problem]:
    """Returns a problem if the study does not exist, and one for every arm that it does not have."""
    try:
        study = read_experiment(experiment_path(str(part.with_["study"]))).study
    except InputError as error:
        return [Problem(f"{where}.study", str(problem)) for problem in error.problems]
    if study is None:
        return [Problem(f"{where}.study", f"{part.with_['study']} is an experiment without a study")]
    named = [arm for key in NAME_ARMS for arm in _items(part.with_.get(key, ()))]
    arms = [entrant.name for entrant in study.entrants]
    return [
        Problem(where, f"{part.with_['study']} has no such arm (got {shown(arm)})", close_match(str(arm), arms))
        for arm in named
        if not isinstance(arm, str) or arm not in arms
    ]

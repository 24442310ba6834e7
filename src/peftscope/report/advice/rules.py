"""The rules of the advice, ``experiments/advice.yaml``, and how far their evidence carries. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftscope.claims.stored import read_findings
from peftscope.claims.verdict import Verdict
from peftscope.errors import InputError
from peftscope.files.content import read_yaml
from peftscope.files.problems import dotted, problems_of
from peftscope.layout import ADVICE_FILE, CLAIMS_RESULTS, PACKAGED, PUBLISHED_RESULTS, REPOSITORY, shipped

Priority = Literal["quality", "memory", "speed", "retention"]
Setting = Literal[
    "method",
    "precision",
    "rank",
    "targets",
    "alpha",
    "dropout",
    "learning_rate",
    "batch",
    "epochs",
    "variants",
    "merging",
    "peak",
]
SCOPE_WIDTH = 72
"""The most characters of a claim's scope that a line of the advice repeats."""

Findings = Mapping[str, Mapping[str, Any]]


class Standing(IntEnum):
    """What a recommendation rests on, the strongest first."""

    COMPUTED = 0
    HOLDS = 1
    OPEN = 2
    PAPERS = 3
    CUSTOM = 4
    REFUTED = 5


class Grounds(BaseModel):
    """What a recommendation says, and what it rests on.

    Attributes:
        says: The recommendation, or its reason, as a sentence.
        claims: The ids of claims that have to hold.
        against: The ids of claims that have to be wrong.
        studies: The studies whose chosen learning rates are told beside it.
        papers: Papers that say the same, and what they found.
        reaches_billions: The parameters, in billions, of the largest model in these papers.
        computed: Whether arithmetic alone decides.
    """

    model_config = ConfigDict(extra="forbid")

    says: str
    claims: list[str] = []
    against: list[str] = []
    studies: list[str] = []
    papers: str = ""
    reaches_billions: float | None = None
    computed: bool = False

    def standing(self, findings: Findings) -> Standing:
        """Returns what it rests on under these verdicts. A claim without a finding is not run."""
        verdicts = [_verdict(findings, claim) for claim in self.claims]
        verdicts += [_opposite(_verdict(findings, claim)) for claim in self.against]
        if Verdict.WRONG in verdicts:
            return Standing.REFUTED
        if self.computed:
            return Standing.COMPUTED
        if verdicts:
            return Standing.HOLDS if set(verdicts) == {Verdict.HOLDS} else Standing.OPEN
        return Standing.PAPERS if self.papers else Standing.CUSTOM

    def evidence(self, findings: Findings, billions: float) -> str:
        """Returns what it rests on and how far that carries, as text."""
        named = [*self.claims, *self.against]
        known = {claim: _verdict(findings, claim) for claim in named}
        waiting = [claim for claim, verdict in known.items() if verdict == Verdict.NOT_RUN]
        told = [
            f"{claim} {verdict} ({shorten(findings[claim]['scope'], SCOPE_WIDTH, placeholder=' …')})"
            for claim, verdict in known.items()
            if claim not in waiting
        ]
        told += [f"{', '.join(waiting)} not run yet"] if waiting else []
        told += list(_chosen_rates(self.studies))
        if self.papers:
            told.append(f"papers: {self.papers}{_reach(self.reaches_billions, billions)}")
        standing = self.standing(findings)
        if standing is Standing.CUSTOM or (
            standing is Standing.OPEN and len(waiting) == len(named) and not self.papers
        ):
            told.append("nothing but custom")
        if standing is Standing.OPEN:
            told.insert(0, "open")
        return "; ".join(told) or "computed"


def _verdict(findings: Findings, claim: str) -> Verdict:
    return Verdict(findings[claim]["verdict"]) if claim in findings else Verdict.NOT_RUN


def _opposite(verdict: Verdict) -> Verdict:
    return {Verdict.WRONG: Verdict.HOLDS, Verdict.HOLDS: Verdict.WRONG}.get(verdict, verdict)


def _reach(reaches: float | None, billions: float) -> str:
    if reaches is None:
        return ""
    beyond = f"; this model has {billions:.3g}B: not tested above" if billions > 1.1 * reaches else ""
    return f" (up to {reaches:g}B{beyond})"


def _chosen_rates(studies: Sequence[str]) -> Iterator[str]:
    """Yields the learning rates that published studies chose, as far as they have."""
    for study in studies:
        with suppress(OSError, ValueError, KeyError):
            arms = json.loads(_published(f"{study}/tuned.json").read_text())["arms"]
            rates = (f"{arm} {arms[arm]['learning_rate']:g}" for arm in ("lora", "full") if arm in arms)
            yield f"study `{study}` chose {', '.join(rates)} (smollm2-135m)"


class When(BaseModel):
    """The condition of a rule. All that is given must hold.

    Attributes:
        priority: The priorities that it is for.
        method: The methods that it is for.
        examples_at_most: The most examples.
        examples_at_least: The fewest examples.
        billions_at_most: The most parameters of the model, in billions.
        billions_above: The parameters, in billions, that the model has to exceed.
        data_rank_at_least: The lowest rank at which an adapter has room for the data.
    """

    model_config = ConfigDict(extra="forbid")

    priority: list[Priority] | None = None
    method: list[str] | None = None
    examples_at_most: int | None = None
    examples_at_least: int | None = None
    billions_at_most: float | None = None
    billions_above: float | None = None
    data_rank_at_least: int | None = None

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Returns whether the condition holds for facts: priority, method, examples, billions and data_rank."""
        for name, bound in self:
            fact, _, comparison = name.partition("_at_")
            fact = fact.removesuffix("_above")
            if bound is None:
                continue
            if isinstance(bound, list):
                kept = facts[fact] in bound
            elif comparison == "most":
                kept = facts[fact] <= bound
            else:
                kept = facts[fact] > bound if name.endswith("_above") else facts[fact] >= bound
            if not kept:
                return False
        return True


class Rule(Grounds):
    """One recommendation for a setting.

    Attributes:
        setting: The setting that it is about.
        when: Its condition.
        value: The value to take, or to start from. ``data_rank`` stands for the rank that the data ask for.
        range: The values among which the evidence leaves the choice; for a learning rate, the grid to search.
    """

    setting: Setting
    when: When = When()
    value: Any = None
    range: Annotated[list[Any], Field(min_length=2)] | None = None


class Change(Grounds):
    """A change with which a method may fit, and what it costs in quality.

    Attributes:
        name: Its name.
        methods: The methods that it is for; none: all.
        fields: The fields of the run that it changes.
        rank: The rank that it lowers a higher one to.
    """

    name: str
    methods: list[str] = []
    fields: dict[str, Any] = {}
    rank: int | None = None


class Rules(BaseModel):
    """All rules and changes of the advice."""

    model_config = ConfigDict(extra="forbid")

    rules: list[Rule]
    changes: list[Change]

    def rule(self, setting: Setting, facts: Mapping[str, Any], findings: Findings) -> Rule | None:
        """Returns the first rule of a setting whose condition holds and of which no claim is refuted."""
        return next(
            (
                rule
                for rule in self.rules
                if rule.setting == setting
                and rule.when.holds(facts)
                and rule.standing(findings) is not Standing.REFUTED
            ),
            None,
        )

    def change(self, name: str) -> Change:
        """Returns the change with a name."""
        return next(change for change in self.changes if change.name == name)


def read_rules(path: Path | None = None) -> Rules:
    """Returns the rules of a file; the default is ``experiments/advice.yaml``.

    Names of claims are not looked up, because reading the ledger loads every check; a test looks them up.

    Raises:
        InputError: The file has problems.
    """
    path = path or shipped(ADVICE_FILE)
    names = {*Rule.model_fields, *Change.model_fields, *When.model_fields, *Rules.model_fields}
    try:
        return Rules.model_validate(read_yaml(path))
    except ValidationError as error:
        raise InputError(problems_of(error, lambda loc: f"{path}: {dotted(loc)}", names)) from None


def _published(name: str) -> Path:
    """Returns the path of a published result, here or among what the suite comes with.

    Unlike ``layout.published``, it looks further where the working folder has experiments of its own: advice needs
    verdicts there, too.
    """
    paths = [root / PUBLISHED_RESULTS / name for root in (Path(), REPOSITORY, PACKAGED)]
    return next((path for path in paths if path.is_file()), paths[0])


def known_findings(path: Path | None = None) -> tuple[dict[str, dict[str, Any]], str]:
    """Returns the findings on all claims by their ids, and where they were read.

    Without a path they are those of ``results/claims.json`` or, without that, the published ones. If there are none, no
    claim was run.

    Raises:
        InputError: The file is not a ``claims.json``.
    """
    own = path or (CLAIMS_RESULTS if CLAIMS_RESULTS.is_file() else None)
    chosen = own or _published("claims.json")
    if own is None and not chosen.is_file():
        return {}, "no claims.json: no claim was run"
    return {finding["id"]: finding for finding in read_findings(chosen)}, str(own or PUBLISHED_RESULTS / chosen.name)

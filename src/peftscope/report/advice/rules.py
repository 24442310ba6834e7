"""The rules of the advice, ``experiments/advice.yaml``, and how far their evidence carries. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from peftscope.claims.stored import read_findings
from peftscope.claims.verdict import Verdict
from peftscope.files.content import Strict, read_yaml
from peftscope.files.problems import validated
from peftscope.layout import ADVICE_FILE, CLAIMS_RESULTS, PACKAGED, PUBLISHED_RESULTS, REPOSITORY, shipped
from peftscope.report.spoken import spoken_scope, spoken_verdict, spoken_worlds
from peftscope.words import counted

Priority = Literal["quality", "memory", "speed", "retention"]
Fact = Literal["priority", "method", "examples", "billions", "data_rank"]
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

HABIT = "a habit; not tested here"
"""The note on a recommendation that nobody cited here tested."""

Findings = Mapping[str, Mapping[str, Any]]


class Standing(IntEnum):
    """The grounds of a recommendation, the strongest first."""

    COMPUTED = 0
    HOLDS = 1
    OPEN = 2
    PAPERS = 3
    CUSTOM = 4
    REFUTED = 5


class Grounds(Strict):
    """A recommendation with its grounds.

    Attributes:
        says: The recommendation, or its reason, as a sentence.
        claims: The ids of claims that have to hold.
        against: The ids of claims that have to be wrong.
        papers: Papers that say the same, and what they found.
        reaches_billions: The parameters, in billions, of the largest model in these papers.
        computed: Whether arithmetic alone decides.
    """

    says: str
    claims: list[str] = []
    against: list[str] = []
    papers: str = ""
    reaches_billions: float | None = None
    computed: bool = False

    def standing(self, findings: Findings) -> Standing:
        """Returns what it rests on under these verdicts. A claim without a finding is not run."""
        verdicts = [_verdict(findings, claim) for claim in self.claims]
        opposite = {Verdict.WRONG: Verdict.HOLDS, Verdict.HOLDS: Verdict.WRONG}
        verdicts += [opposite.get(one, one) for one in (_verdict(findings, claim) for claim in self.against)]
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
            f"{claim} {spoken_verdict(found)} ({shorten(spoken_scope(found), SCOPE_WIDTH, placeholder=' …')})"
            for claim in known
            if claim not in waiting and (found := dict(findings[claim]))
        ]
        told += [f"{', '.join(waiting)} not run yet"] if waiting else []
        if self.papers:
            told.append(f"papers: {self.papers}{_reach(self.reaches_billions, billions)}")
        standing = self.standing(findings)
        untested = standing is Standing.OPEN and len(waiting) == len(named) and not self.papers
        if standing is Standing.CUSTOM or untested:
            told.append(HABIT)
        if standing is Standing.OPEN:
            told.insert(0, "open")
        return "; ".join(told) or "computed"

    def rests_on(self, findings: Findings, billions: float) -> tuple[str, ...]:
        """Returns the worlds that it was tested in with their seeds, or how else; and how far papers carry."""
        parts = [part for claim in (*self.claims, *self.against) for part in findings.get(claim, {}).get("parts", ())]
        worlds: dict[str, int] = {}
        for part in parts:
            if part["kind"] == "training" and part["role"] != "beside" and part["found"] is not None:
                world = spoken_worlds([part["model"]])
                worlds[world] = max(worlds.get(world, 0), len(part["samples"]))
        told = [f"{world}: {counted(seeds, 'seed')}" if seeds else world for world, seeds in worlds.items()]
        standing = self.standing(findings)
        told += ["computed"] if not told and standing <= Standing.HOLDS else []
        told += [f"papers{_reach(self.reaches_billions, billions)}"] if self.papers else []
        told = ["open", *told] if told and standing is Standing.OPEN else told
        return tuple(told) or (HABIT,)


def _verdict(findings: Findings, claim: str) -> Verdict:
    return Verdict(findings[claim]["verdict"]) if claim in findings else Verdict.NOT_RUN


def _reach(reaches: float | None, billions: float) -> str:
    if reaches is None:
        return ""
    beyond = f"; this model has {billions:.3g}B: not tested above" if billions > 1.1 * reaches else ""
    return f" (up to {reaches:g}B{beyond})"


class Rule(Grounds):
    """One recommendation for a setting.

    Attributes:
        setting: The setting that it is about.
        when: Its condition: for some facts of a situation the words that are meant, or the range with its ends. The
            parameters of the model are in billions; ``data_rank`` is the lowest rank with room for the data.
        value: The value to take, or to start from. ``data_rank`` stands for the rank that the data ask for.
        range: The values among which the evidence leaves the choice; for a learning rate, the grid to search.
    """

    setting: Setting
    when: dict[Fact, list[str] | tuple[float, float]] = {}
    value: Any = None
    range: Annotated[list[Any], Field(min_length=2)] | None = None

    def is_for(self, facts: Mapping[str, Any]) -> bool:
        """Returns whether the whole condition holds in a situation."""
        return all(
            meant[0] <= facts[name] <= meant[1] if isinstance(meant, tuple) else facts[name] in meant
            for name, meant in self.when.items()
        )


class Change(Grounds):
    """The cost of a change that lowers quality, or may; ``name`` is its name."""

    name: str


class Rules(Strict):
    """All rules and changes of the advice."""

    rules: list[Rule]
    changes: list[Change]

    def rule(self, setting: Setting, facts: Mapping[str, Any], findings: Findings) -> Rule | None:
        """Returns the first rule of a setting whose condition holds and of which no claim is refuted."""
        speaking = (rule for rule in self.rules if rule.setting == setting and rule.is_for(facts))
        return next((rule for rule in speaking if rule.standing(findings) is not Standing.REFUTED), None)

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
    names = {*Rule.model_fields, *Change.model_fields, *Rules.model_fields, *get_args(Fact)}
    return validated(Rules, read_yaml(path), path, names)


def known_findings(path: Path | None = None) -> tuple[dict[str, dict[str, Any]], str]:
    """Returns the findings on all claims by their ids, and where they were read.

    Without a path they are those of ``results/claims.json`` or, without that, the published ones. If there are none, no
    claim was run.

    Raises:
        InputError: The file is not a ``claims.json``.
    """
    where = PUBLISHED_RESULTS / CLAIMS_RESULTS.name
    # Unlike ``layout.published``, this looks further where the working folder has experiments of its own.
    paths = [CLAIMS_RESULTS, *(root / where for root in (Path(), REPOSITORY, PACKAGED))]
    chosen = path or next(filter(Path.is_file, paths), None)
    if chosen is None:
        return {}, "no claims.json: no claim was run"
    return {finding["id"]: finding for finding in read_findings(chosen)}, str(where if chosen in paths[1:] else chosen)

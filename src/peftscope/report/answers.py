"""Reads typed answers, fills in their numbers, and finds those that no longer agree with results. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
from pydantic import Field

from peftscope.analysis.compare import Outcome
from peftscope.analysis.study import StudyResults
from peftscope.errors import InputError, Problem, close_match, raise_any
from peftscope.files.content import Strict, read_yaml
from peftscope.files.problems import validated
from peftscope.layout import ANSWERS_FILE, shipped
from peftscope.planning.experiment import experiment_names
from peftscope.planning.published import RETENTION
from peftscope.report.contrasts import AHEAD, BEHIND, contrasts, in_brackets, word_of
from peftscope.report.spoken import deciding, spoken_number
from peftscope.words import scale_of, signed, spoken_bound

BARE = ("", "about")
"""The forms that tell a size alone, which is no finding unless one arm is ahead of the other."""

_REFERENCE = re.compile(r"\{(?P<what>[^{}:]+)(?::(?P<form>[a-z]+))?\}")
_CLAIM = re.compile(r"(?P<id>[SP]\d+)(?:\.(?P<part>\d+))?")
_PAIR = re.compile(r"(?:(?P<study>[a-z0-9-]+)/)?(?P<arm>[a-z0-9-]+)(?: against (?P<against>[a-z0-9-]+))?")
_LARGEST = re.compile("largest within of (.+)")
_WORD = re.compile(r"(?P<word>[a-z ]+?)(?: by (?P<low>[\d.]+) to (?P<high>[\d.]+))?")


class Answer(Strict):
    """One to three sentences, and the words on which they rest.

    Attributes:
        says: The sentences. References such as ``{sums/r4 against full:within}`` stand for numbers, see
            ``Sources.fill``.
        words: What has to be so for the sentences to be true: the word for each pair of arms (`ahead`, `behind`,
            `the same`, `not told apart`, with a size where they lean on one, as in `behind by 10 to 35`), and the
            verdict for each claim or part of one.
        claims: The ids of the claims to which a page links from it.
    """

    says: str
    words: dict[str, str] = Field({}, alias="while")
    claims: list[str] = []


class Question(Answer):
    """A part of the page of findings.

    Attributes:
        title: The question.
        table: A table in Markdown, with references.
        rests: The line on models, tasks and rates behind the answer.
        doubt: The folded paragraph: doubts, and the papers' view.
        studies: The experiments whose reports belong to it.
    """

    title: str
    table: str = ""
    rests: str
    doubt: str = ""
    studies: list[str] = []


class Answers(Strict):
    """The content of ``experiments/answers.yaml``.

    Attributes:
        picture: The title of the README's picture, with references.
        first: The answers of the README.
        questions: The questions of the page of findings.
        studies: The answers of studies, which lead their reports.
        cut: The studies that were planned and are not run for now, each with the reason.
    """

    picture: Answer
    first: list[Answer] = []
    questions: list[Question] = []
    studies: dict[str, Answer] = {}
    cut: dict[str, str] = {}

    def entries(self) -> Iterator[tuple[str, str, Answer]]:
        """Yields each answer with its place in the file and the study that its pairs are of, if they name none."""
        yield "picture", "", self.picture
        yield from ((f"first[{number}]", "", answer) for number, answer in enumerate(self.first))
        yield from ((f"questions: {question.title}", "", question) for question in self.questions)
        yield from ((f"studies: {name}", name, answer) for name, answer in self.studies.items())


def read_answers() -> Answers:
    """Returns the answers of ``experiments/answers.yaml``.

    Raises:
        InputError: The file has problems, names an experiment that is not known, or tells a number without its word.
    """
    path = shipped(ANSWERS_FILE)
    known = {"while"}.union(*(kind.model_fields for kind in (Answers, Question)))
    answers = validated(Answers, read_yaml(path), path, known)
    named = [(f"questions: {each.title}", name) for each in answers.questions for name in each.studies]
    named += [(place, name) for place in ("studies", "cut") for name in getattr(answers, place)]
    raise_any(
        Problem(f"{path}: {where}", f"no such experiment (got {name})", close_match(name, experiment_names()))
        for where, name in named
        if name not in experiment_names()
    )
    raise_any(
        problem for place, _, answer in answers.entries() for problem in _without_word(answer, f"{path}: {place}")
    )
    return answers


def _without_word(answer: Answer, where: str) -> Iterator[Problem]:
    """Yields a problem for each number of a pair that has no word, or whose word does not go with a bare size."""
    for match in _REFERENCE.finditer(answer.says):
        form, of = match["form"] or "", _LARGEST.fullmatch(match["what"])
        for name in re.split(", *", of[1]) if of else [match["what"]]:
            if _CLAIM.fullmatch(name) or form in _OF_ARM:
                continue
            if not (said := answer.words.get(name, "")):
                yield Problem(where, f"{match[0]} has no word", f"write `{name}: ...` under `while`")
            elif not of and form in BARE and not said.startswith((AHEAD, BEHIND)):
                yield Problem(where, f"{match[0]} is a size, and `{said}`", f"write {{{name}:within}}")


class Sources:
    """The numbers that answers refer to: published studies, those given, and the findings on claims.

    Args:
        findings: The findings on claims.
        given: A study that is read from elsewhere than the published files.
    """

    def __init__(self, findings: Sequence[dict[str, Any]] = (), given: StudyResults | None = None) -> None:
        self._findings = {finding["id"]: finding for finding in findings}
        self._studies = {given.name: given} if given else {}
        self._rows: dict[str, dict[tuple[str, str], dict[Any, Any]]] = {}

    def fill(self, text: str, home: str = "") -> str:
        """Returns a text with a number in place of each reference, for Markdown or for people.

        ``{STUDY/ARM against OTHER}`` is the size of a difference in % of the task gain, without its sign. Without
        ``OTHER`` it is against the study's reference, and without ``STUDY`` it is of ``home``. After a colon a form may
        follow: ``about`` (whole %), ``interval``, ``within``, ``points``, ``cell`` (for a table: signed, marked by its
        word). ``rate`` is the best learning rate of an arm, ``forgets`` how much less of English prose is forgotten one
        rate below it, and ``costs`` the loss of that on the task. ``{largest within of A, B}`` is the largest bound of
        several pairs. ``{P15.2}`` is the number of the second part that decides a claim; ``{P15}`` of its only one.

        Raises:
            InputError: A reference names nothing that has a number.
        """
        return _REFERENCE.sub(lambda match: self._filled(match["what"], match["form"] or "", home), text)

    def word(self, name: str, home: str = "") -> tuple[str, float | None]:
        """Returns the word for a pair of arms with the size of its difference in %, or the verdict on a claim or part.

        Raises:
            InputError: There is no such pair or claim.
        """
        if claim := _CLAIM.fullmatch(name):
            found = self._part(claim) if claim["part"] else self._finding(claim["id"])
            return str(found["verdict"]), None
        row = self._row(name, home)
        return word_of(row), abs(row["percent"])

    def _study(self, name: str) -> StudyResults:
        if name not in self._studies:
            self._studies[name] = StudyResults(name, is_published=True)
        return self._studies[name]

    def _filled(self, what: str, form: str, home: str) -> str:
        if of := _LARGEST.fullmatch(what):
            bounds = [self._row(name.strip(), home)["bound_percent"] for name in of[1].split(",")]
            return f"{spoken_bound(max(bounds))} %"
        if claim := _CLAIM.fullmatch(what):
            if form not in BARE:
                raise _refused(what, f"no such form of a claim (got {form})", "leave it out, or write about")
            part = self._part(claim)
            size = abs(scale_of(part["unit"]) * part["found"])
            number = spoken_number(round(size) if form == "about" else size)
            return f"{number} %" if scale_of(part["unit"]) == 100 else number
        if form in _OF_ARM:
            study, pair = self._pair(what, home)
            return _OF_ARM[form](study, pair[0])
        if form not in _OF_PAIR:
            raise _refused(what, f"no such form (got {form})", close_match(form, [*_OF_PAIR, *_OF_ARM]))
        return _OF_PAIR[form](self._row(what, home))

    def _finding(self, claim: str) -> dict[str, Any]:
        if claim not in self._findings:
            raise _refused(claim, "no such claim", close_match(claim, self._findings))
        return self._findings[claim]

    def _part(self, claim: re.Match[str]) -> dict[str, Any]:
        parts = [part for part in deciding(self._finding(claim["id"])) if part["found"] is not None]
        if claim["part"] is None and len(parts) != 1:
            raise _refused(claim[0], f"has {len(parts)} numbers", f"write {claim[0]}.1 for the first")
        if (number := int(claim["part"] or 1)) > len(parts):
            raise _refused(claim[0], f"has no part {number}, but {len(parts)}")
        return parts[number - 1]

    def _pair(self, name: str, home: str) -> tuple[StudyResults, tuple[str, str]]:
        match = _PAIR.fullmatch(name)
        if not match or not (match["study"] or home):
            raise _refused(name, "is no pair of arms", "write STUDY/ARM or STUDY/ARM against OTHER")
        study = self._study(match["study"] or home)
        return study, (match["arm"], match["against"] or study.reference)

    def _row(self, name: str, home: str) -> dict[Any, Any]:
        study, pair = self._pair(name, home)
        rows = self._table(study)
        if pair not in rows:
            raise _refused(name, f"`{study.name}` does not compare these", close_match(pair[0], study.arms))
        return rows[pair]

    def _table(self, study: StudyResults) -> dict[tuple[str, str], dict[Any, Any]]:
        if study.name not in self._rows:
            rows = contrasts(study).to_dict("records")
            self._rows[study.name] = {(row["arm"], row["against"]): row for row in rows}
        return self._rows[study.name]


def stale(sources: Sources, wanted: Callable[[str, str], bool] = lambda place, name: True) -> list[Problem]:
    """Returns a problem for each word of an answer that results no longer agree with.

    Args:
        sources: Where the numbers are.
        wanted: Returns whether to check an answer at a place of the file against a pair or a claim.
    """
    problems = []
    for place, home, answer in read_answers().entries():
        for name, said in answer.words.items():
            if not wanted(place, name if "/" in name or _CLAIM.fullmatch(name) else f"{home}/{name}"):
                continue
            where = f"{ANSWERS_FILE}: {place}: while: {name}"
            word, size = sources.word(name, home)
            asked = _WORD.fullmatch(said)
            if not asked or asked["word"] != word:
                problems.append(Problem(where, f"says `{said}`, and it is `{word}`", "mend the answer"))
            elif asked["low"] and not float(asked["low"]) <= (size or 0.0) <= float(asked["high"]):
                problems.append(Problem(where, f"says `{said}`, and it is {size:.1f} %", "mend the answer"))
    return problems


def answer_of(study: StudyResults, table: pd.DataFrame, counted: str) -> str:
    """Returns the answer of a study's report: the typed one, why that is out of date, or else a counted line."""
    answer = read_answers().studies.get(study.name)
    if answer is None or table.empty:
        return counted
    sources = Sources(given=study)
    place = f"studies: {study.name}"
    if found := stale(sources, lambda at, name: at == place):
        return "; ".join(map(str, found))
    return sources.fill(answer.says, study.name)


def headline(study: StudyResults, table: pd.DataFrame) -> str:
    """Returns the first sentence of the typed answer of a study; empty without one, or if it is out of date."""
    place = f"studies: {study.name}"
    if table.empty or study.name not in (typed := read_answers().studies):
        return ""
    sources = Sources(given=study)
    if stale(sources, lambda at, name: at == place):
        return ""
    return sources.fill(typed[study.name].says, study.name).partition(". ")[0].rstrip(".:")


def check_answers_on(study: StudyResults) -> None:
    """Raises InputError if an answer no longer agrees with a study."""
    raise_any(stale(Sources(given=study), lambda _, name: name.startswith(f"{study.name}/")))


def _refused(name: str, message: str, remedy: str = "") -> InputError:
    return InputError(Problem(f"{ANSWERS_FILE}: {{{name}}}", message, remedy))


def _cell(row: dict[Any, Any]) -> str:
    outcome = Outcome(row["outcome"])
    said = in_brackets(row, "percent", ".1f")
    return f"{said} same" if outcome == Outcome.SAME else said if outcome == Outcome.OPEN else f"**{said}**"


def _interval(row: dict[Any, Any]) -> str:
    ends = sorted((row["percent_low"], row["percent_high"]), key=abs)
    if ends[0] * ends[1] < 0:
        return in_brackets(row, "percent", ".1f").replace(" [", " % [")
    return f"{abs(row['percent']):.1f} % [{abs(ends[0]):.1f}, {abs(ends[1]):.1f}]"


def _around_best(study: StudyResults, arm: str) -> list[pd.DataFrame]:
    """Returns the runs of an arm at the rate below the best one, and at the best."""
    best, rates = study.rate(arm).best, sorted(study.rate(arm).losses)
    if (place := rates.index(best)) == 0:
        raise _refused(f"{study.name}/{arm}", "ran at no rate below its best")
    runs = study.rate_runs(arm)
    return [runs[runs["learning_rate"] == rate] for rate in (rates[place - 1], best)]


def _forgets(study: StudyResults, arm: str) -> str:
    below, best = ((r[RETENTION] - r[f"{RETENTION}_before"]).mean() for r in _around_best(study, arm))
    return f"{100 * (1 - below / best):.0f} %"


def _costs(study: StudyResults, arm: str) -> str:
    below, best = (study.rate(arm).losses[r["learning_rate"].iloc[0]] for r in _around_best(study, arm))
    return f"{signed(100 * (below - best) / study.yardstick, '.1f')} %"


_OF_PAIR: dict[str, Callable[[dict[Any, Any]], str]] = {
    "": lambda row: f"{abs(row['percent']):.1f} %",
    "about": lambda row: f"{abs(row['percent']):.0f} %",
    "interval": _interval,
    "within": lambda row: f"{spoken_bound(row['bound_percent'])} %",
    "points": lambda row: signed(row["accuracy"], ".1f"),
    "cell": _cell,
}
_OF_ARM: dict[str, Callable[[StudyResults, str], str]] = {
    "rate": lambda study, arm: f"{study.rate(arm).best:.1e}".replace("e-0", "e-"),
    "forgets": _forgets,
    "costs": _costs,
}

"""Errors for people: what is wrong, where, and what to do. Shown without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that a person has to mend.

    Attributes:
        where: File and field, for example ``experiments/quick.yaml: axes.rank[1]``.
        message: What is wrong, with the value.
        remedy: What to do about it.
    """

    where: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        tail = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.where}: {self.message}{tail}"


class InputError(Exception):
    """Bad input. Carries every problem that was found, not only the first."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        found = [problems] if isinstance(problems, Problem) else list(problems)
        self.problems = list(dict.fromkeys(found))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def close_match(word: str, known: Iterable[str]) -> str:
    """Returns "did you mean ...?" for a misspelt word, or the list of known words.

    >>> close_match("rnak", ["rank", "alpha"])
    'did you mean `rank`?'
    >>> close_match("zzz", ["rank", "alpha"])
    'known: alpha, rank'
    """
    names = sorted(known)
    matches = difflib.get_close_matches(word, names, n=1)
    return f"did you mean `{matches[0]}`?" if matches else f"known: {', '.join(names)}"

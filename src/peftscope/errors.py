"""Errors for people: what is wrong, where, and what to do. Shown without a traceback."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_PART = 1000
"""The most characters of a message's place, text or remedy, because people may write texts of any length."""

OPTIONAL = frozenset(
    (
        *("accelerate", "bitsandbytes", "datasets", "filelock", "gguf", "huggingface_hub", "jinja2"),
        *("lm_eval", "markupsafe", "matplotlib", "numpy", "pandas", "peft", "psutil", "pyarrow", "pynvml"),
        *("reasoning_gym", "safetensors", "scipy", "seaborn", "snakemake", "tokenizers", "torch"),
        *("tqdm", "transformers"),
    )
)
"""The packages that only some commands import, and that the extras of pyproject.toml install."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 12


def shown(value: Any) -> str:
    """Returns a value as Python code, shortened if it is long or deep.

    >>> shown("q_prj"), shown(list(range(100)))
    ("'q_prj'", '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...]')
    """
    return _REPR.repr(value)


def printable(text: str) -> str:
    r"""Returns text that is safe in a terminal: control characters and halves of surrogate pairs become escapes.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    short = text if len(text) <= LONGEST_PART else f"{text[:LONGEST_PART]}..."
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in short)


@dataclass(frozen=True)
class Problem:
    """One thing that a person has to fix.

    Attributes:
        where: File and field, for example ``experiments/quick.yaml: axes.rank[1]``.
        message: What is wrong, with the value.
        remedy: What to do about it.
    """

    where: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        tail = f" -> {printable(self.remedy)}" if self.remedy else ""
        return f"{printable(self.where)}: {printable(self.message)}{tail}"


class InputError(Exception):
    """Bad input. It holds all problems, not only the first one."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        found = [problems] if isinstance(problems, Problem) else list(problems)
        self.problems = list(dict.fromkeys(found))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def raise_any(problems: Iterable[Problem]) -> None:
    """Raises InputError with all problems, if there are any."""
    if found := list(problems):
        raise InputError(found)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turns the lack of an optional package into an error for people; a context, and a decorator of functions.

    Raises:
        InputError: The context imported a package that is not installed. The error names ``extra``, which has it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        raise InputError(Problem(str(error.name), "needed here, and not installed", how_to_install(extra))) from None


def how_to_install(extra: str) -> str:
    """Returns the command that installs an extra: of the clone that this package runs from, if it does."""
    clone = Path(__file__).parents[2]
    is_clone = (clone / "pyproject.toml").is_file()
    return f"pip install '{('.' if Path.cwd() == clone else clone) if is_clone else 'peftscope'}[{extra}]'"


def close_match(word: str, known: Iterable[str]) -> str:
    """Returns "did you mean ...?" if a known word is close, otherwise the list of known words, and nothing of none.

    >>> close_match("rnak", ["rank", "alpha"])
    'did you mean `rank`?'
    >>> close_match("zzz", ["rank", "alpha"])
    'known: alpha, rank'
    """
    names = sorted(set(known))
    if match := closest(word, names):
        return f"did you mean `{match}`?"
    return f"known: {', '.join(names)}" if names else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word that is most like this one, or None if none is close."""
    return next(iter(difflib.get_close_matches(word[:LONGEST_PART], sorted(set(known)), n=1)), None)

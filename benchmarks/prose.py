"""Refuses prose with too many numbers: ``python -m benchmarks.prose``, which ``make lint`` runs.

Numbers stand in tables and pictures. A sentence has two at most and a paragraph five; an interval counts as one. Digits
in code, tables, headings, links, texts of pictures and names (P15, SmolLM2-135M, bf16, 8B) do not count.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from peftscope.report.answers import read_answers

MOST_A_SENTENCE, MOST_A_PARAGRAPH = 2, 5
METHOD = (Path("docs", f"{name}.md") for name in ("rests-on", "studies", "worlds", "error-rates", "method-history"))
PAGES = (Path("README.md"), Path("reports/published/findings.md"), *METHOD)
_LEFT_OUT = re.compile(
    r"^```.*?^```$|^[|#].*?$|!\[.*?\]\(.*?\)|(?<=\])\(.*?\)|`[^`]*`|<[^>]*>", re.MULTILINE | re.DOTALL
)
_INTERVAL = re.compile(r"\[[+−-]?[\d.,]+, [+−-]?[\d.,]+\]")
_NUMBER = re.compile(r"(?<![\w.-])[+−-]?\d+(?:[.,]\d+)*(?:e-?\d+)?(?![\w-])")
_PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\s*- )")
_SENTENCE = re.compile(r"(?<=[.!?])[*”)]*\s+(?=[^a-z\s])")


def numbers(text: str) -> int:
    """Returns how many numbers a text tells.

    >>> numbers("SmolLM2-135M has 135 million parameters, and P15 says 7.8 % [6.0, 9.7] at 5.2e-3.")
    4
    """
    return len(_NUMBER.findall(_INTERVAL.sub(" 1 ", text)))


def crowded(page: str) -> Iterator[str]:
    """Yields what is wrong with each sentence or paragraph of a page in Markdown that has too many numbers.

    >>> list(crowded("One, 1, 2 and 3.\\n\\n| 1 | 2 | 3 |"))
    ['3 numbers in a sentence: One, 1, 2 and 3.']
    """
    for paragraph in _PARAGRAPH.split(_LEFT_OUT.sub(" ", page)):
        if (count := numbers(paragraph)) > MOST_A_PARAGRAPH:
            yield f"{count} numbers in a paragraph: {' '.join(paragraph.split())[:120]}"
        for sentence in _SENTENCE.split(paragraph):
            if (count := numbers(sentence)) > MOST_A_SENTENCE:
                yield f"{count} numbers in a sentence: {' '.join(sentence.split())[:120]}"


def leads() -> Iterator[tuple[Path, str]]:
    """Yields the answer of each published report that has an answer of its own, as Markdown."""
    for study in read_answers().studies:
        page = Path("reports/published", study, "report.html")
        found = re.findall(r'<p class="lead" id="answer">(.*?)</p>', page.read_text(), re.DOTALL)
        yield page, "\n\n".join(map(unescape, found))


def main() -> int:
    """Prints what is crowded, and returns 1 if anything is."""
    texts = [*((page, page.read_text()) for page in PAGES), *leads()]
    found = [f"{page}: {said}" for page, text in texts for said in crowded(text)]
    print("\n".join(found) or "No sentence and no paragraph has too many numbers.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())

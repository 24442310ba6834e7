"""Says what was found of a claim, in words. Needs no more than the light install."""

from __future__ import annotations

import re
from typing import Any

from peftscope.claims.verdict import Verdict
from peftscope.words import scale_of, spoken_number, spoken_quantity

MOST_WORDS = 5
"""The most words of a scope in the one sentence on a claim."""


def spoken_finding(finding: dict[str, Any]) -> str:
    """Returns what was measured of a claim's deciding parts, or of one part, as an answer to what is claimed."""
    if "parts" in finding:
        found = [spoken_finding(part) for part in deciding(finding) if part["found"] is not None]
        return "; ".join(dict.fromkeys(found)) or "-"
    if finding["found"] is None:
        return "-"
    return finding["answer"] + spread(finding) if finding.get("answer") else measured(finding)


def measured(part: dict[str, Any]) -> str:
    """Returns the value of a part that was measured, with its unit and interval, and of which of several it is."""
    if part["found"] is None:
        return "-"
    shown = part["evidence"].get("shown")
    return (f"{shown}: " if shown else "") + spoken_quantity(part["found"], part["unit"]) + spread(part)


def spread(part: dict[str, Any]) -> str:
    """Returns a part's interval in brackets, in the scale of its value; empty without one.

    Where the answer says that one is ahead of another or behind, the ends say so too.

    >>> spread({"low": -0.02, "high": 0.05, "unit": "of the task gain", "answer": "PiSSA is 3 % behind LoRA"})
    ' (2 behind to 5 ahead)'
    """
    if part["low"] is None:
        return ""
    ends = [scale_of(part["unit"]) * part[end] for end in ("low", "high")]
    low, high = map(spoken_number, ends)
    if re.search(r" (ahead of|behind)( |$)", part.get("answer", "")):
        low, high = (f"{spoken_number(abs(end))} {'ahead' if end > 0 else 'behind'}" for end in ends)
    return f" ({low} to {high})"


def key_part(finding: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the part with the number that matters: a measured one with the claim's verdict, or that fails, if possible a training."""
    wanted = Verdict.WRONG if finding["verdict"] == Verdict.IN_PART else finding["verdict"]
    parts = sorted(deciding(finding), key=lambda part: (part["verdict"] != wanted, part["kind"] != "training"))
    return next((part for part in parts if part["found"] is not None), None)


def short_scope(scope: str) -> str:
    """Returns the first words of a scope, up to the comma or semicolon that leaves at most ``MOST_WORDS``.

    >>> short_scope("SmolLM2-135M, two-digit sums, rank 8, AdamW, 160 steps"), short_scope("arithmetic")
    ('SmolLM2-135M, two-digit sums', 'arithmetic')
    """
    pieces = re.split(r"(?<=[,;]) ", scope)
    ends = [n for n in range(1, len(pieces) + 1) if len(" ".join(pieces[:n]).split()) <= MOST_WORDS]
    return " ".join(pieces[: max(ends, default=1)]).rstrip(",;")


def spoken_verdict(finding: dict[str, Any]) -> str:
    """Returns a claim's verdict, with the number of its worlds if the claim speaks of models and tasks at large.

    >>> spoken_verdict({"verdict": "holds", "worlds": ["smollm2-135m, two-digit-sums"]})
    'holds here (1 world)'
    """
    worlds = len(finding["worlds"])
    return finding["verdict"] + ("" if not worlds else " here (1 world)" if worlds == 1 else f" ({worlds} worlds)")


def spoken_moves(finding: dict[str, Any]) -> str:
    """Returns a sentence for each change of the rule that moved the verdict after its result was seen; or nothing."""
    return " ".join(
        f"Until {move['date']} it was “{move['from']}”, by a rule that was changed after its result was seen."
        for move in finding["moved"]
    )


def told(finding: dict[str, Any], statement: str) -> list[str]:
    """Returns a claim in lines: what it says, its verdict, every number that decides, its scope, how it is known."""
    numbers = [spoken_finding(part) for part in deciding(finding)]
    about = [finding["scope"], finding["known"], spoken_moves(finding)]
    return [statement, f"{spoken_verdict(finding)}:", *dict.fromkeys(numbers), *filter(None, about)]


def deciding(finding: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the parts of a finding that decide."""
    return [part for part in finding["parts"] if part["role"] != "beside"]

"""Says what was found of a claim, in words. Needs no more than the light install."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peftscope.analysis.compare import MARGIN
from peftscope.claims.measurement import POINTS, TOKENS, WITHIN
from peftscope.claims.verdict import OF_SIZE, UNDECIDED, Verdict
from peftscope.words import grouped, listed, scale_of, spoken_bound, spoken_number, spoken_quantity

NAMES = {
    "smollm2-135m": "SmolLM2-135M",
    "gemma-3-270m": "Gemma-3-270M",
    "llama-2-7b": "Llama-2-7B",
    "toy": "a toy model",
    "two-digit-sums": "two-digit sums",
}
"""Models and tasks as prose writes them, where the catalogues name them otherwise. The first is the base of studies."""
MOST_WORDS = 5
"""The most words of a scope in the one sentence on a claim."""

GAIN = "of the task gain"
"""The unit of leads, of which a page says once that it is meant."""
_SAME = "no difference"
"""The word for a claim, or its part in a world, that says of two who are the same that they differ."""
_SIDES = re.compile(" (ahead of|behind)( |$)")
"""An answer that says who is ahead, and so is followed by the margin."""


def spoken_finding(finding: dict[str, Any]) -> str:
    """Returns what was measured of a claim's deciding parts, or of one part, with what stands beside it.

    If a claim's numbers are of several models, each is told with its scope (``own_scope``).

    >>> part = {"found": -0.02, "low": -0.05, "high": 0.01, "unit": GAIN, "answer": "A ends 2 % behind B"}
    >>> spoken_finding(part | {"evidence": {WITHIN: 0.04, POINTS: "+3.0 [+1.0, +5.0]"}, "matters": 0.025})
    'A ends 2 % behind B [−1, 5], within 4.0 %, +3.0 [+1.0, +5.0] points of exact match'
    """
    if "parts" in finding:
        told = []
        for part in deciding(finding):
            if part["found"] is not None:
                scope = own_scope(part, finding)
                told.append(spoken_finding(part) + asked(part) + f" ({scope})" * bool(scope))
        return "; ".join(dict.fromkeys(told)) or "-"
    return ", ".join([key_number(finding), *_beside(finding)])


def key_number(part: dict[str, Any]) -> str:
    """Returns the answer that a part gives in one number with its interval; "-" if it was not measured.

    >>> part = {"found": -0.02, "low": -0.05, "high": 0.01, "unit": GAIN}
    >>> key_number(part | {"answer": "A ends 2 % behind B"}), key_number(part | {"evidence": {}})
    ('A ends 2 % behind B [−1, 5]', '−2 % of the task gain [−5, 1]')
    """
    if part["found"] is None:
        return "-"
    where = on_world(part["model"]) if part.get("elsewhere") else ""
    if not (answer := part.get("answer")):
        return measured(part) + where
    where *= where.partition(" with ")[0].strip() not in answer
    return answer + where + spread(part, is_lag=bool(_SIDES.search(answer)) and part["found"] < 0)


def beside(part: dict[str, Any]) -> str:
    """Returns what ``key_number`` leaves out: the bound of a difference with its points, or the threshold."""
    return ", ".join(filter(None, [*_beside(part), asked(part).removeprefix(", ")]))


def _beside(part: dict[str, Any]) -> list[str]:
    if part["found"] is None or not _SIDES.search(part.get("answer") or ""):
        return []
    told, unit = [], part["unit"]
    if bound := part["evidence"].get(WITHIN):
        told.append(f"within {spoken_bound(scale_of(unit) * bound)}" + " %" * (unit == GAIN))
        margin = max((abs(a) for a in part.get("judged", {}).values() if not isinstance(a, str)), default=0)
        told += [f"margin {spoken_number(scale_of(unit) * margin)}"] * (margin not in (0, MARGIN))
        told += ["at one rate each"] * (not part.get("matters"))
    return told + [f"{points} {of}" for of in (POINTS, TOKENS) if (points := part["evidence"].get(of))]


def asked(part: dict[str, Any]) -> str:
    """Returns what counts as right for a number that training gave; empty if that is to be ahead, or is told already.

    >>> part = {"kind": "training", "judged": {"at_least": 2.0}, "rule": "at least 2 ×"}
    >>> asked(part), asked(part | {"judged": {"better_by": 0.0}}), asked(part | {"answer": "it ends 3 % behind LoRA"})
    (', asked: at least 2 ×', '', '')
    """
    is_told = _SIDES.search(part.get("answer") or "") or part.get("kind") != "training"
    return "" if is_told or not part.get("judged", {}).keys() - {"better_by"} else f", asked: {part['rule']}"


def own_scope(part: dict[str, Any], finding: dict[str, Any]) -> str:
    """Returns a part's short scope, if its claim's numbers are of several models, one of them trained; else nothing.

    A part that asks another world the same has the world's name with its value, and so no scope either.
    """
    parts = [one for one in deciding(finding) if one["found"] is not None and not one.get("elsewhere")]
    if part.get("elsewhere") or len({one["model"] for one in parts}) < 2:
        return ""
    is_trained = any(one["kind"] == "training" for one in parts)
    return short_scope(part["scope"] or spoken_worlds([part["model"]])) if is_trained else ""


def measured(part: dict[str, Any]) -> str:
    """Returns the value of a part that was measured, with its unit and interval, and of which of several it is."""
    if part["found"] is None:
        return "-"
    shown = part["evidence"].get("shown")
    return (f"{shown}: " if shown else "") + spoken_quantity(part["found"], part["unit"]) + spread(part)


def spread(part: dict[str, Any], is_lag: bool = False) -> str:
    """Returns a part's interval in brackets, in the scale of its value, with its sign turned for a lag; or nothing."""
    if part["low"] is None:
        return ""
    low, high = (scale_of(part["unit"]) * part[end] for end in ("low", "high"))
    return f" [{spoken_number(-high if is_lag else low)}, {spoken_number(-low if is_lag else high)}]"


def key_part(finding: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the part with the number that matters: a measured one that gives the verdict, if possible a training."""
    wanted = Verdict.WRONG if finding["verdict"] == Verdict.IN_PART else finding["verdict"]
    parts = sorted(deciding(finding), key=lambda part: (part["verdict"] != wanted, part["kind"] != "training"))
    return next((part for part in parts if part["found"] is not None), None)


def short_scope(scope: str) -> str:
    """Returns the first words of a scope, up to a semicolon or the comma that leaves at most ``MOST_WORDS``.

    >>> short_scope("SmolLM2-135M, two-digit sums, rank 8, AdamW, 160 steps"), short_scope("sums; LoRA, DoRA and PiSSA")
    ('SmolLM2-135M, two-digit sums, rank 8', 'sums')
    """
    pieces = re.split(r"(?<=,) ", scope.partition(";")[0])
    ends = [n for n in range(1, len(pieces) + 1) if len(" ".join(pieces[:n]).split()) <= MOST_WORDS]
    return " ".join(pieces[: max(ends, default=1)]).rstrip(",")


def spoken_scope(finding: dict[str, Any], short: bool = False) -> str:
    """Returns for what a verdict holds, or the first words of that; several worlds are told as such.

    >>> finding = {"scope": "m-1, sums, α = 16, AdamW", "in_worlds": {"m-1, sums": "holds", "m-1, words": "open"}}
    >>> spoken_scope(finding), spoken_scope(finding, short=True)
    ('m-1 on sums and words, α = 16, AdamW', 'm-1 on sums and words, α = 16')
    """
    if not (judged := judged_in(finding)):
        return short_scope(finding["scope"]) if short else str(finding["scope"])
    named = "|".join(spoken_worlds([world]).replace(" on ", "(?:,| on) ") for world in judged)
    worlds = spoken_worlds(judged)
    said, found = re.subn(named, worlds, finding["scope"], count=1)
    if not found:
        return worlds if short else f"{worlds}; {said}"
    first = re.match(", .*?(?=[,;] |$)", said.partition(worlds)[2])
    return (worlds + first[0] if first else worlds) if short else said


def judged_in(finding: dict[str, Any]) -> dict[str, str]:
    """Returns the verdicts on a claim by world, that of its own study first; empty if it was not judged in several."""
    away = {part["model"] for part in finding.get("parts", ()) if part.get("elsewhere")}
    return dict(sorted(finding.get("in_worlds", {}).items(), key=lambda judged: judged[0] in away))


def decided(finding: dict[str, Any]) -> dict[str, str]:
    """Returns the verdicts on a claim in the worlds in which it was decided, if it was judged in several."""
    return {world: said for world, said in judged_in(finding).items() if said not in UNDECIDED}


def disagree(finding: dict[str, Any]) -> bool:
    """Returns whether the worlds that decided a claim differ: in its verdict, or in which of its parts hold.

    >>> part = {"role": "assertion", "measures": "x", "model": "m, x", "verdict": "holds"}
    >>> found = {"in_worlds": {"m, x": "holds in part", "m, y": "holds in part"}, "parts": [part]}
    >>> disagree(found), disagree({**found, "parts": [part, {**part, "model": "m, y", "verdict": "wrong"}]})
    (False, True)
    """
    worlds = decided(finding)
    parts = grouped((part["measures"], part["verdict"]) for part in deciding(finding) if part["model"] in worlds)
    return len({*worlds.values()}) > 1 or any({Verdict.HOLDS, Verdict.WRONG} <= {*said} for said in parts.values())


def spoken_verdict(finding: dict[str, Any]) -> str:
    """Returns a claim's verdict, with its worlds if the claim speaks of models and tasks at large.

    A part of a wrong claim that is undecided is told too.

    >>> spoken_verdict({"verdict": "holds", "worlds": ["smollm2-135m, two-digit-sums"]})
    'holds here (1 world)'
    >>> spoken_verdict({"verdict": "holds in part", "worlds": [], "in_worlds": {"m, x": "holds", "m, y": "wrong"}})
    'depends on the task: holds on x with m; wrong on y with m'
    >>> spoken_verdict({"verdict": "holds", "worlds": [], "in_worlds": {"m, x": "holds", "m, y": "open"}})
    'holds in 1 of 2 worlds, open in 1'
    >>> size = {"role": "assertion", "verdict": "wrong", "model": "m, x", "reason": "no difference that matters"}
    >>> size["measures"] = "loss"
    >>> said = {"m, x": "wrong", "m, y": "open"}
    >>> spoken_verdict({"verdict": "wrong", "worlds": [], "in_worlds": said, "parts": [size]})
    'no difference in 1 of 2 worlds, open in 1'
    """
    worlds, judged = len(finding["worlds"]), judged_in(finding)
    if judged:
        where = grouped((word_of(finding, verdict, world), world) for world, verdict in judged.items())
        words = {word_of(finding, verdict, world): verdict for world, verdict in decided(finding).items()}
        if len(words) > 1:
            each = [word + listed(map(on_world, those), last=" and") for word, those in where.items()]
            return f"{_split(finding)}: " * (len({*words.values()}) > 1) + "; ".join(each) + _left(finding)
        if disagree(finding):
            return f"{_split(finding)}: another part holds in each of {len(judged)} worlds"
        mine = next(iter(words), finding["verdict"])
        first = f"{mine} in {len(where.pop(mine))} of {len(judged)} worlds{_left(finding)}"
        return ", ".join([first, *(f"{word} in {len(those)}" for word, those in where.items())])
    place = "" if not worlds else " here (1 world)" if worlds == 1 else f" ({worlds} worlds)"
    if finding["verdict"] == Verdict.NOT_RUN:
        place = in_full(finding)
    return word_of(finding, finding["verdict"]) + place + _left(finding)


def word_of(finding: dict[str, Any], verdict: str, world: str = "") -> str:
    """Returns the word for a verdict on a claim, in one world or in all, with the size of a difference that is small.

    A claim that one is better is wrong where two are the same, and “no difference” says so.

    >>> part = {"role": "assertion", "verdict": "wrong", "model": "m, x", "reason": "no difference that matters, ±2"}
    >>> word_of({"parts": [part]}, "wrong"), word_of({"parts": [part, {**part, "reason": ""}]}, "wrong")
    ('no difference', 'wrong')
    """
    parts = [part for part in deciding(finding) if part["verdict"] == verdict and world in ("", part["model"])]
    reasons = {part["reason"] for part in parts}
    if reasons and all(reason.startswith(OF_SIZE[1]) for reason in reasons):
        return _SAME
    return verdict + (f" ({reasons.pop()})" if len(reasons) == 1 and min(reasons).startswith(OF_SIZE[0]) else "")


def short_verdict(finding: dict[str, Any]) -> str:
    """Returns a claim's verdict in a word or two, or that it depends on the task or the model."""
    return _split(finding) if disagree(finding) else word_of(finding, finding["verdict"])


def _split(finding: dict[str, Any]) -> str:
    """Returns that a verdict depends on the task, on the model, or on both, by the worlds that decided it."""
    models, tasks = (set(names) for names in zip(*(world.split(", ", 1) for world in decided(finding)), strict=True))
    return "depends on " + " and ".join(["the model"] * (len(models) > 1) + ["the task"] * (len(tasks) > 1))


def left_open(finding: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the parts that a claim which is wrong without them leaves undecided, where it is wrong."""
    if finding["verdict"] != Verdict.WRONG:
        return []
    elsewhere = {world for world, said in judged_in(finding).items() if said != Verdict.WRONG}
    return [part for part in deciding(finding) if part["verdict"] in UNDECIDED and part["model"] not in elsewhere]


def _left(finding: dict[str, Any]) -> str:
    left = left_open(finding)
    return f"; a part is {left[0]['verdict']}" if left else ""


def in_full(finding: dict[str, Any]) -> str:
    """Returns what follows "not run" where a part of the claim was measured all the same."""
    was_measured = any(part["found"] is not None for part in deciding(finding))
    return " in full" * (finding["verdict"] == Verdict.NOT_RUN and was_measured)


def on_world(world: str) -> str:
    """Returns a world as it ends a phrase: its task, and its model if that is not the base of most studies.

    >>> on_world("smollm2-135m, two-digit-sums"), on_world("gemma-3-270m, pronunciation")
    (' on two-digit sums', ' on pronunciation with Gemma-3-270M')
    """
    model, _, task = (NAMES.get(name, name) for name in world.partition(", "))
    return f" on {task or model}" + f" with {model}" * bool(task and model != next(iter(NAMES.values())))


def spoken_worlds(worlds: Iterable[str]) -> str:
    """Returns worlds, each a model with a task, in words: the tasks of one model together.

    >>> spoken_worlds(["m-1, two-digit-sums", "m-1, pronunciation", "m-2, pronunciation"])
    'm-1 on two-digit sums and pronunciation, and m-2 on pronunciation'
    """
    tasks: dict[str, list[str]] = {}
    for world in worlds:
        model, _, task = (NAMES.get(name, name) for name in world.partition(", "))
        tasks.setdefault(model, []).extend([task] * bool(task))
    on = [f"{model} on {listed(names, last=' and ')}" if names else model for model, names in tasks.items()]
    return listed(on, last=", and ")


def spoken_moves(finding: dict[str, Any]) -> str:
    """Returns a sentence on what moved the verdict after its result was seen; or nothing."""
    before = ", ".join(f"“{move['from']}” until {move['date']}" for move in finding["moved"])
    return before and f"Its rule changed after the result: {before}."


def trained_in(finding: dict[str, Any]) -> set[str]:
    """Returns the worlds of the trainings that decide a claim."""
    return {part["model"] for part in deciding(finding) if part["kind"] == "training" and part["found"] is not None}


def spoken_known(finding: dict[str, Any]) -> str:
    """Returns how a claim is known, with its worlds if trainings in several decide it."""
    worlds, known = trained_in(finding), finding["known"]
    for world in worlds:
        known = known.replace(f" on {world}", on_world(world) if len(worlds) > 1 else "")
    ways = known.split("; ")
    known = "; ".join(way for way in ways if not any(other.startswith(f"{way},") for other in ways))
    return known.replace("; trained, ", "; ")


def told(finding: dict[str, Any], statement: str) -> list[str]:
    """Returns a claim in lines: what it says, its verdict, every number that decides, its scope, how it is known."""
    numbers = [spoken_finding(part) + asked(part) for part in deciding(finding)]
    about = [spoken_scope(finding), spoken_known(finding), spoken_moves(finding)]
    return [statement, f"{spoken_verdict(finding)}:", *dict.fromkeys(numbers), *filter(None, about)]


def deciding(finding: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the parts of a finding that decide."""
    return [part for part in finding.get("parts", ()) if part["role"] != "beside"]

"""Says what was found of a claim, in words. Needs no more than the light install."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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

_SIDES = re.compile(" (ahead of|behind)( |$)")
"""An answer that says who is ahead, and so is followed by the margin."""


def spoken_finding(finding: dict[str, Any], but: str = "") -> str:
    """Returns what was measured of a claim's deciding parts, or of one part, as an answer to what is claimed.

    If a claim's numbers are of several models, each is told with its scope (``own_scope``).

    Args:
        finding: The claim's finding, or a part of it.
        but: What is told of a part that is left out.
    """
    if "parts" in finding:
        told = []
        for part in deciding(finding):
            if part["found"] is not None and (said := spoken_finding(part)) != but:
                scope = own_scope(part, finding)
                told.append(said + asked(part) + f" [{scope}]" * bool(scope))
        return "; ".join(dict.fromkeys(told)) or "-"
    if finding["found"] is None:
        return "-"
    where = on_world(finding["model"]) if finding.get("elsewhere") else ""
    if not (answer := finding.get("answer")):
        return measured(finding) + where
    if not _SIDES.search(answer):
        return f"{answer}{where}" + spread(finding)
    more = "".join(f", {points} {of}" for of in (POINTS, TOKENS) if (points := finding["evidence"].get(of)))
    if WITHIN in finding["evidence"] and not finding.get("matters"):  # each ran at one rate
        more += " at these rates"
    return f"{answer}{where}" + spread(finding, sides=True) + more


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


def spread(part: dict[str, Any], sides: bool = False) -> str:
    """Returns a part's interval in brackets, in the scale of its value; empty without one.

    Args:
        part: The part.
        sides: Whether the ends are told as ahead and behind in place of their signs, with the bound of the difference,
            and with the margin that the claim is judged by, if it is not the usual one.

    >>> part = {"low": -0.02, "high": 0.05, "unit": "of the task gain", "evidence": {WITHIN: 0.04}}
    >>> spread(part), spread(part, sides=True), spread(part | {"high": -0.01}, sides=True)
    (' (−2 to 5)', ' (2 behind to 5 ahead, within 4.0)', ' (1 to 2 behind, within 4.0)')
    >>> spread(part | {"judged": {"same_within": 0.05}}, sides=True)
    ' (2 behind to 5 ahead, within 4.0, margin 5)'
    """
    if part["low"] is None:
        return ""
    ends = [scale_of(part["unit"]) * part[end] for end in ("low", "high")]
    low, high = map(spoken_number, ends)
    if sides:
        low, high = (spoken_number(abs(end)) for end in sorted(ends, key=abs if max(ends) <= 0 else float))
        high += " behind" if max(ends) <= 0 else " ahead"
        low += " behind" * (min(ends) < 0 < max(ends))
        if bound := part["evidence"].get(WITHIN):
            high += f", within {spoken_bound(scale_of(part['unit']) * bound)}"
            asked = max((abs(a) for a in part.get("judged", {}).values() if not isinstance(a, str)), default=0)
            if asked not in (0, MARGIN):
                high += f", margin {spoken_number(scale_of(part['unit']) * asked)}"
    return f" ({low} to {high})"


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

    That a difference is there and does not matter, or that none which matters is there, belongs to the verdict. So does
    that a part of a wrong claim is undecided.

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
    'wrong (no difference that matters) in 1 of 2 worlds, open in 1'
    """
    worlds, judged = len(finding["worlds"]), judged_in(finding)
    if judged:
        where = grouped((verdict, world) for world, verdict in judged.items())
        told = {verdict: verdict + _size_in(those, finding, verdict) for verdict, those in where.items()}
        if len({*decided(finding).values()}) > 1:
            each = [told[verdict] + listed(map(on_world, those), last=" and") for verdict, those in where.items()]
            return f"{_split(finding)}: {'; '.join(each)}"
        if disagree(finding):
            return f"{_split(finding)}: another part holds in each of {len(judged)} worlds"
        mine = f"{told[finding['verdict']]} in {len(where.pop(finding['verdict']))} of {len(judged)} worlds"
        mine += _left(finding)
        return ", ".join([mine, *(f"{verdict} in {len(those)}" for verdict, those in where.items())])
    place = "" if not worlds else " here (1 world)" if worlds == 1 else f" ({worlds} worlds)"
    if finding["verdict"] == Verdict.NOT_RUN:
        place = in_full(finding)
    reason = (key_part(finding) or {}).get("reason", "")
    is_told = finding["verdict"] in (Verdict.HOLDS, Verdict.WRONG) and reason.startswith(OF_SIZE)
    return finding["verdict"] + place + (f": {reason}" if is_told else "") + _left(finding)


def short_verdict(finding: dict[str, Any]) -> str:
    """Returns a claim's verdict in a word or two, or that it depends on the task or the model."""
    return _split(finding) if disagree(finding) else str(finding["verdict"])


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


def _size_in(worlds: Sequence[str], finding: dict[str, Any], verdict: str) -> str:
    """Returns in brackets what all parts that give a verdict in some worlds say of a difference's size, if they do."""
    parts = [part for part in deciding(finding) if part["verdict"] == verdict and part["model"] in worlds]
    reasons = {part["reason"] for part in parts}
    return f" ({parts[0]['reason']})" if len(reasons) == 1 and parts[0]["reason"].startswith(OF_SIZE) else ""


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

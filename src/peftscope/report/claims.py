"""Renders the claims page, which shows every claim with its verdict and evidence, as HTML and Markdown. No torch."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from markupsafe import Markup

from peftscope.claims.ledger import Claim
from peftscope.claims.verdict import UNDECIDED, Verdict
from peftscope.files.atomic import write_json
from peftscope.layout import CHAPTER_PAGE, CLAIMS_PAGE, CLAIMS_RESULTS
from peftscope.report.looks import MARKERS, SAFE_COLOURS
from peftscope.report.rendering import asset, write_page
from peftscope.report.spoken import (
    GAIN,
    NAMES,
    beside,
    deciding,
    judged_in,
    key_number,
    key_part,
    left_open,
    measured,
    on_world,
    own_scope,
    short_verdict,
    spoken_finding,
    spoken_known,
    spoken_moves,
    spoken_scope,
    spoken_verdict,
    spoken_worlds,
    trained_in,
    word_of,
)
from peftscope.report.svg import STYLE, in_page, interval, svg_of
from peftscope.report.tables import html, markdown, markdown_text
from peftscope.words import capitalised, grouped, listed, spoken_number

COLOURS = {
    Verdict.HOLDS: "#2a7f4f",
    Verdict.IN_PART: "#4a90b8",
    Verdict.WRONG: "#b03a2e",
    Verdict.OPEN: "#d8a520",
    Verdict.NOT_RUN: "#9aa0a6",
}
"""The colours of the verdicts, in the order of the summary bar."""

ROWS: dict[str, set[str]] = {
    "training": {"training"},
    "memory, speed": {"simulation", "gpu"},
    "arithmetic, libraries": set(),
}
"""How claims are known, in the order of a page, each with the kinds of its parts; the last has all others."""
CHAPTER = "Fine-tuning & Alignment, part 2: LoRA & QLoRA"
SOURCES = ("chapter", "papers")
NO_WORLD = "no training"
BASE = next(iter(NAMES.values()))
"""The model of most trainings, which lines on claims do not repeat."""

MEANINGS = {
    Verdict.HOLDS: "every part that decides holds, under every condition that was declared before",
    Verdict.IN_PART: "some of what the claim says holds and some fails; the entry says which",
    Verdict.WRONG: "every part that decides fails, or shows no difference that matters",
    Verdict.OPEN: "measured and not decided: an interval lies on both sides, or the entry says why it cannot decide",
    Verdict.NOT_RUN: "a part that decides was not measured; the entry says what it waits for",
}


def write_claims_page(claims: tuple[Claim, ...], findings: list[dict[str, Any]]) -> Path:
    """Writes ``claims.json``, renders ``claims.html`` and its Markdown copy, and returns the page's path."""
    write_json(CLAIMS_RESULTS, findings)
    by_id = {finding["id"]: finding for finding in findings}
    order = list(ROWS)
    entries = [_entry(claim, by_id[claim.id]) for claim in claims if claim.id in by_id]
    chapter = [entry for entry in entries if entry["source"] == SOURCES[0]]
    entries.sort(key=lambda entry: order.index(row_of(entry["finding"])))
    counts = {v: sum(finding["verdict"] == v for finding in findings) for v in COLOURS}
    topics = grouped((entry["claim"].section, entry) for entry in entries)

    def place(topic: str) -> float:
        return mean(order.index(row_of(entry["finding"])) for entry in topics[topic])

    content = {
        "topics": {topic: topics[topic] for topic in sorted(topics, key=place)},
        "sources": SOURCES,
        "kinds": sorted({part["kind"] for finding in findings for part in finding["parts"]}),
        "worlds": sorted(set().union(*(e["worlds"] for e in entries)), key=lambda name: (name == NO_WORLD, name)),
        "counts": {verdict: count for verdict, count in counts.items() if count},
        "total": len(findings),
        "base": BASE,
        "chapter": CHAPTER,
        "colours": COLOURS,
        "meanings": MEANINGS,
        "learned": [entry for entry in entries if entry["instead"] and entry["source"] == SOURCES[0]],
        "hardware": " and ".join(sorted({finding["hardware"] for finding in findings} - {""})) or "-",
        "spoken": partial(spoken_number, digits=4),
        "measured": measured,
        "spoken_verdict": spoken_verdict,
        "spoken_moves": spoken_moves,
        "spoken_worlds": spoken_worlds,
    }
    write_page(CLAIMS_PAGE.with_suffix(".md"), "claims.md.j2", **content)
    CHAPTER_PAGE.write_text(_chapter_page(chapter))
    style = asset("report.css") + asset("claims.css")
    return write_page(CLAIMS_PAGE, "claims.html.j2", **content, style=style, script=asset("claims.js"))


def _chapter_page(entries: list[dict[str, Any]]) -> str:
    """Returns the page of the chapter in its order: what is wrong with what holds instead, and in a line what holds."""
    verdicts = [entry["finding"]["verdict"] for entry in entries]
    counts = pd.DataFrame([{str(verdict): str(verdicts.count(verdict)) for verdict in COLOURS}])
    lines = [f"# The chapter, checked\n\nThe {len(entries)} statements of “{CHAPTER}”, in its order:\n"]
    lines += [markdown(counts).replace("|---|", "|---:|")]
    sections = grouped((entry["claim"].source.removeprefix("chapter: ").partition(" (")[0], entry) for entry in entries)
    for section, group in sections.items():
        lines.append(f"\n## {capitalised(section)}\n")
        for entry in group:
            claim, verdict = entry["claim"], capitalised(short_verdict(entry["finding"]))
            said = f"“{claim.sentence}”" if claim.sentence else f"{claim.statement} (Not in these words.)"
            instead = f" → {entry['instead'].strip() or entry['key']}" if entry["instead"] else ""
            lines.append(markdown_text(f"- **{verdict}** [{claim.id}](claims.md#{claim.id}) {said}{instead}"))
    return "\n".join(lines) + "\n"


def row_of(finding: dict[str, Any]) -> str:
    """Returns how a claim is known: the first of ``ROWS`` that has a kind of the parts that decide it."""
    kinds = {part["kind"] for part in deciding(finding)}
    return next(row for row, of_row in ROWS.items() if kinds & of_row or not of_row)


def _entry(claim: Claim, finding: dict[str, Any]) -> dict[str, Any]:
    """Returns what the page says of one claim."""
    verdict = Verdict(finding["verdict"])
    parts = sorted(finding["parts"], key=lambda part: part["role"] == "beside")
    open_parts = [part for part in deciding(finding) if part["verdict"] == Verdict.OPEN]
    key, judged = key_part(finding), judged_in(finding)
    short = (own_scope(key, finding) if key else "") or spoken_scope(finding, short=True)
    known, scope = "" if judged else spoken_known(finding), spoken_scope(finding)
    rest = scope.removeprefix(short).replace(spoken_worlds(judged) or scope, "").strip(",; ")
    left = left_open(finding)
    worlds = _by_world(finding)
    curves = [(f"{claim.id}-{number}", part) for number, part in enumerate(parts) if part["curves"]]
    return {
        "claim": claim,
        "finding": finding,
        "key": _brief({**key, "elsewhere": key["kind"] == "training"} if judged else key) if key else "-",
        "drawing": interval(key) if key else "",
        "short": short,
        "told_for": short.removeprefix(spoken_worlds(judged) or f"{BASE}, ").lstrip(", "),
        "scope": scope,
        "found": spoken_finding(finding) if not judged else "",
        "also": _also(key, finding) if key else "",
        "by_world": Markup(markdown(worlds).replace("---:", "---")) if judged else "",
        "table": Markup(html(worlds, f"{claim.id}-worlds")) if judged else "",
        "source": SOURCES[not claim.source.startswith(SOURCES[0])],
        "basis": capitalised("; ".join(filter(None, [known, rest]))) if known else rest and f"For {rest}",
        "worlds": {spoken_worlds([world]) for world in trained_in(finding)} or {NO_WORLD},
        "instead": (claim.correction or " ") if verdict in (Verdict.WRONG, Verdict.IN_PART) else "",
        "advice": claim.advice.get(verdict, ""),
        "left_open": listed(dict.fromkeys(part["measures"] for part in left), "; "),
        "to_decide": claim.to_decide if verdict in UNDECIDED or left else "",
        "parts": [(part, interval(part)) for part in parts],
        "drawn": [interval(part) for part in open_parts] if verdict == Verdict.OPEN else [],
        "figures": [(_figure(name, part), part["measures"] + _elsewhere(part)) for name, part in curves],
    }


def _brief(part: dict[str, Any]) -> str:
    """Returns a part's number where the page has said that leads are in per cent of the task gain."""
    return key_number(part).replace(f" {GAIN}", "")


def _also(key: dict[str, Any], finding: dict[str, Any]) -> str:
    """Returns what was found beside the key of a claim: its bound, points or threshold, and all of the other parts."""
    told = [beside(key)] if beside(key) else []
    for part in deciding(finding):
        if part is not key and part["found"] is not None:
            told.append(", ".join(filter(None, [_brief(part), own_scope(part, finding), beside(part)])))
    return capitalised("; ".join(dict.fromkeys(told))) if told else ""


def _by_world(finding: dict[str, Any]) -> pd.DataFrame:
    """Returns what was found of a claim: a row of text for each deciding part, with the world that it is of."""
    parts = [part for part in deciding(finding) if part["found"] is not None]
    rows = [
        {
            "world": on_world(part["model"]).removeprefix(" on ") or NO_WORLD,
            "verdict": word_of({"parts": [part]}, part["verdict"]),
            "found": _brief({**part, "elsewhere": False}),
            "beside": beside(part),
            "known": part["known"].removeprefix("trained, ").removesuffix(f" on {part['model']}"),
        }
        for part in parts
    ]
    return pd.DataFrame(rows)


def _elsewhere(part: dict[str, Any]) -> str:
    return on_world(part["model"]) if part.get("elsewhere") else ""


def _figure(name: str, part: dict[str, Any]) -> Markup:
    """Returns a small figure of a part's curves as SVG."""
    with sns.axes_style("whitegrid"), plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
        curves = zip(part["curves"].items(), cycle(SAFE_COLOURS), cycle(MARKERS), strict=False)
        for (label, curve), colour, marker in curves:
            x, y = zip(*sorted((float(x), y) for x, y in curve.items()), strict=True)
            axes.plot(x, y, marker=marker, markersize=4, color=colour, label=label)
        points = [float(x) for curve in part["curves"].values() for x in curve]
        if min(points) > 0 and max(points) / min(points) > 20:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel(part["axes"][0])
        axes.set_ylabel(part["axes"][1])
        if len(part["curves"]) > 1:
            axes.legend(fontsize="small")
        return in_page(svg_of(figure, name), f"{part['axes'][1]} over {part['axes'][0]}: {part['measures']}")

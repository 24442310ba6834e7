"""Renders the claims page, which shows every claim with its verdict and evidence, as HTML and Markdown. No torch."""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from peftscope.claims.ledger import Claim
from peftscope.claims.verdict import Verdict
from peftscope.files.atomic import write_json
from peftscope.layout import CLAIMS_PAGE, CLAIMS_RESULTS
from peftscope.report.tables import markdown_cell, markdown_text

COLOURS = {
    Verdict.EXACT: "#2a7f4f",
    Verdict.SUPPORTED: "#5fae7b",
    Verdict.EQUIVALENT: "#4a90b8",
    Verdict.EXACT_WRONG: "#b03a2e",
    Verdict.REFUTED: "#d9765f",
    Verdict.INCONCLUSIVE: "#d8a520",
    Verdict.NOT_RUN: "#9aa0a6",
    Verdict.NOT_TESTABLE_HERE: "#c4c8cc",
}
"""The colours of the verdicts, in the order of the summary bar."""

MEANINGS = {
    Verdict.EXACT: "a deterministic check found what is claimed",
    Verdict.SUPPORTED: "the whole interval lies where the claim says",
    Verdict.EQUIVALENT: "the two are the same within the margin of the rule",
    Verdict.EXACT_WRONG: "a deterministic check found something else",
    Verdict.REFUTED: "the whole interval lies elsewhere",
    Verdict.INCONCLUSIVE: "the measurement does not decide; the entry says what is missing",
    Verdict.NOT_RUN: "the runs that decide have not been made",
    Verdict.NOT_TESTABLE_HERE: "none of our machines can test it; the entry says why",
}


def write_claims_page(claims: tuple[Claim, ...], findings: list[dict[str, Any]]) -> Path:
    """Writes ``claims.json``, renders ``claims.html`` and its Markdown copy, and returns the page's path."""
    write_json(CLAIMS_RESULTS, findings)
    by_id = {finding["id"]: finding for finding in findings}
    entries: list[dict[str, Any]] = [
        {"claim": claim, "finding": by_id[claim.id]} for claim in claims if claim.id in by_id
    ]
    for entry in entries:
        entry["found"] = spoken_finding(entry["finding"])
        entry["figures"] = [_figure(part) for part in entry["finding"]["parts"] if part["curves"]]
    counts = {v: sum(finding["verdict"] == v for finding in findings) for v in COLOURS}
    content = {
        "entries": entries,
        "sections": list(dict.fromkeys(claim.section for claim in claims)),
        "kinds": sorted({part["kind"] for finding in findings for part in finding["parts"]}),
        "counts": {verdict: count for verdict, count in counts.items() if count},
        "total": len(findings),
        "colours": COLOURS,
        "meanings": MEANINGS,
        "wrong": [e for e in entries if e["finding"]["verdict"] in (Verdict.EXACT_WRONG, Verdict.REFUTED)],
        "hardware": next((finding["hardware"] for finding in findings if finding["hardware"]), "-"),
        "spoken": spoken_number,
        "spoken_finding": spoken_finding,
    }
    path = CLAIMS_PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "loader": PackageLoader("peftscope.report"),
        "undefined": StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
    }
    html = Environment(**options, autoescape=True).get_template("claims.html.j2")
    folder = files("peftscope.report").joinpath("templates")
    style = folder.joinpath("report.css").read_text() + folder.joinpath("claims.css").read_text()
    path.write_text(html.render(**content, style=style, script=folder.joinpath("claims.js").read_text()))
    markdown = Environment(**options, autoescape=False, finalize=lambda value: markdown_text(str(value)))
    markdown.filters["cell"] = markdown_cell
    path.with_suffix(".md").write_text(markdown.get_template("claims.md.j2").render(**content))
    return path


def spoken_number(value: Any) -> str:
    """Returns a measured quantity as text for people.

    >>> spoken_number(16777216), spoken_number(0.000123456), spoken_number(True), spoken_number(None)
    ('16,777,216', '0.0001235', 'yes', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def spoken_finding(finding: dict[str, Any]) -> str:
    """Returns the measured value of a claim or a part as text, with unit and interval."""
    if finding["found"] is None:
        return "-"
    text = f"{spoken_number(finding['found'])} {finding['unit']}".strip()
    if finding["low"] is not None:
        text += f" ({spoken_number(finding['low'])} to {spoken_number(finding['high'])})"
    return text


def _figure(part: dict[str, Any]) -> Markup:
    """Returns a small figure of a part's curves as SVG."""
    with sns.axes_style("whitegrid"), plt.rc_context({"svg.hashsalt": "claims", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(5.2, 2.9), layout="constrained")
        for name, curve in part["curves"].items():
            x, y = zip(*sorted((float(x), y) for x, y in curve.items()), strict=True)
            axes.plot(x, y, marker="o", markersize=3, label=name)
        points = [float(x) for curve in part["curves"].values() for x in curve]
        if min(points) > 0 and max(points) / min(points) > 20:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel(part["axes"][0])
        axes.set_ylabel(part["axes"][1])
        if len(part["curves"]) > 1:
            axes.legend(fontsize="small")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])

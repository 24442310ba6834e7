"""Renders the claims page, which shows every claim with its verdict and evidence, as HTML and Markdown. No torch.

Its sentences can be read without the libraries that draw.
"""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscope.claims.ledger import Claim
from peftscope.claims.measurement import spoken_number
from peftscope.claims.verdict import Verdict
from peftscope.files.atomic import write_json
from peftscope.layout import CLAIMS_PAGE, CLAIMS_RESULTS

if TYPE_CHECKING:
    from markupsafe import Markup

COLOURS = {
    Verdict.HOLDS: "#2a7f4f",
    Verdict.IN_PART: "#4a90b8",
    Verdict.WRONG: "#b03a2e",
    Verdict.OPEN: "#d8a520",
    Verdict.NOT_RUN: "#9aa0a6",
}
"""The colours of the verdicts, in the order of the summary bar."""

MEANINGS = {
    Verdict.HOLDS: "every part that decides holds, under every condition that was declared before",
    Verdict.IN_PART: "some of what the claim says holds and some fails; the entry says which",
    Verdict.WRONG: "every part that decides fails",
    Verdict.OPEN: "measured, and the interval lies on both sides; the entry says what would decide",
    Verdict.NOT_RUN: "what decides was not measured; the entry says what it waits for",
}


SAID = {Verdict.HOLDS: "holds", Verdict.WRONG: "fails", Verdict.OPEN: "is open", Verdict.NOT_RUN: "was not run"}
"""The verdict on one of several parts, as a verb."""


def write_claims_page(claims: tuple[Claim, ...], findings: list[dict[str, Any]]) -> Path:
    """Writes ``claims.json``, renders ``claims.html`` and its Markdown copy, and returns the page's path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from peftscope.report.tables import markdown_cell, markdown_text

    write_json(CLAIMS_RESULTS, findings)
    by_id = {finding["id"]: finding for finding in findings}
    entries: list[dict[str, Any]] = [
        {"claim": claim, "finding": by_id[claim.id]} for claim in claims if claim.id in by_id
    ]
    for entry in entries:
        entry["found"] = spoken_finding(entry["finding"])
        entry["sentence"] = sentence(entry["finding"])
        entry["parts"] = sorted(entry["finding"]["parts"], key=lambda part: part["role"] == "beside")
        entry["figures"] = [_figure(part) for part in entry["parts"] if part["curves"]]
    counts = {v: sum(finding["verdict"] == v for finding in findings) for v in COLOURS}
    content = {
        "entries": entries,
        "sections": list(dict.fromkeys(claim.section for claim in claims)),
        "kinds": sorted({part["kind"] for finding in findings for part in finding["parts"]}),
        "counts": {verdict: count for verdict, count in counts.items() if count},
        "total": len(findings),
        "colours": COLOURS,
        "meanings": MEANINGS,
        "wrong": [e for e in entries if e["finding"]["verdict"] in (Verdict.WRONG, Verdict.IN_PART)],
        "hardware": " and ".join(sorted({finding["hardware"] for finding in findings} - {""})) or "-",
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


def spoken_finding(finding: dict[str, Any]) -> str:
    """Returns what was measured of a claim's deciding parts, or of one part, with unit and interval."""
    if "parts" in finding:
        measured = [spoken_finding(part) for part in _deciding(finding) if part["found"] is not None]
        return "; ".join(dict.fromkeys(measured)) or "-"
    if finding["found"] is None:
        return "-"
    text = f"{spoken_number(finding['found'])} {finding['unit']}".strip()
    if finding["low"] is not None:
        text += f" ({spoken_number(finding['low'])} to {spoken_number(finding['high'])})"
    return text


def sentence(finding: dict[str, Any]) -> str:
    """Returns a claim's verdict as one sentence: every number that decides, how it is known, and its scope."""
    deciding = _deciding(finding)
    basis = "; ".join(filter(None, (finding["known"], finding["scope"])))
    clauses = "; ".join(_clause(part, alone=len(deciding) == 1) for part in deciding)
    return f"{finding['verdict'].capitalize()}: {clauses} ({basis})."


def _deciding(finding: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in finding["parts"] if part["role"] != "beside"]


def _clause(part: dict[str, Any], alone: bool) -> str:
    """Returns what one part found and what would have counted as right, or what it waits for."""
    narrower = part["scope"] and part["scope"] not in part["measures"]
    subject = part["measures"] + (f" ({part['scope']})" if narrower else "")
    if part["found"] is None:
        said = f"{subject}, {'not measured:' if part['check'] else 'which waits for'} {part['reason']}"
    else:
        said = f"{subject}, found {spoken_finding(part)}, where {part['rule']} counts as right"
        said += f", {part['reason']}" if part["reason"] else ""
    return said if alone else f"“{part['quotes']}” {SAID[Verdict(part['verdict'])]}: {said}"


def _figure(part: dict[str, Any]) -> Markup:
    """Returns a small figure of a part's curves as SVG."""
    import matplotlib.pyplot as plt
    import seaborn as sns
    from markupsafe import Markup

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

"""Figures as SVG: sharp at any size, in the colours of a light or a dark page. No torch."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from markupsafe import Markup

from peftscope.claims.verdict import Rule
from peftscope.report.spoken import spread
from peftscope.words import scale_of, spoken_number

INK, LINE = "#24292f", "#d0d7de"
"""The colours of text and axes, and of the grid, on a light page. A dark page has others."""
STYLE = {
    "svg.hashsalt": "peftscope",
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.framealpha": 0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINE),
}
"""The settings of matplotlib with which a figure can follow the page."""
OWN_COLOURS = (
    f"<style>svg{{--ink:{INK};--line:{LINE}}}"
    "@media(prefers-color-scheme:dark){svg{--ink:#e6edf3;--line:#3d444d}}</style>"
)
"""The colours of a file of its own; in a page, the page sets them."""


def svg_of(figure: plt.Figure, name: str) -> str:
    """Returns a figure as one SVG element and closes it. The name keeps its ids apart from those of other figures."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", text, count=2)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"font: ([^;\"]*?)(?:'[^;\"]*|sans-serif)(?=[;\"])", r"font: \1system-ui, sans-serif", text)
    for colour, variable in ((INK, "ink"), (LINE, "line")):
        text = text.replace(colour, f"var(--{variable},{colour})")
    return re.sub(r"\s*\n\s*", "\n", text).strip() + "\n"


def in_page(text: str, alt: str) -> Markup:
    """Returns an SVG file's text as an element of a page, with what it shows in words."""
    opening = Markup('<svg role="img" aria-label="{}"').format(alt)
    return Markup(text.replace(OWN_COLOURS, "").replace("<svg", opening, 1))


MOST_LETTERS = 4
"""The letters of a unit that stands beside the numbers of a drawn interval."""
WIDTH, HEIGHT, SIDE = 220, 34, 12
"""The size of a drawn interval, and what is left free at both sides for numbers, in pixels."""


def interval(part: dict[str, Any]) -> Markup:
    """Returns a part's value with its interval, drawn against the range that counts as right; empty without numbers."""
    rule, value, unit = part.get("judged"), part["found"], part["unit"]
    if not rule or value is None or isinstance(value, bool | str) or isinstance(rule.get("equals"), bool | str):
        return Markup()
    low, high = Rule(**rule).bounds()
    ends = [value if part[end] is None else part[end] for end in ("low", "high")]
    points = [point for point in (low, high, *ends, value) if math.isfinite(point)]
    least, most = min(points), max(points)
    reach = (most - least) or abs(most) or 1.0
    least, most = least - reach / 8, most + reach / 8

    def place(number: float) -> float:
        """Returns where a number stands, in pixels; infinite ones at the edges."""
        share = (min(max(number, least), most) - least) / (most - least)
        return round(SIDE + share * (WIDTH - 2 * SIDE), 1)

    left, right = place(low), place(high)
    short = "%" if scale_of(unit) > 1 else unit.partition(" ")[0]
    short = f" {short}" if short != "as" and len(short) <= MOST_LETTERS else ""
    marks = Markup().join(
        Markup(
            f'<line class="margin" x1="{place(bound)}" x2="{place(bound)}" y1="3" y2="19"/>'
            f'<text x="{place(bound)}" y="31">{spoken_number(scale_of(unit) * bound)}{{}}</text>'
        ).format(short)
        for bound in dict.fromkeys((low, high))
        if math.isfinite(bound)
    )
    first, last = map(place, ends)
    whisker = f'<line class="whisker" x1="{first}" x2="{last}" y1="11" y2="11"/>' * (first != last)
    said = f"found {spoken_number(scale_of(unit) * value)}"
    alt = f"{said}{spread(part)}, where {part['rule']} counts as right"
    return Markup(
        f'<svg class="interval {{}}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{{}}"><rect x="{left}" y="3" width="{max(0.0, round(right - left, 1))}" height="16"/>'
        f'<line class="axis" x1="{SIDE}" x2="{WIDTH - SIDE}" y1="11" y2="11"/>{marks}{whisker}'
        f'<circle cx="{place(value)}" cy="11" r="4"/></svg>'
    ).format(part["verdict"].replace(" ", "-"), alt)

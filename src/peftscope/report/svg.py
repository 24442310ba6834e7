"""Figures as SVG: sharp at any size, in the colours of a light or a dark page. No torch."""

from __future__ import annotations

import io
import re

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from markupsafe import Markup

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
"""What a file of its own says about colours; in a page, the page says it."""


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
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\s*\n\s*", "\n", text).strip() + "\n"


def in_page(text: str, alt: str) -> Markup:
    """Returns an SVG file's text as an element of a page, with what it shows in words."""
    return Markup(
        text.replace(OWN_COLOURS, "").replace("<svg", Markup('<svg role="img" aria-label="{}"').format(alt), 1)
    )

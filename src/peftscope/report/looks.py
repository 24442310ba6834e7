"""How methods look in every figure of every report: colours, markers and dashes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib as mpl

from peftscope.methods import METHODS


class Look(NamedTuple):
    """How a method is drawn in every figure of every report."""

    colour: str
    marker: str
    dash: str = "-"

    @property
    def line(self) -> dict[str, Any]:
        """The arguments of ``plot`` for a line that looks so."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash}


BLUE, ORANGE, GREEN, RED = "#1879bb", "#e69f00", "#009e73", "#d55e00"
PINK, SKY, PURPLE, GREY = "#cc79a7", "#56b4e9", "#8a63b5", "#808890"
"""Colours after Okabe and Ito, which the colour-blind tell apart, without yellow and black, which pages swallow."""
LIGHTEST = 0.45
"""How much white the last of several variants of a method gets. On a light page more would be hard to see."""
SAFE_COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, PURPLE, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--", "-.", ":")
LOOKS: dict[str, Look] = {
    "none": Look(GREY, "X"),
    "full": Look(ORANGE, "s"),
    "lora": Look(BLUE, "o"),
    "qlora": Look(SKY, "D"),
    "dora": Look(GREEN, "^"),
    "adalora": Look(PINK, "v"),
    "loftq": Look(RED, "P"),
    "lora-plus": Look(RED, ">", "--"),
    "rslora": Look(SKY, "<", "--"),
    "pissa": Look(PURPLE, "*"),
    "ia3": Look(GREY, "d", "--"),
    "prompt-tuning": Look(GREEN, "h", "--"),
    "prefix-tuning": Look(PINK, "8", "--"),
    "random-subspace": Look(PURPLE, "p", "--"),
    "rounded": Look(ORANGE, "H", "--"),
    "peft": Look(GREEN, "$x$", "-."),
}
"""The colour and the marker of each method: methods that share a colour have other markers and dashes."""


def looks(labels: Mapping[str, str]) -> dict[str, Look]:
    """Returns how each variant is drawn, from the label of its method.

    A method with one variant looks as it does everywhere. Of several, the first does; the others have lighter
    shades of its colour, and markers and dashes of their own.
    """
    known = {cls.label: LOOKS[name] for name, cls in METHODS.items() if name in LOOKS}
    found = {}
    for number, label in enumerate(dict.fromkeys(labels.values())):
        plain = Look(SAFE_COLOURS[number % len(SAFE_COLOURS)], MARKERS[number % len(MARKERS)])
        own = Look(GREY, "o") if label.endswith("(A/A)") else known.get(label, plain)
        names = [name for name, of in labels.items() if of == label]
        markers = [own.marker, *(marker for marker in MARKERS if marker != own.marker)]
        for place, name in enumerate(names):
            colour = own.colour if len(names) == 1 else mixed(own.colour, LIGHTEST * place / (len(names) - 1))
            dash = own.dash if place == 0 else DASHES[place % len(DASHES)]
            found[name] = Look(colour, markers[place % len(markers)], dash)
    return found


def arm_looks(labels: Mapping[str, str]) -> dict[str, Look]:
    """Returns how each arm of a study is drawn, from its label, which begins with that of its method."""
    known = sorted((cls.label for cls in METHODS.values()), key=len, reverse=True)
    return looks({arm: next((name for name in known if text.startswith(name)), text) for arm, text in labels.items()})


def mixed(colour: str, share: float) -> str:
    """Returns a colour that is mixed with white by this share, or with black by a negative one."""
    towards = 1.0 if share > 0 else 0.0
    return mpl.colors.to_hex([part + abs(share) * (towards - part) for part in mpl.colors.to_rgb(colour)])

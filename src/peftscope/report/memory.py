"""The report's section on memory: curves, and the bars of large models. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from peftscope.hardware.cards import find_gpu
from peftscope.memory.trace import KINDS
from peftscope.methods import METHODS
from peftscope.report.looks import GREEN, GREY, RED, SAFE_COLOURS, looks, mixed
from peftscope.report.plots import new_figure
from peftscope.sizing.cheapest import OnCard
from peftscope.sizing.grid import CENTRE
from peftscope.sizing.why import Why
from peftscope.words import GIB, spoken_bytes

CARDS = {"24GiB": "RTX 4090", "48GiB": "L40S", "80GiB": "H100"}
"""The sizes of cards that figures mark, each with a card that has it."""
SCALE_GIB = 100
"""Where the scale of the bars ends."""
AXIS_LABELS = {"rank": "rank", "seq_len": "tokens of a sequence", "batch_size": "sequences a batch"}


def draw_grid(curves: Sequence[Path], path: Path) -> None:
    """Draws the memory that a card needs along each axis, with one line per method."""
    points = pd.concat([pd.read_csv(curve) for curve in curves])
    labels = points["method"].map(lambda name: METHODS[name].label)
    points = points.assign(gibibytes=points["device_bytes"] / GIB, label=labels)
    styles = looks({label: label for label in points["label"]})
    with new_figure(path, 11, 4.4, columns=len(AXIS_LABELS), sharey=True) as panels:
        for axes, (axis, told) in zip(panels, AXIS_LABELS.items(), strict=True):
            part = points[points["axis"] == axis]
            for label, rows in part.groupby("label", sort=False):
                axes.plot(rows["value"], rows["gibibytes"], label=label, markersize=5, **styles[str(label)].line)
            axes.set(xlabel=told, yscale="log")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(set(part["value"])), [f"{value:g}" for value in sorted(set(part["value"]))])
            axes.minorticks_off()
            _mark_cards(axes.axhline)
        panels[0].set_ylabel("peak on the card (GiB)")
        ticks = [4, 8, 16, 24, 48, 80, 160]
        panels[0].set_yticks(ticks, [str(tick) for tick in ticks])
        handles = _handles(panels)
        panels[0].figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, fontsize=9)


def draw_bars(bars: pd.DataFrame, path: Path) -> None:
    """Draws the bytes at the peak by kind: a block for each model with a bar for each method, all on one scale.

    A bar that is longer than the scale ends with its size. The title says on which card the largest model fits.
    """
    colours = dict(zip(KINDS, (*SAFE_COLOURS, mixed(GREY, -0.4)), strict=True))
    wide = bars.pivot_table(index=["model", "method"], columns="kind", values="bytes", sort=False, aggfunc="sum")
    wide = wide.fillna(0) / GIB
    places = [row + model for row, model in enumerate(pd.factorize(wide.index.get_level_values("model"))[0])]
    with new_figure(path, 6.6, 4.6) as axes:
        left = pd.Series(0.0, index=wide.index)
        for kind in (kind for kind in KINDS if kind in wide):
            axes.barh(places, wide[kind], left=left, color=colours[kind], label=kind, linewidth=0)
            left += wide[kind]
        for place, size in zip(places, left, strict=True):
            if size > SCALE_GIB:
                axes.text(
                    SCALE_GIB, place, f"{size:,.0f} → ", ha="right", va="center", color="white", fontweight="bold"
                )
        axes.set_yticks(places, [f"{model}, {METHODS[method].label}" for model, method in wide.index])
        axes.set_xlim(0, SCALE_GIB)
        axes.invert_yaxis()
        axes.grid(visible=False)
        for card, name in CARDS.items():
            axes.axvline(find_gpu(card).memory_bytes / GIB, color=GREY, linewidth=1, linestyle="--")
            axes.annotate(
                f"{card.replace('GiB', ' GiB')}\n{name}",
                (find_gpu(card).memory_bytes / GIB, 1),
                xycoords=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize="small",
            )
        axes.set_xlabel(
            f"allocated at the peak (GiB)\none sequence of {CENTRE['seq_len']} tokens, activations recomputed"
        )
        model, method = wide.index[-1]
        fits = [name for card, name in CARDS.items() if left.iloc[-1] * GIB < find_gpu(card).memory_bytes]
        title = f"{METHODS[method].label} puts {model} on one {fits[0]}" if fits else f"{model} fits on none of these"
        axes.figure.suptitle(title, x=0.01, ha="left", fontsize="medium", fontweight="bold")
        axes.figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)


def draw_cheapest(cards: Sequence[OnCard], path: Path) -> None:
    """Draws the cost of a training, or of 1M tokens, over its time, with a cross of intervals for each priced card."""
    with new_figure(path, 8, 4.6) as axes:
        for one in cards:
            time, cost = one.time.training_seconds or one.time.step_seconds, one.time.cost
            if cost is None:
                continue
            hours = time.times(1 / 3600)
            sides = [([r.value - r.low], [r.high - r.value]) for r in (hours, cost)]
            axes.errorbar(hours.value, cost.value, xerr=sides[0], yerr=sides[1], fmt="o", color=SAFE_COLOURS[0])
            axes.annotate(one.gpu.name, (hours.value, cost.value), xytext=(4, 4), textcoords="offset points")
        trained = cards[0].time.training_seconds is not None
        axes.set(xscale="log", xlabel=f"hours of {'the training' if trained else 'a step'}")
        axes.set(yscale="log", ylabel=f"cost of {'the training' if trained else '1M tokens'}")


def _handles(panels: Sequence[plt.Axes]) -> dict[str, Any]:
    """Returns what stands for each label in a legend of several panels."""
    return {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}


def waterfall(why: Why) -> list[tuple[str, int]]:
    """Returns the steps from the second peak to the first, in bytes. Changes that are not notable are one step."""
    large = [change for change in why.changes if abs(change.bytes) > why.notable_bytes]
    rest = why.bytes - sum(change.bytes for change in large)
    return [(change.name, change.bytes) for change in large] + ([("all other terms", rest)] if rest else [])


def draw_waterfall(why: Why, path: Path) -> None:
    """Draws a difference as bars that lead from the second peak to the first, with one bar per term."""
    steps = waterfall(why)
    names = [why.second, *(name for name, _ in steps), why.first]
    starts = [0, *accumulate((size for _, size in steps), initial=why.second_bytes)]
    starts[-1] = 0
    sizes = [why.second_bytes, *(size for _, size in steps), why.first_bytes]
    colours = ["0.5", *(RED if size > 0 else GREEN for _, size in steps), "0.5"]
    with new_figure(path, 9, 1 + 0.45 * len(names)) as axes:
        places = range(len(names))
        axes.barh(places, [size / GIB for size in sizes], left=[start / GIB for start in starts], color=colours)
        for place, start, size in zip(places, starts, sizes, strict=True):
            text = f" {spoken_bytes(size)}" if place in (0, len(names) - 1) else f" {size / GIB:+.2f} GiB"
            axes.text(max(start, start + size) / GIB, place, text, va="center", fontsize=8)
        axes.set_yticks(places, [fill(name, 45) for name in names])
        axes.set_xlim(0, 1.12 * max(max(start, start + size) for start, size in zip(starts, sizes, strict=True)) / GIB)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set(xlabel="allocated at the peak (GiB)")


def _mark_cards(line: Callable[..., object]) -> None:
    for card in CARDS:
        line(find_gpu(card).memory_bytes / GIB, color="0.5", linewidth=0.8, linestyle=":")

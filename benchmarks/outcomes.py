"""Runs that others published as ended well or out of memory, and what the closed form says of them.

``published_outcomes.csv`` holds one row a run, from the newest table of its source that has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pandas as pd

from benchmarks.page import write_blocks
from benchmarks.points import PublishedRun, sizes_by_formula
from peftscope.hardware.cards import find_gpu

OUTCOMES_FILE = Path("benchmarks/published_outcomes.csv")
NEAR = 20
"""A run is near the card if its tensors are predicted to miss or exceed the card's memory by this many % of it."""


class Outcome(PublishedRun):
    """How a run ended that somebody published."""

    ended: Literal["ran", "out of memory"]


def judge(outcomes: list[Outcome]) -> pd.DataFrame:
    """Returns one row a run: whether the closed form says that it fits, and whether this is right.

    To call a run tight is to say that it runs.
    """
    rows = []
    for run in outcomes:
        sizes, gpu = sizes_by_formula(run), find_gpu(run.gpu)
        fits = gpu.fits(sizes["least"], sizes["device"])
        predicted = {
            "least_bytes": sizes["least"],
            "device_bytes": sizes["device"],
            "usable_bytes": gpu.usable_bytes,
            "beyond_percent": round(100 * (sizes["least"] / gpu.usable_bytes - 1), 2),
            "fits": fits,
            "right": (fits != "no") == (run.ended == "ran"),
        }
        rows.append({**run.model_dump(), "asked": json.dumps(run.asked)} | predicted)
    return pd.DataFrame(rows)


def render(judged: pd.DataFrame) -> str:
    """Returns the outcomes as Markdown: how many are right by source, and those that are wrong."""
    modelled = judged["not_modelled"] == ""
    asked = judged[modelled].drop_duplicates(["preset", "gpu", "asked"])
    lines = [
        f"The runs that are modelled ask {len(asked)} different questions, of which {asked['right'].sum()} are "
        "answered right: some ran in bf16 and in float16, which take the same bytes.",
        "",
        f"| source | runs | judged | right | out of memory | called so | within {NEAR} % of the card | called so |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    names = modelled.map({True: "modelled", False: "not wholly"}), judged["source"].str.split("[ #;]").str[0]
    whole = [((name, "all"), runs) for name, runs in judged.groupby(names[0])]
    for (name, source), runs in [*whole, *judged.groupby([*names])]:
        full = runs[runs["ended"] == "out of memory"]
        near = full[full["beyond_percent"].abs() <= NEAR]
        counts = [count for part in (runs, full, near) for count in (len(part), part["right"].sum())]
        lines.append(f"| {source} | {name} | {' | '.join(map(str, counts))} |")
    lines += ["", "Answered wrong:", ""]
    for row in judged[~judged["right"]].itertuples():
        reason = f"; not modelled: {row.not_modelled}" if row.not_modelled else ""
        lines.append(f"- `{row.id}`: {row.ended}, called *{row.fits}* ({row.beyond_percent:+.0f} %){reason}")
    return "\n".join(lines)


def publish(folder: Path, page: Path) -> None:
    """Judges every published outcome, and writes the table and the page's block."""
    judged = judge(Outcome.read(OUTCOMES_FILE))
    judged.to_csv(folder / "outcomes.csv", index=False, lineterminator="\n")
    write_blocks({"outcomes": render(judged)}, page)

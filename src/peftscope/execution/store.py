"""Moves runs into the store from the experiments' folders, where older versions kept them."""

from __future__ import annotations

from peftscope.layout import PUBLISHED_RESULTS, RESULTS, run_folder


def move_runs() -> tuple[list[str], list[str]]:
    """Moves finished runs from ``results/EXPERIMENT/runs`` into the store.

    Returns:
        The ids of the moved runs, and of the runs that stay because the store already has them.
    """
    moved, stay = [], []
    for record in sorted(RESULTS.glob("*/runs/*/record.json")):
        if record.is_relative_to(PUBLISHED_RESULTS):
            continue
        target = run_folder(record.parent.name)
        if target.exists():
            stay.append(target.name)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        record.parent.rename(target)
        moved.append(target.name)
    return moved, stay

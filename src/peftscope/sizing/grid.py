"""Memory over rank, sequence length, batch size and method, in closed form, for the figures of the report."""

from __future__ import annotations

import pandas as pd

from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.base import describe_model
from peftscope.memory.question import ask
from peftscope.memory.trace import by_kind
from peftscope.methods import METHODS
from peftscope.sizing.needs import options_of_method

MODEL = "llama-2-7b"
CENTRE = {"rank": 8, "seq_len": 512, "batch_size": 1, "targets": "all-linear"}
AXES: dict[str, tuple[int, ...]] = {
    "rank": (2, 8, 32, 128, 512),
    "seq_len": (128, 256, 512, 1024, 2048, 4096),
    "batch_size": (1, 2, 4, 8, 16),
}
"""The values of each axis. A curve varies one axis and keeps the others at the centre."""
METHOD_NAMES = ("full", "lora", "qlora", "dora", "adalora", "loftq")

SIZES = ("qwen3-8b", "qwen3-32b", "llama-3.3-70b")
BARS = ("full", "lora", "qlora")
"""The models and methods of the bars, all with recomputed activations, as trainers set it."""


def grid() -> pd.DataFrame:
    """Returns the curves of the grid: one row per curve, with its method and the axis that it varies."""
    return pd.DataFrame(
        [
            {"method": method, "axis": axis}
            for method in METHOD_NAMES
            for axis in AXES
            if axis != "rank" or METHODS[method].with_rank(1)
        ]
    )


def curve(method: str, axis: str) -> pd.DataFrame:
    """Returns the peaks of a method along an axis, in bytes: one row per value.

    Raises:
        InputError: The method or the axis is unknown.
    """
    for what, name, known in (("method", method, METHODS), ("axis", axis, AXES)):
        if name not in known:
            raise InputError(Problem(what, f"no such {what} (got {shown(name)})", close_match(name, known)))
    model, rows = describe_model(MODEL), []
    for value in AXES[axis]:
        peaks = peaks_by_formula(ask(model, options_of_method(method, CENTRE | {axis: value})))
        sizes = {name: getattr(peaks, name) for name in ("allocated_bytes", "reserved_bytes", "device_bytes")}
        rows.append({"method": method, "axis": axis, "value": value} | sizes)
    return pd.DataFrame(rows)


def bars() -> pd.DataFrame:
    """Returns the bytes that are alive at the peak: one row per model, method and kind."""
    rows = []
    for name in SIZES:
        model = describe_model(name)
        for method in BARS:
            peaks = peaks_by_formula(ask(model, options_of_method(method, CENTRE | {"checkpointing": True})))
            for kind, size in by_kind(peaks.alive(peaks.binding_phase)).items():
                rows.append({"model": name, "method": method, "kind": kind, "bytes": size})
    return pd.DataFrame(rows)

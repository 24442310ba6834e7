"""How long runs will take: scaled from records of the same model and method, this machine's before published ones."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftscope.errors import InputError
from peftscope.models.catalog import find_model
from peftscope.spec import RunSpec

FALLBACK_FLOPS = 1.2e11
"""Floating-point operations a second of two ordinary CPU cores, where nothing was measured yet."""
FALLBACK_TOKENS = 16
FALLBACK_OVERHEAD_SECONDS = 6.0
FALLBACK_SECONDS_PER_PARAMETER = 1.5e-7
"""Loading, evaluation and probe."""


@lru_cache
def _measured() -> dict[tuple[str, str, str], dict[str, Any]]:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    published = sorted(Path("results/published").glob("*/runs/*/record.json"))
    own = sorted(Path("results").glob("*/runs/*/record.json"), key=lambda path: path.stat().st_mtime)
    for path in [*published, *own]:
        try:
            record = json.loads(path.read_text())
            spec = record["spec"]
            if record["status"] == "ok":
                found[spec["model"], spec["method"]["name"], spec["device"]] = record
        except (OSError, ValueError, KeyError):
            continue
    return found


def measured_runs() -> list[dict[str, Any]]:
    """Returns one record each of a model, method and device that ended well, as JSON content."""
    return list(_measured().values())


def estimate_seconds(spec: RunSpec) -> float:
    """Returns the wall seconds that a run will take, to within a factor of about two on another machine."""
    work = spec.steps * spec.batch_size * spec.gradient_accumulation
    record = _measured().get((spec.model, spec.method.name, spec.device))
    if record:
        seconds, before = record["seconds"], record["spec"]
        scale = work / (before["steps"] * before["batch_size"] * before["gradient_accumulation"])
        return float(seconds["wall"] + (scale - 1) * seconds["train"])
    try:
        shape = find_model(spec.model).shape
    except InputError:
        shape = None
    parameters = shape.parameters if shape else 10**9
    flops = 6 * parameters * work * FALLBACK_TOKENS * (1 if spec.method.trains else 0)
    return FALLBACK_OVERHEAD_SECONDS + FALLBACK_SECONDS_PER_PARAMETER * parameters + flops / FALLBACK_FLOPS


def spoken(seconds: float) -> str:
    """Returns a duration as people say it.

    >>> spoken(75), spoken(7300)
    ('1 min 15 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

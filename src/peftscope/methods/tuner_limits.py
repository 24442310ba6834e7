"""What a tuner of PEFT cannot do here, as ``make tuners`` found it on the toy model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

LIMITS_FILE = Path(__file__).with_name("tuner_limits.json")


@cache
def limits() -> dict[str, dict[str, str]]:
    """Returns, for each tuner that has limits, what it cannot do and the reason."""
    tuners: dict[str, dict[str, str]] = json.loads(LIMITS_FILE.read_text(encoding="utf-8"))["tuners"]
    return tuners


def limit_of(tuner: str, what: str) -> str:
    """Returns why a tuner cannot do something; empty if it can, or was never tried."""
    return limits().get(tuner, {}).get(what, "")

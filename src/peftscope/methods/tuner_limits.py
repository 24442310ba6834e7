"""What a tuner of PEFT cannot do here, as ``make tuners`` found it on the toy model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

LIMITS_FILE = Path(__file__).with_name("tuner_limits.json")


@cache
def _read() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(LIMITS_FILE.read_text(encoding="utf-8"))
    return content


def tried_version() -> str:
    """Returns the version of PEFT whose tuners were tried."""
    return str(_read()["peft"])


def limits() -> dict[str, dict[str, str]]:
    """Returns, for each tuner that has limits, what it cannot do and the reason."""
    tuners: dict[str, dict[str, str]] = _read()["tuners"]
    return tuners


def limit_of(tuner: str, what: str) -> str:
    """Returns why a tuner cannot do something; empty if it can, or was never tried."""
    return limits().get(tuner, {}).get(what, "")

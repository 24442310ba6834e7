"""Changes that may make a run fit on a card, and the mildest of them that does. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from peftscope.errors import InputError

_LOSS: dict[str, Any] = {"loss_path": "response_only"}
_LESS = _LOSS | {"checkpointing": True}
ADVICE: tuple[dict[str, Any], ...] = (
    _LOSS,
    {"checkpointing": True},
    _LESS,
    {"batch_size": 1},
    _LESS | {"batch_size": 1},
    {"optimizer": "adamw_8bit"},
    _LESS | {"batch_size": 1, "optimizer": "adamw_8bit"},
    {"method": "qlora"},
    _LESS | {"method": "qlora"},
    _LESS | {"method": "qlora", "batch_size": 1},
    _LESS | {"method": "qlora", "batch_size": 1, "seq_len": 256},
)
"""Changes that may make a run fit, the mildest first: those that change nothing that is learned come before others."""


def mildest_change(fits: Callable[[Mapping[str, Any]], bool], asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the mildest change in ``ADVICE`` that makes a run fit, or None if none does.

    A smaller batch comes with as many more accumulated ones, so that a step learns from as many examples.

    Args:
        fits: Returns whether a run fits with these changes. It raises ``InputError`` or ``ValidationError`` if they are
            not possible.
        asked: The fields of the run as they are. What would not change is left out.
    """
    tried: list[dict[str, Any]] = []
    for advice in ADVICE:
        changes = {name: value for name, value in advice.items() if asked[name] != value}
        if changes.get("seq_len", 0) > asked["seq_len"]:
            del changes["seq_len"]
        if "batch_size" in changes:
            changes["gradient_accumulation"] = asked["gradient_accumulation"] * asked["batch_size"]
        if not changes or changes in tried:
            continue
        tried.append(changes)
        with suppress(InputError, ValidationError):
            if fits(changes):
                return changes
    return None

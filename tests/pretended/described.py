"""What the pretended card is: the variable PRETENDED_CARD changes some of it. No torch."""

import json
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Described:
    """A card as a test describes it.

    Attributes:
        name: The driver's name of it.
        major: Its compute capability, with ``minor``.
        minor: See ``major``.
        total_mib: What torch calls its total memory.
        count: How many of them there are.
        nvml: ``v2``, ``v1`` (an old driver), ``broken``, ``missing``, or ``slice`` (MIG) with a neighbour.
        full_in: A function of ``execution/way.py`` during which the card has no byte left.
    """

    name: str = "NVIDIA A100-SXM4-80GB"
    major: int = 8
    minor: int = 0
    total_mib: float = 81_154
    count: int = 1
    nvml: str = "v2"
    full_in: str = ""


def described() -> Described:
    return Described(**json.loads(os.environ.get("PRETENDED_CARD", "{}")))

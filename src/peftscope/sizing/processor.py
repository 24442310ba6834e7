"""How long a step takes on a processor: the operations of ``speed.py`` one after another, and casts of matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftscope.memory.question import Question
from peftscope.sizing.speed import Passes, fitted, passes_of

CAST_BYTES = 3
"""The bytes of the casts of a product of 16-bit matrices that is computed in fp32 (``hardware/bf16.py``), over those of
the product: both matrices and the result are read in one width and written in the other."""
LARGE_BYTES = 1e8
"""The size of a kernel from which on its memory came fresh from the system when steps were timed (docs/time.md)."""


@dataclass(frozen=True)
class ProcessorConstants:
    """The constants of a step on a processor; an operation takes what a launch takes on cards, whatever its size.

    Attributes:
        rate_share: The share of the rate at a large product that products reach.
        memory_share: The share of the rate of a large copy that other kernels reach.
        large_share: The same for kernels of ``LARGE_BYTES`` and more.
    """

    rate_share: float
    memory_share: float
    large_share: float


def processor_passes(question: Question, *, casts: bool = True) -> Passes:
    """Returns the passes of a step, with what products of 16-bit matrices are cast if they are."""
    found: Passes = []
    for content, times in passes_of(question):
        products = [(one, factor) for one, factor in content if casts and one.flops and not one.fp32]
        more = [(replace(one, bytes=CAST_BYTES * one.bytes, flops=0.0, launches=3), by) for one, by in products]
        found.append(([*content, *more], times))
    return found


def processor_step(
    passes: Passes, flops: float, copied_bytes: float, constants: ProcessorConstants | None = None
) -> tuple[float, float]:
    """Returns the seconds of a step, and those of one forward pass on one batch.

    ``flops`` and ``copied_bytes`` are those a second of a large product, and of a large copy, read and written. The
    constants are those that were fitted, unless others are given.
    """
    on_cards, content = fitted()
    known = constants or ProcessorConstants(**content["processor"])
    seconds = []
    for work, times in passes:
        taken = 0.0
        for one, factor in work:
            large = one.bytes >= LARGE_BYTES * max(1.0, one.launches)
            size_rate = copied_bytes * (known.large_share if large else known.memory_share)
            kernels = max(one.flops / (known.rate_share * flops), one.bytes / size_rate)
            taken += factor * one.times * (kernels + one.launches * on_cards.launch_seconds)
        seconds.append((taken, times))
    return sum(taken * times for taken, times in seconds), seconds[0][0]

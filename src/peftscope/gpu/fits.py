"""Does a run fit on a smaller card? Two training steps and an evaluation, held to that card's memory."""

from __future__ import annotations

from typing import Any

import torch

from peftscope.gpu.jobs import CardJob
from peftscope.gpu.memory import measure, used_bytes
from peftscope.hardware.cards import CONTEXT_BYTES


def hold(job: CardJob, used_before: int | None) -> dict[str, Any]:
    """Holds torch's allocator to what a job's card would have left for it, and returns the sizes behind that.

    Whatever the allocator takes beyond raises ``torch.OutOfMemoryError``. The CUDA context is not the allocator's: its
    size is taken off before, as it is here or was on the worst card so far, whichever is larger.

    Args:
        job: Has a limit.
        used_before: Bytes in use on the card before this process began; None: not known.
    """
    torch.empty(1, device="cuda")
    used = used_bytes()
    found = used - used_before - torch.cuda.memory_reserved() if used is not None and used_before is not None else 0
    context = max(found, CONTEXT_BYTES)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (job.capacity_bytes - context) / total))
    return {"assumed_context_bytes": context}


def check_fit(job: CardJob, device: str, used_before: int | None) -> dict[str, Any]:
    """Returns the peaks of a job that is held to a card's memory, on the loading of the model as well.

    On a processor nothing is enforced.

    Raises:
        torch.OutOfMemoryError: It does not fit.
    """
    sizes = hold(job, used_before) if device == "cuda" else {}
    return measure(job.question, device) | sizes


def fits(job: CardJob, row: dict[str, Any]) -> bool:
    """Returns whether a job that ended stayed within its card's memory: the largest peak that is known counts."""
    if row["status"] != "ok":
        return False
    peaks = [row.get(f"measured_{name}_bytes") for name in ("device", "reserved", "allocated")]
    return next(peak for peak in peaks if peak is not None) <= job.capacity_bytes

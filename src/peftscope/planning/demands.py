"""The resources that a training job asks of a cluster's scheduler: host memory and minutes. No torch."""

from __future__ import annotations

import math
from typing import Any

from peftscope.data.tasks import find_task, item_tokens
from peftscope.memory.answer import peaks_by_formula
from peftscope.memory.base import Model
from peftscope.memory.question import Question
from peftscope.methods import METHODS
from peftscope.models.catalog import find_model
from peftscope.planning.estimate import estimate_seconds
from peftscope.planning.plan import Workflow
from peftscope.spec import RunSpec, memory_key
from peftscope.words import GIB

PROCESS_BYTES = 2 * GIB
"""A process that has imported torch, transformers and lm-eval, reads its data and writes its checkpoint."""
MARGIN = 1.25
"""The memory of a job over the peak of its tensors: allocators keep freed memory, and generation has a cache."""
LONGEST = 4
"""Tokens of a task's longest item over those of a usual one, where its entry does not say how many that has.

A job that runs out of memory is retried with more."""
SLOWER = 3
"""How much longer than estimated a job may take before it is stopped; it then goes on where it was."""
SHORTEST_MINUTES = 20
UNKNOWN_BYTES = 64 * GIB
"""The memory of a job if the shape of its model is not known before it is fetched."""


class JobDemands:
    """Answers Snakemake about a workflow's training jobs; each further attempt asks for more."""

    def __init__(self, workflow: Workflow) -> None:
        self._workflow = workflow

    def memory_mb(self, wildcards: Any, attempt: int) -> int:
        """Returns the host memory that a run asks for, in megabytes."""
        return math.ceil(host_bytes(self._workflow.spec(wildcards)) * attempt / 10**6)

    def minutes(self, wildcards: Any, attempt: int) -> int:
        """Returns the minutes after which a run may be stopped."""
        one_thread = self._workflow.shares_machine(wildcards.run_id)
        seconds = estimate_seconds(self._workflow.spec(wildcards), one_thread=one_thread)
        return max(SHORTEST_MINUTES, math.ceil(SLOWER * seconds / 60)) * attempt


_known: dict[tuple[str, str], int] = {}


def host_bytes(spec: RunSpec) -> int:
    """Returns the host memory that a run needs, which is asked once for all runs that take the same memory."""
    key = (memory_key(spec), spec.task)  # how long a task's items are counts here
    if key not in _known:
        _known[key] = _host_bytes(spec)
    return _known[key]


def _host_bytes(spec: RunSpec) -> int:
    """Returns the host memory that a run needs: on a card, each of its processes loads the weights through there."""
    shape = find_model(spec.model).shape
    if shape is None:
        return UNKNOWN_BYTES
    if spec.device == "cuda":
        # In fp32 at most, and twice: as they are read, and as they are put together.
        return spec.shards * (PROCESS_BYTES + 2 * 4 * shape.parameters)
    longest = find_task(spec.task).most_tokens or math.ceil(LONGEST * item_tokens(spec.task))
    length = spec.seq_len if spec.packing else min(spec.seq_len, longest)
    widest = spec.model_copy(update={"seq_len": length})
    model = Model(spec.model, shape.to_config(), shape)
    # For a method without a closed form two others stand in: one takes the most states, the other the most activations.
    methods = [spec.method] if spec.method.closed_form else [METHODS["full"](), METHODS["dora"]()]
    runs = [widest.model_copy(update={"method": method}) for method in methods]
    questions = [Question(model, run, length, None, 1) for run in runs]
    allocated = max(peaks_by_formula(question, evaluation=True).allocated_bytes for question in questions)
    return spec.shards * (PROCESS_BYTES + round(MARGIN * allocated))

"""The needs of runs on a card, each asked once, and whether they fit. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftscope.errors import InputError, Problem
from peftscope.hardware.cards import Fits, Gpu
from peftscope.memory.answer import Peaks, peaks_by_formula
from peftscope.memory.formula.step import TrainingTraces, operations_of
from peftscope.memory.question import METHOD_OPTIONS, Question
from peftscope.methods import METHODS

ACCEPTED: tuple[tuple[Fits, ...], ...] = (("yes",), ("yes", "tight"))
"""The aims of advice: that a run fits with room and, if nothing does, that it fits at all."""


def options_of_method(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that a method has, and its name. ``rank`` also sets AdaLoRA's initial rank."""
    fields = METHODS[method].model_fields
    own = {k: v for k, v in options.items() if v is not None and (k not in METHOD_OPTIONS or k in fields)}
    if "rank" not in fields and options.get("rank") is not None:
        if options["rank"] < 1:
            raise InputError(Problem("rank", f"must be at least 1 (got {options['rank']})"))
        own |= METHODS[method].with_rank(options["rank"])
    if not METHODS[method].supports_checkpointing:
        own.pop("checkpointing", None)
    return {**own, "method": method}


class Needs:
    """The needs of runs on a card, each computed once.

    Attributes:
        gpu: The card.
        traces: Traces that serve runs of other sizes.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.traces = TrainingTraces()
        self._known: dict[Any, Peaks] = {}

    def peaks(self, question: Question) -> Peaks:
        """Returns the peaks of a run; of one that does not fit, reserved bytes may be those of its tensors only.

        Raises:
            InputError: The closed form does not cover the model's family or the method.
        """
        key = question.model.name, question.spec, question.responses, question.gpus, question.beside
        if key not in self._known:
            self._known[key] = peaks_by_formula(question, traces=self.traces, enough=self.gpu.usable_bytes)
        return self._known[key]

    def simulated(self, question: Question) -> Peaks:
        """Returns the peaks by simulation, which methods share that do the same operations on the same tensors.

        Raises:
            InputError: The model or the method cannot be simulated.
        """
        from peftscope.memory.simulate import peaks_by_simulation

        sizes = question.spec.model_dump_json(include={"batch_size", "eval_batch_size", "seq_len"})
        method = question.spec.method
        ranks = [getattr(method, name, None) for name in ("rank", "init_r", "target_r")]
        own = method.closed_form or method.name, *ranks
        key = question.model.name, operations_of(question), sizes, own, question.responses, question.gpus
        if key not in self._known:
            self._known[key] = peaks_by_simulation(question)
        return self._known[key]

    def fits(self, question: Question) -> Fits:
        """Returns whether a run fits on the card.

        Raises:
            InputError: The closed form does not cover the model's family or the method.
        """
        peaks = self.peaks(question)
        return self.gpu.fits(peaks.least_bytes, peaks.device_bytes)

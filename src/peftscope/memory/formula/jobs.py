"""The step of DPO and its kin, of reward models and of GRPO, as TRL's trainers do it, on a tape. No torch."""

from __future__ import annotations

from typing import Any

from peftscope.memory.beside import passes_of
from peftscope.memory.formula.decoder import keep_positions, run_decoder, run_head
from peftscope.memory.formula.fused import chunked_log_probs
from peftscope.memory.formula.linear import TapedModel
from peftscope.memory.tape import Gradients, Shaped


def job_loss(model: TapedModel, *, masked: bool) -> Shaped:
    """Stands for ``compute_loss`` of a trainer of TRL: its passes, of which one has gradients."""
    tape, own, scores = model.tape, (model.targets, model.weights), dict[str, Shaped]()
    held: list[Shaped] = []
    for kind in passes_of(model.beside):
        tape.training = kind == "loss"
        model.targets, model.weights = ([], model.second or own[1]) if kind == "reference" else own
        scores[kind] = _score(model, held, masked=masked)
        tape.casts.clear()
    tape.training, (model.targets, model.weights) = True, own
    return tape.op([scores["loss"]], (), 4)


def _score(model: TapedModel, held: list[Shaped], *, masked: bool) -> Shaped:
    """Stands for a pass: log-probabilities of the answers, or rewards."""
    tape, beside = model.tape, model.beside
    hidden = run_decoder(model, masked=masked)
    if beside.job == "reward":
        tape.module = "score"
        return tape.matmul(hidden, model.weights["score"], ("T",), "rewards")
    if beside.logprobs == "chunked":
        return chunked_log_probs(model, keep_positions(model, hidden))
    logits = run_head(model, hidden, kept=beside.job == "grpo")
    tape.casts.clear()
    del hidden
    tape.module = "loss"
    logits = tape.cast(logits, 4, "logits in 32 bits") if tape.autocast else logits
    if beside.logprobs == "whole":
        return _from_all(model, tape.cast(logits, 4, "logits in 32 bits"), held)
    if beside.job != "orpo":
        return _from_logits(model, logits)
    return tape.op([_chosen_loss(model, logits), _from_logits(model, logits)], (), 4)


def _from_all(model: TapedModel, logits: Shaped, held: list[Shaped]) -> Shaped:
    """Stands for LLaMA-Factory's ``get_batch_logps``, which takes all rows at once; its logits stay for the metrics."""
    tape, dims = model.tape, ("N", "V")
    if tape.training:
        held.append(logits)
    if tape.training and model.beside.job == "kto":
        held.append(tape.new(dims, 4, term="logits of the chosen and the rejected answers"))
    logs = tape.with_saved_output([logits], dims, 4, "log-softmax of the logits")
    return tape.op([logs], ("N",), 4, lambda *_: [tape.new(dims, 4, term="gradients of the logits")])


def _chosen_loss(model: TapedModel, logits: Shaped) -> Shaped:
    """Stands for ORPO's cross-entropy of the chosen answers, on a copy of the first half of the logits."""
    tape, dims, width = model.tape, logits.dims, logits.width
    chosen = tape.op([logits], dims, width / 2, lambda *_: [tape.new(dims, width)], term="logits of the chosen answers")
    logs = tape.with_saved_output([chosen], dims, width / 2, "log-softmax of the logits")
    return tape.op([logs], (), 4, lambda *_: [tape.new(dims, width / 2)], (logs,))


def _from_logits(model: TapedModel, logits: Shaped) -> Shaped:
    """Stands for ``selective_log_softmax``, which takes a row at a time; in 16 bits it keeps the softmax of each."""
    tape, width = model.tape, logits.width
    rows = "N" if tape.training else "s"  # without a gradient, each row goes at once
    kept = [logits if width == 4 else tape.new((rows, "V"), width, term="log-softmax of the logits")]

    def backward(*_: Any) -> Gradients:
        tape.last_of(3 if width == 4 else 2, ("s", "V"), width)  # of the first row
        if width != 4:
            kept.clear()  # each row goes with its gradient
        _apart = tape.new(("N", "V"), width, term="gradients of the logits, row by row")
        return [tape.new(("N", "V"), width, term="gradients of the logits")]

    return tape.op([logits], ("N",), 4, backward, kept)

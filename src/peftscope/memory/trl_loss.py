"""Makes a simulated step that of another job: the passes and the loss of TRL's trainers.

Source: TRL 0.24.0 for log-probabilities from the logits, TRL 1.16.0 for those that are chunked over the head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from peftscope.memory.beside import Beside, passes_of
from peftscope.memory.kernels import LOGPROB_COLUMNS, LOGPROB_ROWS
from peftscope.training.step import TrainedModel


class ChunkedLogProbs(torch.autograd.Function):
    """Allocates what ``ChunkedLogProbFunction`` does on CUDA, where a kernel of Triton works in place on each tile.

    Source: TRL 1.16.0, trl/kernels/chunked_logprob.py.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns log-probabilities, (N,), for hidden states (N, h) and a head (V, h)."""
        statistics = [torch.empty(x.shape[0]) for _ in range(7)]
        ctx.width = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        _tile(x, weight, ctx.width)
        ctx.save_for_backward(x, weight, *statistics[:2])
        return torch.empty(x.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Returns gradients that were summed in 32 bits."""
        (x, weight), needs = ctx.saved_tensors[:2], ctx.needs_input_grad
        wide = [torch.empty(t.shape) if need else None for t, need in zip((x, weight), needs, strict=True)]
        _held = _tile(x, weight, ctx.width)
        return tuple(w if w is None else w.to(t.dtype) for w, t in zip(wide, (x, weight), strict=True))


def _tile(x: torch.Tensor, weight: torch.Tensor, width: torch.dtype) -> list[torch.Tensor]:
    """Returns what a tile of logits takes: its buffer, and its factors where autocast converts them."""
    tile = torch.empty(min(x.shape[0], LOGPROB_ROWS), LOGPROB_COLUMNS, dtype=width)
    return [tile, x[:LOGPROB_ROWS].to(width), weight[:LOGPROB_COLUMNS].to(width)]


class _WideLogProbs(torch.autograd.Function):
    """Allocates what ``selective_log_softmax`` does on logits in 32 bits, of which it takes a row at a time.

    Under a tracker, torch would sum gradients out of place that it otherwise sums in place.
    Source: TRL 0.24.0, trl/trainer/utils.py:1486.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        """Returns log-probabilities, (B, S), for logits (B, S, V)."""
        ctx.save_for_backward(logits)
        return torch.empty(logits.shape[:2])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Returns the gradients of all rows in one tensor."""
        (logits,) = ctx.saved_tensors
        # A difference and its exponential live until the gradient is there.
        return torch.stack([[torch.empty_like(row) for _ in range(3)][-1] for row in logits])


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Stands for ``selective_log_softmax`` on logits (B, S, V), which in 16 bits takes the softmax of every row."""
    if logits.dtype == torch.float32:
        return _WideLogProbs.apply(logits)
    index = torch.zeros(*logits.shape[:2], 1, dtype=torch.int64)
    rows = [row.log_softmax(-1).gather(-1, i).squeeze(-1) for row, i in zip(logits, index, strict=True)]
    return torch.stack(rows)


def _loss_of(beside: Beside, logits: torch.Tensor, weight: torch.Tensor, responses: int) -> torch.Tensor:
    """Returns a loss or log-probabilities from what the head gives: logits, rewards, or hidden states if it is fused.

    Source: TRL 0.24.0, trainer/utils.py:1486 and orpo_trainer.py; TRL 1.16.0, trainer/reward_trainer.py.
    """
    if beside.logprobs == "chunked":
        positions = torch.arange(logits.shape[1] - responses, logits.shape[1])
        return ChunkedLogProbs.apply(logits[:, positions].flatten(0, 1), weight)
    if beside.job == "reward":
        return logits[:, -1, 0].float()
    if beside.job != "orpo":
        return _log_probs(logits)
    # The cross-entropy of the chosen answers, the first half of the rows; their last position counts.
    chosen = logits[: len(logits) // 2].clone().flatten(0, 1)
    nll = functional.cross_entropy(chosen, torch.zeros(len(chosen), dtype=torch.int64))
    del chosen
    return _log_probs(logits).float() + nll


def take_job(trained: TrainedModel, beside: Beside, responses: int, reference: Any = None) -> None:
    """Replaces a model's forward pass, head and loss by those of a job.

    ``responses`` is the number of positions of a row that carry a loss. A second model, the reference, becomes a part
    of the first, so that it is counted.
    """
    model, job, forward = trained.model, beside.job, trained.model.forward
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if job == "reward":  # a score in place of the logits, which TRL and PEFT train
        base.set_output_embeddings(torch.nn.Linear(base.config.hidden_size, 1, bias=False, dtype=base.dtype))
    head = base.get_output_embeddings()
    for one in [head] if reference is None else [head, reference.get_output_embeddings()]:
        one.forward = partial(_project, one.forward, beside.logprobs == "chunked")
    if reference is not None:
        model.reference = reference.requires_grad_(False)
    trained.loss_function._loss = lambda logits: _loss_of(beside, logits, head.weight, responses)
    kept = {"logits_to_keep": responses} if job == "grpo" and beside.logprobs == "full" else {}

    def run(input_ids: torch.Tensor, attention_mask: Any, **_: Any) -> Any:
        scores = {}
        for kind in passes_of(beside):
            other = kind == "reference"
            call = reference if other and reference is not None else forward
            without = model.disable_adapter() if other and reference is None else nullcontext()
            with torch.set_grad_enabled(kind == "loss"), without:
                output = call(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kept)
                if beside.logprobs != "chunked":  # a fused head is a part of the pass
                    torch.clear_autocast_cache()
                scores[kind] = trained.loss_function(output.logits).float().view(len(input_ids), -1)
            torch.clear_autocast_cache()  # accelerate autocasts each pass on its own
            del output
        return SimpleNamespace(loss=-functional.logsigmoid(scores["loss"].sum(1)).mean())

    model.forward = run


def _project(project: Callable[[torch.Tensor], torch.Tensor], fused: bool, x: torch.Tensor) -> torch.Tensor:
    """Returns what a fused head takes, or logits as accelerate does: in 32 bits if autocast computed them."""
    logits = x if fused else project(x)
    return logits.float() if not fused and torch.is_autocast_enabled("cpu") else logits

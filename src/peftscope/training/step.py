"""The one training step. The loop runs it on data, the probe under a byte tracker, the simulator on fake tensors.

Fake tensors have no values, so nothing here reads one: no ``item()``, no ``if`` on a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftscope.data.batching import Batch
from peftscope.spec import RunSpec
from peftscope.training.load import autocast


@dataclass(frozen=True)
class StepOutput:
    """The losses of a step, both () fp32 and detached.

    Attributes:
        loss: The minimised loss, including regularisers.
        nll: The mean negative log likelihood of the response tokens, in nats.
    """

    loss: torch.Tensor
    nll: torch.Tensor


def make_optimizer(model: Any, spec: RunSpec) -> torch.optim.Optimizer:
    """Returns the spec's optimizer over the method's parameter groups."""
    groups = spec.method.optimizer_groups(model, spec)
    adam = {
        "lr": spec.learning_rate,
        "betas": (spec.adam_beta1, spec.adam_beta2),
        "eps": spec.adam_epsilon,
        "weight_decay": spec.weight_decay,
    }
    if spec.optimizer not in ("adamw", "sgd"):
        import bitsandbytes.optim

        names = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
        optimizer = getattr(bitsandbytes.optim, names[spec.optimizer])(groups, **adam)
        # On a CPU nothing can be paged out. Without this, bitsandbytes warns of it at every start.
        optimizer._cpu_paged_warned = True
        return optimizer
    implementation = {"foreach": spec.optimizer_implementation == "foreach"}
    if spec.optimizer_implementation == "fused":
        implementation = {"fused": True}
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=spec.learning_rate, weight_decay=spec.weight_decay, **implementation)
    return torch.optim.AdamW(groups, **adam, **implementation)


def make_schedule(optimizer: torch.optim.Optimizer, spec: RunSpec) -> torch.optim.lr_scheduler.LRScheduler:
    """Returns the learning-rate schedule: linear warm-up, then constant, linear or cosine decay to zero."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if spec.schedule == "constant" else spec.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=spec.warmup_steps, num_training_steps=spec.steps)


class CausalLoss:
    """The causal loss of transformers. It also keeps the plain nll, before a wrapper adds a regulariser to the loss."""

    def __init__(self) -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        self._loss = ForCausalLMLoss
        self.nll: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the loss. ``nll`` holds a detached copy, because wrappers change the loss in place."""
        loss = self._loss(*args, **kwargs)
        self.nll = loss.detach().clone()
        return loss


@dataclass(frozen=True)
class TrainedModel:
    """The model with its method applied, from ``build_model``, and the loss that it calls.

    The model is always called through its outermost wrapper.
    """

    model: Any
    loss_function: CausalLoss

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the model's vocabulary."""
        return self.model.config.vocab_size


def forward_loss(model: Any, batch: Batch, spec: RunSpec, response_tokens: torch.Tensor | None = None) -> Any:
    """Returns the model's output, whose loss is the sum over response tokens divided by ``response_tokens``.

    The model is always called through its outermost wrapper, so that virtual tokens and regularisers take effect.

    Args:
        model: The trained model. In its output, ``loss`` is () and ``logits`` is (B, K or S, vocabulary).
        spec: The run, whose loss path decides which logits are computed.
        response_tokens: The divisor, (). Under gradient accumulation it is larger than the batch's own count.
    """
    total = batch.response_tokens if response_tokens is None else response_tokens
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    if spec.loss_path == "response_only":
        positions = batch.kept_positions + spec.method.logit_offset()
        inputs |= {"shift_labels": batch.kept_labels, "logits_to_keep": positions}
    if batch.example_ids is not None and spec.attention == "flash_attention_2":
        inputs = _end_to_end({**inputs, "position_ids": batch.position_ids})
    elif batch.example_ids is not None:
        mask = _block_mask(batch.example_ids, spec)
        inputs |= {"attention_mask": mask, "position_ids": batch.position_ids}
    with autocast(spec):
        return model(**inputs, num_items_in_batch=total, use_cache=False)


def _end_to_end(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs as one row, (1, B·S), without a mask.

    Flash attention tells examples apart by their positions, and only if there is a single row. Source: transformers
    5.24, ``_is_packed_sequence``. The first token of an example carries no loss, so none crosses the end of a row.
    """
    rows, width = inputs["input_ids"].shape
    if "logits_to_keep" in inputs:
        starts = torch.arange(rows, device=inputs["input_ids"].device)[:, None] * width
        inputs["logits_to_keep"] = (starts + inputs["logits_to_keep"]).flatten()
    names = ("input_ids", "labels", "position_ids", "shift_labels")
    return inputs | {name: inputs[name].view(1, -1) for name in names if name in inputs} | {"attention_mask": None}


def _block_mask(examples: torch.Tensor, spec: RunSpec) -> torch.Tensor:
    """Returns (B, 1, S, S): True where a position may attend, or the term that eager attention adds to its scores."""
    same = examples[:, None, :, None] == examples[:, None, None, :]
    mask = same & torch.ones_like(same[:1]).tril()
    if spec.attention != "eager":
        return mask
    dtype = torch.float32 if spec.precision == "fp32" else torch.bfloat16
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def train_step(
    trained: TrainedModel,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    spec: RunSpec,
    step: int,
    at_phase: Callable[[str], None] = lambda phase: None,
) -> StepOutput:
    """Runs one optimizer step over the batches of a gradient accumulation, and returns its losses.

    Args:
        batches: The batches, at least one. The loss is the mean over all their response tokens.
        step: The number of the step, from 0. Some methods depend on it after an update.
        at_phase: Called when ``forward``, ``backward`` and ``optimizer`` begin.
    """
    total = torch.stack([batch.response_tokens for batch in batches]).sum()
    losses, nlls = [], []
    for batch in batches:
        at_phase("forward")
        output = forward_loss(trained.model, batch, spec, total)
        loss = output.loss
        if not spec.keeps_logits:
            del output
        assert trained.loss_function.nll is not None
        nlls.append(trained.loss_function.nll)
        losses.append(loss.detach())
        at_phase("backward")
        loss.backward()
        del loss
    at_phase("optimizer")
    if spec.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], spec.max_grad_norm)
    optimizer.step()
    spec.method.after_optimizer_step(trained.model, step)
    optimizer.zero_grad(set_to_none=True)
    return StepOutput(loss=torch.stack(losses).sum(), nll=torch.stack(nlls).sum())


def rehearse(trained: TrainedModel, batch: Batch, spec: RunSpec) -> None:
    """Runs the forward and backward passes of a step on a batch, and leaves everything unchanged.

    With gradient accumulation it runs two passes, because the second one starts with gradients in memory.
    """
    devices = [torch.cuda.current_device()] if spec.device == "cuda" else []
    with torch.random.fork_rng(devices):
        for _ in range(min(2, spec.gradient_accumulation)):
            forward_loss(trained.model, batch, spec).loss.backward()
    trained.model.zero_grad(set_to_none=True)
    trained.loss_function.nll = None

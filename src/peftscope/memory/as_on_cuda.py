"""Makes a simulated step on CPU tensors keep what the same step keeps on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftscope.memory.kernels import attention_kernel, liger_chunk

FLASH_STAND_IN = "sdpa_in_16_bits"
"""SDPA in place of flash attention: it keeps the same, and like transformers it gets 16-bit numbers and no mask."""


def _flash_stand_in(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    return output, None


AttentionInterface.register(FLASH_STAND_IN, _flash_stand_in)


class _CudaDropout(torch.autograd.Function):
    """Saves what ``aten::native_dropout`` saves on CUDA: a mask with one byte per element. A CPU saves the factors."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Returns a tensor of the input's shape and dtype."""
        ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Returns a gradient with the shape and dtype of the output's gradient."""
        return torch.empty_like(grads[0])


class _LigerLoss(torch.autograd.Function):
    """Allocates what ``LigerFusedLinearCrossEntropyFunction`` does: gradients in the forward pass, logits in chunks.

    Source: liger-kernel 0.8.5, liger_kernel/ops/fused_linear_cross_entropy.py.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns a loss, (), for hidden states (N, h) and a head (V, h)."""
        rows = liger_chunk(x.shape[0], *weight.shape)
        gradients = [torch.empty_like(x), torch.empty_like(weight) if weight.requires_grad else None]
        losses = torch.empty(x.shape[0])
        if x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu"):
            torch.mm(x[:rows], weight.t(), out=torch.empty(rows, weight.shape[0], dtype=x.dtype))
        else:
            for _ in range(min(2, -(-x.shape[0] // rows))):
                logits = x[:rows] @ weight.t()
            del logits
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Returns the gradients that the forward pass made."""
        return ctx.saved_tensors


def fuse_loss(model: Any, loss_function: Any, chunked: Callable[..., torch.Tensor] | None) -> None:
    """Replaces head and loss: by Liger's in training, or by one that is chunked, as TRL's is in evaluation, too."""
    head = model.get_output_embeddings()
    project = head.forward
    if chunked:
        model.config.final_logit_softcapping = None  # its kernel does it in place

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return chunked(rows[torch.arange(len(rows))], head.weight) if chunked else _LigerLoss.apply(rows, head.weight)

    def take(x: torch.Tensor) -> torch.Tensor:
        if chunked and not model.training:
            return loss_of(x).view(*x.shape[:-1], 1)
        return x if model.training else project(x)

    head.forward = take
    loss_function._loss = lambda logits, *_, num_items_in_batch, **__: loss_of(logits).sum() / num_items_in_batch


def drop_as_on_cuda(model: torch.nn.Module) -> None:
    """Replaces the dropout of a model."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.forward = lambda x, owner=module: _CudaDropout.apply(x) if owner.training else x


def dequantised_bytes(function: Any, arguments: Any) -> int:
    """Returns what a 4-bit product of bitsandbytes takes for itself on CUDA: the layer's weights in 16 bits."""
    if str(function) != "bitsandbytes.gemm_4bit.default":
        return 0
    rows, columns = arguments[2]
    return int(2 * rows * columns)


class _GroupedProduct(torch.autograd.Function):
    """Allocates what ``grouped_mm`` does, in every precision; without data, torch 2.13 knows it in bf16 alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Returns the products of rows with the weights of their experts."""
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, offsets)
        ctx.like = [(t.shape, t.stride()) if need else None for t, need in zip((x, weight), needs, strict=False)]
        return x.new_empty(x.shape[0], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Returns the gradients of what needs one."""
        return *[grads[0].new_empty_strided(*like) if like else None for like in ctx.like], None


def grouped_products() -> Any:
    """Lets products of experts run without data."""
    return patch.object(torch.nn.functional, "grouped_mm", lambda x, w, *, offs: _GroupedProduct.apply(x, w, offs))


@contextmanager
def as_on_cuda(*, before_ampere: bool = False) -> Iterator[None]:
    """Lets attention inside this context run the math kernel where it would on CUDA, and PEFT see autocast.

    A CPU's flash kernel takes what CUDA's refuses, and keeps as much as CUDA's flash and efficient kernels. PEFT's
    4-bit layers ask only for the state of CUDA's autocast, under which they leave out casts.
    """
    attend, enabled = torch.nn.functional.scaled_dot_product_attention, torch.is_autocast_enabled

    def choose(query: torch.Tensor, *others: torch.Tensor, **options: Any) -> torch.Tensor:
        width = 2 if enabled("cpu") else query.element_size()
        masked, grouped = options.get("attn_mask") is not None, bool(options.get("enable_gqa"))
        kernel = attention_kernel(width, query.shape[-1], masked=masked, grouped=grouped, before_ampere=before_ampere)
        with sdpa_kernel(SDPBackend.MATH) if kernel == "math" else nullcontext():
            return attend(query, *others, **options)

    # A mode for functions would be off in the backward pass, where layers are recomputed.
    chosen = patch.object(torch.nn.functional, "scaled_dot_product_attention", choose)
    with chosen, patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device)):
        yield

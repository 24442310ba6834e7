"""Makes a simulated step on CPU tensors keep what the same step keeps on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from peftscope.memory.kernels import attention_kernel


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


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Lets attention inside this context run the math kernel where it would on CUDA.

    A CPU's flash kernel takes what CUDA's refuses, and keeps as much as CUDA's flash and efficient kernels.
    """
    functional: Any = torch.nn.functional
    attend = functional.scaled_dot_product_attention

    def choose(query: torch.Tensor, *others: torch.Tensor, **options: Any) -> torch.Tensor:
        width = 2 if torch.is_autocast_enabled("cpu") else query.element_size()
        masked, grouped = options.get("attn_mask") is not None, bool(options.get("enable_gqa"))
        kernel = attention_kernel(width, query.shape[-1], masked=masked, grouped=grouped)
        with sdpa_kernel(SDPBackend.MATH) if kernel == "math" else nullcontext():
            return attend(query, *others, **options)  # type: ignore[no-any-return]

    # A mode for functions would be off in the backward pass, where layers are recomputed.
    functional.scaled_dot_product_attention = choose
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attend

"""Which kernels run on CUDA, and in which pieces: that decides what a step keeps. No torch."""

from __future__ import annotations

from typing import Literal

Kernel = Literal["flash", "efficient", "math"]

WIDEST_HEAD = 256
"""The widest head of the flash kernel."""
ALIGNMENT_BYTES = 16
"""The efficient kernel reads heads in units of so many bytes."""


def attention_kernel(
    width: float, head_dim: int, *, masked: bool, grouped: bool, before_ampere: bool = False
) -> Kernel:
    """Returns the first kernel that takes the inputs of ``scaled_dot_product_attention`` on CUDA.

    The flash kernel takes 16-bit numbers without a mask; cuDNN's, which some cards prefer, keeps as much. The
    efficient kernel takes any numbers and masks, but needs a key for every query head. What is left goes to the math
    kernel, which keeps the scores of every pair of positions in 32 bits. So does all bf16 on a card before Ampere:
    there, no flash kernel runs, and the efficient one takes fp16 and fp32 alone.

    Source: torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: can_use_flash_attention,
    can_use_mem_efficient_attention (``check_batch_size_and_num_heads_dense<false>``,
    ``less_than_sm80_mem_efficient_dtypes``), priority_order.

    ``width`` is in bytes, and 2 means bf16; ``grouped``: several query heads share a key (``enable_gqa``).

    >>> attention_kernel(2, 128, masked=False, grouped=True), attention_kernel(4, 128, masked=False, grouped=True)
    ('flash', 'math')
    """
    if width == 2 and before_ampere:
        return "math"
    if width == 2 and not masked and head_dim <= WIDEST_HEAD:
        return "flash"
    return "math" if grouped or head_dim * width % ALIGNMENT_BYTES else "efficient"


LOGPROB_ROWS, LOGPROB_COLUMNS = 4096, 32768
"""Positions and tokens of the vocabulary that TRL computes logits of at a time, for chunked log-probabilities.

Source: TRL 1.16.0, trl/kernels/chunked_logprob.py and trl/trainer/utils.py.
"""


def liger_chunk(tokens: int, vocabulary: int, hidden: int) -> int:
    """Returns how many positions Liger's loss computes logits of at a time.

    Source: liger-kernel 0.8.5, liger_kernel/ops/fused_linear_cross_entropy.py, lines 111 to 113.

    >>> liger_chunk(16384, 32000, 4096)
    2048
    """
    share = -(-tokens // -(-vocabulary // hidden))
    return min(1 << (share - 1).bit_length(), tokens)

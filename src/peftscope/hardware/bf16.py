"""How a processor computes products of bf16 matrices: natively, or in fp32 with the result rounded to bf16.

Without bf16 instructions, torch and oneDNN compute such products value by value, and a training step takes more than
thirty times as long. The fp32 way adds two casts to a product of fp32 tensors. It accumulates in fp32, as native
instructions do. Only this module decides which way a process uses. It loads no torch until a product is computed.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from peftscope.errors import InputError, Problem

Way = Literal["native", "fp32"]

CPUINFO = Path("/proc/cpuinfo")
VARIABLE = "PEFTSCOPE_BF16"
"""The environment variable that forces a way."""

NATIVE_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""The names of the instructions in ``CPUINFO``: the first two on x86, the last one on Arm."""

CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that forbid newer instructions to oneDNN, which computes torch's bf16 products."""

UNCAPPED = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")
"""Parts of the values of these variables that still allow bf16 instructions."""

PRODUCTS = {
    **{f"{name}{overload}": 1 for name in ("mm", "addmm", "bmm", "baddbmm") for overload in ("", ".out")},
    "_scaled_dot_product_flash_attention_for_cpu": 1,  # its second result, the log-sum-exp, is fp32 either way
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}
"""The torch operators that compute all matrix products of a model. The number says how many of an operator's first
results have the precision of its inputs. Compiled layers call those that write into a given tensor (``mm.out``)."""


def has_native_bf16() -> bool:
    """Returns whether this processor has bf16 instructions that torch uses. On macOS torch uses none."""
    cap = next((os.environ[name].upper() for name in CAPS if os.environ.get(name)), "DEFAULT")
    if platform.system() != "Linux" or not any(part in cap for part in UNCAPPED):
        return False
    told = [line for line in CPUINFO.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return any(NATIVE_FLAGS.intersection(line.partition(":")[2].split()) for line in told)


def chosen_way() -> Way:
    """Returns how this process computes bf16 products. The processor's instructions decide, never a timing.

    Raises:
        InputError: ``PEFTSCOPE_BF16`` does not name a way.
    """
    wish = os.environ.get(VARIABLE)
    if not wish:
        return "native" if has_native_bf16() else "fp32"
    if wish not in get_args(Way):
        raise InputError(Problem(VARIABLE, f"unknown way (got {wish!r})", f"use {' or '.join(get_args(Way))}"))
    return wish  # type: ignore[return-value]


@contextmanager
def bf16_products(way: Way | None = None) -> Iterator[None]:
    """Computes bf16 products on the processor in one way inside this context; the default is the chosen way.

    The fp32 way replaces the kernels of ``PRODUCTS`` for the whole process. Its fp32 copies live inside a kernel: code
    that observes operators, such as the memory tracker, sees the same tensors either way.
    """
    if (way or chosen_way()) == "native":
        yield
        return
    import torch

    kernels = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # torch warns of the replacement
            for operator, narrowed in PRODUCTS.items():
                native = torch.library.get_kernel(f"aten::{operator}", "CPU")
                product = partial(_in_fp32, native, narrowed)
                kernels.impl(operator, product, "CPU", with_keyset=True, allow_override=True)
        yield
    finally:
        kernels._destroy()


def _in_fp32(native: Any, narrowed: int, keys: Any, *inputs: Any, **options: Any) -> Any:
    """Calls a native kernel; with bf16 inputs, computes in fp32 and rounds the first ``narrowed`` results to bf16."""
    import torch

    bf16, fp32 = torch.bfloat16, torch.float32

    def widened(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype is not bf16:
            return value
        # A weight for each row of a batch is one weight: copies of it took gigabytes at the first answered token.
        once = value[tuple(slice(1) if stride == 0 else slice(None) for stride in value.stride())]
        return once.to(fp32).expand(value.shape)

    if inputs[0].dtype is not bf16:
        return native.call_boxed(keys, *inputs, **options)
    target = options.get("out")
    options = {name: widened(value) for name, value in options.items()}
    result = native.call_boxed(keys, *map(widened, inputs), **options)
    if target is not None:
        return target.copy_(result)
    if isinstance(result, torch.Tensor):
        return result.to(bf16)
    return tuple(value.to(bf16) if index < narrowed else value for index, value in enumerate(result))

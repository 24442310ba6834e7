"""Bases whose linear layers are stored in few bits: the formats of checkpoints, and what a product keeps. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from peftscope.errors import shown


class Stored(NamedTuple):
    """How the linear layers of a frozen base are stored.

    Attributes:
        name: The name of the format.
        parts: What a layer keeps, and its bytes a weight. Constants of a row or a column are left out.
        product: What a product does: unpack the layer in both passes, unpack it in the backward pass alone, keep what
            it unpacked for the backward pass, or round its input as well.
        source: The code that says so.
    """

    name: str
    parts: dict[str, float]
    product: Literal["both", "backward", "kept", "int8"]
    source: str


INT8 = Stored("int8", {"int8 weights": 1.0}, "int8", "bitsandbytes 0.50, autograd/_functions.py, MatMul8bitLt")
BLOCK = 64
"""Weights that share one block constant in bitsandbytes' 4-bit storage; 256 such constants share one in turn."""
UNPACKED = {
    "mxfp4": "transformers 5.24 trains no MXFP4 (quantizer_mxfp4.py:209); it is unpacked to 16 bits when loaded"
}
"""Formats that are unpacked to train, and what an answer says."""


def four_bits(*, nested: bool) -> dict[str, float]:
    """Returns what bitsandbytes keeps of a weight in 4 bits."""
    parts = {"4-bit weights": 0.5, "block constants": (1 if nested else 4) / BLOCK}
    return parts | ({"constants of block constants": 4 / BLOCK / 256} if nested else {})


def stored_as(how: Mapping[str, Any]) -> Stored:
    """Returns the format that the ``quantization_config`` of a ``config.json`` describes.

    Raises:
        ValueError: The format is not modelled.
    """
    name = how.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in how else "unknown")
    if name == "bitsandbytes" and how.get("load_in_8bit"):
        return INT8
    if name == "bitsandbytes":
        nested = bool(how.get("bnb_4bit_use_double_quant"))
        return Stored("bnb-4bit", four_bits(nested=nested), "both", "bitsandbytes 0.50, functional.py, quantize_4bit")
    if name in ("gptq", "awq"):
        bits, group = int(how.get("bits") or 4), int(how.get("group_size") or 128)
        parts = {"packed weights": bits / 8}
        parts |= {"scales and zeros of groups": (2 + bits / 8) / group} if group > 0 else {}
        return Stored(name, parts, "kept", "GPTQModel at 011c00a, qlinear/torch.py: unpacked weights meet autograd")
    if name == "fp8":
        rows, columns = how.get("weight_block_size") or (0, 0)
        scales = {"scales of blocks": 4 / (rows * columns)} if rows else {}
        source = "transformers 5.24, integrations/finegrained_fp8.py, FP8LinearFunction"
        return Stored("fp8", {"fp8 weights": 1.0} | scales, "backward", source)
    raise ValueError(f"a checkpoint that is quantised ({shown(name)}) is not modelled")

"""Bases whose linear layers are stored in few bits: the formats of checkpoints, and what a product keeps. No torch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from peftscope.errors import InputError, Problem, shown


class Stored(NamedTuple):
    """How the linear layers of a frozen base are stored: the bytes a weight of each part, without those of a row.

    A product unpacks the layer in both passes or in the backward pass alone, keeps what it unpacked for the backward
    pass, or rounds its input to 8 bits as well. The source says so.
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


def stored_as(how: Any) -> tuple[Stored | None, str]:
    """Returns the format that the ``quantization_config`` of a ``config.json`` describes, and what else to say of it.

    Raises:
        InputError: The format is not modelled.
    """
    if not isinstance(how, dict) or not how:
        return None, ""
    name = str(how.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in how else "unknown"))
    if name in UNPACKED:
        return None, UNPACKED[name]
    if name == "bitsandbytes" and how.get("load_in_8bit"):
        return INT8, ""
    if name == "bitsandbytes":
        nested = bool(how.get("bnb_4bit_use_double_quant"))
        return Stored(
            "bnb-4bit", four_bits(nested=nested), "both", "bitsandbytes 0.50, functional.py, quantize_4bit"
        ), ""
    numbers = [how.get("bits", 4), how.get("group_size", 128), *(how.get("weight_block_size") or (1, 1))]
    is_known = name in ("gptq", "awq", "fp8") and len(numbers) == 4 and numbers[0] in (2, 3, 4, 8)
    if not is_known or not all(isinstance(n, int) and (n > 0 or n == -1) for n in numbers):
        message = f"a checkpoint that is quantised ({shown(name)}) is not modelled"
        raise InputError(Problem("model", message, "give the config.json of its 16-bit base"))
    if name == "fp8":
        scales = {"scales of blocks": 4 / (numbers[2] * numbers[3])} if how.get("weight_block_size") else {}
        source = "transformers 5.24, integrations/finegrained_fp8.py, FP8LinearFunction"
        return Stored("fp8", {"fp8 weights": 1.0} | scales, "backward", source), ""
    bits, group = numbers[:2]
    parts = {"packed weights": bits / 8} | ({"scales and zeros of groups": (2 + bits / 8) / group} if group > 0 else {})
    return Stored(name, parts, "kept", "GPTQModel at 011c00a, qlinear/torch.py: unpacked weights meet autograd"), ""

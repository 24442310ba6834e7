"""The share of one card if several hold a model, or the host a part of it. No torch.

All of it is formula only: the simulation knows one card and one training step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from peftscope.memory.formula.linear import COPY
from peftscope.memory.formula.terms import OPTIMIZER_COPY, sizes_of
from peftscope.memory.question import Question
from peftscope.memory.trace import Block, Trace, factors

RESIDENT = ("weights", "quantised weights", "adapters", "gradients", "optimizer states")
"""Kinds of blocks that persist from step to step. FSDP and ZeRO-3 shard all, ZeRO-2 those that are no weights."""
WEIGHTS = ("weights", "quantised weights", "adapters")

GATHERED_WEIGHTS = "weights gathered from other cards"
FETCHED_WEIGHTS = "weights fetched from the host"
GATHERED_OUTSIDE = "weights outside of layers, gathered in a pass"
WHOLE_GRADIENTS = "gradients of a layer on their way to other cards or the host"
MASTER = "32-bit copies of trained weights (ZeRO-2)"
WIDE_GRADIENTS = "32-bit copies of gradients (ZeRO-2)"
BUCKETS = "buffers of gradients (ZeRO-2)"
NARROW = "16-bit weights and gradients beside 32-bit ones (ZeRO-3)"
SUB_GROUP = 10**9
"""The values of which ZeRO-3 holds gradients and temporaries of the step in 32 bits at once: its sub_group_size."""
GATHERS = {"zero3": (2, False, 0), "fsdp1": (2, True, 1), "fsdp2": (3, True, 2)}
"""How many layers are gathered at once, whether what is outside of layers stays, and how often a layer's gradients."""

PACKED = "4-bit weights"
"""The term of the weights of a 4-bit base, apart from their constants."""


def _cards(question: Question, block: Block) -> int:
    """Returns over how many cards a block is spread: 1 if a card has it whole, 0 if the host has it."""
    beside, of_optimizer = question.beside, block.term == OPTIMIZER_COPY or block.kind == "optimizer states"
    if block.kind not in RESIDENT and not of_optimizer:
        return 1
    way = beside.sharding if question.gpus > 1 else ""
    integers = block.term != PACKED or (way == "fsdp2" and beside.quant_storage == "uint8")
    if way == "zero2" and block.kind in WEIGHTS:
        return 1
    if way in ("fsdp1", "fsdp2") and block.kind == "quantised weights" and integers:
        return 1
    if beside.offload == "parameters" or (beside.offload == "optimizer" and (of_optimizer or way == "zero2")):
        return 0
    return question.gpus


def _trains(question: Question, block: Block) -> bool:
    """Returns whether a block holds trained weights. Frozen embeddings, a vision tower and a reference are not."""
    method = question.spec.method
    frozen = ("embed_tokens", "lm_head") if getattr(method, "embeddings", "") == "frozen" else ()
    full = method.trains_base and block.kind == "weights"
    return (full and not block.module.startswith(("vision_tower", "reference.", *frozen))) or block.kind == "adapters"


def _times(question: Question, block: Block) -> int:
    """Returns how many times a block is as large where shards of trained weights are kept in fp32."""
    spec, zero2 = question.spec, question.gpus > 1 and question.beside.sharding == "zero2"
    if (question.beside.master_weights != "fp32" and not zero2) or spec.precision != "bf16":
        return 1
    copied, of_states = block.term == OPTIMIZER_COPY, block.kind == "optimizer states"
    kinds = ("optimizer states",) if zero2 else RESIDENT
    if (of_states and spec.optimizer != "adamw") or not (copied or block.kind in kinds):
        return 1  # the states of bitsandbytes do not depend on the weights
    narrow = spec.method.trains_base or getattr(spec.method, "adapter_dtype", "") == "base"
    narrow = narrow or (COPY in block.module and question.beside.modules_to_save_dtype == "base")
    return 2 if narrow and (_trains(question, block) or block.kind not in WEIGHTS) else 1


def _beside_zero2(question: Question, phase: str, trained: list[Block]) -> list[Block]:
    """Returns what DeepSpeed's ZeRO-2 keeps beside a card's weights, shares of gradients and shares of states.

    Source: DeepSpeed at 02aa38c, runtime/zero/stage_1_and_2.py: single_partition_of_fp32_groups, ipg_buffer.
    """
    beside, widths = question.beside, [factors(block.formula)[0] for block in trained]
    values = sum(block.size / width for block, width in zip(trained, widths, strict=True))
    share = 0 if beside.offload == "optimizer" else -(-4 * int(values) // question.gpus)
    blocks = [Block(share, "optimizer states", term=MASTER)]
    if phase == "optimizer":
        blocks.append(Block(share, "temporaries", term=WIDE_GRADIENTS))
    if phase == "backward":
        size = int((beside.reduce_bucket or sizes_of(question)["h"] ** 2) * max(widths, default=0))
        blocks.append(Block(size, "temporaries", term=BUCKETS))
    return blocks


def on_card(question: Question, trace: Trace) -> Trace:
    """Returns a trace whose blocks have the bytes that they have on one card, for the places of its peaks."""

    def size(block: Block) -> int:
        cards = _cards(question, block)
        return block.size * _times(question, block) // cards if cards else 0

    return Trace([replace(block, size=size(block)) for block in trace.blocks], trace.events, trace.marks)


def share_of(question: Question, phase: str, blocks: list[Block]) -> list[Block]:
    """Returns the blocks on one card: its shares, what stays there, and layers that are gathered while a model runs.

    Source: torch 2.13, distributed/fsdp/_fully_shard/_fully_shard.py:187 (the root stays gathered),
    _fsdp_collectives.py:431 (a buffer beside the gathered layer) and _fsdp_api.py:183 (CPUOffloadPolicy); accelerate
    1.15, utils/fsdp_utils.py:797 (weights that are packed into integers are left out).
    """
    gpus, beside = question.gpus, question.beside
    share: list[Block] = []
    layers: dict[str, int] = defaultdict(int)
    trained: dict[str, int] = defaultdict(int)
    for block in blocks:
        cards, times = _cards(question, block), _times(question, block)
        if cards and (cards, times) != (1, 1):
            part = str(times) if cards == 1 else f"{times}/G"
            formula = f"{block.formula}·{part}" if block.formula else ""
            share.append(Block(-(-block.size * times // cards), block.kind, block.module, block.term, formula))
        elif cards:
            share.append(block)
        if block.kind in WEIGHTS and cards != 1:
            owner = ".".join(block.module.split(".")[:2]) if block.module.startswith("layers.") else block.module
            layers[owner] += block.size
            if _trains(question, block):
                trained[owner] += block.size
    if gpus > 1 and beside.sharding == "zero2":
        return share + _beside_zero2(question, phase, [block for block in blocks if _trains(question, block)])
    kept = gpus > 1, question.spec.precision, beside.sharding, beside.master_weights, beside.offload
    if phase == "optimizer" and kept == (True, "bf16", "zero3", "fp32", "none"):
        # Source: DeepSpeed at edaa722, runtime/zero/stage3.py: grad_partitions_flat_buffer, _prepare_sub_group
        values = sum(trained.values()) // 2 // gpus
        share.append(Block(max(0, min(4 * values, 8 * SUB_GROUP - 4 * values)), "temporaries", term=NARROW))
    if phase in ("load", "optimizer") or not layers:
        return share
    at_once, root_stays, gradients = GATHERS[beside.sharding if gpus > 1 else "zero3"]
    term = GATHERED_WEIGHTS if gpus > 1 else FETCHED_WEIGHTS
    units = [size for owner, size in layers.items() if "layers." in owner or not root_stays]
    more = {term: at_once * max(units, default=0)}
    if root_stays:
        more[GATHERED_OUTSIDE] = sum(size for owner, size in layers.items() if "layers." not in owner)
    if phase == "backward" and trained and (gradients or beside.offload == "parameters"):
        more[WHOLE_GRADIENTS] = max(gradients, 1) * max(trained.values())
    return share + [Block(size, "temporaries", term=name) for name, size in more.items()]

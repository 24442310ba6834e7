"""What one card holds if several share a model, or the host a part of it. No torch.

All of it is formula only: the simulation knows one card and one training step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from peftscope.memory.formula.linear import COPY
from peftscope.memory.formula.terms import OPTIMIZER_COPY
from peftscope.memory.question import Question
from peftscope.memory.trace import Block, Trace

RESIDENT = ("weights", "quantised weights", "adapters", "gradients", "optimizer states")
"""Kinds of blocks that persist from step to step. FSDP and ZeRO-3 shard them over the cards."""
WEIGHTS = ("weights", "quantised weights", "adapters")

GATHERED_WEIGHTS = "weights gathered from other cards"
FETCHED_WEIGHTS = "weights fetched from the host"
GATHERED_OUTSIDE = "weights outside of layers, gathered in a pass"
WHOLE_GRADIENTS = "gradients of a layer on their way to other cards or the host"

PACKED = "4-bit weights"
"""The term of the weights of a 4-bit base, apart from their constants."""


def _cards(question: Question, block: Block) -> int:
    """Returns over how many cards a block is spread: 1 if a card has it whole, 0 if the host has it."""
    beside = question.beside
    copied = block.term == OPTIMIZER_COPY
    if block.kind not in RESIDENT and not copied:
        return 1
    fsdp2 = question.gpus > 1 and beside.sharding == "fsdp2"
    if fsdp2 and block.kind == "quantised weights" and (block.term != PACKED or beside.quant_storage == "uint8"):
        return 1
    of_optimizer = copied or block.kind == "optimizer states"
    if beside.offload == "parameters" or (beside.offload == "optimizer" and of_optimizer):
        return 0
    return question.gpus


def _times(question: Question, block: Block) -> int:
    """Returns how many times a block is as large where shards of trained weights are kept in fp32."""
    spec, beside = question.spec, question.beside
    if beside.master_weights != "fp32" or spec.precision != "bf16":
        return 1
    copied, of_states = block.term == OPTIMIZER_COPY, block.kind == "optimizer states"
    if (of_states and spec.optimizer != "adamw") or not (copied or block.kind in RESIDENT):
        return 1  # the states of bitsandbytes do not depend on the weights
    narrow = spec.method.trains_base or getattr(spec.method, "adapter_dtype", "") == "base"
    narrow = narrow or (COPY in block.module and beside.modules_to_save_dtype == "base")
    trained = spec.method.trains_base or block.kind not in ("weights", "quantised weights")
    return 2 if narrow and trained else 1


def on_card(question: Question, trace: Trace) -> Trace:
    """Returns a trace whose blocks have the bytes that they have on one card, for the places of its peaks."""
    cards = [_cards(question, block) for block in trace.blocks]
    sizes = [
        block.size * _times(question, block) // number if number else 0
        for block, number in zip(trace.blocks, cards, strict=True)
    ]
    blocks = [replace(block, size=size) for block, size in zip(trace.blocks, sizes, strict=True)]
    return Trace(blocks, trace.events, trace.marks)


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
            if block.kind == "adapters" or question.spec.method.trains_base:
                trained[owner] += block.size
    if phase in ("load", "optimizer") or not layers:
        return share
    largest = max(layers.values())
    term = GATHERED_WEIGHTS if gpus > 1 else FETCHED_WEIGHTS
    fsdp2 = gpus > 1 and beside.sharding == "fsdp2"
    if fsdp2:
        inside = max((size for owner, size in layers.items() if "layers." in owner), default=0)
        outside = sum(size for owner, size in layers.items() if "layers." not in owner)
        more = {term: 3 * inside, GATHERED_OUTSIDE: outside}
    else:
        more = {term: 2 * largest}
    if phase == "backward" and trained and (fsdp2 or beside.offload == "parameters"):
        more[WHOLE_GRADIENTS] = (2 if fsdp2 else 1) * max(trained.values())
    return share + [Block(size, "temporaries", term=name) for name, size in more.items()]

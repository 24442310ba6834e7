"""A table that compares figures from introductions to LoRA and QLoRA, on the memory of a 7B model, with our own.

Each line has a statement, the claimed figure, and the question that gives our figure. Our figures are simulated, unless
the line says that they come from arithmetic or from the closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from peftscope.hardware.cards import Gpu, find_gpu
from peftscope.memory.answer import Answer, peaks_by_formula
from peftscope.memory.fit import options_of_method
from peftscope.memory.grid import CHAPTER_RUN, MODEL
from peftscope.memory.question import ask, describe_model
from peftscope.memory.simulate import answer_by_simulation

GB = 10**9
LARGEST_SHARDING = 64

FULL = {"method": "full"}
FULL_AMP = {"method": "full", "precision": "amp"}
LORA = {"method": "lora", "targets": "attention"}
QLORA = {"method": "qlora", "targets": "attention"}
QLORA_BF16 = QLORA | {"adapter_dtype": "base"}
QLORA_CHECKPOINTED = QLORA | {"checkpointing": True}


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        statement: The statement, in our words.
        theirs: The claimed figure.
        ours: A function that computes our figure, with its unit.
        setting: The run behind our figure.
        why: The reason why the two differ, or what was counted.
    """

    statement: str
    theirs: str
    ours: Callable[[], str]
    setting: str
    why: str


@cache
def _answer(model: str, options: tuple[tuple[str, Any], ...]) -> Answer:
    return answer_by_simulation(ask(describe_model(model), CHAPTER_RUN | dict(options)))


def _simulated(options: dict[str, Any], model: str = MODEL) -> Answer:
    return _answer(model, tuple(options.items()))


def _kind(options: dict[str, Any], *kinds: str) -> Callable[[], str]:
    """Returns a function that gives the bytes of some kinds at the peak."""
    return lambda: _gb(sum(_simulated(options).components.get(kind, 0) for kind in kinds))


def _adapter_states() -> str:
    """Returns the bytes of QLoRA's gradients and optimizer states: three 32-bit values for each trained parameter."""
    trained = _simulated(QLORA).trainable_parameters
    assert trained is not None
    return _gb(3 * 4 * trained)


def _total(options: dict[str, Any], model: str = MODEL) -> Callable[[], str]:
    def total() -> str:
        answer = _simulated(options, model)
        return f"{_gb(answer.peak_allocated_bytes)} allocated, {_gb(answer.peak_device_bytes)} on the card"

    return total


def _fits(options: dict[str, Any], card: Gpu, model: str = MODEL) -> Callable[[], str]:
    def verdict() -> str:
        left = card.memory_bytes - _simulated(options, model).peak_device_bytes
        return f"{'fits' if left >= 0 else 'does not fit'}: {_gb(abs(left))} {'left' if left >= 0 else 'missing'}"

    return verdict


def _cards(options: dict[str, Any], card: Gpu) -> Callable[[], str]:
    """Returns a function that gives the number of cards, with weights, gradients and states sharded, in closed form."""

    def count() -> str:
        model, chosen = describe_model(MODEL), options_of_method(str(options["method"]), CHAPTER_RUN | options)
        for gpus in range(1, LARGEST_SHARDING + 1):
            if peaks_by_formula(ask(model, chosen, gpu=card, gpus=gpus)).device_bytes <= card.memory_bytes:
                return f"{gpus} of {card.name}"
        return f"more than {LARGEST_SHARDING} of {card.name}"

    return count


def _loaded(precision: str) -> Callable[[], str]:
    """Returns a function that gives the bytes of all weights after loading."""
    if precision == "nf4":
        return _kind(QLORA, "weights", "quantised weights")
    return _kind({"method": "lora", "targets": "attention", "precision": precision}, "weights")


def _int8() -> str:
    """Returns the bytes of an 8-bit model: one for each weight of a linear layer, and a 32-bit scale for each row."""
    shape = describe_model(MODEL).shape
    assert shape is not None
    rows = shape.num_layers * sum(layer.outputs for layer in shape.block)
    return _gb(shape.linear_parameters + 4 * rows + 2 * (shape.parameters - shape.linear_parameters))


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def lines() -> tuple[Line, ...]:
    """Returns all lines of the table."""
    a100, rtx4090 = find_gpu("a100-80gb"), find_gpu("rtx4090")
    card8, card48 = find_gpu("8GiB"), find_gpu("48GiB")
    bf16, amp, seven = "full, pure BF16", "full, 32-bit weights under autocast", "LoRA on attention, r = 8"
    qlora, checkpointed = "QLoRA on attention, r = 8", "QLoRA on attention, r = 8, checkpointing"
    return (
        Line("Full fine-tuning: weights", "14 GB", _kind(FULL, "weights"), bf16, "The model has fewer than 7·10⁹."),
        Line("Full fine-tuning: gradients", "14 GB", _kind(FULL, "gradients"), bf16, "As large as the weights."),
        Line(
            "Full fine-tuning: AdamW's states",
            "56 GB",
            _kind(FULL, "optimizer states"),
            bf16,
            "torch keeps both moments in the parameters' precision: 2 bytes each, not 4.",
        ),
        Line(
            "Full fine-tuning: AdamW's states",
            "56 GB",
            _kind(FULL_AMP, "optimizer states"),
            amp,
            "With 32-bit weights the states are as claimed, but then weights and gradients take 4 bytes as well.",
        ),
        Line(
            "Full fine-tuning: total",
            "84 GB and more",
            _total(FULL),
            bf16,
            "The states are half of the claim; a temporary copy that the optimizer makes comes on top.",
        ),
        Line(
            "Full fine-tuning: total",
            "84 GB and more",
            _total(FULL_AMP),
            amp,
            "No single setting of torch gives the claimed sum, which adds 16-bit weights and 32-bit states.",
        ),
        Line("Full fine-tuning: cards", "at least 4 A100 80 GB", _cards(FULL, a100), bf16, "Sharded; closed form."),
        Line("Full fine-tuning: cards", "at least 4 A100 80 GB", _cards(FULL_AMP, a100), amp, "Sharded; closed form."),
        Line("LoRA: total", "16 GB", _total(LORA), seven, "16-bit weights, and activations of one sequence of 512."),
        Line("LoRA on a 4090", "fits", _fits(LORA, rtx4090), seven, "The device peak, with the CUDA context."),
        Line(
            "QLoRA: base in NF4",
            "3.5 GB",
            _kind(QLORA, "quantised weights"),
            qlora,
            "Half a byte per weight and the block constants, for linear layers only.",
        ),
        Line(
            "QLoRA: base with what stays in 16 bits",
            "3.5 GB",
            _kind(QLORA, "weights", "quantised weights"),
            qlora,
            "Embeddings, head and norms are not quantised.",
        ),
        Line("QLoRA: adapters in BF16", "0.1 GB", _kind(QLORA_BF16, "adapters"), qlora, "Only attention has them."),
        Line("QLoRA: adapters", "0.1 GB", _kind(QLORA, "adapters"), qlora, "PEFT keeps adapters in 32 bits."),
        Line(
            "QLoRA: gradients and states",
            "0.5 GB",
            _adapter_states,
            "by arithmetic",
            "Three 32-bit values per adapter weight; they need not all be alive at the peak.",
        ),
        Line(
            "QLoRA: activations",
            "2 to 3 GB",
            _kind(QLORA, "saved activations", "logits and loss", "temporaries"),
            qlora,
            "Saved activations, logits and temporaries at the peak, which grow with the tokens of a batch.",
        ),
        Line(
            "QLoRA: activations",
            "2 to 3 GB",
            _kind(QLORA_CHECKPOINTED, "saved activations", "logits and loss", "temporaries"),
            checkpointed,
            "Checkpointing recomputes most of them in the backward pass.",
        ),
        Line("QLoRA: total", "6 to 7 GB", _total(QLORA), qlora, "Depends on the length, which is not stated."),
        Line("QLoRA: total", "6 to 7 GB", _total(QLORA_CHECKPOINTED), checkpointed, "The same with checkpointing."),
        Line("QLoRA on 8 GB", "fits", _fits(QLORA, card8), qlora, "The device peak, with the CUDA context."),
        Line("QLoRA on 8 GB", "fits", _fits(QLORA_CHECKPOINTED, card8), checkpointed, "The same with checkpointing."),
        Line("QLoRA of 65B on 48 GB", "fits", _fits(QLORA, card48, "llama-65b"), qlora, "One sequence of 512."),
        Line(
            "QLoRA of 65B on 48 GB",
            "fits",
            _fits(QLORA_CHECKPOINTED, card48, "llama-65b"),
            checkpointed,
            "One sequence of 512 tokens, checkpointed as in the QLoRA paper.",
        ),
        Line("Weights in FP32", "28 GB", _loaded("fp32"), "loaded", "The model has fewer than 7·10⁹."),
        Line("Weights in BF16", "14 GB", _loaded("bf16"), "loaded", "The model has fewer than 7·10⁹."),
        Line(
            "Weights in INT8",
            "7 GB",
            _int8,
            "by arithmetic",
            "Embeddings and norms keep 16 bits; the scales come on top.",
        ),
        Line(
            "Weights in NF4",
            "3.5 GB",
            _loaded("nf4"),
            "loaded",
            "Embeddings and norms keep 16 bits; the block constants come on top.",
        ),
    )


def rebuild() -> Iterator[dict[str, str]]:
    """Yields the rows of the table. A line that does not say otherwise is about ``MODEL`` and ``CHAPTER_RUN``."""
    for line in lines():
        yield {
            "what": line.statement,
            "theirs": line.theirs,
            "ours": line.ours(),
            "run": line.setting,
            "why": line.why,
        }

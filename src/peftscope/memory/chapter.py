"""Figures that introductions to LoRA and QLoRA give for the memory of a 7B model, line by line, beside our own.

Each line is what is said, and how to ask for the same thing here. Every number of ours is computed: simulated where
tensors of a step are asked for, by arithmetic or in closed form where the line says so.
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
        statement: What is said, in our words.
        theirs: The figure that is claimed.
        ours: Computes what is found, with its unit.
        setting: The run behind it.
        why: Why the two differ, or what was counted.
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
    """Returns what is alive of some kinds at the peak."""
    return lambda: _gb(sum(_simulated(options).components.get(kind, 0) for kind in kinds))


def _adapter_states() -> str:
    """Returns the bytes of QLoRA's gradients and optimizer states: three 32-bit values a trained parameter."""
    trained = _simulated(QLORA).trainable_parameters
    assert trained is not None
    return _gb(3 * 4 * trained)


def _total(options: dict[str, Any], model: str = MODEL) -> Callable[[], str]:
    def found() -> str:
        answer = _simulated(options, model)
        return f"{_gb(answer.peak_allocated_bytes)} allocated, {_gb(answer.peak_device_bytes)} on the card"

    return found


def _fits(options: dict[str, Any], card: Gpu, model: str = MODEL) -> Callable[[], str]:
    def found() -> str:
        left = card.memory_bytes - _simulated(options, model).peak_device_bytes
        return f"{'fits' if left >= 0 else 'does not fit'}: {_gb(abs(left))} {'left' if left >= 0 else 'missing'}"

    return found


def _cards(options: dict[str, Any], card: Gpu) -> Callable[[], str]:
    """Returns how many cards it takes when weights, gradients and states are sharded, in closed form."""

    def found() -> str:
        model, chosen = describe_model(MODEL), options_of_method(str(options["method"]), CHAPTER_RUN | options)
        for gpus in range(1, LARGEST_SHARDING + 1):
            if peaks_by_formula(ask(model, chosen, gpu=card, gpus=gpus)).device_bytes <= card.memory_bytes:
                return f"{gpus} of {card.name}"
        return f"more than {LARGEST_SHARDING} of {card.name}"

    return found


def _loaded(precision: str) -> Callable[[], str]:
    """Returns the bytes of all weights as they are loaded."""
    if precision == "nf4":
        return _kind(QLORA, "weights", "quantised weights")
    return _kind({"method": "lora", "targets": "attention", "precision": precision}, "weights")


def _int8() -> str:
    """Returns the bytes with one for each weight of a linear layer and a 32-bit scale for each of its rows."""
    shape = describe_model(MODEL).shape
    assert shape is not None
    rows = shape.num_layers * sum(layer.outputs for layer in shape.block)
    return _gb(shape.linear_parameters + 4 * rows + 2 * (shape.parameters - shape.linear_parameters))


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"


def lines() -> tuple[Line, ...]:
    """Returns every line."""
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
            "States are half of what is claimed; a temporary copy of the optimizer comes on top.",
        ),
        Line(
            "Full fine-tuning: total",
            "84 GB and more",
            _total(FULL_AMP),
            amp,
            "No single regime of torch gives the claimed sum: it adds 16-bit weights to 32-bit states.",
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
            "Half a byte a weight and its block constants, for linear layers only.",
        ),
        Line(
            "QLoRA: base with what stays in 16 bits",
            "3.5 GB",
            _kind(QLORA, "weights", "quantised weights"),
            qlora,
            "Embeddings, head and norms are not quantised.",
        ),
        Line("QLoRA: adapters in BF16", "0.1 GB", _kind(QLORA_BF16, "adapters"), qlora, "Attention only: smaller."),
        Line("QLoRA: adapters", "0.1 GB", _kind(QLORA, "adapters"), qlora, "PEFT keeps adapters in 32 bits."),
        Line(
            "QLoRA: gradients and states",
            "0.5 GB",
            _adapter_states,
            "by arithmetic",
            "Three 32-bit values an adapter weight, which need not be at the peak together.",
        ),
        Line(
            "QLoRA: activations",
            "2 to 3 GB",
            _kind(QLORA, "saved activations", "logits and loss", "temporaries"),
            qlora,
            "Saved activations, logits and temporaries at the peak; in proportion to the tokens of a batch.",
        ),
        Line(
            "QLoRA: activations",
            "2 to 3 GB",
            _kind(QLORA_CHECKPOINTED, "saved activations", "logits and loss", "temporaries"),
            checkpointed,
            "Recomputed in the backward pass, most of them go.",
        ),
        Line("QLoRA: total", "6 to 7 GB", _total(QLORA), qlora, "Depends on the length, which is not stated."),
        Line("QLoRA: total", "6 to 7 GB", _total(QLORA_CHECKPOINTED), checkpointed, "The same with recomputation."),
        Line("QLoRA on 8 GB", "fits", _fits(QLORA, card8), qlora, "The device peak, with the CUDA context."),
        Line("QLoRA on 8 GB", "fits", _fits(QLORA_CHECKPOINTED, card8), checkpointed, "The same with recomputation."),
        Line("QLoRA of 65B on 48 GB", "fits", _fits(QLORA, card48, "llama-65b"), qlora, "LLaMA-65B, one of 512."),
        Line(
            "QLoRA of 65B on 48 GB",
            "fits",
            _fits(QLORA_CHECKPOINTED, card48, "llama-65b"),
            checkpointed,
            "LLaMA-65B, one of 512, as the QLoRA paper does it.",
        ),
        Line("Weights in FP32", "28 GB", _loaded("fp32"), "loaded", "The model has fewer than 7·10⁹."),
        Line("Weights in BF16", "14 GB", _loaded("bf16"), "loaded", "The model has fewer than 7·10⁹."),
        Line(
            "Weights in INT8",
            "7 GB",
            _int8,
            "by arithmetic",
            "Embeddings and norms keep 16 bits; scales on top.",
        ),
        Line(
            "Weights in NF4",
            "3.5 GB",
            _loaded("nf4"),
            "loaded",
            "Embeddings and norms keep 16 bits; constants on top.",
        ),
    )


def rebuild() -> Iterator[dict[str, str]]:
    """Yields the table's rows; the model is ``MODEL`` and the run ``CHAPTER_RUN``, where nothing else is said."""
    for line in lines():
        yield {
            "what": line.statement,
            "theirs": line.theirs,
            "ours": line.ours(),
            "run": line.setting,
            "why": line.why,
        }

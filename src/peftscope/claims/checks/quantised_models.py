"""The effect of four-bit weights on a model's output. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from peftscope.claims.checks.codes import CodeBook
from peftscope.claims.measurement import Measurement, mean_of
from peftscope.claims.subjects import fetched_model, text_windows, window_losses
from peftscope.models.stored import BLOCK

WINDOWS = 48
AT_ONCE = 8
"""The windows of one forward pass: the logits of all would take a gigabyte."""

UNTOUCHED = "not rounded"
DOUBLE = "nf4 with double quantization"


def loss_added_by_rivals(model: str, code: str, rivals: Sequence[str]) -> Measurement:
    """Returns by how much more the nearest rival raises a language model's loss on prose than a code does, in nats."""
    return _added(_losses, model, code, rivals, "loss", (UNTOUCHED,))


def loss_added_by_double_quantization(model: str) -> Measurement:
    """Returns by how much a language model's loss on prose rises when NF4's constants are quantised too, in nats."""
    return _added(_losses, model, "nf4", [DOUBLE], "loss", (UNTOUCHED,))


def shift_added_by_rivals(model: str, code: str, rivals: Sequence[str]) -> Measurement:
    """Returns by how much further the nearest rival moves an encoder's embeddings than a code does, in %.

    Weights and codes are as in ``loss_added_by_rivals``. An embedding is the mean of a window's token vectors; its
    shift is told in % of its norm.
    """
    return _added(_shifts, model, code, rivals, "shift in %")


def shift_added_by_double_quantization(model: str) -> Measurement:
    """Returns by how much further NF4 moves an encoder's embeddings when its constants are quantised too, in %."""
    return _added(_shifts, model, "nf4", [DOUBLE], "shift in %")


@cache
def _losses(model: str, rounding: str) -> tuple[float, ...]:
    """Returns the mean loss of every window of text."""
    language_model = _rounded(fetched_model(model, "AutoModelForCausalLM"), rounding)
    found: list[float] = []
    for windows in text_windows(model, WINDOWS).split(AT_ONCE):
        found += window_losses(language_model, windows).tolist()
    return tuple(round(loss, 6) for loss in found)


@cache
def _shifts(model: str, rounding: str) -> tuple[float, ...]:
    """Returns how far each window's embedding moves, in % of its norm."""
    exact, moved = (_embeddings(model, name) for name in (UNTOUCHED, rounding))
    return tuple((100 * (moved - exact).norm(dim=1) / exact.norm(dim=1)).tolist())


def _embeddings(model: str, rounding: str) -> torch.Tensor:
    with torch.no_grad():
        return _rounded(fetched_model(model, "AutoModel"), rounding)(text_windows(model, WINDOWS))[0].mean(1)


def _rounded(model: Any, rounding: str) -> Any:
    """Rounds the linear weights inside a model's blocks; embeddings, norms, head and pooler stay as they are."""
    rounded = _rounding(rounding)
    for name, module in model.named_modules():
        if "layer" in name and isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data)
    return model.eval()


def _rounding(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name == UNTOUCHED:
        return lambda weight: weight
    book = CodeBook("nf4" if name == DOUBLE else name)
    return lambda weight: book.rounded(weight, BLOCK, double=name == DOUBLE)


def _added(
    measure: Callable[[str, str], tuple[float, ...]],
    model: str,
    code: str,
    rivals: Sequence[str],
    quantity: str,
    beside: Sequence[str] = (),
) -> Measurement:
    """Returns the mean rise of a quantity from a code to its nearest rival, paired by window."""
    values = {name: measure(model, name) for name in (*beside, code, *rivals)}
    nearest = min(rivals, key=lambda name: sum(values[name]))
    rises = tuple(b - a for a, b in zip(values[code], values[nearest], strict=True))
    evidence = {f"{quantity}, {name}": sum(each) / len(each) for name, each in values.items()}
    return mean_of(rises, samples=rises, evidence=evidence | {"measured against": nearest}, model=model)

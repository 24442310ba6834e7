"""The effect of four-bit weights on a model's output. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscope.analysis.stats import mean_interval
from peftscope.claims.checks.codes import CodeBook
from peftscope.claims.measurement import Measurement, NotRunError
from peftscope.claims.subjects import weight_matrices
from peftscope.models.catalog import LOCAL, model_folder

if TYPE_CHECKING:
    import torch

WINDOW_TOKENS = 128
BLOCK = 64
"""The weights per constant."""

UNTOUCHED = "not rounded"
DOUBLE = "nf4 with double quantization"


def loss_added_by_rivals(model: str, code: str, rivals: Sequence[str]) -> Measurement:
    """Returns by how much more the nearest rival raises a language model's loss on prose than a code does, in nats.

    Args:
        model: The model whose linear weights inside the blocks are rounded.
        code: The name of a ``CodeBook``.
        rivals: The codes to compare with.
    """
    losses = {name: _losses(model, name) for name in (UNTOUCHED, code, *rivals)}
    nearest = min(rivals, key=lambda name: sum(losses[name]))
    return _rise(model, losses, code, nearest)


def loss_added_by_double_quantization(model: str) -> Measurement:
    """Returns by how much a language model's loss on prose rises when NF4's constants are quantised too, in nats."""
    return _rise(model, {name: _losses(model, name) for name in (UNTOUCHED, "nf4", DOUBLE)}, "nf4", DOUBLE)


def error_added_by_double_quantization(model: str) -> Measurement:
    """Returns the ratio of NF4's relative RMSE with double quantization to that without, mean over matrices."""
    plain, double = _rounding("nf4"), _rounding(DOUBLE)
    ratios = [float((w - double(w)).norm() / (w - plain(w)).norm()) for _, w in weight_matrices(model)]
    return Measurement(sum(ratios) / len(ratios), n=len(ratios), evidence={"largest": max(ratios)}, model=model)


def embedding_error_ratio(model: str, code: str, rivals: Sequence[str]) -> Measurement:
    """Returns how far a code moves an encoder's sentence embeddings, divided by the distance of the nearest rival.

    Args:
        model: The model whose linear weights inside the blocks are rounded.
        code: The name of a ``CodeBook``.
        rivals: The codes to compare with.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from peftscope.evaluation.retention import prose

    folder = _folder(model)
    sentences = [line for line in prose().splitlines() if line.strip()]
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)(
        sentences, return_tensors="pt", padding=True, truncation=True, max_length=WINDOW_TOKENS
    )
    mask = tokens["attention_mask"].unsqueeze(-1)

    def embeddings(rounding: str) -> torch.Tensor:
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, **LOCAL)
        with torch.no_grad():
            return (_rounded(encoder, rounding)(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)

    exact = embeddings(UNTOUCHED)
    moved = {}
    for name in (code, *rivals):
        moved[name] = float(((embeddings(name) - exact).norm(dim=1) / exact.norm(dim=1)).mean())
    return Measurement(
        moved[code] / min(moved[name] for name in rivals),
        n=len(sentences),
        evidence={f"relative change, {name}": value for name, value in moved.items()},
        model=model,
    )


@cache
def _losses(model: str, rounding: str) -> tuple[float, ...]:
    """Returns the mean loss of every window of the held-out prose."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peftscope.evaluation.retention import prose

    folder = _folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = tokenizer(prose(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS]).view(-1, WINDOW_TOKENS)
    language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **LOCAL)
    with torch.no_grad():
        logits = _rounded(language_model, rounding)(windows).logits[:, :-1].transpose(1, 2)
        each = torch.nn.functional.cross_entropy(logits, windows[:, 1:], reduction="none")
    return tuple(round(loss, 6) for loss in each.double().mean(1).tolist())


def _rounded(model: Any, rounding: str) -> Any:
    """Rounds the linear weights inside a model's blocks; embeddings, norms, head and pooler stay as they are."""
    import torch

    rounded = _rounding(rounding)
    for name, module in model.named_modules():
        if ".layer" in name and isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data)
    return model.eval()


def _rounding(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name == UNTOUCHED:
        return lambda weight: weight
    if name != DOUBLE:
        book = CodeBook(name)
        return lambda weight: book.rounded(weight, BLOCK)
    from bitsandbytes import functional

    def doubly(weight: torch.Tensor) -> torch.Tensor:
        options = {"blocksize": BLOCK, "quant_type": "nf4", "compress_statistics": True}
        packed, state = functional.quantize_4bit(weight.flatten(), **options)
        return functional.dequantize_4bit(packed, state).view_as(weight)

    return doubly


def _folder(model: str) -> Path:
    folder = model_folder(model)
    if not (folder / "model.safetensors").is_file():
        raise NotRunError(f"the weights of {model} are missing; run `peftscope fetch {model}`")
    return folder


def _rise(model: str, losses: dict[str, tuple[float, ...]], before: str, after: str) -> Measurement:
    """Returns the mean rise of the loss from one rounding to another, paired by window."""
    rises = tuple(b - a for a, b in zip(losses[before], losses[after], strict=True))
    interval = mean_interval(rises)
    assert interval is not None
    return Measurement(
        interval.mean,
        low=interval.low,
        high=interval.high,
        n=len(rises),
        samples=rises,
        evidence={f"loss, {name}": sum(each) / len(each) for name, each in losses.items()}
        | {"measured against": after},
        model=model,
    )

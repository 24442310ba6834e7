"""The initial errors of LoftQ and PiSSA on a 4-bit base, and the spectra of random updates.

Checks use the float weights of a fetched model. ``matrices`` is how many matrices are used, evenly spread; 0 means all.
bitsandbytes quantises them to NF4 in blocks of 64 with fp32 constants. ``rank`` is that of B A.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Any

import torch
from bitsandbytes import functional
from peft import LoftQConfig, LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer

from peftscope.analysis.stats import median_interval
from peftscope.claims.checks.codes import CodeBook
from peftscope.claims.lora_subjects import nf4_layer
from peftscope.claims.measurement import Measurement, geometric_mean_of, mean_of
from peftscope.claims.subjects import fetched, fetched_model, weight_matrices
from peftscope.methods.loftq import LoftQ, best_rank_approximation
from peftscope.words import counted


def loftq_error_ratio(model: str, rank: int, alpha: float, iterations: int, by: str, matrices: int) -> Measurement:
    """Returns the error of LoftQ's start over NF4's, ‖W − (Q + sBA)‖ / ‖W − NF4(W)‖: the median over matrices.

    Args:
        alpha: The numerator of the scale s = alpha / rank, as in a LoRA layer.
        iterations: The number of alternations of quantising and approximating.
        by: ``peft`` for PEFT's own initialisation, ``peftscope`` for this project's, which keeps the scale.
    """
    start = {"peft": _peft_start, "peftscope": _own_start}[by]
    ratios = []
    for _, weight in _some(model, matrices):
        error = weight - start(weight, rank, alpha, iterations)
        ratios.append(float(error.norm() / (weight - _nf4(weight)).norm()))
    return _median(ratios, model, matrices)


def loftq_error_after(model: str, rank: int, iterations: int, over: int, matrices: int) -> Measurement:
    """Returns the error of LoftQ's start after some iterations over that after fewer: the median over matrices.

    The error is the Frobenius norm of W − (Q + BA) at scale 1. Source: Li et al. 2023, arXiv 2310.08659, section 4.4.

    Args:
        iterations: The iterations of the numerator, and the last of the figure.
        over: The iterations of the denominator; 0 is NF4 alone.
    """
    errors = []
    for _, weight in _some(model, matrices):
        starts = [_nf4(weight), *(_own_start(weight, rank, float(rank), n) for n in range(1, iterations + 1))]
        errors.append([float((weight - start).norm()) for start in starts])
    found = _median([each[iterations] / each[over] for each in errors], model, matrices)
    curve = {float(n): statistics.median(each[n] / each[0] for each in errors) for n in range(iterations + 1)}
    fell = sum(later < earlier for each in errors for earlier, later in itertools.pairwise(each))
    evidence = {**found.evidence, "share of iterations that lower the error": fell / (len(errors) * iterations)}
    return replace(found, evidence=evidence, curves={"median": curve}, axes=("iterations", "error over NF4's"))


def loftq_output_error_ratio(model: str, ranks: list[int], rank: int, iterations: int) -> Measurement:
    """Returns the error of an encoder's answers at LoftQ's start over their error with NF4 weights alone.

    The error is the Frobenius norm of the change of the last layer's token vectors. The value is the geometric mean
    over a few sentences, with its interval.

    Args:
        ranks: The ranks of the figure.
        rank: The rank of the value. alpha equals it, so that the scale is 1.
    """
    exact = _answers(model, lambda weight: weight)
    plain = [float((found - true).norm()) for found, true in zip(_answers(model, _nf4), exact, strict=True)]
    curve, logs = {}, {}
    for each in ranks:
        started = _answers(model, partial(_own_start, rank=each, alpha=float(each), iterations=iterations))
        left = [float((found - true).norm()) for found, true in zip(started, exact, strict=True)]
        logs[each] = [math.log(a / b) for a, b in zip(left, plain, strict=True)]
        curve[float(each)] = math.exp(statistics.mean(logs[each]))
    relative = math.hypot(*plain) / math.hypot(*(float(true.norm()) for true in exact))
    closer = sum(log < 0 for log in logs[rank]) / len(plain)
    return geometric_mean_of(
        logs[rank],
        model=model,
        evidence={"share of sentences that are closer": closer, "error of NF4, relative": relative},
        curves={counted(iterations, "iteration"): curve},
        axes=("rank", "error over NF4's"),
    )


def qpissa_error_ratio(model: str, rank: int, iterations: int, norm: str, matrices: int) -> Measurement:
    """Returns the error of QPiSSA's start over that of LoftQ's, both at scale 1: the median over matrices.

    QPiSSA splits off the largest singular values of W and quantises the rest; LoftQ quantises first. With more than
    one iteration both alternate. Source: Meng et al. 2024, arXiv 2404.02948, table 4, which takes the nuclear norm.

    Args:
        norm: ``nuclear`` (sum of singular values) or ``frobenius`` (root of the sum of their squares).
    """
    ratios, pissa_saves, loftq_saves = [], [], []
    for _, weight in _some(model, matrices):
        starts = (_nf4(weight), _own_start(weight, rank, float(rank), iterations), _qpissa(weight, rank, iterations))
        spectra = [torch.linalg.svdvals(weight - start) for start in starts]
        plain, loftq, pissa = (float(s.sum() if norm == "nuclear" else s.norm()) for s in spectra)
        ratios.append(pissa / loftq)
        pissa_saves.append(1 - pissa / plain)
        loftq_saves.append(1 - loftq / plain)
    found = _median(ratios, model, matrices)
    saved = {
        "QPiSSA removes of NF4's error": statistics.mean(pissa_saves),
        "LoftQ removes of NF4's error": statistics.mean(loftq_saves),
    }
    return replace(found, evidence={**found.evidence, **saved})


def intruders_of_random_updates(model: str, rank: int, sizes: list[float], size: float, matrices: int) -> Measurement:
    """Returns intruder dimensions after a random update of low rank minus those after one of full rank, a matrix.

    An intruder is one of the ten leading left singular vectors of W + U whose cosine with every left singular vector of
    W stays below 0.5. Source: Shuttleworth et al. 2024, arXiv 2410.21228.

    Args:
        rank: The rank of the low-rank update.
        sizes: The values of ‖U‖/‖W‖ (Frobenius) of the figure.
        size: The size of the value.
    """
    torch.manual_seed(0)
    counts = {kind: {each: list[int]() for each in sizes} for kind in ("low rank", "full rank")}
    for _, weight in _some(model, matrices):
        rows, columns = weight.shape
        before = torch.linalg.svd(weight, full_matrices=False).U
        updates = {
            "low rank": torch.randn(rows, rank) @ torch.randn(rank, columns),
            "full rank": torch.randn(rows, columns),
        }
        for (kind, update), each in itertools.product(updates.items(), sizes):
            changed = weight + update * (each * weight.norm() / update.norm())
            after = torch.linalg.svd(changed, full_matrices=False).U[:, :10]
            counts[kind][each].append(int(((before.T @ after).abs().amax(dim=0) < 0.5).sum()))
    means = {kind: {each: statistics.mean(n) for each, n in by_size.items()} for kind, by_size in counts.items()}
    evidence = {f"after a {kind} update": by_size[size] for kind, by_size in means.items()}
    axes = ("size of the update over the weight's", "intruders among ten")
    differences = [a - b for a, b in zip(counts["low rank"][size], counts["full rank"][size], strict=True)]
    return mean_of(differences, evidence=evidence, curves=means, axes=axes, model=model)


def _some(model: str, matrices: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields some of a model's weight matrices, evenly spread, or all of them."""
    found = list(weight_matrices(model))
    step = max(1, len(found) // matrices) if matrices else 1
    yield from found[::step][: matrices or None]


def _median(ratios: list[float], model: str, matrices: int) -> Measurement:
    """Returns the median, with its interval if only some of the model's matrices were taken."""
    low, high = median_interval(ratios) if matrices else (None, None)
    evidence = {"smallest": min(ratios), "largest": max(ratios)}
    return Measurement(statistics.median(ratios), low, high, len(ratios), evidence=evidence, model=model)


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    """Returns a matrix after a round trip through NF4."""
    return CodeBook("nf4").rounded(weight, block=64)


def _own_start(weight: torch.Tensor, rank: int, alpha: float, iterations: int) -> torch.Tensor:
    """Returns Q + sBA after this project's LoftQ has initialised a 4-bit layer of PEFT."""
    model = torch.nn.Sequential(nf4_layer(weight, compute_dtype=torch.float32, double_quant=False))
    model.is_loaded_in_4bit = True
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    layer = get_peft_model(model, config).base_model.model[0]
    LoftQ(rank=rank, alpha=alpha, iterations=iterations, double_quant=False)._initialise(layer, weight)
    base = layer.get_base_layer().weight
    return functional.dequantize_4bit(base.data, base.quant_state) + layer.get_delta_weight("default").detach()


def _peft_start(weight: torch.Tensor, rank: int, alpha: float, iterations: int) -> torch.Tensor:
    """Returns Q + sBA after PEFT's own LoftQ has initialised a layer."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    start: Any = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4, loftq_iter=iterations)}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **start)
    with _OnProcessor():
        layer = get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
    return layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()


class _OnProcessor(TorchFunctionMode):
    """A context in which what is sent to an accelerator stays on the processor. PEFT's LoftQ asks for one."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.to:
            args = [_on_processor(value) for value in args]
            kwargs = {name: _on_processor(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)


def _on_processor(value: Any) -> Any:
    return "cpu" if isinstance(value, str | torch.device) else value


def _qpissa(weight: torch.Tensor, rank: int, iterations: int) -> torch.Tensor:
    """Returns Q + BA, where BA is computed first and Q is the quantised rest of W."""
    dequantised = torch.zeros_like(weight)
    for _ in range(iterations):
        left, right = best_rank_approximation(weight - dequantised, rank)
        dequantised = _nf4(weight - left @ right)
    return dequantised + left @ right


def _answers(model: str, change: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Returns an encoder's last token vectors for each sentence, with the matrices of its blocks changed."""
    tokenizer = AutoTokenizer.from_pretrained(fetched(model), local_files_only=True, trust_remote_code=False)
    encoder = fetched_model(model, "AutoModel")
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layer." in name:
            module.weight.data = change(module.weight.data)
    sentences = files("peftscope.claims.checks").joinpath("sentences.txt").read_text(encoding="utf-8").splitlines()
    with torch.no_grad():
        return [encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in sentences]

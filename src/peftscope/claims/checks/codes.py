"""Code books of four bits, and the errors of weights that are rounded to them.

Weights are cut into blocks. Every block is divided by its constant, which is its value of the largest magnitude, and
each quotient is rounded to the nearest level of the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from bitsandbytes import functional
from gguf import GGMLQuantizationType, quants
from scipy import stats

from peftscope.claims.measurement import Measurement, geometric_mean_of, mean_of
from peftscope.claims.subjects import weight_matrices

CODES = ("nf4", "fp4", "e2m1", "e3m0", "int4", "int4-twos-complement")
FLOATS = {"e2m1": (0.0, 0.5, 1, 1.5, 2, 3, 4, 6), "e3m0": (0.0, 0.25, 0.5, 1, 2, 4, 8, 16)}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_OF_THE_KERNEL = 1024
"""The largest block size that bitsandbytes' own CPU kernel dequantises; above, it compiles torch code."""

CURVE_VALUES = 32768
"""The values of each matrix that curves over block sizes and the entropy of levels are computed from."""


class CodeBook:
    """The levels of one code in ascending order. The largest magnitude is 1.

    ``nf4``, ``fp4`` and ``int4`` (-7 to 7) are bitsandbytes' own.
    ``e2m1`` (the OCP Microscaling specification's) and ``e3m0`` are floats with these numbers of exponent and mantissa
    bits; ``int4-twos-complement`` has all integers from -8 to 7.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        if name in FLOATS:
            positive = torch.tensor(FLOATS[name])
            levels = torch.cat([positive, -positive]) / positive.max()
        elif name == "int4-twos-complement":
            levels = torch.tensor([(bits ^ 8) - 8 for bits in range(16)]) / 8
        elif name == "int4":
            # get_4bit_type of bitsandbytes 0.50 raises an error for this code. Zero comes out as -3e-8.
            levels = (functional.create_linear_map(signed=True, total_bits=4) * 7).round() / 7
        else:
            levels = functional.get_4bit_type(name, device="cpu")
        self.levels = levels.unique()

    def rounded(self, values: torch.Tensor, block: int, *, double: bool = False) -> torch.Tensor:
        """Returns the values after a round trip through the code, with bitsandbytes' kernels if it has them.

        These quantise the constants too if ``double``.

        Values are flattened, because bitsandbytes 0.50 dequantises wrongly on CPUs with AVX-512 if a block crosses the
        end of a row.
        """
        if self.name not in ("nf4", "fp4") or block > LARGEST_OF_THE_KERNEL:
            return self.rounded_by_definition(values, block)
        options = {"blocksize": block, "quant_type": self.name, "compress_statistics": double}
        packed, state = functional.quantize_4bit(values.flatten(), **options)
        return functional.dequantize_4bit(packed, state).view_as(values)

    def rounded_by_definition(self, values: torch.Tensor, block: int) -> torch.Tensor:
        """Returns the values after a round trip through any code with any block size."""
        index, constants = self.encoded(values, block)
        return (self.levels[index] * constants).flatten()[: values.numel()].view_as(values)

    def encoded(self, values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (blocks, block) indices of levels and (blocks, 1) constants. Zeros fill the last block.

        A code that reaches only -1 gets a signed constant, so that the value of the largest magnitude is mapped to -1.
        """
        blocks = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % block)).view(-1, block)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        constants = largest.abs() if self.levels[-1] == 1 else -largest
        constants = torch.where(constants == 0, 1, constants)
        return self.nearest(blocks / constants), constants

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the index of the level nearest to each value."""
        return torch.bucketize(values, (self.levels[1:] + self.levels[:-1]) / 2)


def levels_in_steps(library: Literal["bitsandbytes", "gguf"]) -> Measurement:
    """Returns the levels that a library's 4-bit integers reach, in units of their smallest gap, as text.

    They are read off a ramp of 32 values, which both take as one block, after a round trip.
    """
    ramp = torch.linspace(-1, 1, 32) if library == "bitsandbytes" else torch.linspace(-8, 7.5, 32)
    if library == "bitsandbytes":
        code = functional.create_linear_map(signed=True, total_bits=4)
        found = functional.dequantize_blockwise(*functional.quantize_blockwise(ramp, code=code, blocksize=64))
    else:
        packed = quants.quantize(ramp.numpy(), GGMLQuantizationType.Q4_0)
        found = torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q4_0))
    levels = ((found / found.abs().max()) * 2**12).round().unique() / 2**12
    gaps = levels.diff()
    in_steps = (levels / gaps.min()).round(decimals=1).tolist()
    return Measurement(
        ", ".join(f"{level + 0.0:.4g}" for level in in_steps),
        evidence={"levels": len(in_steps), "widest gap over narrowest": float(gaps.max() / gaps.min())},
        model=f"{library}'s 4-bit integers",
    )


def gaps_that_do_not_widen(code: str) -> Measurement:
    """Returns how many gaps between levels are not wider than their neighbour nearer to zero; 0 is finest at zero."""
    levels = CodeBook(code).levels
    negative, positive = -levels[levels <= 0].flip(0), levels[levels >= 0]
    sides = [side.diff().tolist() for side in (negative, positive)]
    gaps = [gap for side in sides for gap in side]
    return Measurement(
        sum(outer <= inner * (1 + 1e-6) for side in sides for inner, outer in pairwise(side)),
        n=len(gaps) - 2,
        evidence={
            "narrowest gap": min(gaps),
            "widest gap": max(gaps),
            "widest over narrowest": max(gaps) / min(gaps),
            "narrowest touches zero": min(gaps) == min(side[0] for side in sides),
        },
        curves={
            name: dict(zip(((levels[1:] + levels[:-1]) / 2).tolist(), levels.diff().tolist(), strict=True))
            for name, levels in ((code, levels), ("int4", CodeBook("int4").levels))
        },
        axes=("level, as a share of the largest magnitude", "distance of neighbouring levels"),
        model=code,
    )


def share_with_lower_error(
    model: str, block: int, code: str, rivals: Sequence[str], metric: str = "rmse"
) -> Measurement:
    """Returns the share of a model's matrices on which a code has a lower error than every rival.

    All weights of a matrix count. ``gaussian`` stands for 16 matrices of normal values.
    """
    books = [CodeBook(name) for name in (code, *rivals)]
    errors = [[_error(matrix, book, block, metric) for book in books] for matrix in _matrices(model)]
    own, *others = zip(*errors, strict=True)
    evidence = {f"mean {metric} of {code}": sum(own) / len(own)}
    for name, theirs in zip(rivals, others, strict=True):
        evidence[f"mean {metric} of {name}"] = sum(theirs) / len(theirs)
        evidence[f"matrices on which {code} beats {name}"] = sum(a < b for a, b in zip(own, theirs, strict=True))
        evidence[f"Wilcoxon p against {name}"] = float(stats.wilcoxon(own, theirs).pvalue) if len(own) > 1 else 1.0
    share = sum(mine < min(theirs) for mine, *theirs in errors) / len(errors)
    return Measurement(share, n=len(errors), evidence=evidence, model=model)


def likeness_of_rows_to_normal(model: str, rows: int = 32) -> Measurement:
    """Returns the squared correlation of a row's sorted weights with normal quantiles, mean of the matrices' medians.

    ``rows`` evenly spaced rows of each matrix are taken.
    """
    medians, lowest, scores = [], 1.0, []
    for taken in _rows(model, rows):
        quantiles = stats.norm.ppf((np.arange(len(taken[0])) + 0.5) / len(taken[0]))
        fits = [float(np.corrcoef(np.sort(row), quantiles)[0, 1] ** 2) for row in taken]
        medians.append(float(np.median(fits)))
        lowest = min(lowest, *fits)
        scores.append(stats.zscore(taken, axis=1).ravel())
    edges = np.linspace(-4, 4, 33)
    middles = (edges[1:] + edges[:-1]) / 2
    pooled = np.concatenate(scores)
    density = np.histogram(pooled, edges)[0] / len(pooled) / np.diff(edges)
    curves = {
        model: dict(zip(middles.tolist(), density.tolist(), strict=True)),
        "normal": dict(zip(middles.tolist(), stats.norm.pdf(middles).tolist(), strict=True)),
    }
    axes = ("weight, in standard deviations of its row", "density")
    return mean_of(medians, evidence={"lowest of all rows": lowest}, curves=curves, axes=axes, model=model)


def share_of_weights(model: str, deviations: float, rows: int = 32) -> Measurement:
    """Returns the share of weights within this many standard deviations of their row's mean, mean over matrices."""
    shares = [float(np.mean(np.abs(stats.zscore(taken, axis=1)) < deviations)) for taken in _rows(model, rows)]
    normal = float(stats.norm.cdf(deviations) - stats.norm.cdf(-deviations))
    return mean_of(shares, evidence={"of normal weights": normal}, model=model)


def entropy_of_levels(code: str, model: str, block: int) -> Measurement:
    """Returns the entropy in bits of a code's levels, mean over matrices; 4 bits if all sixteen are used equally.

    ``CURVE_VALUES`` of each matrix count. Source: Yoshida 2023, arXiv 2306.06965.
    """
    book = CodeBook(code)
    entropies = [_entropy([book.encoded(m.flatten()[:CURVE_VALUES], block)[0]]) for m in _matrices(model)]
    by_block = {
        float(size): _entropy([book.encoded(m.flatten()[:CURVE_VALUES], size)[0] for m in _matrices(model)])
        for size in BLOCKS
    }
    axes = ("block size", "entropy of the levels, bits")
    return mean_of(entropies, curves={code: by_block}, axes=axes, model=model)


def spread_of_quotients(model: str, block: int, over: int) -> Measurement:
    """Returns the standard deviation of quotients in blocks of one size over that in blocks of another.

    A quotient is a weight over its block's constant. The value is the geometric mean over matrices, with its interval.
    """

    def deviation(matrix: torch.Tensor, size: int) -> float:
        blocks = matrix.flatten()[:CURVE_VALUES].view(-1, size)
        return float((blocks / blocks.abs().amax(1, keepdim=True)).std())

    logs = [math.log(deviation(m, block) / deviation(m, over)) for m in _matrices(model)]
    return geometric_mean_of(logs, model=model)


def error_of_fitted_code(model: str, block: int) -> Measurement:
    """Returns the mean absolute error of the code that is best for normal values in such blocks, over that of NF4.

    The code is fitted to other normal values: each level is the median of the quotients nearest to it, and -1, 0 and 1
    are kept. The value is the geometric mean over matrices, of each of which ``CURVE_VALUES`` count, with its interval.
    Source: Yoshida 2023, arXiv 2306.06965.
    """
    fitted, nf4 = _fitted(block), CodeBook("nf4")
    samples = [matrix.flatten()[:CURVE_VALUES] for matrix in _matrices(model)]
    logs = [math.log(_error(s, fitted, block, "mae") / _error(s, nf4, block, "mae")) for s in samples]
    evidence = {f"level {index}": float(level) for index, level in enumerate(fitted.levels)}
    return geometric_mean_of(logs, evidence=evidence, model=model)


def _fitted(block: int, rounds: int = 40) -> CodeBook:
    """Returns the code with the lowest mean absolute error on normal values in blocks of this size."""
    values = torch.randn(2**18 // block, block, generator=torch.Generator().manual_seed(1))
    quotients = (values / values.abs().amax(1, keepdim=True)).flatten()
    book = CodeBook("nf4")
    book.name = "fitted"
    kept = (book.levels.abs() == 1) | (book.levels == 0)
    for _ in range(rounds):
        nearest = book.nearest(quotients)
        medians = torch.stack([quotients[nearest == index].median() for index in range(len(book.levels))])
        book.levels = torch.where(kept, book.levels, medians)
    return book


def _rows(model: str, count: int) -> Iterator[Any]:
    """Yields evenly spaced rows of every matrix, as one fp64 array for each."""
    for matrix in _matrices(model):
        yield matrix[:: max(1, len(matrix) // count)][:count].double().numpy()


def _matrices(model: str) -> Iterator[torch.Tensor]:
    if model == "gaussian":
        yield from torch.randn(16, 256, 256, generator=torch.Generator().manual_seed(0))
    else:
        yield from (matrix for _, matrix in weight_matrices(model))


def _error(values: torch.Tensor, book: CodeBook, block: int, metric: str) -> float:
    order = {"rmse": 2, "mae": 1}[metric]
    lost = (values - book.rounded(values, block)).flatten().double()
    return float(lost.norm(order) / values.flatten().double().norm(order))


def _entropy(indices: Sequence[torch.Tensor]) -> float:
    """Returns the entropy in bits of the levels that these indices name."""
    counts = torch.cat([index.flatten() for index in indices]).bincount()
    return float(torch.special.entr(counts / counts.sum()).sum() / math.log(2))

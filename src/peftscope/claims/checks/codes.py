"""Code books of four bits, and the errors of weights that are rounded to them.

Weights are cut into blocks. Every block is divided by its constant, which is its value of the largest magnitude, and
each quotient is rounded to the nearest level of the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from peftscope.claims.measurement import Measurement
from peftscope.claims.subjects import weight_matrices

if TYPE_CHECKING:
    import torch

CODES = ("nf4", "fp4", "e2m1", "e3m0", "int4", "int4-twos-complement")
FLOATS = {"e2m1": (0.0, 0.5, 1, 1.5, 2, 3, 4, 6), "e3m0": (0.0, 0.25, 0.5, 1, 2, 4, 8, 16)}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_OF_THE_KERNEL = 1024
"""The largest block size that bitsandbytes' own CPU kernel dequantises; above, it compiles torch code."""

CURVE_VALUES = 32768
"""The values of each matrix that curves over block sizes and the entropy of levels are computed from."""


class CodeBook:
    """The levels of one code in ascending order. The largest magnitude is 1.

    ``nf4``, ``fp4`` and ``int4`` (-7 to 7) are bitsandbytes' own; ``e2m1`` (the OCP Microscaling specification's) and
    ``e3m0`` are floats with these numbers of exponent and mantissa bits; ``int4-twos-complement`` has all integers
    from -8 to 7.
    """

    def __init__(self, name: str) -> None:
        import torch
        from bitsandbytes import functional

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

    def rounded(self, values: torch.Tensor, block: int) -> torch.Tensor:
        """Returns the values after a round trip through the code, with bitsandbytes' kernels if it has them.

        Values are flattened, because bitsandbytes 0.50 dequantises wrongly on CPUs if a block crosses the end of a row.
        """
        if self.name not in ("nf4", "fp4") or block > LARGEST_OF_THE_KERNEL:
            return self.rounded_by_definition(values, block)
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(values.flatten(), blocksize=block, quant_type=self.name)
        return functional.dequantize_4bit(packed, state).view_as(values)

    def rounded_by_definition(self, values: torch.Tensor, block: int) -> torch.Tensor:
        """Returns the values after a round trip through any code with any block size."""
        index, constants = self.encoded(values, block)
        return (self.levels[index] * constants).flatten()[: values.numel()].view_as(values)

    def encoded(self, values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (blocks, block) indices of levels and (blocks, 1) constants. Zeros fill the last block.

        A code that reaches only -1 gets a signed constant, so that the value of the largest magnitude is mapped to -1.
        """
        import torch

        blocks = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % block)).view(-1, block)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        constants = largest.abs() if self.levels[-1] == 1 else -largest
        constants = torch.where(constants == 0, 1, constants)
        return self.nearest(blocks / constants), constants

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the index of the level nearest to each value."""
        import torch

        return torch.bucketize(values, (self.levels[1:] + self.levels[:-1]) / 2)


def levels_in_steps(code: str) -> Measurement:
    """Returns the levels of a code in units of its smallest gap, as text."""
    levels = CodeBook(code).levels
    gaps = levels.diff()
    in_steps = (levels / gaps.min()).tolist()
    return Measurement(
        ", ".join(f"{level:.4g}" for level in in_steps),
        evidence={"levels": len(in_steps), "widest gap over narrowest": float(gaps.max() / gaps.min())},
        model=code,
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
            name: {float(middle): float(gap) for middle, gap in zip(middles, widths, strict=True)}
            for name in (code, "int4")
            for middles, widths in [_gaps(CodeBook(name).levels)]
        },
        axes=("level, as a share of the largest magnitude", "distance of neighbouring levels"),
        model=code,
    )


def error_ratio(model: str, block: int, code: str, rival: str, metric: str = "rmse") -> Measurement:
    """Returns the error of one code divided by that of a rival; both are means over matrices.

    Args:
        model: The model whose linear weights are rounded, ``CURVE_VALUES`` of each matrix; ``gaussian`` stands for
            16 matrices of normal values.
        block: The weights per constant.
        code: The name of a ``CodeBook``.
        rival: The code to compare with.
        metric: ``rmse`` or ``mae``, relative to the same norm of the weights.
    """
    samples = [matrix.flatten()[:CURVE_VALUES] for matrix in _matrices(model)]
    curves = {
        name: {float(size): _mean_error(samples, CodeBook(name), size, metric) for size in BLOCKS} for name in CODES
    }
    return Measurement(
        curves[code][block] / curves[rival][block],
        n=len(samples),
        evidence={f"{metric} of {name}": curve[block] for name, curve in curves.items()},
        curves=curves,
        axes=("block size", f"relative {metric.upper()}"),
        model=model,
    )


def share_with_lower_error(
    model: str, block: int, code: str, rivals: Sequence[str], metric: str = "rmse"
) -> Measurement:
    """Returns the share of a model's matrices on which a code has a lower error than every rival.

    Args:
        model: As for ``error_ratio``, but with all weights.
        block: The weights per constant.
        code: The name of a ``CodeBook``.
        rivals: The codes to compare with.
        metric: ``rmse`` or ``mae``, relative to the same norm of the weights.
    """
    from scipy.stats import wilcoxon

    books = [CodeBook(name) for name in (code, *rivals)]
    errors = [[_error(matrix, book, block, metric) for book in books] for matrix in _matrices(model)]
    own, *others = zip(*errors, strict=True)
    evidence = {f"mean {metric} of {code}": sum(own) / len(own)}
    for name, theirs in zip(rivals, others, strict=True):
        evidence[f"mean {metric} of {name}"] = sum(theirs) / len(theirs)
        evidence[f"matrices on which {code} beats {name}"] = sum(a < b for a, b in zip(own, theirs, strict=True))
        evidence[f"Wilcoxon p against {name}"] = float(wilcoxon(own, theirs).pvalue) if len(own) > 1 else 1.0
    return Measurement(
        sum(mine < min(theirs) for mine, *theirs in errors) / len(errors),
        n=len(errors),
        evidence=evidence,
        model=model,
    )


def excess_of_non_normal_rows(model: str, rows: int = 32) -> Measurement:
    """Returns by how many percentage points more rows fail a Shapiro-Wilk test at 5 % than normal ones would.

    Source: Dettmers et al. 2023, appendix F, who test each neuron's weights this way.

    Args:
        model: The model whose linear weights are tested.
        rows: The number of evenly spaced rows of each matrix.
    """
    from scipy import stats

    p_values = [float(stats.shapiro(row).pvalue) for row in _rows(model, rows)]
    failed = sum(p < 0.05 for p in p_values) / len(p_values)
    return Measurement(
        100 * (failed - 0.05),
        n=len(p_values),
        evidence={
            "rows that fail, %": 100 * failed,
            "entropy of NF4's levels in blocks of 64, bits": _level_entropy(_matrices(model)),
            "the same for normal values, bits": _level_entropy(_matrices("gaussian")),
        },
        model=model,
    )


def likeness_of_rows_to_normal(model: str, rows: int = 32) -> Measurement:
    """Returns the squared correlation of a row's sorted weights with normal quantiles, median over rows.

    Args:
        model: The model whose linear weights are used.
        rows: The number of evenly spaced rows of each matrix.
    """
    import numpy as np
    from scipy import stats

    taken = list(_rows(model, rows))
    quantiles = {n: stats.norm.ppf((np.arange(n) + 0.5) / n) for n in {len(row) for row in taken}}
    fits = [np.corrcoef(np.sort(row), quantiles[len(row)])[0, 1] ** 2 for row in taken]
    scores = np.concatenate([(row - row.mean()) / row.std() for row in taken])
    edges = np.linspace(-4, 4, 33)
    middles = (edges[1:] + edges[:-1]) / 2
    density = np.histogram(scores, edges)[0] / len(scores) / np.diff(edges)
    return Measurement(
        float(np.median(fits)),
        n=len(fits),
        evidence={
            "lowest of all rows": float(np.min(fits)),
            "excess kurtosis of a row, median (normal: 0)": float(np.median([stats.kurtosis(row) for row in taken])),
            "weights within one standard deviation, % (normal: 68.3)": 100 * float(np.mean(np.abs(scores) < 1)),
            "weights beyond three, % (normal: 0.27)": 100 * float(np.mean(np.abs(scores) > 3)),
        },
        curves={
            model: dict(zip(middles.tolist(), density.tolist(), strict=True)),
            "normal": dict(zip(middles.tolist(), stats.norm.pdf(middles).tolist(), strict=True)),
        },
        axes=("weight, in standard deviations of its row", "density"),
        model=model,
    )


def _rows(model: str, count: int) -> Iterator[Any]:
    """Yields evenly spaced rows of every matrix, as fp64 arrays."""
    for matrix in _matrices(model):
        yield from matrix[:: max(1, len(matrix) // count)][:count].double().numpy()


def _gaps(levels: torch.Tensor) -> tuple[list[float], list[float]]:
    return ((levels[1:] + levels[:-1]) / 2).tolist(), levels.diff().tolist()


def _matrices(model: str) -> Iterator[torch.Tensor]:
    if model == "gaussian":
        import torch

        yield from torch.randn(16, 256, 256, generator=torch.Generator().manual_seed(0))
    else:
        yield from (matrix for _, matrix in weight_matrices(model))


def _error(values: torch.Tensor, book: CodeBook, block: int, metric: str) -> float:
    order = {"rmse": 2, "mae": 1}[metric]
    lost = (values - book.rounded(values, block)).flatten().double()
    return float(lost.norm(order) / values.flatten().double().norm(order))


def _mean_error(samples: Sequence[torch.Tensor], book: CodeBook, block: int, metric: str) -> float:
    return sum(_error(sample, book, block, metric) for sample in samples) / len(samples)


def _level_entropy(matrices: Iterator[torch.Tensor]) -> float:
    """Returns the entropy of NF4's indices, which is 4 bits if all levels are used equally."""
    import torch

    book = CodeBook("nf4")
    indices = (book.encoded(matrix.flatten()[:CURVE_VALUES], 64)[0].flatten() for matrix in matrices)
    counts = sum(index.bincount(minlength=len(book.levels)) for index in indices)
    assert isinstance(counts, torch.Tensor)
    shares = counts / counts.sum()
    return float(torch.special.entr(shares).sum() / torch.log(torch.tensor(2.0)))

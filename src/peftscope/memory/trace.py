"""A trace: every block of memory during a few training steps, in the order of allocations and frees. No torch.

The tracker writes traces from tensors, the closed form writes them from arithmetic. Peaks, breakdowns and the replay in
the allocator are computed from either.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import accumulate, pairwise
from math import prod
from operator import neg
from typing import NamedTuple

ROUNDING_BYTES = 512
"""The CUDA caching allocator rounds every block up to a multiple of this."""

KINDS = (
    "weights",
    "quantised weights",
    "adapters",
    "gradients",
    "optimizer states",
    "saved activations",
    "logits and loss",
    "temporaries",
    "kernel workspace",
)
"""The kinds of content of a block, in the order of tables. The last kind is memory that kernels take for themselves."""


def rounded(size: int) -> int:
    """Returns the bytes that the allocator hands out for a request.

    >>> rounded(1), rounded(512), rounded(0)
    (512, 512, 0)
    """
    return -(-size // ROUNDING_BYTES) * ROUNDING_BYTES


def spoken_width(width: float) -> str:
    """Returns the bytes per element as text. Shared constants take less than a byte and are shown as a fraction.

    >>> spoken_width(2), spoken_width(0.5), spoken_width(1 / 64)
    ('2', '0.5', '1/64')
    """
    return f"{width:g}" if width >= 0.1 else str(Fraction(width).limit_denominator(2**20))


def bytes_of(width: float, dims: Iterable[str], sizes: Mapping[str, float]) -> int:
    """Returns the bytes of a tensor, rounded up as the allocator does.

    >>> bytes_of(0.5, ["h", "h"], {"h": 64})
    2048
    """
    return rounded(int(-(-prod(sizes[name] for name in dims) * width // 1)))


@cache
def factors(formula: str) -> tuple[float, list[str]]:
    """Returns the bytes per element and the named dimensions of a block's formula.

    >>> factors("1/64·h·q")
    (0.015625, ['h', 'q'])
    """
    width, *names = formula.split("·")
    return float(Fraction(width)), names


@dataclass(slots=True)
class Block:
    """One block of memory.

    Attributes:
        size: The bytes, rounded up as the allocator does.
        kind: One of ``KINDS``.
        module: The dotted path of the module that owns it; empty if none does.
        term: The description by which an explanation groups blocks.
        formula: The size as a product of named dimensions.
        paged: Whether it lies in managed memory on CUDA, outside torch's allocator.
    """

    size: int
    kind: str = ""
    module: str = ""
    term: str = ""
    formula: str = ""
    paged: bool = False


@dataclass(slots=True)
class Trace:
    """Blocks, and the order in which they were allocated and freed.

    Attributes:
        blocks: Every block that ever lived.
        events: The index of each block that was allocated, and the complement (``~index``) of each that was freed.
        marks: (position in ``events``, phase) where a phase began. The empty phase is the time between steps.
    """

    blocks: list[Block] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def born(self, block: Block) -> int:
        """Records a new block and returns its index."""
        index = len(self.blocks)
        self.blocks.append(block)
        self.events.append(index)
        return index

    def pass_by(self, block: Block) -> None:
        """Records a block that is allocated and freed at once."""
        self.events.append(~self.born(block))

    def begin(self, phase: str) -> None:
        """Records that a phase begins."""
        self.marks.append((len(self.events), phase))

    def repeat(self, start: int, lasting: set[int]) -> None:
        """Appends a copy of all events since ``start``, except those of the blocks in ``lasting``."""
        first = next(event for event in self.events[start:] if event >= 0)  # blocks are numbered in their order
        shift = len(self.blocks) - first
        events, moved = self.events[start:], len(self.events) - start
        kept = [position for position, event in enumerate(events, start) if event in lasting]
        # What lasts is not repeated, and so later marks move less.
        self.marks += [
            (position + moved - bisect_left(kept, position), phase)
            for position, phase in self.marks
            if position >= start
        ]
        self.events += [event + shift if event >= 0 else event - shift for event in events if event not in lasting]
        self.blocks += self.blocks[first:]

    def segments(self) -> Iterator[tuple[str, int, int]]:
        """Yields (phase, first event, last event + 1) in order. The empty phase covers the time outside of phases."""
        edges = [(0, ""), *self.marks, (len(self.events), "")]
        for (first, phase), (last, _) in pairwise(edges):
            yield phase, first, last

    def sizes(self, *, paged: bool = True) -> list[int]:
        """Returns the bytes of every block. Paged blocks have 0 if they do not count."""
        return [block.size if paged or not block.paged else 0 for block in self.blocks]

    def peaks(self, *, paged: bool = True) -> dict[str, Peak]:
        """Returns the largest peak of each phase that occurs, with or without paged blocks."""
        sizes = self.sizes(paged=paged)
        # ~index counts from the end, where the list has the same sizes with a minus sign.
        changes = [*sizes, *map(neg, reversed(sizes))]
        live = [0, *accumulate(map(changes.__getitem__, self.events))]
        peaks: dict[str, Peak] = {}
        for phase, first, last in self.segments():
            best = max(live[first : last + 1])
            position = live.index(best, first)
            if phase and (phase not in peaks or best > peaks[phase].size):
                peaks[phase] = Peak(best, position)
        return peaks

    def name_open_blocks(self) -> None:
        """Gives a kind to the blocks that have none yet.

        A block of a forward pass that still lives when the backward pass begins was saved for it. All others were
        temporary.
        """
        open_blocks: list[Block] = []
        for phase, first, last in self.segments():
            if phase in ("backward", ""):
                for block in open_blocks:
                    block.kind = "saved activations" if phase else "temporaries"
                open_blocks = []
            for event in self.events[first:last]:
                block = self.blocks[event if event >= 0 else ~event]
                if block.kind:
                    continue
                if event < 0 or phase == "optimizer":
                    block.kind = "temporaries"
                else:
                    open_blocks.append(block)
            open_blocks = [block for block in open_blocks if not block.kind]

    def paged_bytes(self) -> int:
        """Returns the bytes in managed memory at the end of the last phase."""
        if not any(block.paged for block in self.blocks):
            return 0
        return sum(block.size for block in self.alive(self.marks[-1][0]) if block.paged)

    def alive(self, position: int) -> list[Block]:
        """Returns the blocks that live after the first ``position`` events."""
        events = self.events[:position]
        gone = {~event for event in events if event < 0}
        return [self.blocks[event] for event in events if event >= 0 and event not in gone]


class Peak(NamedTuple):
    """The most bytes alive in a phase, and the number of events after which they are alive."""

    size: int
    position: int


def by_kind(blocks: list[Block]) -> dict[str, int]:
    """Returns the bytes of each kind, in the order of ``KINDS``."""
    sums: dict[str, int] = defaultdict(int)
    for block in blocks:
        sums[block.kind] += block.size
    return {kind: sums[kind] for kind in KINDS if sums[kind]}

"""A model of CUDA's caching allocator, which replays a trace and counts the bytes that are reserved. No torch.

The allocator rounds requests up to 512 bytes. It serves requests up to 1 MiB from segments of 2 MiB, and requests below
10 MiB from segments of 20 MiB. A larger request gets a segment of its own, rounded up to 2 MiB. A request gets the
smallest free block that is large enough. The rest of that block stays free if it is large enough to be useful.
Neighbouring free blocks are merged. Only where a new segment would exceed the card are those that are wholly free given
back to CUDA, all at once.

Source: ``c10/cuda/CUDACachingAllocator.cpp`` of torch 2.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from math import inf
from typing import Any

from peftscope.memory.trace import ROUNDING_BYTES, Trace

SMALL_REQUEST = 1 << 20
SMALL_SEGMENT = 2 << 20
MIDDLE_REQUEST = 10 << 20
MIDDLE_SEGMENT = 20 << 20
LARGE_ROUNDING = 2 << 20


def segment_bytes(size: int) -> int:
    """Returns the segment that the allocator asks CUDA for, if no free block is large enough for a request.

    >>> segment_bytes(1), segment_bytes(7 << 20) >> 20, segment_bytes(11 << 20) >> 20
    (2097152, 20, 12)
    """
    if size >= MIDDLE_REQUEST:
        return -(-size // LARGE_ROUNDING) * LARGE_ROUNDING
    return SMALL_SEGMENT if size <= SMALL_REQUEST else MIDDLE_SEGMENT


def segment_share(size: int) -> float:
    """Returns a block's share of its segment, in bytes, if the segment is full of blocks of this size.

    >>> segment_share(7 << 20) / 2**20, segment_share(11 << 20) / 2**20
    (10.0, 12.0)
    """
    segment = segment_bytes(size)
    return segment if size >= MIDDLE_REQUEST else segment / (segment // size)


class Piece:
    """A block inside a segment, linked to its neighbours."""

    __slots__ = ("after", "before", "free", "offset", "pool", "size")

    def __init__(self, offset: int, size: int, pool: list[tuple[int, int, Piece]], before: Piece | None = None) -> None:
        self.offset, self.size, self.pool, self.before = offset, size, pool, before
        self.after: Piece | None = None
        self.free = False


class CachingAllocator:
    """The allocator's segments and free blocks for one stream.

    Attributes:
        capacity: What segments may take on the card. One that exceeds it all the same ends the run out of memory.
        reserved_bytes: The bytes of all segments.
    """

    def __init__(self, capacity: float = inf) -> None:
        self.capacity, self.reserved_bytes, self._end = capacity, 0, 0
        # Free pieces by size and address: one pool for small requests, one for all others.
        self._small: list[tuple[int, int, Piece]] = []
        self._large: list[tuple[int, int, Piece]] = []

    def allocate(self, size: int) -> Piece:
        """Returns a block for a request of ``size`` bytes (a multiple of 512)."""
        small = size <= SMALL_REQUEST
        pool = self._small if small else self._large
        place = bisect_left(pool, (size,))
        if place < len(pool):
            piece = pool.pop(place)[2]
            piece.free = False
        else:
            piece = Piece(self._end, segment_bytes(size), pool)
            if self.reserved_bytes + piece.size > self.capacity:
                self._give_back()
            self._end += piece.size
            self.reserved_bytes += piece.size
        rest = piece.size - size
        if rest >= ROUNDING_BYTES if small else rest > SMALL_REQUEST:
            offset = piece.offset + size
            after = piece.after
            left = Piece(offset, rest, pool, piece)
            left.free, left.after = True, after
            if after is not None:
                after.before = left
            piece.size, piece.after = size, left
            insort(pool, (rest, offset, left))
        return piece

    def _give_back(self) -> None:
        for pool in (self._small, self._large):
            parts = [free for free in pool if free[2].before or free[2].after]
            self.reserved_bytes -= sum(size for size, *_ in pool) - sum(size for size, *_ in parts)
            pool[:] = parts

    def free(self, piece: Piece) -> None:
        """Frees a block and merges it with free neighbours."""
        pool, before, after = piece.pool, piece.before, piece.after
        if after is not None and after.free:
            del pool[bisect_left(pool, (after.size, after.offset))]
            piece.size += after.size
            after = piece.after = after.after
            if after is not None:
                after.before = piece
        if before is not None and before.free:
            del pool[bisect_left(pool, (before.size, before.offset))]
            before.size += piece.size
            before.after = after
            if after is not None:
                after.before = before
            piece = before
        piece.free = True
        insort(pool, (piece.size, piece.offset, piece))


def reserved_bytes(trace: Trace, enough: float = inf, capacity: float = inf) -> int:
    """Returns the bytes that the allocator holds after a trace. It does not hold paged blocks.

    Args:
        trace: The trace.
        enough: Above so many bytes the replay ends early, with the bytes that are held by then.
        capacity: What segments may take before free ones are given back.
    """
    allocator = CachingAllocator(capacity)
    allocate, free, sizes = allocator.allocate, allocator.free, trace.sizes(paged=False)
    pieces: list[Any] = [None] * len(sizes)
    last = trace.marks[-1][0] if trace.marks else len(trace.events)
    for event in trace.events[:last]:  # later events only free blocks
        if event >= 0:
            if size := sizes[event]:
                pieces[event] = allocate(size)
                if allocator.reserved_bytes > enough:
                    break
        elif sizes[~event]:
            free(pieces[~event])
    return allocator.reserved_bytes

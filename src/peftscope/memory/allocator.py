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
from collections.abc import Iterable, Sequence
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


Piece = list[Any]
"""A block inside a segment: size, address, neighbours before and after it, and whether it is free.

It is a list, because lists are sorted as the free blocks of a pool are: by size, then by address.
"""


def replay(
    events: Iterable[int], sizes: Sequence[int], enough: float = inf, capacity: float = inf
) -> tuple[int, list[Piece]]:
    """Returns the bytes of all segments after some events, and the block of each request.

    Args:
        events: The number of each request, and the complement (``~number``) where its block is freed.
        sizes: The bytes of each request, in multiples of 512; 0: the allocator does not see it.
        enough: Above so many bytes the replay ends early.
        capacity: What segments may take before free ones are given back. One that exceeds it all the same ends a run.
    """
    small: list[Piece] = []
    large: list[Piece] = []
    pieces: list[Piece] = [[]] * len(sizes)
    reserved = end = 0
    for event in events:
        if event >= 0:
            if not (size := sizes[event]):
                continue
            pool = small if size <= SMALL_REQUEST else large
            place = bisect_left(pool, [size])
            if place < len(pool):
                pieces[event] = piece = pool.pop(place)
                piece[4] = False
            else:
                segment = segment_bytes(size)
                if reserved + segment > capacity:
                    reserved -= _given_back(small) + _given_back(large)
                pieces[event] = piece = [segment, end, None, None, False]
                end += segment
                reserved += segment
                if reserved > enough:
                    break
            rest = piece[0] - size
            if rest > SMALL_REQUEST or (pool is small and rest >= ROUNDING_BYTES):
                after = piece[3]
                piece[0] = size
                piece[3] = left = [rest, piece[1] + size, piece, after, True]
                if after is not None:
                    after[2] = left
                insort(pool, left)
        elif piece := pieces[~event]:
            pool = small if piece[0] <= SMALL_REQUEST else large
            before, after = piece[2], piece[3]
            if after is not None and after[4]:
                del pool[bisect_left(pool, after)]
                piece[0] += after[0]
                piece[3] = after = after[3]
                if after is not None:
                    after[2] = piece
            if before is not None and before[4]:
                del pool[bisect_left(pool, before)]
                before[0] += piece[0]
                before[3] = after
                if after is not None:
                    after[2] = before
                piece = before
            piece[4] = True
            insort(pool, piece)
    return reserved, pieces


def _given_back(pool: list[Piece]) -> int:
    """Takes the segments that are wholly free out of a pool, and returns their bytes."""
    whole = [piece for piece in pool if not piece[2] and not piece[3]]
    pool[:] = [piece for piece in pool if piece[2] or piece[3]]
    return sum(piece[0] for piece in whole)


def reserved_bytes(trace: Trace, enough: float = inf, capacity: float = inf) -> int:
    """Returns the bytes that the allocator holds after a trace, without paged blocks; limits as of ``replay``."""
    last = trace.marks[-1][0] if trace.marks else len(trace.events)  # later events only free blocks
    return replay(trace.events[:last], trace.sizes(paged=False), enough, capacity)[0]

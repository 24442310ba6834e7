"""What CUDA's caching allocator reserves for a trace: the trace replayed through a model of the allocator. No torch.

Source: ``c10/cuda/CUDACachingAllocator.cpp`` of torch 2: requests are rounded to 512 bytes; up to 1 MiB they are served
from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, and above from segments of their own, rounded up to 2 MiB.
A request takes the smallest free block that is large enough, and the rest of the block stays free if it is worth
keeping; neighbours that are free become one block again. Segments are not given back.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from peftscope.memory.trace import ROUNDING_BYTES, Trace

SMALL_REQUEST = 1 << 20
SMALL_SEGMENT = 2 << 20
MIDDLE_REQUEST = 10 << 20
MIDDLE_SEGMENT = 20 << 20
LARGE_ROUNDING = 2 << 20


def segment_share(size: int) -> float:
    """Returns the bytes of a segment that a block takes up where many blocks of its size lie side by side.

    >>> segment_share(7 << 20) / 2**20, segment_share(11 << 20) / 2**20
    (10.0, 12.0)
    """
    if size >= MIDDLE_REQUEST:
        return -(-size // LARGE_ROUNDING) * LARGE_ROUNDING
    segment = SMALL_SEGMENT if size <= SMALL_REQUEST else MIDDLE_SEGMENT
    return segment / (segment // size)


class Piece:
    """A part of a segment; neighbours are linked."""

    __slots__ = ("after", "before", "free", "offset", "pool", "size")

    def __init__(self, offset: int, size: int, pool: list[tuple[int, int, Piece]]) -> None:
        self.offset, self.size, self.pool = offset, size, pool
        self.free = False
        self.before: Piece | None = None
        self.after: Piece | None = None


class CachingAllocator:
    """The allocator's books for one stream.

    Attributes:
        reserved_bytes: Bytes of all segments; they only grow.
    """

    def __init__(self) -> None:
        self.reserved_bytes = 0
        # Free pieces by size and address, one pool for small requests and one for the others.
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
            piece = Piece(self.reserved_bytes, self._new_segment(size), pool)
        rest = piece.size - size
        if rest >= ROUNDING_BYTES if small else rest > SMALL_REQUEST:
            offset = piece.offset + size
            left = Piece(offset, rest, pool)
            left.free, left.before, left.after = True, piece, piece.after
            if piece.after is not None:
                piece.after.before = left
            piece.size, piece.after = size, left
            insort(pool, (rest, offset, left))
        return piece

    def free(self, piece: Piece) -> None:
        """Gives a block back, and joins it with free neighbours."""
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

    def _new_segment(self, size: int) -> int:
        if size <= SMALL_REQUEST:
            length = SMALL_SEGMENT
        elif size < MIDDLE_REQUEST:
            length = MIDDLE_SEGMENT
        else:
            length = -(-size // LARGE_ROUNDING) * LARGE_ROUNDING
        self.reserved_bytes += length
        return length


def reserved_bytes(trace: Trace) -> int:
    """Returns the bytes that the allocator holds after a trace; paged blocks are not its own."""
    allocator = CachingAllocator()
    allocate, free, sizes = allocator.allocate, allocator.free, trace.sizes(paged=False)
    pieces: dict[int, Piece] = {}
    last = trace.marks[-1][0] if trace.marks else len(trace.events)
    for event in trace.events[:last]:  # what goes after the last step changes nothing
        if event >= 0:
            if size := sizes[event]:
                pieces[event] = allocate(size)
        elif sizes[~event]:
            free(pieces.pop(~event))
    return allocator.reserved_bytes

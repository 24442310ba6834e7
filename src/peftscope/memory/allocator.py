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


class _Piece:
    """A part of a segment; neighbours are linked."""

    __slots__ = ("after", "before", "free", "offset", "size", "small")

    def __init__(self, offset: int, size: int, small: bool) -> None:
        self.offset, self.size, self.small = offset, size, small
        self.free = False
        self.before: _Piece | None = None
        self.after: _Piece | None = None


class CachingAllocator:
    """The allocator's books for one stream.

    Attributes:
        reserved_bytes: Bytes of all segments; they only grow.
    """

    def __init__(self) -> None:
        self.reserved_bytes = 0
        # Free pieces by (size, address), one pool for small requests and one for the others.
        self._pools: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._at: dict[int, _Piece] = {}

    def allocate(self, size: int) -> int:
        """Returns the address of a block for a request of ``size`` bytes (a multiple of 512)."""
        small = size <= SMALL_REQUEST
        pool = self._pools[small]
        place = bisect_left(pool, (size, 0))
        if place < len(pool):
            _, offset = pool.pop(place)
            piece = self._at[offset]
            piece.free = False
        else:
            piece = self._new_segment(size, small)
        rest = piece.size - size
        if rest >= ROUNDING_BYTES if small else rest > SMALL_REQUEST:
            self._split(piece, size)
        return piece.offset

    def free(self, offset: int) -> None:
        """Gives a block back, and joins it with free neighbours."""
        piece = self._at[offset]
        pool = self._pools[piece.small]
        before, after = piece.before, piece.after
        if after is not None and after.free:
            self._take(pool, after)
            del self._at[after.offset]
            piece.size += after.size
            piece.after = after.after
            if piece.after is not None:
                piece.after.before = piece
        if before is not None and before.free:
            self._take(pool, before)
            del self._at[piece.offset]
            before.size += piece.size
            before.after = piece.after
            if before.after is not None:
                before.after.before = before
            piece = before
        piece.free = True
        insort(pool, (piece.size, piece.offset))

    def _new_segment(self, size: int, small: bool) -> _Piece:
        if small:
            length = SMALL_SEGMENT
        elif size < MIDDLE_REQUEST:
            length = MIDDLE_SEGMENT
        else:
            length = -(-size // LARGE_ROUNDING) * LARGE_ROUNDING
        piece = _Piece(self.reserved_bytes, length, small)
        self._at[piece.offset] = piece
        self.reserved_bytes += length
        return piece

    def _split(self, piece: _Piece, size: int) -> None:
        rest = _Piece(piece.offset + size, piece.size - size, piece.small)
        rest.free, rest.before, rest.after = True, piece, piece.after
        if rest.after is not None:
            rest.after.before = rest
        piece.size, piece.after = size, rest
        self._at[rest.offset] = rest
        insort(self._pools[piece.small], (rest.size, rest.offset))

    @staticmethod
    def _take(pool: list[tuple[int, int]], piece: _Piece) -> None:
        del pool[bisect_left(pool, (piece.size, piece.offset))]


def reserved_bytes(trace: Trace) -> int:
    """Returns the bytes that the allocator holds after a trace; paged blocks are not its own."""
    allocator = CachingAllocator()
    addresses: dict[int, int] = {}
    last = trace.marks[-1][0] if trace.marks else len(trace.events)
    for event in trace.events[:last]:  # what goes after the last step changes nothing
        if event >= 0:
            block = trace.blocks[event]
            if block.size and not block.paged:
                addresses[event] = allocator.allocate(block.size)
        elif ~event in addresses:
            allocator.free(addresses.pop(~event))
    return allocator.reserved_bytes

"""Which bytes of an arena are taken: best fit over offsets, pure, touching no memory.

Rules:
  1. Blocks are disjoint and inside the arena; used + available = size.
  2. Two free blocks never touch: a freed block is merged with its free neighbours at once.
  3. A block takes the smallest free block that can hold it, the lowest offset among equals, and always the
     low end of it.
  4. Sizes are rounded up to whole cache lines, from `LARGE` up to whole pages, and offsets are aligned alike.
     So two objects never share a line (two large ones never a page), and an object freed is a perfect fit for
     the next of its size.

Rule 3 is also what keeps pages warm, without a record of what was touched. As every block is cut from the low
end of a free block, all below one high-water mark has been used before, but for alignment gaps of less than a
page. Only the free block that ends where the arena ends reaches beyond the mark. It has the highest offset,
so among equal fits a block used before comes first; and what is cut from it takes its used part first. The
background prefault goes from low to high offsets too.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from hpcray.exceptions import InternalError

LINE = 64  # bytes: the cache line of x86-64 and most of arm64, and the widest vector load
PAGE = 4096  # bytes: the smallest page of any system that hpcray runs on
LARGE = 1 << 20  # bytes: from here on, rounding up to a page wastes less than 0.4 %


class Allocator:
    """The blocks of one arena, by offset. Nothing blocks; O(log n), but for a memmove of the size index."""

    __slots__ = ("_by_end", "_by_size", "_by_start", "_live", "_size", "_start", "_used")

    def __init__(self, start: int, size: int) -> None:
        """Manage the offsets from `start` up to `start + size`, in bytes; all are free.

        Raises:
            ValueError: `start` is negative, `size` is not positive, or either is not a multiple of `LINE`.
        """
        if start < 0 or size <= 0 or start % LINE or size % LINE:
            raise ValueError(f"an arena starts and ends at multiples of {LINE} bytes, not {start} + {size}")
        self._start = start
        self._size = size
        self._used = 0
        self._live: dict[int, int] = {}  # offset -> size
        self._by_size: list[tuple[int, int]] = []  # (size, start) of each free block, sorted
        self._by_start: dict[int, int] = {}  # start -> end of each free block
        self._by_end: dict[int, int] = {}  # end -> start of each free block
        self._add_free(start, start + size)

    @property
    def size(self) -> int:
        """Bytes managed, in allocated and free blocks."""
        return self._size

    @property
    def used(self) -> int:
        """Bytes in allocated blocks, as rounded up."""
        return self._used

    @property
    def count(self) -> int:
        """How many blocks are allocated."""
        return len(self._live)

    @property
    def available(self) -> int:
        """Bytes in free blocks; a request of that size may still fail, see `largest_free`."""
        return self._size - self._used

    @property
    def largest_free(self) -> int:
        """Bytes of the largest free block; to a large request, alignment may leave up to a page less."""
        return self._by_size[-1][0] if self._by_size else 0

    def size_of(self, offset: int) -> int:
        """Bytes of the block that `allocate` returned as `offset`, as rounded up.

        Raises:
            KeyError: No block is allocated there.
        """
        return self._live[offset]

    def allocate(self, n: int) -> int | None:
        """Take `n` bytes and return their offset, a multiple of `LINE`, from `LARGE` bytes up of `PAGE`.

        Returns:
            The offset, to be given to `free` once; ``None`` if no free block can hold `n` bytes.

        Raises:
            ValueError: `n` is not positive.
        """
        if n < 1:
            raise ValueError(f"a block has at least one byte, not {n}")
        alignment = PAGE if n >= LARGE else LINE
        n = _round_up(n, alignment)
        index = self._find(n, alignment)
        if index < 0:
            return None
        size, start = self._by_size[index]
        offset = _round_up(start, alignment)
        end = start + size
        del self._by_size[index], self._by_start[start], self._by_end[end]
        if start < offset:
            self._add_free(start, offset)
        if offset + n < end:
            self._add_free(offset + n, end)
        self._live[offset] = n
        self._used += n
        return offset

    def fits(self, n: int) -> bool:
        """Whether `allocate` would find `n` bytes."""
        alignment = PAGE if n >= LARGE else LINE
        return self._find(_round_up(n, alignment), alignment) >= 0

    def _find(self, n: int, alignment: int) -> int:
        by_size = self._by_size
        # A page-aligned request may not fit a block of less than n + PAGE; others take the first they meet.
        for index in range(bisect_left(by_size, (n, 0)), len(by_size)):
            size, start = by_size[index]
            if _round_up(start, alignment) + n <= start + size:
                return index
        return -1

    def free(self, offset: int) -> None:
        """Give back the block that `allocate` returned as `offset`.

        Raises:
            ValueError: No block is allocated there: never, not any more, or `offset` lies inside one.
        """
        size = self._live.pop(offset, None)
        if size is None:
            raise ValueError(f"no block is allocated at offset {offset}")
        self._used -= size
        end = offset + size
        start = self._by_end.get(offset, offset)
        if start != offset:
            self._remove_free(start, offset)
        if (next_end := self._by_start.get(end)) is not None:
            self._remove_free(end, next_end)
            end = next_end
        self._add_free(start, end)

    def check(self) -> None:
        """Raise InternalError if blocks overlap, leave holes or are not coalesced, or sums or tables differ.

        Slow: tests and HPCRAY_CHECK=1.
        """
        if self._by_size != sorted((end - start, start) for start, end in self._by_start.items()):
            raise InternalError("free blocks by size and by start disagree")
        if self._by_end != {end: start for start, end in self._by_start.items()}:
            raise InternalError("free blocks by start and by end disagree")
        if self._used != (in_blocks := sum(self._live.values())):
            raise InternalError(f"{self._used} bytes are counted as used, the blocks have {in_blocks}")
        blocks = [(offset, offset + size, True) for offset, size in self._live.items()]
        blocks += [(start, end, False) for start, end in self._by_start.items()]
        reached, last_is_live = self._start, True
        for start, end, is_live in sorted(blocks):
            if start != reached or end <= start:
                raise InternalError(f"after a block that ends at {reached}, one is from {start} to {end}")
            if not is_live and not last_is_live:
                raise InternalError(f"the free blocks that meet at offset {start} are not coalesced")
            reached, last_is_live = end, is_live
        if reached != self._start + self._size:
            raise InternalError(f"blocks end at offset {reached}, the arena at {self._start + self._size}")

    def _add_free(self, start: int, end: int) -> None:
        insort(self._by_size, (end - start, start))
        self._by_start[start] = end
        self._by_end[end] = start

    def _remove_free(self, start: int, end: int) -> None:
        del self._by_size[bisect_left(self._by_size, (end - start, start))]
        del self._by_start[start], self._by_end[end]


def _round_up(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment

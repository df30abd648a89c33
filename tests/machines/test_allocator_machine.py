"""The allocator against a model that keeps nothing but the list of live blocks and searches all gaps."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from hpcray.store.allocator import LARGE, LINE, PAGE, Allocator


def best_fit(live: dict[int, int], start: int, size: int, n: int, alignment: int) -> int | None:
    fits: list[tuple[int, int]] = []
    reached = start
    for block, length in [*sorted(live.items()), (start + size, 0)]:
        offset = -(-reached // alignment) * alignment
        if block > reached and offset + n <= block:
            fits.append((block - reached, offset))
        reached = block + length
    return min(fits)[1] if fits else None


class AllocatorMachine(RuleBasedStateMachine):
    """Sizes cluster around the rounding limits, and the arena is small, so that it fills up and fragments."""

    offsets: Bundle[int] = Bundle("offsets")

    @initialize(start=st.integers(0, 100), lines=st.integers(1, 5 * LARGE // LINE))
    def create(self, start: int, lines: int) -> None:
        self.start = start * LINE
        self.size = lines * LINE
        self.live: dict[int, int] = {}
        self.allocator = Allocator(self.start, self.size)

    @rule(
        target=offsets,
        n=st.one_of(
            st.integers(1, 3 * LINE),
            st.integers(1, 3 * PAGE),
            st.integers(LARGE - 2 * PAGE, LARGE + 2 * PAGE),
            st.integers(1, 6 * LARGE),
        ),
    )
    def allocate(self, n: int) -> int:
        alignment = LINE if n < LARGE else PAGE
        rounded = -(-n // alignment) * alignment
        expected = best_fit(self.live, self.start, self.size, rounded, alignment)
        assert self.allocator.fits(n) == (expected is not None)
        offset = self.allocator.allocate(n)
        assert offset == expected
        if offset is None:
            return -1
        self.live[offset] = rounded
        assert self.allocator.size_of(offset) == rounded
        return offset

    @rule(offset=consumes(offsets))
    def free(self, offset: int) -> None:
        if self.live.pop(offset, None) is not None:
            self.allocator.free(offset)
        else:
            with pytest.raises(ValueError, match="no block"):
                self.allocator.free(offset)

    @rule(offset=st.integers(0, 6 * LARGE))
    def free_anything(self, offset: int) -> None:
        if offset not in self.live:
            with pytest.raises(ValueError, match="no block"):
                self.allocator.free(offset)
            with pytest.raises(KeyError):
                self.allocator.size_of(offset)

    @invariant()
    def sums_agree_and_free_blocks_are_coalesced(self) -> None:
        self.allocator.check()
        used = sum(self.live.values())
        assert (self.allocator.used, self.allocator.available) == (used, self.size - used)
        ends = [self.start, *(offset + length for offset, length in sorted(self.live.items()))]
        gaps = zip(ends, [*sorted(self.live), self.start + self.size], strict=True)
        assert self.allocator.largest_free == max(block - end for end, block in gaps)


TestAllocator = AllocatorMachine.TestCase

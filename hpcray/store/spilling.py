"""Which primary copies go to disk to make room, and what has become of it: a pure core.

Rules:
  1. Nothing is spilled before somebody waits for room. Then those least recently looked at go first, and not only as much as
     is asked for, but a tenth of the store (at most what all writers write at a time), so that not every creator waits.
  2. A batch is one file: small objects are fused. Several batches are under way at a time, each by a writer of its own.
  3. A block is pinned while it is written. Whoever looks at it meanwhile keeps it here; its copy on disk is kept too.
  4. What could not be written stays in memory, and is tried again after a pause, as long as somebody waits for room. The
     error is part of what those are told who wait in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hpcray.store.entry import Extent
from hpcray.store.memory import Block, Memory

FILE_BYTES = 100_000_000
"""Bytes of small objects in one file (Ray's `min_spilling_size`): so a disk sees long writes, and files are few."""
LEAST_BATCH = 4 << 20
"""Bytes below which a batch is not split among writers."""
BATCHES = 4
"""Batches under way at a time."""
RETRY_PAUSE = 1.0
"""Seconds after a failed write, before the next."""


class SpillOut(Protocol):
    """The only way out of the raylet."""

    def spill(self, blocks: list[Block], done: Callable[[list[Extent], str | None], None]) -> None:
        """Write these blocks into a new file; `done`, later, gets where the first of them are, all or up to an error."""

    def restore(self, extent: Extent, block: Block, done: Callable[[str | None], None]) -> None:
        """Read an object back into a block; `done` gets None, or what went wrong."""

    def forget(self, extent: Extent) -> None:
        """Nobody needs this copy any more: give its disk space back."""


class SpillKeeper(Protocol):
    """Who knows what lies in the blocks."""

    def on_spilled(self, block: Block, extent: Extent) -> bool:
        """A copy of the block is on disk. False: nobody needs it any more."""


class Spiller:
    """What is being written to disk, and what was."""

    def __init__(self, memory: Memory, out: SpillOut, keeper: SpillKeeper) -> None:
        self._memory = memory
        self._out = out
        self._keeper = keeper
        self.under_way = 0
        """Bytes that are being written."""
        self._batches: dict[int, float] = {}
        """Those under way, and since when."""
        self._batches_made = 0
        self.error = ""
        """Why a write failed; empty if one that was begun later did not."""
        self._failed_before = 0
        """The batch that was begun last when one failed: no earlier one proves that the disk is well again."""
        self._has_failed = False
        """A write has failed in this turn."""
        self.retry_at: float | None = None
        """When the next write may be tried, after one that failed."""
        # Figures:
        self.spilled_objects = self.spilled_bytes = 0
        self.restored_objects = self.restored_bytes = 0
        self.bytes_on_disk = 0

    def relieve(self, needed: int, now: float) -> None:
        """So many bytes are waited for: start to write what can go, unless enough is being written already."""
        if self.retry_at is not None and now < self.retry_at:
            return
        self.retry_at = None
        goal = max(needed, min(self._memory.size // 10, BATCHES * FILE_BYTES))
        most = min(FILE_BYTES, max(goal // BATCHES, LEAST_BATCH))
        while self.under_way < goal and len(self._batches) < BATCHES and (batch := self._next_batch(most)):
            self._write(batch, now)

    def on_turn(self, now: float) -> None:
        """At the end of each turn: from then on counts the pause after a write that failed."""
        if self._has_failed:
            self._has_failed = False
            self.retry_at = now + RETRY_PAUSE

    @property
    def busy_since(self) -> float:
        """When the oldest batch under way was begun; -inf if there is none."""
        return min(self._batches.values(), default=float("-inf"))

    def _next_batch(self, most: int) -> list[Block]:
        batch: list[Block] = []
        size = 0
        for block in self._memory.primaries.values():
            if batch and size + block.size > most:
                break
            batch.append(block)
            size += block.size
        return batch

    def _write(self, batch: list[Block], now: float) -> None:
        size = sum(block.size for block in batch)
        self.under_way += size
        self._batches_made += 1
        number = self._batches_made
        self._batches[number] = now
        for block in batch:
            self._memory.pin(block)

        def done(extents: list[Extent], error: str | None) -> None:
            self.under_way -= size
            del self._batches[number]
            if error:
                self.error = error
                self._failed_before = self._batches_made
                self._has_failed = True
            elif number > self._failed_before:
                self.error = ""
            for block, extent in zip(batch, extents, strict=False):
                self.spilled_objects += 1
                self.spilled_bytes += extent.size
                self.bytes_on_disk += extent.size
                self._memory.note_progress()
                if block.dead or not self._keeper.on_spilled(block, extent):
                    self.forget(extent)
            for block in batch:
                self._memory.unpin(block)

        self._out.spill(batch, done)

    def restore(self, extent: Extent, block: Block, done: Callable[[str | None], None]) -> None:
        """Read an object back into a block."""

        def read(error: str | None) -> None:
            if error is None:
                self.restored_objects += 1
                self.restored_bytes += extent.size
            done(error)

        self._out.restore(extent, block, read)

    def forget(self, extent: Extent) -> None:
        """Nobody needs this copy any more."""
        self.bytes_on_disk -= extent.size
        self._out.forget(extent)

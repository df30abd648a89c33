"""The blocks of one raylet's arena: who has one, who looks at it, who waits for one, and what makes room.

Rules:
  1. A block goes back to the allocator when it was abandoned *and* its last pin is gone.
  2. Creators are served in the order of their asking: a small request waits behind a large one, which never starves.
  3. Where there is no room, unused copies go first, the oldest first, but none that somebody looks at (`_find_victim`).
     If there is none to go either, the creator waits: whatever gives a block back, ends the last pin on an unused copy, or
     makes a copy unused, serves the creators again. One whose time is over is told so (`expire`).

Blocks in arenas of other ranks of this host are pinned here as well; the last pin on them goes back to that rank.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from hpcray.exceptions import InternalError
from hpcray.protocol import messages as m
from hpcray.store.allocator import Allocator


class Block:
    """Memory of one object in some arena of this host. `dead`: to be given back when `pins` reaches zero."""

    __slots__ = ("dead", "id", "offset", "pins", "rank", "size")

    def __init__(self, identifier: bytes, rank: int, offset: int, size: int) -> None:
        self.id = identifier
        self.rank = rank
        self.offset = offset
        self.size = size
        self.pins = 0
        self.dead = False


class MemoryOut(Protocol):
    """The only way out of the raylet."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...


class Evictor(Protocol):
    """Who knows what lies in the blocks."""

    def on_evicted(self, identifier: bytes) -> None:
        """The unused copy of this object is gone."""

    def count_stored(self) -> int:
        """How many objects lie in this arena."""


class _Creator(NamedTuple):
    """Somebody who waits for room."""

    id: bytes
    size: int
    deadline: float
    then: Callable[[Block | None], None]


class Memory:
    """The arena of one raylet, as offsets: a pure core, see the module's rules."""

    def __init__(self, rank: int, allocator: Allocator, out: MemoryOut, evictor: Evictor) -> None:
        self._rank = rank
        self._allocator = allocator
        self._out = out
        self._evictor = evictor
        self.unused: OrderedDict[bytes, Block] = OrderedDict()
        """Copies that nothing here refers to and others have too, by object, in the order in which they became so."""
        self._creators: deque[_Creator] = deque()

    # ---------------------------------------------------------------------------------------------------------- looking
    def pin(self, block: Block) -> None:
        """Somebody looks at this memory: it stays until `unpin`."""
        block.pins += 1

    def unpin(self, block: Block) -> None:
        """One who looks less."""
        block.pins -= 1
        if block.pins == 0:
            if block.dead:
                self._give_back(block)
            elif block.id in self.unused:
                self._serve_creators()

    def abandon(self, block: Block) -> None:
        """Nothing refers to this memory any more; it goes back when the last pin is gone."""
        block.dead = True
        if block.pins == 0:
            self._give_back(block)

    def _give_back(self, block: Block) -> None:
        if block.rank != self._rank:
            self._out.send(block.rank, m.UnmapObject(block.id))
            return
        self._allocator.free(block.offset)
        self._serve_creators()

    # ------------------------------------------------------------------------------------------------------------- room
    def reserve(self, identifier: bytes, size: int, deadline: float, then: Callable[[Block | None], None]) -> None:
        """Call `then` with memory for the object, at once or when there is room; with None if there can be none by then."""
        if size > self._allocator.size:
            then(None)
        elif not self._creators and (block := self._make_room(identifier, size)) is not None:
            then(block)
        else:
            self._creators.append(_Creator(identifier, size, deadline, then))

    def offer(self, block: Block) -> None:
        """A copy that nothing here refers to any more: it may make room for others."""
        self.unused[block.id] = block
        self._serve_creators()

    def withdraw(self, identifier: bytes) -> None:
        """Something refers to the object again, or it is freed: its copy is not to be evicted, if there is one."""
        self.unused.pop(identifier, None)

    def expire(self, now: float) -> None:
        """Tell creators whose time is over."""
        late = [creator for creator in self._creators if creator.deadline <= now]
        if late:
            self._creators = deque(creator for creator in self._creators if creator.deadline > now)
            for creator in late:
                creator.then(None)
            self._serve_creators()

    @property
    def next_expiry(self) -> float | None:
        """When `expire` should be called, if a creator waits."""
        return min(creator.deadline for creator in self._creators) if self._creators else None

    @property
    def is_waited_for(self) -> bool:
        """Whether creators wait for room."""
        return bool(self._creators)

    def _serve_creators(self) -> None:
        while self._creators:
            first = self._creators[0]
            block = self._make_room(first.id, first.size)
            if block is None:
                return
            self._creators.popleft()
            first.then(block)

    def _make_room(self, identifier: bytes, size: int) -> Block | None:
        while (offset := self._allocator.allocate(size)) is None:
            victim = self._find_victim()
            if victim is None:
                return None
            self._evict(victim)
        return Block(identifier, self._rank, offset, size)

    def _find_victim(self) -> Block | None:
        return next((block for block in self.unused.values() if not block.pins), None)

    def _evict(self, victim: Block) -> None:
        del self.unused[victim.id]
        self._allocator.free(victim.offset)
        self._evictor.on_evicted(victim.id)

    # ---------------------------------------------------------------------------------------------------------- figures
    @property
    def in_use(self) -> int:
        """Bytes of the arena in blocks, those that are being written included."""
        return self._allocator.used

    def why_full(self, size: int) -> str:
        """What an `ObjectStoreFullError` says."""
        free, largest, total = self._allocator.available, self._allocator.largest_free, self._allocator.size
        return (
            f"an object of {size:,} bytes does not fit: the object store of rank {self._rank} has {total:,} bytes, "
            f"{free:,} free (largest piece {largest:,}), and {self._evictor.count_stored()} objects in it are still "
            "referenced. Drop references (`del`), store less at a time, or give the store more: "
            "init(object_store_memory=…) or --object-store-memory."
        )

    def check(self) -> None:
        """Raise InternalError if blocks and allocator disagree. Slow: tests and HPCRAY_CHECK=1."""
        self._allocator.check()
        for identifier, block in self.unused.items():
            if block.id != identifier or block.rank != self._rank or block.dead or block.pins < 0:
                raise InternalError(f"rank {self._rank}: the unused copy of {identifier.hex()} is none")

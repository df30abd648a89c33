"""The blocks of one raylet's arena: who has one, who looks at it, who waits for one, and what makes room.

Rules:
  1. A block goes back to the allocator when it was abandoned *and* its last pin is gone.
  2. Creators wait in one queue: the more urgent ones first, since who is waited for by what runs must not wait for what has to
     run later; among equals in the order of their asking. What comes free is for the first, so that large requests are served
     while others come and go. But once nothing more has come free for the first for `STANDSTILL` seconds, whoever fits into
     what is free is served: it may be just what the first waits for.
  3. Where there is no room, blocks without pins leave, those least recently looked at first: unused copies, then copies that
     others have too, then primary copies that are on disk as well. If that is not enough, the creator waits, and the keeper
     is told, once per turn, how much is waited for (`on_pressure`): it spills.
  4. One that is not wanted any more (its client has died, its object was freed) leaves the queue in that turn: it is told
     that there is no room, and nobody waits behind it.
  5. A creator waits until, for `patience` seconds, no more has come free than was before, nobody was served in turn and no write
     to disk was begun that is still under way; then it is told so. One that asks for more than the arena has is told at the end
     of the turn.

Blocks in arenas of other ranks of this host are pinned here as well; the last pin on them goes back to that rank.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

from hpcray.exceptions import InternalError
from hpcray.protocol import messages as m
from hpcray.store.allocator import Allocator

STANDSTILL = 1.0
"""Seconds without anything coming free, after which the first creator is overtaken: long for tasks that come and go, short for
those who wait in a circle."""


class Block:
    """Memory of one object in some arena of this host. `dead`: to be given back when `pins` reaches zero."""

    __slots__ = ("dead", "id", "is_recalled", "offset", "pins", "queue", "rank", "size")

    def __init__(self, identifier: bytes, rank: int, offset: int, size: int) -> None:
        self.id = identifier
        self.rank = rank
        self.offset = offset
        self.size = size
        self.pins = 0
        self.dead = False
        self.queue: Queue | None = None
        """Where it waits for its turn to leave while it has no pins; None: it is being written, or not ours."""
        self.is_recalled = False
        """It lies in another rank's arena, which wants it back when nobody here looks at it any more."""


Queue: TypeAlias = OrderedDict[bytes, Block]
"""Blocks without pins by object, those least recently looked at first."""


class MemoryOut(Protocol):
    """The only way out of the raylet."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...


class Keeper(Protocol):
    """Who knows what lies in the blocks."""

    def on_evicted(self, block: Block) -> None:
        """This block made room for something else."""

    def on_pressure(self, needed: int, now: float) -> float:
        """So many bytes are waited for, and nothing that could simply go is left. Since when room is being made (-inf: not)."""

    def on_idle(self, block: Block) -> None:
        """Nobody here looks any more at this block of another rank, which wants it back."""


class _Creator:
    """Somebody who waits for room."""

    __slots__ = ("id", "is_wanted", "since", "size", "then", "urgency")

    def __init__(
        self,
        identifier: bytes,
        size: int,
        then: Callable[[Block | None], None],
        is_wanted: Callable[[], bool],
        urgency: int,
    ) -> None:
        self.id = identifier
        self.urgency = urgency
        self.size = size
        self.is_wanted = is_wanted
        self.since = float("inf")
        """When it began to wait; known at the end of the turn."""
        self.then = then


class Memory:
    """The arena of one raylet, as offsets: a pure core, see the module's rules.

    Args:
        patience: Seconds without anything coming free, after which a creator is told that there is no room.
    """

    def __init__(self, rank: int, allocator: Allocator, out: MemoryOut, keeper: Keeper, patience: float) -> None:
        self._rank = rank
        self._allocator = allocator
        self._out = out
        self._keeper = keeper
        self._patience = patience
        self.unused: Queue = OrderedDict()
        """Copies that nothing here refers to and others have too."""
        self.copies: Queue = OrderedDict()
        """Copies that something here refers to and others have too."""
        self.backed: Queue = OrderedDict()
        """Primary copies that are on disk as well."""
        self.primaries: Queue = OrderedDict()
        """Primary copies that are nowhere else."""
        self.freed: dict[int, Block] = {}
        """Blocks of this arena, by offset, that were abandoned and wait for their last pin."""
        self._creators: list[_Creator] = []
        self._refused: list[_Creator] = []
        """Those who are to be told that there is no room."""
        self._first: _Creator | None = None
        """Who was first in the queue at the end of the last turn."""
        self._most_free = 0
        """Bytes that were free at most since then."""
        self._has_hope = False
        self._moved_at = self._busy_since = self._now = float("-inf")

    # ---------------------------------------------------------------------------------------------------------- looking
    def pin(self, block: Block) -> None:
        """Somebody looks at this memory: it stays until `unpin`."""
        if not block.pins and block.queue is not None:
            del block.queue[block.id]
        block.pins += 1

    def unpin(self, block: Block) -> None:
        """One who looks less."""
        block.pins -= 1
        if block.pins:
            return
        if block.dead:
            self._give_back(block)
        elif block.queue is not None:
            block.queue[block.id] = block
            self._serve_creators()
        elif block.is_recalled:
            self._keeper.on_idle(block)

    def abandon(self, block: Block) -> None:
        """Nothing refers to this memory any more; it goes back when the last pin is gone."""
        self._put_in(block, None)
        block.dead = True
        if not block.pins:
            self._give_back(block)
        elif block.rank == self._rank:
            self.freed[block.offset] = block

    def _give_back(self, block: Block) -> None:
        if block.rank != self._rank:
            self._out.send(block.rank, m.UnmapObject(block.id))
            return
        self.freed.pop(block.offset, None)
        self._allocator.free(block.offset)
        self._serve_creators()

    # ------------------------------------------------------------------------------------------------- what may leave
    def offer(self, block: Block) -> None:
        """A copy that nothing here refers to any more: it goes before all others."""
        self._put_in(block, self.unused)

    def keep_copy(self, block: Block) -> None:
        """A copy that something here refers to (again)."""
        self._put_in(block, self.copies)

    def keep_primary(self, block: Block, *, is_on_disk: bool = False) -> None:
        """The copy that must not be lost."""
        self._put_in(block, self.backed if is_on_disk else self.primaries)

    def _put_in(self, block: Block, queue: Queue | None) -> None:
        if block.queue is queue:
            return
        if block.queue is not None and not block.pins:
            del block.queue[block.id]
        block.queue = queue
        if queue is not None and not block.pins:
            queue[block.id] = block
            self._serve_creators()

    # ------------------------------------------------------------------------------------------------------------- room
    def reserve(
        self,
        identifier: bytes,
        size: int,
        then: Callable[[Block | None], None],
        is_wanted: Callable[[], bool] = lambda: True,
        *,
        urgency: int = 0,
        only_free: bool = False,
    ) -> None:
        """Call `then` with memory for the object, at once or when there is room; with None if none comes.

        That is not known before the end of the turn; nor does one wait longer who is not wanted any more. With `only_free`,
        nothing else leaves for it, and it does not wait. `urgency`: see entry.py, the least goes first.
        """
        creator = _Creator(identifier, size, then, is_wanted, urgency)
        if size > self._allocator.size or (only_free and not self.is_free(size)):
            self._refused.append(creator)
        elif self._is_next(urgency) and (block := self._make_room(creator)) is not None:
            then(block)
        else:
            insort(self._creators, creator, key=_urgency)

    def _is_next(self, urgency: int) -> bool:
        return not self._creators or urgency < self._creators[0].urgency

    def hasten(self, identifier: bytes, urgency: int) -> None:
        """Whoever waits for room for this object is more urgent now. Does nothing if nobody does."""
        for creator in [each for each in self._creators if each.id == identifier and urgency < each.urgency]:
            self._creators.remove(creator)
            creator.urgency = urgency
            insort(self._creators, creator, key=_urgency)
            self._serve_creators()

    def is_free(self, size: int) -> bool:
        """Whether there is memory for an object that nobody would have to leave, or to wait longer, for."""
        return not self._creators and self._allocator.fits(size)

    def on_turn(self, now: float) -> None:
        """At the end of each turn in which somebody waits: have room made, and tell those whose time is over.

        Again in the same turn if that `has_news`: who is told may ask again, and would not be looked at before the next one.
        """
        refused, self._refused = self._refused, []
        for creator in refused:
            creator.then(None)
        self._dismiss(lambda creator: not creator.is_wanted())
        if self._creators:
            self._busy_since = self._keeper.on_pressure(sum(creator.size for creator in self._creators), now)
        for creator in self._creators:
            creator.since = min(creator.since, now)
        self._note_moves(now)
        self._dismiss(lambda creator: self._is_late(creator, now))
        if self.stands_still:
            self._serve_whoever_fits()

    def _note_moves(self, now: float) -> None:
        self._now = now
        if not self._creators:
            return
        first, free = self._creators[0], self._allocator.available
        if first is not self._first:
            self._first, self._most_free = first, free
        elif free > self._most_free:
            self._most_free = free
        elif not self._has_hope:
            return
        self._has_hope = False
        self._moved_at = now

    def _serve_whoever_fits(self) -> None:
        served = []
        for creator in self._creators[1:]:
            if (offset := self._allocator.allocate(creator.size)) is not None:
                served.append((creator, Block(creator.id, self._rank, offset, creator.size)))
                self._creators.remove(creator)
        for creator, block in served:
            creator.then(block)

    def _dismiss(self, is_meant: Callable[[_Creator], bool]) -> None:
        kept: list[_Creator] = []
        dismissed: list[_Creator] = []
        for creator in self._creators:
            (dismissed if is_meant(creator) else kept).append(creator)
        if dismissed:
            self._creators = kept
            for creator in dismissed:
                creator.then(None)
            self._serve_creators()

    def note_progress(self) -> None:
        """Room is being made: who waits may hope."""
        self._has_hope = True

    def _idle_since(self, creator: _Creator) -> float:
        return max(creator.since, self._moved_at, self._busy_since)

    def _deadline(self, creator: _Creator) -> float:
        return self._idle_since(creator) + self._patience

    @property
    def stands_still(self) -> bool:
        """Whether no more has come free for the first creator for so long that others need not wait behind it."""
        first = self._creators[0] if self._creators else None
        return first is not None and first is self._first and self._idle_since(first) + STANDSTILL <= self._now

    def _is_late(self, creator: _Creator, now: float) -> bool:
        # Nobody is in the turn of its asking, whatever the patience: who is told may ask for the same again at once.
        return creator.since < now and self._deadline(creator) <= now

    @property
    def first_urgency(self) -> int:
        """Of the creators that wait, the first one's."""
        return self._creators[0].urgency

    @property
    def next_expiry(self) -> float | None:
        """When `on_turn` should be called, if a creator waits."""
        due = min(map(self._deadline, self._creators), default=float("inf"))
        if self._creators and (standstill := self._idle_since(self._creators[0]) + STANDSTILL) > self._now:
            due = min(due, standstill)
        return due if due < float("inf") else None

    @property
    def has_news(self) -> bool:
        """Whether somebody has asked in vain since the last `on_turn`."""
        return bool(self._refused) or any(creator.since == float("inf") for creator in self._creators)

    @property
    def is_waited_for(self) -> bool:
        """Whether creators wait for room."""
        return bool(self._creators or self._refused)

    def _serve_creators(self) -> None:
        while self._creators:
            first = self._creators[0]
            if not first.is_wanted():
                return  # the end of the turn is near
            block = self._make_room(first)
            if block is None:
                return
            del self._creators[0]
            first.then(block)

    def _make_room(self, creator: _Creator) -> Block | None:
        while (offset := self._allocator.allocate(creator.size)) is None:
            victim = next(self._victims(), None)
            if victim is None:
                return None
            self._evict(victim)
        return Block(creator.id, self._rank, offset, creator.size)

    def _victims(self) -> Iterator[Block]:
        for queue in (self.unused, self.copies, self.backed):
            yield from queue.values()

    def _evict(self, victim: Block) -> None:
        self._put_in(victim, None)
        self._allocator.free(victim.offset)
        self._keeper.on_evicted(victim)

    # ---------------------------------------------------------------------------------------------------------- figures
    @property
    def size(self) -> int:
        """Bytes of the arena."""
        return self._allocator.size

    @property
    def in_use(self) -> int:
        """Bytes of the arena in blocks, those that are being written included."""
        return self._allocator.used

    @property
    def count(self) -> int:
        """How many objects have memory in the arena, those that are being written included."""
        return self._allocator.count

    @property
    def largest_free(self) -> int:
        """Bytes of the largest free piece."""
        return self._allocator.largest_free

    def check(self) -> None:
        """Raise InternalError if blocks and allocator disagree. Slow: tests and HPCRAY_CHECK=1."""
        self._allocator.check()
        for queue in (self.unused, self.copies, self.backed, self.primaries):
            for identifier, block in queue.items():
                if (block.id, block.rank, block.pins, block.dead) != (identifier, self._rank, 0, False):
                    raise InternalError(f"rank {self._rank}: {identifier.hex()} may leave, but somebody looks at it")
                if block.queue is not queue:
                    raise InternalError(f"rank {self._rank}: {identifier.hex()} waits in the wrong queue")
        for offset, block in self.freed.items():
            if block.offset != offset or not block.dead or block.pins < 1:
                raise InternalError(f"rank {self._rank}: {block.id.hex()} is freed, and its memory is not given back")


def _urgency(creator: _Creator) -> int:
    return creator.urgency

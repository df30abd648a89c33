"""What becomes of the objects of one raylet as memory gets scarce, and again as they are wanted: a pure core.

Rules:
  1. Copies that others have too simply go; primary copies go when they are on disk, and come back to whoever wants them.
  2. One rank has the primary copy, in its arena or on its disk. If the disk fails, it tells the home (`CopyLost`) and takes
     another rank's copy in its place; where there is none, the error takes the object's place.
  3. Where no room comes, whoever waits is told what fills the arena. The object stays where it is.

`Memory` says what has to go, `Spiller` what goes to disk; here is what that means for the object.
"""

from __future__ import annotations

from typing import Protocol

from hpcray import payload
from hpcray.ids import home_of
from hpcray.protocol import messages as m
from hpcray.store.allocator import Allocator
from hpcray.store.entry import AWAY, HERE, MAPPED, PREFETCH, SPILLED, Entry, Extent
from hpcray.store.memory import Block, Memory, MemoryOut
from hpcray.store.references import References
from hpcray.store.spilling import Spiller, SpillOut
from hpcray.store.transfers import Transfers


class PressureOut(MemoryOut, SpillOut, Protocol):
    """The only way out of the raylet."""

    def holders(self) -> list[str]:
        """Which clients hold memory of this arena, and how much, for people."""


class Table(Protocol):
    """Who knows the objects, and hears what has become of one."""

    references: References
    transfers: Transfers

    def on_arrived(self, entry: Entry) -> None:
        """It can be read on this node."""

    def on_no_room(self, entry: Entry) -> None:
        """No room came for it."""

    def on_failed(self, entry: Entry, error: bytes) -> None:
        """It is lost."""


class Pressure:
    """The memory and disk of one raylet's objects: a pure core, see the module's rules."""

    def __init__(
        self,
        rank: int,
        entries: dict[bytes, Entry],
        allocator: Allocator,
        out: PressureOut,
        table: Table,
        patience: float,
    ) -> None:
        self._rank = rank
        self._entries = entries
        self._out = out
        self._table = table
        self.memory = Memory(rank, allocator, out, self, patience)
        self.spiller = Spiller(self.memory, out, self)
        self._contents = ""
        """What `why_full` says of this arena: made once per turn, however many are told."""

    def on_turn(self, now: float) -> None:
        """At the end of each turn: have room made for those who wait for it."""
        self.spiller.on_turn(now)
        if self.memory.is_waited_for:
            self.memory.on_turn(now)
            self._contents = ""

    @property
    def next_expiry(self) -> float | None:
        """When `on_turn` should be called next, if somebody waits for room."""
        due = self.memory.next_expiry
        return due if due is None or self.spiller.retry_at is None else min(due, self.spiller.retry_at)

    # ------------------------------------------------------------------------------------------------------ making room
    def on_evicted(self, block: Block) -> None:
        """A copy made room for something else."""
        entry = self._entries[block.id]
        entry.block = None
        if entry.spilled is not None:
            entry.state = SPILLED
            return
        home = home_of(entry.id)
        if home != self._rank:
            self._out.send(home, m.CopyDropped(entry.id))
        if home == self._rank or entry.holds or entry.guests:
            entry.state = AWAY
        else:
            del self._entries[entry.id]

    def on_pressure(self, needed: int, now: float) -> float:
        """Creators wait for so many bytes: spill, and have other ranks of this host let go of what they only map."""
        self.spiller.relieve(needed, now)
        if self.spiller.under_way < needed:
            self._table.transfers.recall()
        return self.spiller.busy_since

    def on_recall(self, identifier: bytes, owner: int) -> None:
        """Another rank of this host has no room: unmap its block as soon as nobody here looks at it."""
        entry = self._entries.get(identifier)
        if entry is None or entry.state != MAPPED or entry.block is None or entry.block.rank != owner:
            return  # it was unmapped meanwhile, which the owner will hear
        entry.block.is_recalled = True
        if not entry.block.pins:
            self.on_idle(entry.block)

    def on_idle(self, block: Block) -> None:
        """Nobody here looks any more at memory that its owner wants back."""
        entry = self._entries[block.id]
        entry.block = None
        entry.state = AWAY
        entry.copies = (entry.copies or set()) | {block.rank}
        self.memory.abandon(block)
        self._table.references.settle(entry)

    def on_spilled(self, block: Block, extent: Extent) -> bool:
        """A primary copy is on disk too, if it is still wanted."""
        entry = self._entries.get(block.id)
        if entry is None or entry.block is not block:
            return False
        entry.spilled = extent
        self.memory.keep_primary(block, is_on_disk=True)
        return True

    def restore(self, entry: Entry) -> None:
        """Read an object that is SPILLED back; a prefetch takes free memory only."""
        extent = entry.spilled
        is_prefetch = entry.urgency == PREFETCH
        assert extent is not None

        def is_wanted() -> bool:
            return self._entries.get(entry.id) is entry and entry.spilled is extent

        def with_room(block: Block | None) -> None:
            if not is_wanted():
                if block is not None:
                    self.memory.abandon(block)  # freed while it waited for room
            elif block is None and is_prefetch and entry.urgency < PREFETCH:
                self.restore(entry)  # it is needed now
            elif block is None:
                self._table.on_no_room(entry)
            else:
                self.spiller.restore(extent, block, lambda error: done(block, error))

        def done(block: Block, error: str | None) -> None:
            if not is_wanted():
                self.memory.abandon(block)
            elif error is None:
                entry.state = HERE
                entry.block = block
                self._table.on_arrived(entry)
            else:
                self.memory.abandon(block)
                self._lose_spilled(entry, error)

        self.memory.reserve(entry.id, entry.size, with_room, is_wanted, urgency=entry.urgency, only_free=is_prefetch)

    def _lose_spilled(self, entry: Entry, why: str) -> None:
        error = payload.system_error("ObjectLostError", _unreadable_text(entry.id, why), entry.id.hex())
        self.forget(entry)
        entry.state = AWAY
        entry.data = error
        entry.copies = (entry.copies or set()) - {self._rank}
        home = home_of(entry.id)
        if home != self._rank:
            self._out.send(home, m.CopyLost(entry.id, error))
        elif not entry.copies:
            self._table.on_failed(entry, error)
            return
        self._table.transfers.fetch(entry)

    def on_copy_lost(self, message: m.CopyLost, holder: int) -> None:
        """At home: the rank with the primary copy could not read it back."""
        entry = self._entries.get(message.id)
        if entry is None:
            return
        if entry.copies:
            entry.copies.discard(holder)
        if entry.state == AWAY:
            entry.data = message.error
        if entry.state == HERE:
            assert entry.block is not None
            entry.is_primary = True
            self.memory.keep_primary(entry.block, is_on_disk=entry.spilled is not None)
        elif entry.state == AWAY and not entry.copies:
            self._table.on_failed(entry, message.error)

    def forget(self, entry: Entry) -> None:
        """Give the disk space of an object back, if it has any."""
        extent, entry.spilled = entry.spilled, None
        if extent is not None:
            self.spiller.forget(extent)

    # ---------------------------------------------------------------------------------------------------------- no room
    def why_full(self, size: int) -> str:
        """What an `ObjectStoreFullError` says of an object for which there was no room. For calls of `Memory`, in its turn."""
        memory = self.memory
        text = (
            f"an object of {size:,} bytes does not fit: the object store of rank {self._rank} has {memory.size:,} bytes"
        )
        if size > memory.size:
            return text + " in all. Give the store more: init(object_store_memory=…) or --object-store-memory."
        if not self._contents:
            self._contents = self._describe_contents()
        return (
            f"{text}, {self._contents}. Drop what is not needed (`del`: an array from `get` keeps its object in the store), get "
            "less at a time, or give the store more: init(object_store_memory=…) or --object-store-memory."
        )

    def _describe_contents(self) -> str:
        memory = self.memory
        held = [*self._out.holders()]
        if mapped := self._table.transfers.bytes_mapped_out:
            held.append(f"{mapped:,} bytes are mapped by other ranks of this host")
        if queued := sum(block.size for block in memory.primaries.values()):
            why = f"could not be spilled ({self.spiller.error})" if self.spiller.error else "are not spilled yet"
            held.append(f"{queued:,} bytes {why}")
        if writing := self.spiller.under_way:
            held.append(f"{writing:,} bytes are being spilled")
        return (
            f"{memory.size - memory.in_use:,} of them free (the largest piece {memory.largest_free:,}). It holds "
            f"{memory.count} objects; {'; '.join(held) or 'nobody holds them'}"
        )


def _unreadable_text(identifier: bytes, why: str) -> str:
    return (
        f"object {identifier.hex()} was lost: it had been spilled to disk and could not be read back: {why}. Nobody else had a "
        "copy. Look at the disk, choose another directory (--spill-dir), or give the store more memory "
        "(--object-store-memory), so that less is spilled."
    )

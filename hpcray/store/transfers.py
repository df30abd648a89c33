"""Bringing copies of objects to this node, and serving those that are here to others.

Rules:
  1. An entry that is AWAY and has `fetchers` is being fetched by exactly one message (`MapObject` or `Pull`) or waits for
     room. Whatever comes of it, `on_arrived`, `on_failed` or the next source follows.
  2. A copy on this host is mapped, never moved. Who maps a block has it pinned until it says `UnmapObject`.
  3. The home hears of each copy (`CopyAdded`, `CopyDropped`) and frees them all. What arrives too late for that is given
     back by whoever notices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hpcray import payload
from hpcray.exceptions import InternalError
from hpcray.ids import home_of
from hpcray.protocol import messages as m
from hpcray.store.entry import AWAY, HERE, MAPPED, Entry
from hpcray.store.memory import Block, Memory


class TransfersOut(Protocol):
    """The only way out of the raylet."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...
    def is_same_host(self, rank: int) -> bool: ...
    def new_tag(self, rank: int) -> int: ...
    def receive(self, rank: int, tag: int, block: Block, done: Callable[[str | None], None]) -> None: ...
    def serve(self, rank: int, tag: int, block: Block, done: Callable[[str | None], None]) -> None: ...


class Receiver(Protocol):
    """Who waits for what is fetched."""

    def on_arrived(self, entry: Entry) -> None:
        """The object can be read on this node."""

    def on_failed(self, entry: Entry, error: bytes) -> None:
        """It cannot be had: the payload of an error takes its place."""


class Transfers:
    """Copies on their way to and from one raylet: a pure core, see the module's rules."""

    def __init__(
        self, rank: int, entries: dict[bytes, Entry], memory: Memory, out: TransfersOut, receiver: Receiver
    ) -> None:
        self._rank = rank
        self._entries = entries
        self._memory = memory
        self._out = out
        self._receiver = receiver
        self._mapped_out: dict[tuple[int, bytes], Block] = {}
        """Blocks of this arena that other ranks of the host map, by rank and object."""

    # --------------------------------------------------------------------------------------------------------- fetching
    def fetch(self, entry: Entry) -> None:
        """Bring an object that is AWAY to this node."""
        copies = entry.copies or set()
        neighbours = [rank for rank in copies if self._out.is_same_host(rank)]
        if neighbours:
            self._out.send(min(neighbours), m.MapObject(entry.id))
        elif copies:
            source = min(copies)
            self._memory.reserve(entry.id, entry.size, float("inf"), lambda block: self._receive(entry, source, block))
        else:
            error = payload.system_error("ObjectLostError", _lost_text(entry.id), entry.id.hex())
            self._receiver.on_failed(entry, error)

    def _receive(self, entry: Entry, source: int, block: Block | None) -> None:
        if block is None:
            text = f"object {entry.id.hex()} of {entry.size:,} bytes does not fit into this node's object store"
            self._receiver.on_failed(entry, payload.system_error("ObjectStoreFullError", text))
            return
        if not self._is_fetched(entry):
            self._memory.abandon(block)  # freed, or here by another way, while it waited for room
            return
        tag = self._out.new_tag(source)

        def done(error: str | None) -> None:
            if error is not None or not self._is_fetched(entry):
                self._memory.abandon(block)
                self._try_elsewhere(entry, source)
                return
            entry.state = HERE
            entry.block = block
            self._add_copy(entry, mapped=False)
            self._receiver.on_arrived(entry)

        self._out.receive(source, tag, block, done)
        self._out.send(source, m.Pull(entry.id, tag))

    def _is_fetched(self, entry: Entry) -> bool:
        return entry.state == AWAY and self._entries.get(entry.id) is entry

    def _try_elsewhere(self, entry: Entry, failed: int) -> None:
        if entry.copies:
            entry.copies.discard(failed)
        if self._is_fetched(entry) and entry.fetchers is not None:
            self.fetch(entry)

    def on_mapped(self, message: m.ObjectMapped, source: int) -> None:
        """Another rank of this host keeps the object in place for us."""
        entry = self._entries.get(message.id)
        if entry is not None and entry.block is not None and entry.block.rank == source:
            return
        if entry is None or entry.state != AWAY:
            self._out.send(source, m.UnmapObject(message.id))
            return
        entry.state = MAPPED
        entry.block = Block(message.id, source, message.offset, message.size)
        entry.size = message.size
        self._add_copy(entry, mapped=True)
        self._receiver.on_arrived(entry)

    def on_map_failed(self, identifier: bytes, source: int) -> None:
        """It does not have the object."""
        if (entry := self._entries.get(identifier)) is not None:
            self._try_elsewhere(entry, source)

    def _add_copy(self, entry: Entry, *, mapped: bool) -> None:
        home = home_of(entry.id)
        if home != self._rank:
            self._out.send(home, m.CopyAdded(entry.id, mapped))

    # ---------------------------------------------------------------------------------------------------------- serving
    def on_pull(self, message: m.Pull, receiver: int) -> None:
        """Another rank wants the bytes."""
        entry = self._entries.get(message.id)
        if entry is None or entry.block is None:
            self._out.send(receiver, m.PullFailed(message.id, message.tag))
            return
        block = entry.block
        self._memory.pin(block)
        self._out.serve(receiver, message.tag, block, lambda _error: self._memory.unpin(block))

    def on_map(self, identifier: bytes, mapper: int) -> None:
        """Another rank of this host wants to map the object."""
        entry = self._entries.get(identifier)
        if entry is None or entry.block is None or entry.block.rank != self._rank:
            self._out.send(mapper, m.PullFailed(identifier, 0))
            return
        if (mapper, identifier) not in self._mapped_out:
            self._memory.pin(entry.block)
            self._mapped_out[mapper, identifier] = entry.block
        self._out.send(mapper, m.ObjectMapped(identifier, entry.block.offset, entry.block.size))

    def on_unmap(self, identifier: bytes, mapper: int) -> None:
        """It does not map it any more."""
        self._memory.unpin(self._mapped_out.pop((mapper, identifier)))

    # ---------------------------------------------------------------------------------------------------------- at home
    def on_copy_added(self, message: m.CopyAdded, holder: int) -> None:
        """Another rank has a copy of an object homed here."""
        entry = self._entries.get(message.id)
        if entry is None:
            self._out.send(holder, m.Free([message.id]))
        elif message.mapped:
            entry.mappers = (entry.mappers or set()) | {holder}
        else:
            entry.copies = (entry.copies or set()) | {holder}

    def on_copy_dropped(self, identifier: bytes, holder: int) -> None:
        """It has evicted its copy."""
        entry = self._entries.get(identifier)
        if entry is not None and entry.copies:
            entry.copies.discard(holder)

    def check(self) -> None:
        """Raise InternalError if a block that others map is not kept. Slow: tests and HPCRAY_CHECK=1."""
        for (mapper, identifier), block in self._mapped_out.items():
            if block.id != identifier or block.rank != self._rank or block.pins < 1:
                raise InternalError(f"rank {self._rank}: {identifier.hex()}, mapped by rank {mapper}, is not pinned")


def _lost_text(identifier: bytes) -> str:
    return f"object {identifier.hex()} was lost: no rank holds a copy any more"

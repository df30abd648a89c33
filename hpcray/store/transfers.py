"""Serving the objects that are here to other ranks, and what each raylet knows of the others' copies. A pure core.

What comes here is the affair of `Pulls` (pulls.py), which shares it with whoever wants it from here:

    receiver ── Pull ──→ holder         ── the bytes ──→                  at most FANOUT receivers of an object at a time
    receiver ←─ PullFrom ── holder      "have it from that rank"          the others form a tree below these
    mapper   ── MapObject ──→ owner     ── ObjectMapped ──→               ranks of one host

Rules:
  1. Who is sent an object has its block pinned until the last chunk has left; who maps one, until it says `UnmapObject`.
  2. What is still arriving is served behind its own reception, but only to those that our own source has sent here, and to
     ranks of this host, once it is here.
  3. The home hears of each copy (`CopyAdded`, `CopyDropped`) and frees them all. What arrives too late for that is given
     back by whoever notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from hpcray.exceptions import InternalError
from hpcray.protocol import messages as m
from hpcray.store import pulls
from hpcray.store.entry import ARGUMENT, SPILLED, Entry, Fetcher
from hpcray.store.memory import Block, Memory
from hpcray.store.pulls import NOBODY, Done, Filling, Pulls, PullsOut, Transfer

FANOUT = 2
"""Receivers of one object that a rank serves at a time; the next are sent on to these."""


class TransfersOut(PullsOut, Protocol):
    """The only way out of the raylet."""

    def serve(self, transfer: Transfer, done: Done) -> None: ...
    def hasten(self, rank: int, tag: int, urgency: int) -> None: ...
    def end_serve(self, rank: int, tag: int, why: str) -> int:
        """Send no more of a transfer, `done(why)` follows when what was sent has left: so many bytes."""


class Receiver(pulls.Receiver, Protocol):
    """Who waits for what is fetched."""

    def when_local(self, identifier: bytes, action: Fetcher, urgency: int) -> bool:
        """True if the object can be read on this node; else it is brought here and `action` is called then."""

    def hasten(self, identifier: bytes, urgency: int) -> None:
        """If it is being brought here, it is wanted at least so urgently."""


class _Serving:
    """One receiver that is being sent an object."""

    __slots__ = ("block", "receiver", "sent_on", "tag")

    def __init__(self, receiver: int, tag: int, block: Block) -> None:
        self.receiver = receiver
        self.tag = tag
        self.block = block
        self.sent_on = 0
        """How many others were told to have it from this receiver."""


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
        self.pulls = Pulls(rank, entries, memory, out, receiver, self)
        self.sent_bytes = 0
        self._servings: dict[bytes, list[_Serving]] = {}
        """By object. The receiver may be done before us, and ask again under the same tag."""
        self._asked: dict[tuple[int, int], m.Pull] = {}
        """Pulls by receiver and tag that wait until the object is read back from disk."""
        self._mapped_out: dict[tuple[int, bytes], Block] = {}
        """Blocks of this arena that other ranks of the host map, by rank and object."""
        self._recalled: set[tuple[int, bytes]] = set()
        """Those of them that were asked back."""

    # --------------------------------------------------------------------------------------------------------- fetching
    def fetch(self, entry: Entry) -> None:
        """Bring an object that is AWAY to this node, as urgently as the entry says; or hasten it."""
        self.pulls.fetch(entry)

    # ---------------------------------------------------------------------------------------------------------- serving
    def on_pull(self, message: m.Pull, receiver: int) -> None:
        """Another rank wants the bytes."""

        key = receiver, message.tag

        def serve(block: Block | None, error: bytes) -> None:
            del self._asked[key]
            if block is None:
                self._out.send(receiver, m.PullFailed(message.id, message.tag, 0, error))
            else:
                self._serve(message, receiver, block, None)

        pull = self.pulls.receiving(message.id, message.via) if message.via != NOBODY else None
        if pull is not None and pull.block is not None:
            self._receiver.hasten(message.id, message.urgency)
            self._serve(message, receiver, pull.block, pull.filling)
        else:
            self._asked[key] = message
            self._when_here(message.id, message.urgency, serve)

    def _serve(self, message: m.Pull, receiver: int, block: Block, filling: Filling | None) -> None:
        servings = self._servings.setdefault(message.id, [])
        other = self._who_else(servings, receiver)
        if other != NOBODY:
            self._out.send(receiver, m.PullFrom(message.id, message.tag, other))
            return
        serving = _Serving(receiver, message.tag, block)
        servings.append(serving)
        self._memory.pin(block)

        def done(error: str | None) -> None:
            if error is None:
                self.sent_bytes += block.size - message.start
            servings.remove(serving)
            if not servings:
                del self._servings[message.id]
            self._memory.unpin(block)

        transfer = Transfer(receiver, message.tag, block, message.start, filling, message.urgency)
        self._out.serve(transfer, done)

    def _who_else(self, servings: list[_Serving], receiver: int) -> int:
        """The rank that `receiver` is to have the object from in our place: one of its host first."""
        others = {serving.receiver: serving for serving in servings if serving.receiver != receiver}
        chosen = next((rank for rank in others if self._out.share_host(rank, receiver)), NOBODY)
        if chosen == NOBODY and len(others) >= FANOUT:
            chosen = min(others, key=lambda rank: others[rank].sent_on)
        if chosen != NOBODY:
            others[chosen].sent_on += 1
        return chosen

    def on_hasten(self, message: m.HastenPull, receiver: int) -> None:
        """The receiver wants it more urgently now: it is sent so, and comes here so if it is not here yet."""
        if (asked := self._asked.get((receiver, message.tag))) is not None:
            asked.urgency = message.urgency
        if message.tag:
            self._out.hasten(receiver, message.tag, message.urgency)
        self._receiver.hasten(message.id, message.urgency)

    def on_given_up(self, block: Block) -> None:
        """This block will not be filled any more: whoever is sent what has arrived of it must go on elsewhere."""
        why = "its own source has failed"
        for serving in list(self._servings.get(block.id, ())):
            if serving.block is block:
                sent = self._out.end_serve(serving.receiver, serving.tag, why)
                self._out.send(serving.receiver, m.PullFailed(block.id, serving.tag, sent))

    # ---------------------------------------------------------------------------------------------------------- mapping
    def on_map(self, identifier: bytes, mapper: int, urgency: int) -> None:
        """Another rank of this host wants to map the object."""
        if (pull := self.pulls.receiving(identifier)) is not None:
            pull.mappers.append(mapper)
            self._receiver.hasten(identifier, urgency)
            return

        def show(block: Block | None, error: bytes) -> None:
            if block is None or block.rank != self._rank:
                self._out.send(mapper, m.PullFailed(identifier, 0, 0, error))
                return
            if (mapper, identifier) not in self._mapped_out:
                self._memory.pin(block)
                self._mapped_out[mapper, identifier] = block
            self._out.send(mapper, m.ObjectMapped(identifier, block.offset, block.size))

        self._when_here(identifier, urgency, show)

    def _when_here(self, identifier: bytes, urgency: int, then: Callable[[Block | None, bytes], None]) -> None:
        """With the block of an object, if need be restored from disk; with None if it cannot be had here.

        With an error as well if it is on disk and there is no room for it: it may be had later.
        """
        entry = self._entries.get(identifier)
        if entry is None:
            then(None, b"")
            return

        def local(error: bytes | None) -> None:
            is_on_disk = entry.state == SPILLED and self._entries.get(identifier) is entry
            then(entry.block, error if error is not None and is_on_disk else b"")

        # What another rank prefetches is read back like the arguments of a task: this one does not know its memory.
        if entry.state != SPILLED or self._receiver.when_local(identifier, local, min(urgency, ARGUMENT)):
            then(entry.block, b"")

    def on_unmap(self, identifier: bytes, mapper: int) -> None:
        """It does not map it any more."""
        self._recalled.discard((mapper, identifier))
        self._memory.unpin(self._mapped_out.pop((mapper, identifier)))

    def recall(self) -> None:
        """Ask ranks that map our blocks to let go of those that they do not look at.

        Of all: which of them are looked at we do not know, and that may be for what waits for room here.
        """
        for key in sorted(self._mapped_out.keys() - self._recalled):
            self._recalled.add(key)
            self._out.send(key[0], m.RecallMapping(key[1]))

    def mapped_out(self) -> Iterator[tuple[int, Block]]:
        """Blocks of this arena that other ranks of the host map, each with the rank."""
        return ((mapper, block) for (mapper, _), block in self._mapped_out.items())

    @property
    def bytes_mapped_out(self) -> int:
        """Bytes of this arena that other ranks of the host map."""
        return sum({block.id: block.size for block in self._mapped_out.values()}.values())

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

    # ------------------------------------------------------------------------------------------------------------- loss
    def on_rank_lost(self, rank: int) -> None:
        """A rank has died: what it was sending comes from elsewhere, what it was sent or mapped is let go of."""
        for entry in self._entries.values():
            if entry.copies:
                entry.copies.discard(rank)
            if entry.mappers:
                entry.mappers.discard(rank)
        for serving in [each for servings in self._servings.values() for each in servings if each.receiver == rank]:
            self._out.end_serve(rank, serving.tag, f"rank {rank} died")
        for mapper, identifier in [key for key in self._mapped_out if key[0] == rank]:
            self.on_unmap(identifier, mapper)
        self.pulls.on_rank_lost(rank)

    def check(self) -> None:
        """Raise InternalError if a block that others map or are sent is not kept. Slow: tests and HPCRAY_CHECK=1."""
        self.pulls.check()
        for (mapper, identifier), block in self._mapped_out.items():
            if block.id != identifier or block.rank != self._rank or block.pins < 1:
                raise InternalError(f"rank {self._rank}: {identifier.hex()}, mapped by rank {mapper}, is not pinned")
        for identifier, servings in self._servings.items():
            if not servings or any(s.block.id != identifier or s.block.pins < 1 for s in servings):
                raise InternalError(
                    f"rank {self._rank}: {identifier.hex()} is sent to {len(servings)} ranks and not pinned"
                )

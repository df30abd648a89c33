"""What one raylet knows of objects: where each is, and who waits for it.

    References  who refers to what                        (store/references.py)
    Pressure    what leaves memory, and comes back        (store/pressure.py)
      Memory      the blocks of this raylet's arena       (store/memory.py)
      Spiller     primary copies that go to disk          (store/spilling.py)
    Transfers   copies on their way here and from here    (store/transfers.py)

Rules:
  1. An object is freed once, by its home, when nothing refers to it; every rank that has a copy or mapping hears `Free`.
  2. References inside an object are held, by its home, as long as the object.
  3. An entry is known while something here refers to it, its bytes are here, or they are being fetched.
  4. Who waits is called exactly once: when the object exists (`when_exists`) or can be read on this node (`when_local`),
     be it only as an error that tells why not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from hpcray import payload
from hpcray.exceptions import InternalError
from hpcray.ids import home_of
from hpcray.protocol import messages as m
from hpcray.store.allocator import Allocator
from hpcray.store.entry import AWAY, GET, HERE, INLINE, MAPPED, PENDING, PREFETCH, SPILLED, Entry, Fetcher
from hpcray.store.memory import Block
from hpcray.store.pressure import Pressure, PressureOut
from hpcray.store.references import References, ReferencesOut
from hpcray.store.transfers import Transfers, TransfersOut


class StoreOut(ReferencesOut, PressureOut, TransfersOut, Protocol):
    """The only way out of the store."""


class ObjectTable:
    """The objects of one raylet: a pure core, see the module's rules."""

    def __init__(self, rank: int, allocator: Allocator, out: StoreOut, *, patience: float) -> None:
        self.rank = rank
        self.entries: dict[bytes, Entry] = {}
        self.references = References(rank, self.entries, out, self)
        self.pressure = Pressure(rank, self.entries, allocator, out, self, patience)
        self.memory = self.pressure.memory
        self.transfers = Transfers(rank, self.entries, self.memory, out, self)
        self._out = out
        self._due: deque[Callable[[], None]] = deque()
        self._is_acting = False

    # ---------------------------------------------------------------------------------------------------------- values
    def set_inline(self, identifier: bytes, data: bytes, nested: list[bytes]) -> None:
        """The object exists now; `nested` references are already held for it. No one wants it any more: they are dropped."""
        entry = self.entries.get(identifier)
        if entry is None:
            self._drop_all(nested)
            return
        entry.nested = nested or None
        self._set_inline(entry, data)

    def set_here(self, identifier: bytes, block: Block, nested: list[bytes]) -> None:
        """The object was written into this arena."""
        entry = self.entries.get(identifier)
        if entry is None:
            self.memory.abandon(block)
            self._drop_all(nested)
            return
        entry.nested = nested or None
        self._set_primary(entry, block)

    def set_away(self, identifier: bytes, rank: int, size: int, nested: list[bytes]) -> None:
        """The object was written into another rank's arena."""
        entry = self.entries.get(identifier)
        if entry is None:
            self._out.send(rank, m.Free([identifier]))
            self._drop_all(nested)
            return
        entry.nested = nested or None
        self._set_away(entry, size, {rank})

    def keep_primary(self, identifier: bytes, block: Block) -> None:
        """A result written here for a task homed elsewhere: kept until the home says `Free`."""
        entry = self.entries.get(identifier)
        if entry is None:
            entry = self.entries[identifier] = Entry(identifier)
        self._set_primary(entry, block)

    def learn_copies(self, identifier: bytes, size: int, ranks: Iterable[int]) -> None:
        """The object of a guest exists on these ranks, says who holds the reference for it."""
        entry = self.entries[identifier]
        if entry.state == PENDING:
            self._set_away(entry, size, set(ranks))
        elif entry.state == AWAY:
            entry.copies = (entry.copies or set()).union(ranks)

    def _set_inline(self, entry: Entry, data: bytes) -> None:
        entry.state = INLINE
        entry.is_primary = False
        entry.data = data
        entry.size = len(data)
        self._exists(entry)
        self.on_arrived(entry)

    def _set_primary(self, entry: Entry, block: Block) -> None:
        entry.state = HERE
        entry.block = block
        entry.size = block.size
        entry.is_primary = True
        self._exists(entry)
        self.on_arrived(entry)

    def _set_away(self, entry: Entry, size: int, ranks: set[int]) -> None:
        entry.state = AWAY
        entry.size = size
        entry.copies = ranks
        self._exists(entry)
        if entry.fetchers is not None:
            self.transfers.fetch(entry)

    # --------------------------------------------------------------------------------------------------------- waiting
    def when_exists(self, identifier: bytes, action: Callable[[], None]) -> bool:
        """True if the held object exists; else `action` is called once it does."""
        entry = self.entries[identifier]
        if entry.state != PENDING:
            return True
        if entry.waiters is None:
            entry.waiters = []
        entry.waiters.append(action)
        self._ask_home(entry)
        return False

    def when_local(self, identifier: bytes, action: Fetcher, urgency: int = GET) -> bool:
        """True if the held object can be read on this node; else it is brought here and `action` is called then."""
        entry = self.entries[identifier]
        if entry.state in (INLINE, HERE, MAPPED):
            return True
        if entry.fetchers is None:
            entry.urgency = urgency
            entry.fetchers = []
            if entry.state == AWAY:
                self.transfers.fetch(entry)
                if entry.state != AWAY:
                    return True  # no copy: an error is at hand at once
            elif entry.state == SPILLED:
                self.pressure.restore(entry)
            else:
                self._ask_home(entry)
        else:
            self.hasten(identifier, urgency)
        entry.fetchers.append(action)
        return False

    def hasten(self, identifier: bytes, urgency: int) -> None:
        """If the object is being brought here, it is wanted at least so urgently."""
        entry = self.entries.get(identifier)
        if entry is None or entry.fetchers is None or urgency >= entry.urgency:
            return
        entry.urgency = urgency
        if entry.state == AWAY and not entry.is_stranded:
            self.transfers.fetch(entry)
        elif entry.state == SPILLED:
            self.memory.hasten(identifier, urgency)

    def _exists(self, entry: Entry) -> None:
        waiters, entry.waiters = entry.waiters, None
        if waiters:
            self._do(waiters)

    def on_arrived(self, entry: Entry) -> None:
        """The object can be read on this node."""
        if self.entries.get(entry.id) is not entry:
            return  # one of those who were told before that it exists has let go of it, as the last
        block = entry.block
        if block is not None:
            self.memory.pin(block)  # or it might make room for others before those who wait have looked at it
            entry.data = b""
            if entry.state == HERE and block.queue is None:
                if entry.is_primary:
                    self.memory.keep_primary(block, is_on_disk=entry.spilled is not None)
                else:
                    self.memory.keep_copy(block)
        self._tell_fetchers(entry, None)
        if block is not None:
            self.memory.unpin(block)

    def on_failed(self, entry: Entry, error: bytes) -> None:
        """The object cannot be brought here: the error takes its place."""
        self._set_inline(entry, error)

    def on_no_room(self, entry: Entry, error: bytes = b"") -> None:
        """No room came for it, here or (`error`) where it is: whoever waits is told so. The object stays where it is."""
        if not error and entry.urgency == PREFETCH:
            error = _NO_PREFETCH  # nobody reads it, and thousands may be refused in a turn
        self._tell_fetchers(
            entry, error or payload.system_error("ObjectStoreFullError", self.pressure.why_full(entry.size))
        )

    def _tell_fetchers(self, entry: Entry, error: bytes | None) -> None:
        fetchers, entry.fetchers = entry.fetchers, None
        entry.urgency = PREFETCH
        if fetchers is None:
            return
        for fetcher in fetchers:
            fetcher(error)
        if self.entries.get(entry.id) is entry:
            self.references.settle(entry)

    # -------------------------------------------------------------------------------------------------------- locating
    def _ask_home(self, entry: Entry) -> None:
        home = home_of(entry.id)
        if home != self.rank and not entry.is_asked:
            entry.is_asked = True
            self._out.send(home, m.Locate(entry.id))

    def on_locate(self, identifier: bytes, asker: int) -> None:
        """A borrower asks where the object is: it is told once the object exists, or is freed."""
        entry = self.entries.get(identifier)
        if entry is None:
            self._out.send(asker, m.Located(identifier, _freed_already(identifier), 0, []))
            return

        def tell() -> None:
            if self.entries.get(identifier) is not entry:
                self._out.send(asker, m.Located(identifier, _freed_already(identifier), 0, []))
            elif entry.state == INLINE:
                self._out.send(asker, m.Located(identifier, entry.data, len(entry.data), []))
            else:
                ranks = set(entry.copies or ())
                if entry.state in (HERE, SPILLED):
                    ranks.add(self.rank)
                self._out.send(asker, m.Located(identifier, None, entry.size, sorted(ranks)))

        if self.when_exists(identifier, tell):
            tell()

    def on_located(self, message: m.Located) -> None:
        """The home's answer."""
        entry = self.entries.get(message.id)
        if entry is None:
            return
        entry.is_asked = False
        if entry.state not in (PENDING, AWAY):
            return
        if message.data is not None:
            self._set_inline(entry, message.data)
            return
        # The home may not have heard yet that our copy is gone.
        is_late = self.rank in message.ranks
        ranks = set(message.ranks) - {self.rank}
        if entry.state == PENDING:
            self._set_away(entry, message.size, ranks)
            return
        entry.size = message.size  # a task has brought its place meanwhile: if it is wanted, it is being fetched
        entry.copies = ranks
        if entry.is_stranded:
            entry.is_stranded = False
            if ranks:
                self.transfers.fetch(entry)
            elif is_late:
                self.on_stranded(entry)
            else:
                self.on_failed(entry, entry.data or _lost(entry.id))

    def on_stranded(self, entry: Entry) -> None:
        """None of the ranks known to have a copy has it any more: the home knows better, or it is lost."""
        if home_of(entry.id) == self.rank:
            self.on_failed(entry, entry.data or _lost(entry.id))
        else:
            entry.is_stranded = True
            self._ask_home(entry)

    # --------------------------------------------------------------------------------------------------------- freeing
    def on_unreachable(self, entry: Entry) -> None:
        """Nothing in the job refers to this object of ours: free it everywhere."""
        del self.entries[entry.id]
        if entry.block is not None:
            self.memory.abandon(entry.block)
        if entry.spilled is not None:
            self.pressure.forget(entry)
        if entry.copies or entry.mappers:
            for rank in (entry.copies or set()) | (entry.mappers or set()):
                if rank != self.rank:
                    self._out.send(rank, m.Free([entry.id]))
        self._exists(entry)  # as much as it ever will: who asked from afar before the last holder let go is told so
        if entry.fetchers is not None:
            self._tell_fetchers(entry, _freed_already(entry.id))
        if entry.nested:
            self._drop_all(entry.nested)
        if entry.on_free is not None:
            entry.on_free()

    def on_free(self, identifier: bytes) -> None:
        """The home says that nothing refers to the object: give up our copy or mapping."""
        entry = self.entries.get(identifier)
        if entry is None or (entry.block is None and entry.spilled is None):
            return
        block, entry.block = entry.block, None
        entry.state = PENDING
        entry.is_primary = False
        if block is not None:
            self.memory.abandon(block)
        self.pressure.forget(entry)
        if not (entry.holds or entry.guests):
            del self.entries[identifier]
        if entry.fetchers is not None:
            self._tell_fetchers(entry, _freed_already(identifier))

    def on_unused(self, entry: Entry) -> None:
        """Nothing here refers to an object homed elsewhere: forget it, unless its bytes are here or on their way."""
        if entry.fetchers:
            return
        if entry.state == HERE:
            if not entry.is_primary:
                assert entry.block is not None
                self.memory.offer(entry.block)
        elif entry.state not in (MAPPED, SPILLED):
            del self.entries[entry.id]

    def on_used(self, entry: Entry) -> None:
        """Something here refers to it (again): its copy is no unused one."""
        if entry.block is not None and entry.block.queue is self.memory.unused:
            self.memory.keep_copy(entry.block)

    def on_forgotten(self, entry: Entry) -> None:
        """Something refers to an object of ours that was freed: it gets an error instead of waiting for ever."""
        self._set_inline(entry, _freed_already(entry.id))

    def _drop_all(self, identifiers: Iterable[bytes]) -> None:
        self._do([partial(self.references.drop, identifier) for identifier in identifiers])

    def _do(self, actions: Iterable[Callable[[], None]]) -> None:
        # One after the other, never one inside the other: a long list of objects that hold one another, or of tasks
        # that wait for one another, must not be as deep on the stack as it is long.
        self._due.extend(actions)
        if self._is_acting:
            return
        self._is_acting = True
        try:
            while self._due:
                self._due.popleft()()
        finally:
            self._is_acting = False

    # ----------------------------------------------------------------------------------------------------------- state
    def end_turn(self, now: float) -> None:
        """At the end of each turn: have room made for those who wait for it."""
        self.pressure.on_turn(now)
        if self.transfers.pulls.is_waiting:
            self.transfers.pulls.pump()  # memory may have come free

    def check(self) -> None:
        """Raise InternalError if the table disagrees with itself. Slow: tests and HPCRAY_CHECK=1."""
        self.references.check()
        self.memory.check()
        self.transfers.check()
        for identifier, entry in self.entries.items():
            problems = [
                entry.id != identifier and "is filed under another id",
                (entry.state in (HERE, MAPPED)) != (entry.block is not None) and "disagrees with its block",
                entry.state == SPILLED and entry.spilled is None and "is spilled nowhere",
                entry.spilled is not None and not entry.is_primary and "is a copy, and on disk",
                entry.spilled is not None and entry.state not in (HERE, SPILLED) and "is on disk and elsewhere",
                entry.state == HERE and entry.block is not None and self._misplaced(entry, entry.block),
            ]
            for problem in filter(None, problems):
                raise InternalError(f"rank {self.rank}: object {identifier.hex()} {problem}")
        on_disk = sum(entry.spilled.size for entry in self.entries.values() if entry.spilled is not None)
        if on_disk != self.pressure.spiller.bytes_on_disk:
            raise InternalError(
                f"rank {self.rank}: {self.pressure.spiller.bytes_on_disk} bytes on disk, {on_disk} of objects"
            )

    def _misplaced(self, entry: Entry, block: Block) -> str:
        memory = self.memory
        if entry.is_primary:
            right = memory.primaries if entry.spilled is None else memory.backed
        elif entry.holds or entry.guests or home_of(entry.id) == self.rank:
            right = memory.copies
        else:
            right = memory.unused
        return "" if block.queue is right else "waits to make room in the wrong queue"


_NO_PREFETCH = payload.system_error("ObjectStoreFullError", "no memory was free for an object that is not needed yet")


def _freed_already(identifier: bytes) -> bytes:
    text = f"object {identifier.hex()} was freed before: no reference to it was held when this one was used"
    return payload.system_error("ObjectLostError", text, identifier.hex())


def _lost(identifier: bytes) -> bytes:
    text = f"object {identifier.hex()} was lost: no rank holds a copy any more"
    return payload.system_error("ObjectLostError", text, identifier.hex())

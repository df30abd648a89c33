"""What one raylet knows of objects: where each is, who counts it, who waits for it, who looks at its memory.

Rules:
  1. The home counts. A raylet that holds a reference homed elsewhere is one of its *borrowers*.
  2. A raylet lets go of nothing (`Unborrow`, `Finished`) before every `Borrow` that it sent earlier has been counted. So
     whatever protected a reference while it travelled outlives the travel (`after_borrows`).
  3. An object is freed once, by its home, when no client, task, container or borrower holds it.
  4. Memory goes back to the allocator when the object is freed *and* the last pin on its block is gone.

An entry is in one of five states. PENDING: not made yet, or (homed elsewhere) not located. INLINE: the payload is at hand.
HERE: in this raylet's arena. MAPPED: in the arena of another rank of this host, which keeps it for us. AWAY: it exists on
`copies` only.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from hpcray import payload
from hpcray.exceptions import InternalError
from hpcray.ids import home_of
from hpcray.protocol import messages as m
from hpcray.store.allocator import Allocator

PENDING, INLINE, HERE, MAPPED, AWAY = range(5)


class StoreOut(Protocol):
    """The only way out of the table."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...
    def is_same_host(self, rank: int) -> bool: ...
    def new_tag(self, rank: int) -> int: ...
    def receive(self, rank: int, tag: int, block: Block, done: Callable[[str | None], None]) -> None: ...
    def serve(self, rank: int, tag: int, block: Block, done: Callable[[str | None], None]) -> None: ...


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


class Entry:
    """One object or reference known here."""

    __slots__ = (
        "block",
        "borrowers",
        "borrows",
        "copies",
        "data",
        "fetchers",
        "guests",
        "holds",
        "id",
        "is_asked",
        "is_primary",
        "mappers",
        "nested",
        "on_free",
        "size",
        "state",
        "waiters",
    )

    def __init__(self, identifier: bytes) -> None:
        self.id = identifier
        self.state = PENDING
        self.holds = 0
        """Clients, tasks and containers here that hold the reference."""
        self.guests = 0
        """Tasks here whose submitter holds the reference for us."""
        self.borrows = 0
        """How many times the home counts us (elsewhere homed only)."""
        self.borrowers: dict[int, int] | None = None
        """At home: rank → how often counted; a release may overtake its borrow, so a count may pass through -1."""
        self.data: bytes = b""
        self.size = 0
        self.block: Block | None = None
        self.is_primary = False
        """The copy that must not be evicted."""
        self.copies: set[int] | None = None
        """Ranks to pull from."""
        self.mappers: set[int] | None = None
        """At home: ranks that map a copy and want to hear `Free`."""
        self.nested: list[bytes] | None = None
        self.waiters: list[Callable[[], None]] | None = None
        self.fetchers: list[Callable[[], None]] | None = None
        self.is_asked = False
        self.on_free: Callable[[], None] | None = None


class ObjectTable:
    """The objects of one raylet: a pure core, see the module's rules."""

    def __init__(self, rank: int, allocator: Allocator, out: StoreOut) -> None:
        self.rank = rank
        self.entries: dict[bytes, Entry] = {}
        self._out = out
        self._allocator = allocator
        self._evictable: OrderedDict[bytes, None] = OrderedDict()
        self._unmade: deque[tuple[int, float, Callable[[Block | None], None], bytes]] = deque()
        self._mapped_out: dict[tuple[int, bytes], Block] = {}
        self._borrow_serial = 0
        self._uncounted: dict[int, None] = {}
        self._uncounted_by_home: dict[int, deque[int]] = {}
        self._after: deque[tuple[int, Callable[[], None]]] = deque()
        self._due: deque[Callable[[], None]] = deque()
        self._is_acting = False

    # ------------------------------------------------------------------------------------------------------ references
    def create(self, identifier: bytes) -> Entry:
        """A new object homed here, held once by whoever asked for it."""
        entry = Entry(identifier)
        entry.holds = 1
        self.entries[identifier] = entry
        return entry

    def hold(self, identifier: bytes) -> Entry:
        """Count one more holder in this raylet; a reference homed elsewhere is borrowed."""
        entry = self.entries.get(identifier)
        if entry is None:
            entry = self.entries[identifier] = Entry(identifier)
            if home_of(identifier) == self.rank:
                self._set_inline(entry, _freed_already(identifier))
        entry.holds += 1
        if not entry.borrows and home_of(identifier) != self.rank:
            self._evictable.pop(identifier, None)
            entry.borrows = 1
            self._borrow(identifier, self.rank)
        return entry

    def hold_counted(self, identifier: bytes) -> None:
        """Like `hold`, for a reference in a result: the sender has already had the home count us."""
        if home_of(identifier) == self.rank:
            self.hold(identifier)
            return
        entry = self.entries.get(identifier)
        if entry is None:
            entry = self.entries[identifier] = Entry(identifier)
        self._evictable.pop(identifier, None)
        entry.holds += 1
        entry.borrows += 1

    def drop(self, identifier: bytes) -> None:
        """One holder less."""
        entry = self.entries.get(identifier)
        if entry is None or entry.holds <= 0:
            raise InternalError(f"rank {self.rank} drops {identifier.hex()}, which nothing here holds")
        entry.holds -= 1
        if entry.holds == 0:
            self._settle(entry)

    def count_for(self, identifier: bytes, borrower: int) -> None:
        """Have the home count `borrower` for a reference that is about to travel there in a result."""
        home = home_of(identifier)
        if home == borrower:
            return
        if home == self.rank:
            self.on_borrow(identifier, borrower)
        else:
            self._borrow(identifier, borrower)

    def after_borrows(self, action: Callable[[], None]) -> None:
        """Do this now, or once all borrows sent so far are counted: rule 2."""
        if self._uncounted:
            self._after.append((self._borrow_serial, action))
        else:
            action()

    def on_borrow(self, identifier: bytes, borrower: int) -> None:
        entry = self.entries.get(identifier)
        if entry is None:
            entry = self.entries[identifier] = Entry(identifier)
            self._set_inline(entry, _freed_already(identifier))
        if entry.borrowers is None:
            entry.borrowers = {}
        self._count_borrower(entry, borrower, +1)

    def on_borrowed(self, home: int) -> None:
        serial = self._uncounted_by_home[home].popleft()
        del self._uncounted[serial]
        oldest = next(iter(self._uncounted), None)
        while self._after and (oldest is None or self._after[0][0] < oldest):
            self._after.popleft()[1]()

    def on_unborrow(self, identifier: bytes, borrower: int, count: int) -> None:
        entry = self.entries.get(identifier)
        if entry is None:
            raise InternalError(
                f"rank {borrower} gives back {identifier.hex()}, which its home {self.rank} has forgotten"
            )
        if entry.borrowers is None:
            entry.borrowers = {}
        self._count_borrower(entry, borrower, -count)

    def _count_borrower(self, entry: Entry, borrower: int, change: int) -> None:
        assert entry.borrowers is not None
        if count := entry.borrowers.get(borrower, 0) + change:
            entry.borrowers[borrower] = count
        else:
            entry.borrowers.pop(borrower, None)
            self._settle(entry)

    def _borrow(self, identifier: bytes, borrower: int) -> None:
        home = home_of(identifier)
        self._borrow_serial += 1
        self._uncounted[self._borrow_serial] = None
        self._uncounted_by_home.setdefault(home, deque()).append(self._borrow_serial)
        self._out.send(home, m.Borrow(identifier, borrower))

    def _settle(self, entry: Entry) -> None:
        if entry.holds or entry.guests:
            return
        if home_of(entry.id) == self.rank:
            if not entry.borrowers:
                self._free(entry)
            return
        if entry.borrows:
            count, entry.borrows = entry.borrows, 0
            self.after_borrows(lambda: self._out.send(home_of(entry.id), m.Unborrow(entry.id, count)))
        if entry.fetchers:
            return
        if entry.state == HERE:
            if not entry.is_primary:
                self._evictable[entry.id] = None
                self._serve_creators()
        elif entry.state != MAPPED:
            del self.entries[entry.id]

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

    def _free(self, entry: Entry) -> None:
        del self.entries[entry.id]
        if entry.block is not None:
            self._evictable.pop(entry.id, None)
            self.abandon(entry.block)
        for rank in (entry.copies or set()) | (entry.mappers or set()):
            if rank != self.rank:
                self._out.send(rank, m.Free([entry.id]))
        if entry.nested:
            self._do([partial(self.drop, nested) for nested in entry.nested])
        if entry.on_free is not None:
            entry.on_free()

    def on_free(self, identifier: bytes) -> None:
        """The home says that nothing refers to the object: give up our copy or mapping."""
        entry = self.entries.get(identifier)
        if entry is None or entry.block is None:
            return
        self._evictable.pop(identifier, None)
        block, entry.block = entry.block, None
        entry.state = PENDING
        entry.is_primary = False
        self.abandon(block)
        if not (entry.holds or entry.guests or entry.fetchers):
            del self.entries[identifier]

    # ---------------------------------------------------------------------------------------------------------- values
    def set_inline(self, identifier: bytes, data: bytes, nested: list[bytes]) -> None:
        """The object exists now; `nested` references are already held for it. No one wants it any more: they are dropped."""
        entry = self.entries.get(identifier)
        if entry is None:
            for inner in nested:
                self.drop(inner)
            return
        entry.nested = nested or None
        self._set_inline(entry, data)

    def set_here(self, identifier: bytes, block: Block, nested: list[bytes]) -> None:
        """The object was written into this arena."""
        entry = self.entries.get(identifier)
        if entry is None:
            self.abandon(block)
            for inner in nested:
                self.drop(inner)
            return
        entry.nested = nested or None
        entry.state = HERE
        entry.block = block
        entry.size = block.size
        entry.is_primary = True
        self._exists(entry)
        self._arrived(entry)

    def set_away(self, identifier: bytes, rank: int, size: int, nested: list[bytes]) -> None:
        """The object was written into another rank's arena."""
        entry = self.entries.get(identifier)
        if entry is None:
            self._out.send(rank, m.Free([identifier]))
            for inner in nested:
                self.drop(inner)
            return
        entry.nested = nested or None
        entry.size = size
        entry.copies = {rank}
        entry.state = AWAY
        self._exists(entry)
        if entry.fetchers:
            self._fetch(entry)

    def keep_primary(self, identifier: bytes, block: Block) -> None:
        """A result written here for a task homed elsewhere: kept until the home says `Free`."""
        entry = self.entries.get(identifier)
        if entry is None:
            entry = self.entries[identifier] = Entry(identifier)
        entry.state = HERE
        entry.block = block
        entry.size = block.size
        entry.is_primary = True
        self._exists(entry)
        self._arrived(entry)

    def _set_inline(self, entry: Entry, data: bytes) -> None:
        entry.state = INLINE
        entry.data = data
        entry.size = len(data)
        self._exists(entry)
        self._arrived(entry)

    def _exists(self, entry: Entry) -> None:
        waiters, entry.waiters = entry.waiters, None
        if waiters:
            self._do(waiters)

    def _arrived(self, entry: Entry) -> None:
        fetchers, entry.fetchers = entry.fetchers, None
        if fetchers is None:
            return
        for fetcher in fetchers:
            fetcher()
        if entry.id in self.entries:
            self._settle(entry)

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

    def when_local(self, identifier: bytes, action: Callable[[], None]) -> bool:
        """True if the held object can be read on this node; else it is fetched and `action` is called then."""
        entry = self.entries[identifier]
        if entry.state in (INLINE, HERE, MAPPED):
            return True
        if entry.fetchers is None:
            entry.fetchers = []
            if entry.state == AWAY:
                self._fetch(entry)
                if entry.state != AWAY:
                    return True  # no copy, or no arena as large as it: an error is at hand at once
            else:
                self._ask_home(entry)
        entry.fetchers.append(action)
        return False

    def add_guest(self, identifier: bytes, size: int, ranks: Iterable[int]) -> None:
        """A task here needs this object; its submitter holds the reference until the task is done."""
        entry = self.entries.get(identifier)
        if entry is None:
            entry = self.entries[identifier] = Entry(identifier)
        entry.guests += 1
        self._evictable.pop(identifier, None)
        if entry.state == PENDING:
            entry.state = AWAY
            entry.size = size
            entry.copies = set(ranks)
            self._exists(entry)
            if entry.fetchers is not None:
                self._fetch(entry)
        elif entry.state == AWAY:
            entry.copies = (entry.copies or set()).union(ranks)

    def drop_guest(self, identifier: bytes) -> None:
        entry = self.entries[identifier]
        entry.guests -= 1
        self._settle(entry)

    def _ask_home(self, entry: Entry) -> None:
        home = home_of(entry.id)
        if home != self.rank and not entry.is_asked:
            entry.is_asked = True
            self._out.send(home, m.Locate(entry.id))

    def on_locate(self, identifier: bytes, asker: int) -> None:
        entry = self.entries.get(identifier)
        if entry is None:
            self._out.send(asker, m.Located(identifier, _freed_already(identifier), 0, []))
            return

        def tell() -> None:
            if entry.state == INLINE:
                self._out.send(asker, m.Located(identifier, entry.data, len(entry.data), []))
            else:
                ranks = set(entry.copies or ())
                if entry.state == HERE:
                    ranks.add(self.rank)
                self._out.send(asker, m.Located(identifier, None, entry.size, sorted(ranks)))

        if self.when_exists(identifier, tell):
            tell()

    def on_located(self, message: m.Located) -> None:
        entry = self.entries.get(message.id)
        if entry is None:
            return
        entry.is_asked = False
        if entry.state not in (PENDING, AWAY):
            return
        if message.data is not None:
            self._set_inline(entry, message.data)
            return
        was_pending = entry.state == PENDING
        entry.state = AWAY
        entry.size = message.size
        entry.copies = set(message.ranks)
        self._exists(entry)
        if was_pending and entry.fetchers is not None:
            self._fetch(entry)  # if it was not, it is being fetched already

    # -------------------------------------------------------------------------------------------------------- transfers
    def _fetch(self, entry: Entry) -> None:
        copies = entry.copies or set()
        neighbours = [rank for rank in copies if self._out.is_same_host(rank)]
        if neighbours:
            self._out.send(min(neighbours), m.MapObject(entry.id))
        elif copies:
            source = min(copies)
            self.reserve(entry.id, entry.size, float("inf"), lambda block: self._receive(entry, source, block))
        else:
            self._set_inline(entry, payload.system_error("ObjectLostError", _lost_text(entry.id), entry.id.hex()))

    def _receive(self, entry: Entry, source: int, block: Block | None) -> None:
        if block is None:
            text = f"object {entry.id.hex()} of {entry.size:,} bytes does not fit into this node's object store"
            self._set_inline(entry, payload.system_error("ObjectStoreFullError", text))
            return
        if not self._is_fetched(entry):
            self.abandon(block)  # freed, or here by another way, while it waited for room
            return
        tag = self._out.new_tag(source)

        def done(error: str | None) -> None:
            if error is not None or not self._is_fetched(entry):
                self.abandon(block)
                self._try_elsewhere(entry, source)
                return
            entry.state = HERE
            entry.block = block
            self._add_copy(entry, mapped=False)
            self._arrived(entry)

        self._out.receive(source, tag, block, done)
        self._out.send(source, m.Pull(entry.id, tag))

    def _is_fetched(self, entry: Entry) -> bool:
        return entry.state == AWAY and self.entries.get(entry.id) is entry

    def _try_elsewhere(self, entry: Entry, failed: int) -> None:
        if entry.copies:
            entry.copies.discard(failed)
        if self._is_fetched(entry) and entry.fetchers is not None:
            self._fetch(entry)

    def on_pull(self, message: m.Pull, receiver: int) -> None:
        entry = self.entries.get(message.id)
        if entry is None or entry.block is None:
            self._out.send(receiver, m.PullFailed(message.id, message.tag))
            return
        block = entry.block
        block.pins += 1
        self._out.serve(receiver, message.tag, block, lambda _error: self.unpin(block))

    def on_map(self, identifier: bytes, mapper: int) -> None:
        entry = self.entries.get(identifier)
        if entry is None or entry.block is None or entry.block.rank != self.rank:
            self._out.send(mapper, m.PullFailed(identifier, 0))
            return
        if (mapper, identifier) not in self._mapped_out:
            entry.block.pins += 1
            self._mapped_out[mapper, identifier] = entry.block
        self._out.send(mapper, m.ObjectMapped(identifier, entry.block.offset, entry.block.size))

    def on_mapped(self, message: m.ObjectMapped, source: int) -> None:
        entry = self.entries.get(message.id)
        if entry is not None and entry.block is not None and entry.block.rank == source:
            return
        if entry is None or entry.state != AWAY:
            self._out.send(source, m.UnmapObject(message.id))
            return
        entry.state = MAPPED
        entry.block = Block(message.id, source, message.offset, message.size)
        entry.size = message.size
        self._add_copy(entry, mapped=True)
        self._arrived(entry)

    def on_map_failed(self, identifier: bytes, source: int) -> None:
        if (entry := self.entries.get(identifier)) is not None:
            self._try_elsewhere(entry, source)

    def on_unmap(self, identifier: bytes, mapper: int) -> None:
        self.unpin(self._mapped_out.pop((mapper, identifier)))

    def _add_copy(self, entry: Entry, *, mapped: bool) -> None:
        home = home_of(entry.id)
        if home == self.rank:
            return
        self._out.send(home, m.CopyAdded(entry.id, mapped))

    def on_copy_added(self, message: m.CopyAdded, holder: int) -> None:
        entry = self.entries.get(message.id)
        if entry is None:
            self._out.send(holder, m.Free([message.id]))
        elif message.mapped:
            entry.mappers = (entry.mappers or set()) | {holder}
        else:
            entry.copies = (entry.copies or set()) | {holder}

    def on_copy_dropped(self, identifier: bytes, holder: int) -> None:
        entry = self.entries.get(identifier)
        if entry is not None and entry.copies:
            entry.copies.discard(holder)

    # ----------------------------------------------------------------------------------------------------------- memory
    def pin(self, block: Block) -> None:
        """Somebody looks at this memory: it stays until `unpin`."""
        block.pins += 1

    def unpin(self, block: Block) -> None:
        block.pins -= 1
        if block.pins == 0:
            if block.dead:
                self._give_back(block)
            elif block.id in self._evictable:
                self._serve_creators()

    def reserve(self, identifier: bytes, size: int, deadline: float, then: Callable[[Block | None], None]) -> None:
        """Call `then` with memory for the object, at once or when there is room; with None if there can be none by then."""
        if size > self._allocator.size:
            then(None)
        elif self._unmade:
            self._unmade.append((size, deadline, then, identifier))
        elif (block := self._make(identifier, size)) is not None:
            then(block)
        else:
            self._unmade.append((size, deadline, then, identifier))

    def expire(self, now: float) -> None:
        """Tell creators whose time is over."""
        late = [waiting for waiting in self._unmade if waiting[1] <= now]
        if late:
            self._unmade = deque(waiting for waiting in self._unmade if waiting[1] > now)
            for _, _, then, _ in late:
                then(None)
            self._serve_creators()

    @property
    def next_expiry(self) -> float | None:
        """When `expire` should be called, if a creator waits."""
        return min((waiting[1] for waiting in self._unmade), default=None) if self._unmade else None

    def _make(self, identifier: bytes, size: int) -> Block | None:
        while (offset := self._allocator.allocate(size)) is None:
            victim = next((i for i in self._evictable if not self._is_pinned(i)), None)
            if victim is None:
                return None
            self._evict(victim)
        return Block(identifier, self.rank, offset, size)

    def _is_pinned(self, identifier: bytes) -> bool:
        block = self.entries[identifier].block
        return block is not None and block.pins > 0

    def _evict(self, identifier: bytes) -> None:
        del self._evictable[identifier]
        entry = self.entries.pop(identifier)
        assert entry.block is not None
        self._out.send(home_of(identifier), m.CopyDropped(identifier))
        self._allocator.free(entry.block.offset)

    def abandon(self, block: Block) -> None:
        """Nothing refers to this memory any more; it goes back when the last pin is gone."""
        block.dead = True
        if block.pins == 0:
            self._give_back(block)

    def _give_back(self, block: Block) -> None:
        if block.rank != self.rank:
            self._out.send(block.rank, m.UnmapObject(block.id))
            return
        self._allocator.free(block.offset)
        self._serve_creators()

    def _serve_creators(self) -> None:
        while self._unmade and (made := self._make(self._unmade[0][3], self._unmade[0][0])) is not None:
            self._unmade.popleft()[2](made)

    @property
    def is_waiting_for_room(self) -> bool:
        return bool(self._unmade)

    @property
    def memory_in_use(self) -> int:
        """Bytes of the arena in blocks, those that are being written included."""
        return self._allocator.used

    def why_full(self, size: int) -> str:
        """What an `ObjectStoreFullError` says."""
        free, largest, total = self._allocator.available, self._allocator.largest_free, self._allocator.size
        held = sum(1 for entry in self.entries.values() if entry.state == HERE)
        return (
            f"an object of {size:,} bytes does not fit: the object store of rank {self.rank} has {total:,} bytes, "
            f"{free:,} free (largest piece {largest:,}), and {held} objects in it are still referenced. Drop references "
            "(`del`), store less at a time, or give the store more: init(object_store_memory=…) or --object-store-memory."
        )

    def check(self) -> None:
        """Raise InternalError if the table disagrees with itself. Slow: tests and HPCRAY_CHECK=1."""
        self._allocator.check()
        for identifier, entry in self.entries.items():
            at_home = home_of(identifier) == self.rank
            problems = [
                entry.id != identifier and "is filed under another id",
                (entry.holds < 0 or entry.guests < 0) and "has a negative count",
                (entry.state in (HERE, MAPPED)) != (entry.block is not None) and "disagrees with its block",
                at_home and entry.borrows and "is borrowed from itself",
                not at_home and entry.borrowers and "has borrowers away from home",
                not at_home and entry.holds > 0 and not entry.borrows and "is held but not borrowed",
                at_home and not (entry.holds or entry.guests or entry.borrowers) and "is reachable by nobody",
                identifier in self._evictable and (entry.holds or entry.guests or entry.is_primary) and "is evictable",
            ]
            for problem in filter(None, problems):
                raise InternalError(f"rank {self.rank}: object {identifier.hex()} {problem}")


def _freed_already(identifier: bytes) -> bytes:
    text = f"object {identifier.hex()} was freed before: no reference to it was held when this one was used"
    return payload.system_error("ObjectLostError", text, identifier.hex())


def _lost_text(identifier: bytes) -> str:
    return f"object {identifier.hex()} was lost: no rank holds a copy any more"

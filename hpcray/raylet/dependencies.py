"""The arguments of work that is to run here: a pure core.

What a piece of work needs from the store is its *bundle*. While the work waits for its turn, its bundle is only prefetched:
nothing is pinned, and memory pressure may take copies away again. When the work could run, its bundle becomes *active*: what
is missing is fetched, and all of it is pinned until the work has been handed over.

Rules:
  1. Active bundles fit into the budget together, but one always may be active. Those of work that could run now become
     active in the order in which the work came.
  2. An active bundle that is complete while its work cannot run (another class took its place) gives its pins up if another
     needs the room. So pinned arguments never wait for each other in a circle.
  3. When nothing comes free any more for those who wait for room, all bundles let go of their pins; what is lost by that is
     fetched again. So a bundle waits neither for the end of a task that waits for memory which the bundle has pinned, nor for
     itself, where what it has pinned lies in the middle of the free memory: that it lets go of only once before others hold
     less, or arguments that do not fit together would make room for one another for ever.
  4. A bundle that is larger than the arena fails its work, and nothing else. One for which no room came fails it only if
     nothing runs here whose end could make room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from hpcray import payload
from hpcray.exceptions import InternalError
from hpcray.protocol import messages as m
from hpcray.raylet.clients import Work
from hpcray.store.entry import ARGUMENT, HERE, INLINE, MAPPED, PREFETCH
from hpcray.store.memory import Block
from hpcray.store.table import ObjectTable


class Claims:
    """Distinct objects that bundles need, and their bytes: tasks often share an argument."""

    __slots__ = ("_sizes", "counts", "size")

    def __init__(self) -> None:
        self.counts: dict[bytes, int] = {}
        """Bundles that need an object."""
        self._sizes: dict[bytes, int] = {}
        """As the first of them said: a task that was run again may have made a result of another size."""
        self.size = 0

    def added(self, sizes: dict[bytes, int]) -> int:
        """How many bytes more these would be."""
        return sum(size for identifier, size in sizes.items() if identifier not in self.counts)

    def add(self, sizes: dict[bytes, int]) -> None:
        self.size += self.added(sizes)
        for identifier, size in sizes.items():
            self.counts[identifier] = self.counts.get(identifier, 0) + 1
            self._sizes.setdefault(identifier, size)

    def remove(self, sizes: dict[bytes, int]) -> None:
        for identifier in sizes:
            if count := self.counts[identifier] - 1:
                self.counts[identifier] = count
            else:
                del self.counts[identifier]
                self.size -= self._sizes.pop(identifier)


class Bundle:
    """The arguments of one piece of work."""

    __slots__ = ("awaited", "is_active", "is_prefetched", "least_of_others", "pins", "round", "sizes", "then", "work")

    def __init__(self, work: Work, sizes: dict[bytes, int], then: Callable[[], None]) -> None:
        self.work = work
        self.sizes = sizes
        self.then = then
        self.is_prefetched = False
        self.is_active = False
        self.least_of_others = float("inf")
        """Bytes of the arena that were not its own when it last let go of its pins for arguments."""
        self.awaited: set[bytes] = set()
        """Objects that are still on their way."""
        self.pins: dict[bytes, Block] = {}
        self.round = 0
        """How often they were asked for: what an earlier round has to say comes too late."""


class Dependencies:
    """The bundles of one raylet: a pure core, see the module's rules.

    Args:
        table: The objects.
        is_busy: Whether anything runs here that holds memory and will end.
    """

    def __init__(self, table: ObjectTable, is_busy: Callable[[], bool]) -> None:
        self._table = table
        self._is_busy = is_busy
        self._budget = table.transfers.pulls.budget
        self._waiting: dict[bytes, dict[Work, Bundle]] = {}
        """By class, in order: bundles that are neither complete nor active."""
        self._active: dict[Work, Bundle] = {}
        """In the order in which they became so, until the work is handed over."""
        self._active_claims = Claims()
        self._prefetch_claims = Claims()
        self._arrivals = 0

    # ------------------------------------------------------------------------------------------------------- from outside
    def add(self, work: Work, then: Callable[[], None]) -> bool:
        """Take up work. True if its arguments are here; else `then()` is called when they are (or cannot be had)."""
        self._arrivals += 1
        work.arrival = self._arrivals
        for dependency in work.dependencies:
            if isinstance(dependency, m.RemoteDependency):
                self._table.references.add_guest(dependency.id)
                self._table.learn_copies(dependency.id, dependency.size, dependency.ranks)
        return self.take(work, then)

    def take(self, work: Work, then: Callable[[], None]) -> bool:
        """The work could be handed over now. False if arguments are missing (again): `then()` is called when they are here."""
        if self.is_missing(work):
            return False
        if work.error is not None or self._has_all(work):
            return True
        if work in self._active:
            raise InternalError(f"a pinned argument of {work.task.hex()} has left")
        sizes = {d.id: d.size for d in work.dependencies if isinstance(d, m.RemoteDependency)}
        if sum(sizes.values()) > self._table.memory.size and (error := self._never_fits(work, sizes)) is not None:
            work.error = error
            return True
        bundle = Bundle(work, sizes, then)
        self._waiting.setdefault(work.template, {})[work] = bundle
        return False

    def hand_over(self, work: Work) -> None:
        """A worker has the work now, and pins what it looks at itself."""
        bundle = self._active.pop(work, None)
        if bundle is not None:
            self._let_go(bundle)

    def release(self, work: Work) -> None:
        """The work has run, or will not run here: its arguments may go."""
        self.hand_over(work)
        if work in self._waiting.get(work.template, ()):
            self._leave(self._waiting[work.template][work])
        for dependency in work.dependencies:
            if isinstance(dependency, m.RemoteDependency):
                self._table.references.drop_guest(dependency.id)

    def is_missing(self, work: Work) -> bool:
        """Whether `then` of this work is still to come."""
        if work in self._waiting.get(work.template, ()):
            return True
        bundle = self._active.get(work)
        return bundle is not None and bool(bundle.awaited)

    def count_missing(self, template: bytes) -> int:
        """How much work of a class waits for arguments."""
        active = sum(bool(b.awaited) and b.work.template == template for b in self._active.values())
        return len(self._waiting.get(template, ())) + active

    def missing(self, is_meant: Callable[[Work], bool]) -> list[Work]:
        """The work that waits for arguments and is meant."""
        waiting = [work for bundles in self._waiting.values() for work in bundles]
        active = [work for work, bundle in self._active.items() if bundle.awaited]
        return [work for work in (*waiting, *active) if is_meant(work)]

    @property
    def is_waiting(self) -> bool:
        """Whether `activate` may have something to do."""
        return bool(self._waiting)

    # ------------------------------------------------------------------------------------------------------- activation
    def activate(self, room: Callable[[bytes], int]) -> None:
        """Once per turn, after all that can run has been handed over. `room`: how much work of a class could run now."""
        places = {template: self._places(template, room) for template in self._waiting}
        while bundle := self._next(places):
            if not self._fits(bundle):
                self._demote()
                if not self._fits(bundle):
                    break
            places[bundle.work.template] -= 1
            self._activate(bundle)
        self._prefetch()

    def _places(self, template: bytes, room: Callable[[bytes], int]) -> int:
        return room(template) - sum(bool(b.awaited) and b.work.template == template for b in self._active.values())

    def _next(self, places: dict[bytes, int]) -> Bundle | None:
        firsts = [
            next(iter(self._waiting[t].values())) for t, count in places.items() if count > 0 and t in self._waiting
        ]
        return min(firsts, key=lambda bundle: bundle.work.arrival, default=None)

    def _fits(self, bundle: Bundle) -> bool:
        claims = self._active_claims
        return not self._active or claims.size + claims.added(bundle.sizes) <= self._budget

    def make_way(self) -> None:
        """Somebody waits for room, and none comes: let go of pins."""
        memory = self._table.memory
        is_for_arguments = memory.first_urgency >= ARGUMENT
        self._demote()
        for bundle in list(self._active.values()):
            if not memory.stands_still:
                return
            others = memory.in_use - sum(block.size for block in bundle.pins.values())
            if is_for_arguments and others >= bundle.least_of_others:
                continue
            if is_for_arguments:
                bundle.least_of_others = others
            self._unpin(bundle)

    def _demote(self) -> None:
        for work, bundle in list(self._active.items()):
            if not bundle.awaited:
                del self._active[work]
                self._let_go(bundle)

    def _activate(self, bundle: Bundle) -> None:
        self._leave(bundle)
        bundle.is_active = True
        self._active[bundle.work] = bundle
        self._active_claims.add(bundle.sizes)
        self._fetch(bundle, bundle.sizes, ARGUMENT)

    def _prefetch(self) -> None:
        waiting = [bundle for bundles in self._waiting.values() for bundle in bundles.values()]
        for bundle in waiting:
            if bundle.is_prefetched:
                continue
            if (
                self._active_claims.size + self._prefetch_claims.size + self._prefetch_claims.added(bundle.sizes)
                > self._budget
            ):
                return
            bundle.is_prefetched = True
            self._prefetch_claims.add(bundle.sizes)
            self._fetch(bundle, bundle.sizes, PREFETCH)

    # --------------------------------------------------------------------------------------------------------- fetching
    def _fetch(self, bundle: Bundle, identifiers: Iterable[bytes], urgency: int) -> None:
        bundle.round += 1
        bundle.awaited = set(identifiers)
        for identifier in list(identifiers):
            arrived = partial(self._arrived, bundle, bundle.round, identifier)
            if self._table.when_local(identifier, arrived, urgency):
                arrived(None)

    def _arrived(self, bundle: Bundle, number: int, identifier: bytes, error: bytes | None) -> None:
        if number != bundle.round or identifier not in bundle.awaited:
            return
        work = bundle.work
        if error is not None and not bundle.is_active:
            return  # there was no room for a prefetch
        bundle.awaited.discard(identifier)
        if error is not None:
            work.error = work.error or error
        elif bundle.is_active:
            self._pin(bundle, identifier)
        if bundle.awaited:
            return
        if work.error is not None and self._may_hope(bundle, work.error):
            work.error = None
            del self._active[work]
            self._let_go(bundle)
            self._demote()
            self._waiting.setdefault(work.template, {})[work] = bundle
            return
        if not bundle.is_active:
            if not self._has_all(work):
                return  # something has left again: it is fetched when the work could run
            self._leave(bundle)
        elif work.error is None and (unpinned := self._unpinned(bundle)):
            self._fetch(bundle, unpinned, ARGUMENT)  # it has made way
            return
        bundle.then()

    def _may_hope(self, bundle: Bundle, error: bytes) -> bool:
        # There was no room; what runs here will give its memory back.
        is_full = payload.describe_system_error(error)[0] == "ObjectStoreFullError"
        return is_full and self._is_busy() and max(bundle.sizes.values()) <= self._table.memory.size

    def _pin(self, bundle: Bundle, identifier: bytes) -> None:
        block = self._table.entries[identifier].block
        if block is not None:
            self._table.memory.pin(block)
            bundle.pins[identifier] = block

    def _unpinned(self, bundle: Bundle) -> list[bytes]:
        entries = self._table.entries
        return [i for i in bundle.sizes if i not in bundle.pins and entries[i].state != INLINE]

    def _unpin(self, bundle: Bundle) -> None:
        pins, bundle.pins = bundle.pins, {}
        for block in pins.values():
            self._table.memory.unpin(block)

    def _let_go(self, bundle: Bundle) -> None:
        bundle.is_active = False
        bundle.round += 1
        bundle.awaited = set()
        self._active_claims.remove(bundle.sizes)
        self._unpin(bundle)

    def _leave(self, bundle: Bundle) -> None:
        """It waits no more."""
        bundles = self._waiting[bundle.work.template]
        del bundles[bundle.work]
        if not bundles:
            del self._waiting[bundle.work.template]
        bundle.round += 1
        bundle.awaited = set()
        if bundle.is_prefetched:
            bundle.is_prefetched = False
            self._prefetch_claims.remove(bundle.sizes)

    def _has_all(self, work: Work) -> bool:
        entries = self._table.entries
        return all(
            entries[dependency.id].state in (INLINE, HERE, MAPPED)
            for dependency in work.dependencies
            if isinstance(dependency, m.RemoteDependency)
        )

    def _never_fits(self, work: Work, sizes: dict[bytes, int]) -> bytes | None:
        # What lies in another arena of this host takes no room here.
        entries, pulls, has = self._table.entries, self._table.transfers.pulls, self._table.memory.size
        needed = sum(size for i, size in sizes.items() if not pulls.is_mappable(entries[i]))
        if needed <= has:
            return None
        text = (
            f"the arguments of task {work.task.hex()} have {needed:,} bytes together: more than the object store of rank "
            f"{self._table.rank}, {has:,} bytes. Pass less at a time, or give the store more: "
            "init(object_store_memory=…) or --object-store-memory."
        )
        return payload.system_error("ObjectStoreFullError", text)

    def check(self) -> None:
        """Raise InternalError if bundles, claims and pins disagree. Slow: tests and HPCRAY_CHECK=1."""
        claims, prefetch = Claims(), Claims()
        for bundle in self._active.values():
            claims.add(bundle.sizes)
            if not bundle.is_active or any(block.pins < 1 for block in bundle.pins.values()):
                raise InternalError(f"the arguments of {bundle.work.task.hex()} are active and not pinned")
        for bundles in self._waiting.values():
            for bundle in bundles.values():
                if bundle.is_active or bundle.pins or not bundles:
                    raise InternalError(f"the arguments of {bundle.work.task.hex()} wait, and are active")
                if bundle.is_prefetched:
                    prefetch.add(bundle.sizes)
        if claims.counts != self._active_claims.counts or prefetch.counts != self._prefetch_claims.counts:
            raise InternalError("bundles claim other objects than they need")

"""Who refers to what: the counts of one raylet, and the protocol that keeps those of all raylets right.

Rules:
  1. The home counts. A raylet that holds a reference homed elsewhere is one of its *borrowers*: it sends `Borrow` with its
     first hold, `Unborrow` after its last, and in between its holds are its own affair.
  2. A raylet lets go of nothing (`Unborrow`, `Finished`) before every `Borrow` that it sent earlier has been counted. So
     whatever protected a reference while it travelled outlives the travel (`after_borrows`).
  3. A reference in a result is counted at its home for the receiver before the result leaves (`count_for`); who receives
     it borrows no second time (`hold_counted`).
  4. An object is unreachable, once and for all, when its home knows of no hold, guest or borrower of it.

Nothing here knows of values, memory or transfers: what follows from a count is the keeper's affair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from hpcray.exceptions import InternalError
from hpcray.ids import home_of
from hpcray.protocol import messages as m
from hpcray.store.entry import Entry


class ReferencesOut(Protocol):
    """The only way out of the raylet."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...


class Keeper(Protocol):
    """Who keeps what the references name, and hears when that changes."""

    def on_unreachable(self, entry: Entry) -> None:
        """At home: nothing in the job refers to it any more."""

    def on_unused(self, entry: Entry) -> None:
        """Homed elsewhere: nothing in this raylet refers to it any more."""

    def on_used(self, entry: Entry) -> None:
        """Something in this raylet refers to it (again)."""

    def on_forgotten(self, entry: Entry) -> None:
        """At home: something refers to what was freed before."""


class References:
    """The counts of one raylet: a pure core, see the module's rules.

    Args:
        rank: Whose raylet this is.
        entries: All entries of this raylet by id, shared with the keeper, who removes them.
        out: The way out of the raylet.
        keeper: Who is told what the counts mean.
    """

    def __init__(self, rank: int, entries: dict[bytes, Entry], out: ReferencesOut, keeper: Keeper) -> None:
        self._rank = rank
        self._entries = entries
        self._out = out
        self._keeper = keeper
        self._borrow_serial = 0
        self._uncounted: dict[int, None] = {}
        """Serial numbers of borrows that were sent and not answered, in order."""
        self._uncounted_by_home: dict[int, deque[int]] = {}
        self._after: deque[tuple[int, Callable[[], None]]] = deque()
        """What waits until all borrows up to a serial number are counted."""

    # ----------------------------------------------------------------------------------------------------------- holders
    def create(self, identifier: bytes) -> Entry:
        """A new object homed here, held once by whoever asked for it."""
        entry = Entry(identifier)
        entry.holds = 1
        self._entries[identifier] = entry
        return entry

    def hold(self, identifier: bytes) -> Entry:
        """Count one more holder in this raylet; a reference homed elsewhere is borrowed."""
        entry = self._entries.get(identifier)
        if entry is None:
            entry = self._entries[identifier] = Entry(identifier)
            if home_of(identifier) == self._rank:
                self._keeper.on_forgotten(entry)
        entry.holds += 1
        if not entry.borrows and home_of(identifier) != self._rank:
            self._keeper.on_used(entry)
            entry.borrows = 1
            self._borrow(identifier, self._rank)
        return entry

    def hold_counted(self, identifier: bytes) -> None:
        """Like `hold`, for a reference in a result: the sender has already had the home count us."""
        if home_of(identifier) == self._rank:
            self.hold(identifier)
            return
        entry = self._entries.get(identifier)
        if entry is None:
            entry = self._entries[identifier] = Entry(identifier)
        self._keeper.on_used(entry)
        entry.holds += 1
        entry.borrows += 1

    def drop(self, identifier: bytes) -> None:
        """One holder less."""
        entry = self._entries.get(identifier)
        if entry is None or entry.holds <= 0:
            raise InternalError(f"rank {self._rank} drops {identifier.hex()}, which nothing here holds")
        entry.holds -= 1
        if entry.holds == 0:
            self.settle(entry)

    def add_guest(self, identifier: bytes) -> None:
        """A task here needs this object; its submitter holds the reference until the task is done."""
        entry = self._entries.get(identifier)
        if entry is None:
            entry = self._entries[identifier] = Entry(identifier)
        entry.guests += 1
        self._keeper.on_used(entry)

    def drop_guest(self, identifier: bytes) -> None:
        """That task is done, or will not run here."""
        entry = self._entries[identifier]
        entry.guests -= 1
        self.settle(entry)

    def settle(self, entry: Entry) -> None:
        """Draw the conclusion if nothing here refers to the object any more."""
        if entry.holds or entry.guests:
            return
        if home_of(entry.id) == self._rank:
            if not entry.borrowers:
                self._keeper.on_unreachable(entry)
            return
        if entry.borrows:
            count, entry.borrows = entry.borrows, 0
            self.after_borrows(lambda: self._out.send(home_of(entry.id), m.Unborrow(entry.id, count)))
        self._keeper.on_unused(entry)

    # -------------------------------------------------------------------------------------------------- between raylets
    def count_for(self, identifier: bytes, borrower: int) -> None:
        """Have the home count `borrower` for a reference that is about to travel there in a result."""
        home = home_of(identifier)
        if home == borrower:
            return
        if home == self._rank:
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
        """Some rank has `borrower` counted once more."""
        entry = self._entries.get(identifier)
        if entry is None:
            entry = self._entries[identifier] = Entry(identifier)
            self._keeper.on_forgotten(entry)
        if entry.borrowers is None:
            entry.borrowers = {}
        entry.borrowers[borrower] = entry.borrowers.get(borrower, 0) + 1

    def on_borrowed(self, home: int) -> None:
        """The home counted the oldest of our borrows that it had not answered."""
        del self._uncounted[self._uncounted_by_home[home].popleft()]
        oldest = next(iter(self._uncounted), None)
        while self._after and (oldest is None or self._after[0][0] < oldest):
            self._after.popleft()[1]()

    def on_unborrow(self, identifier: bytes, borrower: int, count: int) -> None:
        """A borrower gives back `count` borrows."""
        entry = self._entries.get(identifier)
        known = entry.borrowers.get(borrower, 0) if entry is not None and entry.borrowers else 0
        if entry is None or entry.borrowers is None or known < count:
            raise InternalError(
                f"rank {borrower} gives back {count} borrows of {identifier.hex()}, its home {self._rank} knows of {known}"
            )
        if known > count:
            entry.borrowers[borrower] = known - count
        else:
            del entry.borrowers[borrower]
            self.settle(entry)

    def _borrow(self, identifier: bytes, borrower: int) -> None:
        home = home_of(identifier)
        self._borrow_serial += 1
        self._uncounted[self._borrow_serial] = None
        self._uncounted_by_home.setdefault(home, deque()).append(self._borrow_serial)
        self._out.send(home, m.Borrow(identifier, borrower))

    def check(self) -> None:
        """Raise InternalError if a count cannot be right. Slow: tests and HPCRAY_CHECK=1."""
        for identifier, entry in self._entries.items():
            at_home = home_of(identifier) == self._rank
            problems = [
                (entry.holds < 0 or entry.guests < 0) and "has a negative count",
                at_home and entry.borrows and "is borrowed from itself",
                not at_home and entry.borrowers and "has borrowers away from home",
                not at_home and entry.holds > 0 and not entry.borrows and "is held but not borrowed",
                at_home and not (entry.holds or entry.guests or entry.borrowers) and "is reachable by nobody",
            ]
            for problem in filter(None, problems):
                raise InternalError(f"rank {self._rank}: object {identifier.hex()} {problem}")
        if sorted(self._uncounted) != sorted(s for serials in self._uncounted_by_home.values() for s in serials):
            raise InternalError(f"rank {self._rank}: borrows that are not counted differ by home")
        if self._after and not self._uncounted:
            raise InternalError(f"rank {self._rank}: something waits for borrows, and all are counted")

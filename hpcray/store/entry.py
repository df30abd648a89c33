"""What one raylet knows of one object. The parts of the store share it; each minds its own fields.

An entry is in one of six states. PENDING: not made yet, or (homed elsewhere) not located. INLINE: the payload is at hand.
HERE: in this raylet's arena. MAPPED: in the arena of another rank of this host, which keeps it for us. AWAY: it exists on
`copies` only. SPILLED: the primary copy, on this node's disk only (`spilled`); an object that is HERE may have one there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hpcray.store.memory import Block

PENDING, INLINE, HERE, MAPPED, AWAY, SPILLED = range(6)

GET, ARGUMENT, PREFETCH = range(3)
"""How urgently an object is wanted on this node: by a `get` that waits, by a task that could run now, by one in a queue."""

Fetcher = Callable[[bytes | None], None]
"""Who waits until an object can be read on this node: called with None when it can, or with the payload of an error that
says why it cannot be brought here now (the object itself is not touched by that)."""


class Extent(NamedTuple):
    """Where an object lies on disk."""

    file: int
    """Which spill file of this rank."""
    offset: int
    size: int
    checksum: int


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
        "is_stranded",
        "maker",
        "mappers",
        "nested",
        "on_free",
        "size",
        "spilled",
        "state",
        "urgency",
        "waiters",
    )

    def __init__(self, identifier: bytes) -> None:
        self.id = identifier
        # References:
        self.holds = 0
        """Clients, tasks and containers here that hold the reference."""
        self.guests = 0
        """Tasks here whose submitter holds the reference for us."""
        self.borrows = 0
        """How many times the home counts us (elsewhere homed only)."""
        self.borrowers: dict[int, int] | None = None
        """At home: rank → how often counted."""
        # The value, and who waits for it:
        self.state = PENDING
        self.data: bytes = b""
        """The payload; of an object that is AWAY, the error that takes its place if no copy is left."""
        self.size = 0
        self.nested: list[bytes] | None = None
        self.waiters: list[Callable[[], None]] | None = None
        self.fetchers: list[Fetcher] | None = None
        self.is_asked = False
        self.on_free: Callable[[], None] | None = None
        self.maker: bytes | str | tuple[str, int] | None = None
        """At home, for people: the template of the task that makes it, the name of the actor's method, or the file and line
        of the `put`."""
        # Memory:
        self.block: Block | None = None
        self.is_primary = False
        """The copy that must not be lost: it leaves the arena only for the disk."""
        self.spilled: Extent | None = None
        # Transfers:
        self.copies: set[int] | None = None
        """Ranks to pull from."""
        self.is_stranded = False
        """None of them has it any more: the home was asked again where it is."""
        self.urgency = PREFETCH
        """Of the most impatient of its fetchers."""
        self.mappers: set[int] | None = None
        """At home: ranks that map a copy and want to hear `Free`."""

"""What one raylet knows of one object. The parts of the store share it; each minds its own fields.

An entry is in one of five states. PENDING: not made yet, or (homed elsewhere) not located. INLINE: the payload is at hand.
HERE: in this raylet's arena. MAPPED: in the arena of another rank of this host, which keeps it for us. AWAY: it exists on
`copies` only.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcray.store.memory import Block

PENDING, INLINE, HERE, MAPPED, AWAY = range(5)


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
        # References:
        self.holds = 0
        """Clients, tasks and containers here that hold the reference."""
        self.guests = 0
        """Tasks here whose submitter holds the reference for us."""
        self.borrows = 0
        """How many times the home counts us (elsewhere homed only)."""
        self.borrowers: dict[int, int] | None = None
        """At home: rank → how often counted; a release may overtake its borrow, so a count may pass through -1."""
        # The value, and who waits for it:
        self.state = PENDING
        self.data: bytes = b""
        self.size = 0
        self.nested: list[bytes] | None = None
        self.waiters: list[Callable[[], None]] | None = None
        self.fetchers: list[Callable[[], None]] | None = None
        self.is_asked = False
        self.on_free: Callable[[], None] | None = None
        # Memory:
        self.block: Block | None = None
        self.is_primary = False
        """The copy that must not be evicted."""
        # Transfers:
        self.copies: set[int] | None = None
        """Ranks to pull from."""
        self.mappers: set[int] | None = None
        """At home: ranks that map a copy and want to hear `Free`."""

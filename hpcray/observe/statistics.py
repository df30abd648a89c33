"""What a raylet tells of its object store: immutable snapshots, and the counters behind them. Pure."""

from __future__ import annotations

from math import exp

import msgspec

RATE_WINDOW = 5.0
"""Seconds over which a rate is taken: what is older counts for less and less."""


class Amount(msgspec.Struct, frozen=True):
    """So many objects with so many bytes."""

    objects: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.objects + other.objects, self.bytes + other.bytes)


class StoreStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's object store at one time.

    The arena adds up: ``size = free + writing + primary + secondary + unused + freed`` (bytes, as rounded up in the arena).
    """

    rank: int
    host: str
    size: int
    """Bytes of the arena."""
    free: int
    largest_free: int
    writing: int
    """Bytes that a client writes, or that come from another rank or from disk: no object yet."""
    primary: Amount
    """Copies that must not be lost; with those that are on disk as well."""
    secondary: Amount
    """Copies that others have too, and that something here refers to."""
    unused: Amount
    """Copies that others have too, and that may make room at once."""
    freed: Amount
    """Objects that nothing refers to, but whose memory somebody still looks at."""
    pinned: Amount
    """Of all these, what somebody looks at: it can neither move nor leave."""
    spilled: Amount
    """Primary copies on disk only."""
    mapped: Amount
    """Objects in arenas of other ranks of this host that are read in place."""
    inline: Amount
    """Small objects, in the raylet's own memory."""
    hits: int
    """Values that clients asked their raylet for and that were at hand (what a client has kept itself, it does not ask for)."""
    misses: int
    """Values that were brought from another rank or from disk for a client that asked for them."""
    spills: Amount
    restores: Amount
    received: Amount
    """From other ranks; mappings, which move nothing, are not counted."""
    sent: Amount
    received_per_second: float
    """Bytes, over about the last five seconds."""
    sent_per_second: float


class ObjectReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank knows of one object."""

    id: bytes
    rank: int
    size: int
    state: str
    """primary, copy, unused, spilled, mapped, inline, elsewhere, or pending: not made yet, or not looked for."""
    made_by: str = ""
    """The task whose return it is, or who put it; known at its home."""
    clients: list[str] = []
    """Drivers and workers of this rank that hold references."""
    holds: int = 0
    """References of tasks that wait or run, of objects that contain it, and of pickles."""
    guests: int = 0
    """Tasks of other ranks that run here and need it."""
    borrowers: dict[int, int] = {}
    """Ranks that hold references homed here."""
    pinned_by: list[str] = []
    """Who looks at its memory here."""


class ObjectsWanted(msgspec.Struct, frozen=True):
    """Which objects are to be reported: these, or the `limit` largest of each rank (-1: all)."""

    ids: list[bytes] = []
    limit: int = -1


class Meter:
    """Bytes per second over about the last `RATE_WINDOW` seconds."""

    __slots__ = ("_at", "_weight")

    def __init__(self) -> None:
        self._weight = 0.0
        self._at = 0.0

    def add(self, amount: int, now: float) -> None:
        self._weight = self._weight * self._decay(now) + amount
        self._at = max(self._at, now)

    def rate(self, now: float) -> float:
        return self._weight * self._decay(now) / RATE_WINDOW

    def _decay(self, now: float) -> float:
        return exp(min(0.0, self._at - now) / RATE_WINDOW)


class Traffic:
    """Bytes that went in or out of one raylet."""

    __slots__ = ("_meter", "total")

    def __init__(self) -> None:
        self.total = Amount()
        self._meter = Meter()

    def add(self, size: int, now: float) -> None:
        self.total += Amount(1, size)
        self._meter.add(size, now)

    def rate(self, now: float) -> float:
        return self._meter.rate(now)

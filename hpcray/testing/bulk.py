"""The bulk data of the fake cluster: transfers of a few chunks, each of which arrives when the test says so."""

from __future__ import annotations

from collections.abc import Callable

from hpcray.store.pulls import Done, Transfer

CHUNK = 1024

Copy = Callable[[Transfer, Transfer, int, int], None]
"""Copies bytes of an object, from and to an offset in it, between the blocks of two ends."""


class Journey:
    """One transfer: what its receiver has posted, and what its holder serves once it has been asked."""

    def __init__(self, receiver: int, target: Transfer, received: Done) -> None:
        self.receiver = receiver
        self.target = target
        self.received = received
        self.source: Transfer | None = None
        self.served: Done | None = None
        self.arrived = 0
        """Bytes since the start of the transfer."""
        self.end = target.block.size - target.start
        self.error: str | None = None
        """Why the receiver expects no more."""
        self.cut: str | None = None
        """Why the holder sends no more."""

    def next_chunk(self) -> int:
        """Bytes that can arrive next; 0: none."""
        if self.source is None:
            return 0
        size = min(CHUNK, self.end - self.arrived)
        filling = self.source.filling
        return size if filling is None or filling.size - self.source.start >= self.arrived + size else 0


class FakeBulk:
    """All transfers of a cluster, by receiver and tag."""

    def __init__(self, copy: Copy) -> None:
        self.journeys: dict[tuple[int, int], Journey] = {}
        self._copy = copy

    def receive(self, receiver: int, target: Transfer, done: Done) -> None:
        self.journeys[receiver, target.tag] = Journey(receiver, target, done)

    def serve(self, holder: int, source: Transfer, done: Done) -> None:
        journey = self.journeys[source.rank, source.tag]
        assert journey.target.rank == holder
        assert journey.target.start == source.start
        assert journey.target.block.size == source.block.size
        journey.source = source
        journey.served = done

    def choices(self) -> list[tuple[int, int]]:
        """Transfers of which something can arrive now."""
        return [key for key, journey in self.journeys.items() if journey.next_chunk()]

    def arrive(self, receiver: int, tag: int) -> tuple[int, ...]:
        """Let one chunk arrive; the ranks to which something happened."""
        journey = self.journeys[receiver, tag]
        size = journey.next_chunk()
        source, target = journey.source, journey.target
        assert source is not None
        start = target.start + journey.arrived
        self._copy(source, target, start, start + size)
        journey.arrived += size
        if target.filling is not None:
            target.filling.size = start + size
        return self._finish(journey)

    def end_receive(self, receiver: int, tag: int, size: int, why: str) -> None:
        if (journey := self.journeys.get((receiver, tag))) is not None:
            journey.end = min(journey.end, size)
            journey.error = why
            self._finish(journey)

    def end_serve(self, receiver: int, tag: int, why: str) -> int:
        """One more chunk than has arrived is under way, if there was one to send."""
        journey = self.journeys[receiver, tag]
        journey.end = journey.arrived + journey.next_chunk()
        journey.cut = why
        self._finish(journey)
        return journey.end

    def lose(self, rank: int) -> None:
        """Nothing comes from a dead rank, and nothing reaches it."""
        for (receiver, _), journey in self.journeys.items():
            if journey.target.rank == rank:
                journey.source = journey.served = None
            elif receiver == rank:
                journey.source = None

    def _finish(self, journey: Journey) -> tuple[int, ...]:
        if journey.arrived < journey.end:
            return (journey.receiver,)
        served, journey.served = journey.served, None
        if journey.cut is None or journey.error is not None:  # else the receiver is still to be told
            del self.journeys[journey.receiver, journey.target.tag]
            journey.received(journey.error)
        if served is not None:
            served(journey.cut or journey.error)
        return journey.receiver, journey.target.rank

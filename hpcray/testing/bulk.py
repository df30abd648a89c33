"""The bulk data of the fake cluster: transfers of a few chunks, each of which arrives when the test says so.

As with MPI, a receiver is done before its holder is, and may use the tag again at once.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcray.store.pulls import Done, Transfer
from hpcray.transport.tags import Tags

CHUNK = 1024

Copy = Callable[[Transfer, Transfer, int, int], None]
"""Copies bytes of an object, from and to an offset in it, between the blocks of two ends."""


class Journey:
    """One transfer: what its receiver has posted, and what its holder serves once it has been asked."""

    def __init__(self, receiver: int, target: Transfer, received: Done) -> None:
        self.receiver = receiver
        self.target = target
        self.received: Done | None = received
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

    @property
    def has_left(self) -> bool:
        """Whether the holder may learn that it is done."""
        return self.served is not None and self.arrived >= self.end


class FakeBulk:
    """All transfers of a cluster."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self._journeys: dict[int, Journey] = {}
        self._receives: dict[tuple[int, int, int], Journey] = {}
        """By receiver, holder and tag."""
        self._serves: dict[tuple[int, int, int], Journey] = {}
        self._made = 0
        self._tags: dict[int, Tags] = {}
        """Of each receiver."""

    def new_tag(self, receiver: int, holder: int) -> int:
        return self._tags.setdefault(receiver, Tags()).new(holder)

    def receive(self, receiver: int, target: Transfer, done: Done) -> None:
        self._made += 1
        journey = Journey(receiver, target, done)
        self._journeys[self._made] = self._receives[receiver, target.rank, target.tag] = journey

    def serve(self, holder: int, source: Transfer, done: Done) -> None:
        key = source.rank, holder, source.tag
        journey = self._serves[key] = self._receives[key]
        assert journey.source is None
        assert journey.target.start == source.start
        assert journey.target.block.size == source.block.size
        journey.source = source
        journey.served = done

    def choices(self) -> list[tuple[int, int]]:
        """Transfers to which something can happen now, as (receiver, number)."""
        return [(j.receiver, number) for number, j in self._journeys.items() if j.next_chunk() or j.has_left]

    def proceed(self, number: int) -> int:
        """Let one chunk arrive, or the holder learn that all has left; the rank to which that happened."""
        journey = self._journeys[number]
        size = journey.next_chunk()
        if not size:
            holder = journey.target.rank
            self._leave(journey)
            return holder
        source, target = journey.source, journey.target
        assert source is not None
        start = target.start + journey.arrived
        self._copy(source, target, start, start + size)
        journey.arrived += size
        if target.filling is not None:
            target.filling.size = start + size
        self._finish(journey)
        return journey.receiver

    def end_receive(self, receiver: int, holder: int, tag: int, size: int, why: str) -> None:
        if (journey := self._receives.get((receiver, holder, tag))) is not None:
            journey.end = min(journey.end, size)
            journey.error = why
            self._finish(journey)

    def end_serve(self, receiver: int, holder: int, tag: int, why: str) -> int:
        """One more chunk than has arrived is under way, if there was one to send."""
        journey = self._serves[receiver, holder, tag]
        journey.end = journey.arrived + journey.next_chunk()
        journey.cut = why
        if journey.has_left:
            self._leave(journey)
        return journey.end

    def lose(self, rank: int) -> None:
        """Nothing comes from a dead rank, and nothing reaches it."""
        for journey in self._journeys.values():
            if rank in (journey.receiver, journey.target.rank):
                journey.source = None
            if journey.target.rank == rank:
                journey.served = None

    def _finish(self, journey: Journey) -> None:
        # Where the holder has cut it short, the receiver is still to be told.
        if journey.arrived < journey.end or (journey.cut is not None and journey.error is None):
            return
        received, journey.received = journey.received, None
        if received is not None:
            del self._receives[journey.receiver, journey.target.rank, journey.target.tag]
            self._tags[journey.receiver].free(journey.target.rank, journey.target.tag)
            self._forget(journey)
            received(journey.error)

    def _leave(self, journey: Journey) -> None:
        served, journey.served = journey.served, None
        key = journey.receiver, journey.target.rank, journey.target.tag
        if self._serves.get(key) is journey:
            del self._serves[key]
        self._forget(journey)
        assert served is not None
        served(journey.cut or journey.error)

    def _forget(self, journey: Journey) -> None:
        if journey.received is None and journey.served is None:
            for number in [number for number, other in self._journeys.items() if other is journey]:
                del self._journeys[number]

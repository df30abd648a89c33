"""Bulk data between ranks: chunks in order, from memory to memory without a copy here, a bounded number of them with MPI.

Rules:
  1. A transfer is known by peer and tag. Both ends cut the same bytes into the same chunks, one message each, so that no
     message comes near 2 GiB.
  2. A receiver has a few receives posted for each of its transfers. A sender has a few chunks under way to each *peer*, however
     many transfers go there: control frames wait behind those few only. The most urgent transfer's chunks go first.
  3. What was sent is received: an end that is told of before all was sent (`end_send`, `end_receive`) says how much was, and
     the receiver takes so much. So no chunk is ever left over for the next transfer with the tag.
  4. Nothing blocks, and a turn stops when its time is over; the next one goes on where it stopped.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Protocol

import mpi4py

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

OnDone = Callable[[str | None], None]
"""Called once with None, or with what went wrong; the memory is not used any more."""

CHUNK_SIZE = 1 << 20
CHUNKS_IN_FLIGHT = 2
TURN_SECONDS = 1e-3


class Filling(Protocol):
    """How many bytes of a piece of memory are there, counted from its start: what can be sent on while the rest arrives."""

    size: int


class Receive:
    """A transfer that comes here."""

    __slots__ = ("_chunks", "_posted", "buffer", "end", "error", "filling", "on_done", "peer", "tag")

    def __init__(
        self, peer: int, tag: int, buffer: memoryview, on_done: OnDone, filling: Filling | None = None
    ) -> None:
        self.peer = peer
        self.tag = tag
        self.buffer = buffer.cast("B")
        self.on_done = on_done
        self.filling = filling
        self.end = len(self.buffer)
        self.error: str | None = None
        self._posted = 0
        self._chunks: deque[tuple[MPI.Request, int]] = deque()

    def advance(self, comm: MPI.Comm) -> bool:
        """Retire chunks that are here, post receives for others; say whether any was retired."""
        chunks, moved = self._chunks, False
        while chunks and chunks[0][0].Test():
            _, size = chunks.popleft()
            moved = True
            if self.filling is not None:
                self.filling.size += size
        while len(chunks) < CHUNKS_IN_FLIGHT and self._posted < self.end:
            chunk = self.buffer[self._posted : self._posted + CHUNK_SIZE]
            request = comm.Irecv((chunk, MPI.BYTE), self.peer, self.tag)
            self._posted += len(chunk)
            chunks.append((request, len(chunk)))
        return moved

    @property
    def is_done(self) -> bool:
        return not self._chunks and self._posted >= self.end

    def shorten(self, size: int, error: str) -> None:
        """No more than `size` bytes will come: take back the receives of the rest. Of a sender that died more may be here."""
        self.error = error
        self.end = min(size, self.end)
        while self._chunks and self._posted > self.end:
            request, posted = self._chunks.pop()
            cancel(request)
            self._posted -= posted

    def abandon(self) -> list[MPI.Request]:
        """Forget the receives; what is posted is the caller's."""
        requests = [request for request, _ in self._chunks]
        self._chunks.clear()
        self._posted = self.end
        return requests


class Send:
    """A transfer that goes from here."""

    __slots__ = (
        "_in_flight",
        "buffer",
        "end",
        "error",
        "filling",
        "on_done",
        "peer",
        "posted",
        "priority",
        "start",
        "tag",
    )

    def __init__(
        self,
        peer: int,
        tag: int,
        buffer: memoryview,
        on_done: OnDone,
        priority: int,
        filling: Filling | None,
        start: int,
    ) -> None:
        self.peer = peer
        self.tag = tag
        self.buffer = buffer.cast("B")
        self.on_done = on_done
        self.priority = priority
        self.filling = filling
        self.start = start
        self.end = len(self.buffer)
        self.error: str | None = None
        self.posted = 0
        self._in_flight = 0

    def post(self, comm: MPI.Comm) -> MPI.Request | None:
        """Send the next chunk, if there is one and all of it is here."""
        size = min(CHUNK_SIZE, self.end - self.posted)
        if size <= 0 or (self.filling is not None and self.filling.size - self.start < self.posted + size):
            return None
        request = comm.Isend((self.buffer[self.posted : self.posted + size], MPI.BYTE), self.peer, self.tag)
        self.posted += size
        self._in_flight += 1
        return request

    def retire(self) -> None:
        """One chunk less is under way."""
        self._in_flight -= 1

    @property
    def is_done(self) -> bool:
        return not self._in_flight and self.posted == self.end


class Outgoing:
    """All transfers to one peer: the most urgent first, those of one urgency in the order of their coming."""

    __slots__ = ("chunks", "sends")

    def __init__(self) -> None:
        self.sends: list[Send] = []
        self.chunks: deque[tuple[MPI.Request, Send]] = deque()

    def advance(self, comm: MPI.Comm) -> bool:
        """Retire chunks that have left, send others; say whether anything happened."""
        chunks, moved = self.chunks, False
        while chunks and chunks[0][0].Test():
            chunks.popleft()[1].retire()
            moved = True
        for send in self.sends:
            while len(chunks) < CHUNKS_IN_FLIGHT and (request := send.post(comm)) is not None:
                chunks.append((request, send))
                moved = True
        return moved

    def add(self, send: Send) -> None:
        insort(self.sends, send, key=lambda other: other.priority)

    def abandon(self, send: Send) -> None:
        """Let go of its chunks that are with MPI, which takes no sends back."""
        for request, of in self.chunks:
            if of is send and request != MPI.REQUEST_NULL:
                request.Free()
        self.chunks = deque(chunk for chunk in self.chunks if chunk[1] is not send)


class Bulk:
    """All transfers of one rank."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self._receives: dict[tuple[int, int], Receive] = {}
        self._sends: dict[tuple[int, int], Send] = {}
        self._outgoing: dict[int, Outgoing] = {}
        self._order: deque[Receive | Outgoing] = deque()
        """What `progress` looks at, in turn."""
        self.last_moved = 0.0
        """When a chunk was last sent or received."""

    @property
    def is_active(self) -> bool:
        return bool(self._order)

    # -------------------------------------------------------------------------------------------------------- beginning
    def receive(self, receive: Receive) -> None:
        self._receives[receive.peer, receive.tag] = receive
        self._order.append(receive)
        self.last_moved = monotonic()
        self._advance(receive)

    def send(self, send: Send) -> None:
        self._sends[send.peer, send.tag] = send
        outgoing = self._outgoing.get(send.peer)
        if outgoing is None:
            outgoing = self._outgoing[send.peer] = Outgoing()
            self._order.append(outgoing)
        outgoing.add(send)
        self.last_moved = monotonic()
        self._advance(outgoing)
        if send.is_done and send in outgoing.sends:
            self._finish_sends(outgoing)  # it was empty

    # ---------------------------------------------------------------------------------------------------------- changes
    def hasten(self, peer: int, tag: int, priority: int) -> None:
        """Send this transfer's chunks before those of less urgent ones. Does nothing if it is over."""
        send = self._sends.get((peer, tag))
        if send is not None and priority < send.priority:
            outgoing = self._outgoing[peer]
            outgoing.sends.remove(send)
            send.priority = priority
            outgoing.add(send)

    def end_send(self, peer: int, tag: int, error: str) -> int:
        """Send no more of this transfer; how many bytes have been sent. Its `on_done(error)` follows when they have left."""
        send = self._sends.get((peer, tag))
        if send is None:
            return 0
        send.error = error
        send.end = send.posted
        self._finish_sends(self._outgoing[peer])
        return send.posted

    def end_receive(self, peer: int, tag: int, size: int, error: str) -> None:
        """The sender says that no more than `size` bytes will come. `on_done(error)` follows when they are here."""
        receive = self._receives.get((peer, tag))
        if receive is not None:
            receive.shorten(size, error)
            self._advance(receive)

    # --------------------------------------------------------------------------------------------------------- progress
    def progress(self) -> bool:
        """Advance as many transfers as fit into a turn; say whether any moved."""
        began = now = monotonic()
        moved = False
        for _ in range(len(self._order)):
            if not self._order:
                break  # a transfer's end may end others
            item = self._order[0]
            self._order.rotate(-1)
            moved |= self._advance(item)
            now = monotonic()
            if now - began > TURN_SECONDS:
                moved = True
                break
        if moved:
            self.last_moved = now
        return moved

    def _advance(self, item: Receive | Outgoing) -> bool:
        try:
            moved = item.advance(self._comm)
        except MPI.Exception as exception:
            self._fail(item, str(exception))
            return True
        if isinstance(item, Outgoing):
            if moved:
                self._finish_sends(item)
        elif item.is_done:
            self._end(item)
        return moved

    def _finish_sends(self, outgoing: Outgoing) -> None:
        # One at a time: what follows from the end of one may begin another to this peer, and end others inside this loop.
        while (send := next((send for send in outgoing.sends if send.is_done), None)) is not None:
            self._drop(outgoing, send)
            send.on_done(send.error)

    def _drop(self, outgoing: Outgoing, send: Send) -> None:
        outgoing.sends.remove(send)
        if self._sends.get((send.peer, send.tag)) is send:  # else the receiver, done before us, has used the tag again
            del self._sends[send.peer, send.tag]
        if not outgoing.sends:
            del self._outgoing[send.peer]
            self._order.remove(outgoing)

    def _end(self, receive: Receive) -> None:
        del self._receives[receive.peer, receive.tag]
        self._order.remove(receive)
        receive.on_done(receive.error)

    def _fail(self, item: Receive | Outgoing, error: str) -> None:
        if isinstance(item, Receive):
            for request in item.abandon():
                cancel(request)
            item.error = item.error or error
            self._end(item)
            return
        while item.sends:
            send = item.sends[0]
            item.abandon(send)
            self._drop(item, send)
            send.on_done(error)

    # -------------------------------------------------------------------------------------------------------------- end
    def abandon_all(self, first_tag: int) -> tuple[list[MPI.Request], list[MPI.Request]]:
        """At the job's end: forget all transfers with tags from `first_tag` on; their receives and sends under way."""
        receives: list[MPI.Request] = []
        for receive in [receive for receive in self._receives.values() if receive.tag >= first_tag]:
            receives += receive.abandon()
            del self._receives[receive.peer, receive.tag]
            self._order.remove(receive)
        sends: list[MPI.Request] = []
        for outgoing in list(self._outgoing.values()):
            for send in [send for send in outgoing.sends if send.tag >= first_tag]:
                sends += [request for request, of in outgoing.chunks if of is send]
                outgoing.chunks = deque(chunk for chunk in outgoing.chunks if chunk[1] is not send)
                self._drop(outgoing, send)
        return receives, sends


def cancel(request: MPI.Request) -> None:
    """Take a receive back, whether or not it has been matched."""
    if request != MPI.REQUEST_NULL:
        request.Cancel()
        request.Wait()
    if request != MPI.REQUEST_NULL:
        request.Free()

"""Frames between the ranks of a job: small messages, in order per pair, with credit.

Frames of one source arrive in the order sent. Each starts with a header (kind, how many of the receiver's frames the sender
has taken, length) and lands in a ring of pre-posted receives: MPI matches receives in the order posted, so only the head of
the ring has to be tested. A frame that does not fit a slot is announced in one and follows as bulk data, before any other;
later frames of its source wait for it.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from time import monotonic

import mpi4py

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

from hpcray.transport.bells import Bells  # noqa: E402
from hpcray.transport.bulk import Bulk, Receive, Send, cancel  # noqa: E402

OnFrame = Callable[[int, bytes], None]

FRAME_TAG = 1
LARGE_TAG = 2
FRAME_PRIORITY = -1
"""Large frames go before all transfers."""

# Kind, sender, frames taken (modulo 2**32), length. The sender is here since an MPI status costs more to ask.
_HEADER = struct.Struct("<BxxxIIQ")
_HEADER_SIZE = _HEADER.size
_FRAME, _LARGE, _ACK = range(3)
_COUNT_MASK = 0xFFFFFFFF

_SLOT_COUNT = 16
_SLOT_SIZE = 64 * 1024
_FRAMES_PER_TURN = 32
# Bytes. Up to here a message is in the receiver's memory when Isend returns, in both libraries' defaults.
_EAGER_SIZE = 4000
_FRAMES_IN_FLIGHT = 8
_ACK_AFTER = _FRAMES_IN_FLIGHT // 2  # so that the sender has credit left while the acknowledgement travels


class _Peer:
    """Frames to and from one other rank."""

    __slots__ = ("acknowledged", "is_owed", "large_out", "rank", "sent", "taken", "told", "waiting")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.sent = 0  # frames to the peer, and how many of them it said it has taken
        self.acknowledged = 0
        self.taken = 0  # frames from the peer, and how many of them we said we have taken
        self.told = 0
        self.is_owed = False
        self.waiting: deque[bytes | int] = deque()  # frames behind a large one; an int is a large one's length
        self.large_out: deque[bytes] = deque()


class Frames:
    """All frames of one rank; `on_frame` is called with the source and each frame that arrives."""

    def __init__(self, comm: MPI.Comm, bells: Bells, bulk: Bulk, on_frame: OnFrame) -> None:
        self.on_frame = on_frame
        self.last_traffic = monotonic()
        self._comm = comm
        self._rank = comm.Get_rank()
        self._bells = bells
        self._bulk = bulk
        self._peers = [_Peer(rank) for rank in range(comm.Get_size())]
        self._sends: list[tuple[MPI.Request, int, int]] = []
        self._polled_sends = 0
        self._owed: list[_Peer] = []
        self._buffers = [bytearray(_SLOT_SIZE) for _ in range(_SLOT_COUNT)]
        self._ring = [comm.Recv_init((buffer, MPI.BYTE), MPI.ANY_SOURCE, FRAME_TAG) for buffer in self._buffers]
        self._head = 0
        self._has_arrived = False  # what the head's last test said, where it was not acted on at once
        for request in self._ring:
            request.Start()

    # ---------------------------------------------------------------------------------------------------------- sending
    def can_send(self, peer: int) -> bool:
        state = self._peers[peer]
        return (state.sent - state.acknowledged) & _COUNT_MASK < _FRAMES_IN_FLIGHT

    def send(self, peer: int, frame: bytes) -> None:
        state = self._peers[peer]
        state.sent += 1
        size = len(frame)
        if size <= _SLOT_SIZE - _HEADER_SIZE:
            self._send_slot(state, _FRAME, size, frame)
        else:
            self._send_slot(state, _LARGE, size, b"")
            state.large_out.append(frame)
            if len(state.large_out) == 1:
                self._send_large(state)

    def _send_slot(self, state: _Peer, kind: int, size: int, body: bytes) -> None:
        taken = state.told = state.taken
        message = _HEADER.pack(kind, self._rank, taken & _COUNT_MASK, size) + body
        request = self._comm.Isend((message, MPI.BYTE), state.rank, FRAME_TAG)
        if not request.Test():
            self._sends.append((request, state.rank, len(message)))
            if len(message) > _EAGER_SIZE:
                self._polled_sends += 1
        self.last_traffic = monotonic()
        self._bells.wake(state.rank)

    def _send_large(self, state: _Peer) -> None:
        frame = memoryview(state.large_out[0])

        def sent(error: str | None) -> None:
            if error is not None:
                raise ConnectionError(f"a frame of {len(frame)} bytes to rank {state.rank} was cut off: {error}")
            state.large_out.popleft()
            if state.large_out:
                self._send_large(state)

        self._bulk.send(Send(state.rank, LARGE_TAG, frame, sent, FRAME_PRIORITY, None, 0))

    def retire_sends(self) -> None:
        """Let go of frames that have left."""
        if not self._sends:
            return
        pending = [entry for entry in self._sends if not entry[0].Test()]
        self._sends = pending
        self._polled_sends = sum(size > _EAGER_SIZE for _, _, size in pending)
        for _, rank, _ in pending:
            # Above the eager size (Open MPI 4 KiB, MPICH 8) a message needs its receiver more than once.
            self._bells.wake(rank)

    @property
    def has_polled_sends(self) -> bool:
        """Whether frames that are too large to have left at once are under way."""
        return self._polled_sends > 0

    @property
    def is_sending(self) -> bool:
        return bool(self._sends) or any(state.large_out for state in self._peers)

    # --------------------------------------------------------------------------------------------------------- arrivals
    def has_arrived(self) -> bool:
        """Whether a frame is here that `take` has not taken. Not by Get_status, which deactivates a persistent request
        in MPICH 5.0.2."""
        self._has_arrived = self._has_arrived or self._ring[self._head].Test()
        return self._has_arrived

    def take(self) -> bool:
        """Deliver a bounded number of frames; say whether there may be more."""
        if self._owed:
            self.acknowledge()
        ring, buffers, peers = self._ring, self._buffers, self._peers
        taken = 0
        for _ in range(_FRAMES_PER_TURN):
            head = self._head
            request = ring[head]
            if not (self._has_arrived or request.Test()):
                break
            self._has_arrived = False
            taken += 1
            buffer = buffers[head]
            kind, source, acknowledged, size = _HEADER.unpack_from(buffer)
            state = peers[source]
            state.acknowledged = acknowledged
            frame = bytes(memoryview(buffer)[_HEADER_SIZE : _HEADER_SIZE + size]) if kind == _FRAME else b""
            request.Start()
            self._head = (head + 1) % _SLOT_COUNT
            if kind == _FRAME:
                if state.waiting:
                    state.waiting.append(frame)
                else:
                    self._deliver(state, frame)
            elif kind == _LARGE:
                state.waiting.append(size)
                if len(state.waiting) == 1:
                    self._receive_large(state, size)
        if taken:
            self.last_traffic = monotonic()
        return taken == _FRAMES_PER_TURN

    def _deliver(self, state: _Peer, frame: bytes) -> None:
        state.taken += 1
        if not state.is_owed and state.taken - state.told >= _ACK_AFTER:
            state.is_owed = True
            self._owed.append(state)
        self.on_frame(state.rank, frame)

    def acknowledge(self) -> None:
        """Give credit to those who wait for it: late, so that frames sent at a turn's end could carry it for nothing."""
        owed, self._owed = self._owed, []
        for state in owed:
            state.is_owed = False
            if state.taken - state.told >= _ACK_AFTER:
                self._send_slot(state, _ACK, 0, b"")

    def _receive_large(self, state: _Peer, size: int) -> None:
        frame = bytearray(size)

        def received(error: str | None) -> None:
            if error is not None:
                raise ConnectionError(f"{size} bytes from rank {state.rank} were cut off: {error}")
            state.waiting.popleft()
            self._deliver(state, bytes(frame))
            self._deliver_waiting(state)

        self._bulk.receive(Receive(state.rank, LARGE_TAG, memoryview(frame), received))

    def _deliver_waiting(self, state: _Peer) -> None:
        waiting = state.waiting
        while waiting:
            following = waiting[0]
            if isinstance(following, int):
                self._receive_large(state, following)
                return
            waiting.popleft()
            self._deliver(state, following)

    # -------------------------------------------------------------------------------------------------------------- end
    def close(self) -> None:
        """Take the ring's receives back."""
        for request in self._ring:
            cancel(request)

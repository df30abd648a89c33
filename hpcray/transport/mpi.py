"""Frames and bulk data between the ranks of a job, over MPI.

Frames of one source arrive in the order sent. Each starts with a header (kind, how many of the receiver's
frames the sender has taken, length) and lands in a ring of pre-posted receives: MPI matches receives in the
order posted, so only the head of the ring has to be tested. A frame that does not fit a slot is announced in
one and follows as a stream of chunks; later frames of its source wait for it.

Rules:
  1. One thread, and nothing blocks except `close`.
  2. Frames overtake bulk data: own tag, tested first, and a bulk transfer has few chunks in flight.
  3. The asleep flag is set before the last test for traffic, and tested by peers after their send.
  4. MPI may call a small send complete before it has left the process, and tells nobody when a peer's
     half-done message needs us. So sleeps grow with the quiet after traffic: a stall at most doubles it.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Mapping
from threading import Lock
from time import monotonic, sleep
from typing import TYPE_CHECKING, Protocol

import mpi4py

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

if TYPE_CHECKING:
    from hpcray.transport.doorbell import Doorbell
    from hpcray.transport.poller import EventLoop

OnFrame = Callable[[int, bytes], None]
OnDone = Callable[[str | None], None]

_FRAME_TAG = 1
_LARGE_TAG = 2
_FIRST_BULK_TAG = 16
_MOST_BULK_TAGS = 4096  # transfers at once from one peer; MPI promises tags up to 32767 only

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

_CHUNK_SIZE = 4 * 1024 * 1024
_CHUNKS_IN_FLIGHT = 4

# Seconds. What has to be polled is polled without sleep at first, then the sleeps grow with the quiet.
_SPIN = 50e-6
_POLL_SLEEP = 1e-3
_POLL_SLEEP_QUIET = 5e-3
_QUIET = 10.0
# With doorbells only, the sleep is a net under rule 4 and under lost wake-ups.
_SLEEP_MIN = 1e-3
_SLEEP_MAX = 1.0
_CLOSE_SLEEP = 1e-4


class AsleepFlag(Protocol):
    """The part of an arena that the transport uses: a flag that the ranks of one host share."""

    asleep: bool


class _Stream:
    """One direction of one transfer: chunks in order, a bounded number of them with MPI."""

    __slots__ = ("_buffer", "_posted", "_start", "chunks", "is_send", "on_done", "peer", "tag")

    def __init__(
        self, comm: MPI.Comm, peer: int, tag: int, buffer: memoryview, on_done: OnDone, *, is_send: bool
    ) -> None:
        self._start = comm.Isend if is_send else comm.Irecv
        self.peer = peer
        self._buffer = buffer.cast("B")
        self._posted = 0
        self.tag = tag
        self.is_send = is_send
        self.on_done = on_done
        self.chunks: deque[MPI.Request] = deque()

    def advance(self) -> bool:
        """Retire chunks that are done, post others; say whether anything happened."""
        chunks = self.chunks
        moved = False
        while chunks and chunks[0].Test():
            chunks.popleft()
            moved = True
        while len(chunks) < _CHUNKS_IN_FLIGHT and self._posted < len(self._buffer):
            chunk = self._buffer[self._posted : self._posted + _CHUNK_SIZE]
            chunks.append(self._start((chunk, MPI.BYTE), self.peer, self.tag))
            self._posted += len(chunk)
            moved = True
        return moved

    @property
    def is_done(self) -> bool:
        return not self.chunks and self._posted == len(self._buffer)

    def abandon(self) -> None:
        """Let go of the chunks that are with MPI; it takes receives back, but no sends."""
        for request in self.chunks:
            if not self.is_send:
                _cancel(request)
            elif request != MPI.REQUEST_NULL:
                request.Free()
        self.chunks.clear()


class _Peer:
    """What the transport knows about one other rank."""

    __slots__ = (
        "acknowledged",
        "arena",
        "bell",
        "bulk_tags_free",
        "bulk_tags_made",
        "doorbell",
        "is_owed",
        "large_out",
        "rank",
        "sent",
        "taken",
        "told",
        "waiting",
    )

    def __init__(self, rank: int, doorbell: bytes | None) -> None:
        self.rank = rank
        self.doorbell = doorbell
        self.arena: AsleepFlag | None = None
        self.bell = -1  # the peer's eventfd, once it was handed over
        self.sent = 0  # frames to the peer, and how many of them it said it has taken
        self.acknowledged = 0
        self.taken = 0  # frames from the peer, and how many of them we said we have taken
        self.told = 0
        self.is_owed = False
        self.waiting: deque[bytes | int] = deque()  # frames behind a large one; an int is a large one's length
        self.large_out: deque[_Stream] = deque()
        self.bulk_tags_made = 0
        self.bulk_tags_free: deque[int] = deque()


class MpiTransport:
    """Sends and receives for one rank."""

    def __init__(
        self,
        comm: MPI.Comm,
        doorbell: Doorbell,
        arena: AsleepFlag,
        same_host: Mapping[int, bytes],
        on_frame: OnFrame,
    ) -> None:
        """Post the receives.

        Args:
            comm: A duplicate that nobody else uses; `close` leaves it to the caller to free.
            doorbell: Our own; closed by the caller.
            arena: Ours: its asleep flag is what the peers look at.
            same_host: Doorbell names of the other ranks of this host.
            on_frame: Called from `progress` with the source and each of its frames, in order.
        """
        self.on_frame = on_frame
        self.on_handed_over: Callable[[bytes, int], None] = lambda _, fd: os.close(fd)
        self._comm = comm
        self._rank = comm.Get_rank()
        self._doorbell = doorbell
        self._arena = arena
        self._peers = [_Peer(rank, same_host.get(rank)) for rank in range(comm.Get_size())]
        self._has_far_peers = len(same_host) < len(self._peers) - 1
        self._fence = Lock()
        self._sends: list[tuple[MPI.Request, _Peer, int]] = []
        self._polled_sends = 0  # those too large to have left at once
        self._streams: list[_Stream] = []
        self._owed: list[_Peer] = []
        self._last_traffic = monotonic()
        self._buffers = [bytearray(_SLOT_SIZE) for _ in range(_SLOT_COUNT)]
        self._ring = [comm.Recv_init((buffer, MPI.BYTE), MPI.ANY_SOURCE, _FRAME_TAG) for buffer in self._buffers]
        self._head = 0
        self._has_arrived = False  # what the head's last test said, where it was not acted on at once
        for request in self._ring:
            request.Start()

    def attach(self, loop: EventLoop) -> None:
        """Let the doorbell wake `loop`. Descriptors that come over it go to `on_handed_over`."""
        loop.add_reader(self._doorbell.fd, self._answer_doorbell)
        loop.add_reader(self._doorbell.bell, self._doorbell.silence)

    def _answer_doorbell(self) -> None:
        for payload, fd in self._doorbell.drain():
            self.on_handed_over(payload, fd)

    def hand_over(self, rank: int, payload: bytes, fd: int) -> bool:
        """Hand a duplicate of `fd` to another rank of this host; False if that is not possible now."""
        doorbell = self._peers[rank].doorbell
        if doorbell is None:
            return False
        try:
            self._doorbell.send_fd(doorbell, payload, fd)
        except OSError:
            return False
        return True

    def add_peer_arena(self, rank: int, arena: AsleepFlag, bell: int) -> None:
        """Wake this peer by its eventfd, and only while its asleep flag is set; until now it was rung at each send."""
        self._peers[rank].bell = bell
        self._peers[rank].arena = arena

    # Frames

    def can_send(self, peer: int) -> bool:
        """Whether the peer keeps up. While it does not, collect messages for a larger frame instead."""
        state = self._peers[peer]
        return (state.sent - state.acknowledged) & _COUNT_MASK < _FRAMES_IN_FLIGHT

    def send(self, peer: int, frame: bytes) -> None:
        """Send one frame, after all earlier ones to this peer. Accepted whatever `can_send` says."""
        state = self._peers[peer]
        state.sent += 1
        size = len(frame)
        if size <= _SLOT_SIZE - _HEADER_SIZE:
            self._send_slot(state, _FRAME, size, frame)
        else:
            self._send_slot(state, _LARGE, size, b"")
            self._send_large(state, memoryview(frame))

    def _send_slot(self, state: _Peer, kind: int, size: int, body: bytes) -> None:
        taken = state.told = state.taken
        message = _HEADER.pack(kind, self._rank, taken & _COUNT_MASK, size) + body
        request = self._comm.Isend((message, MPI.BYTE), state.rank, _FRAME_TAG)
        if not request.Test():
            self._sends.append((request, state, len(message)))
            if len(message) > _EAGER_SIZE:
                self._polled_sends += 1
        self._last_traffic = monotonic()
        self._wake(state)

    def _wake(self, state: _Peer) -> None:
        if state.doorbell is None:
            return
        fence = self._fence
        fence.acquire()  # a full memory barrier: the message is visible before the flag is read
        fence.release()
        arena = state.arena
        if arena is None:
            self._doorbell.ring(state.doorbell)
        elif arena.asleep:
            arena.asleep = False  # whoever clears it rings, so that a burst rings once
            os.eventfd_write(state.bell, 1)

    def _send_large(self, state: _Peer, frame: memoryview) -> None:
        def sent(error: str | None) -> None:
            if error is not None:
                raise ConnectionError(f"a frame of {len(frame)} bytes to rank {state.rank} was cut off: {error}")
            state.large_out.popleft()
            if state.large_out:
                self._add_stream(state.large_out[0])

        state.large_out.append(_Stream(self._comm, state.rank, _LARGE_TAG, frame, sent, is_send=True))
        if len(state.large_out) == 1:
            self._add_stream(state.large_out[0])

    def _retire_sends(self) -> None:
        pending = [entry for entry in self._sends if not entry[0].Test()]
        self._sends = pending
        self._polled_sends = sum(size > _EAGER_SIZE for _, _, size in pending)
        for _, state, _ in pending:
            # Above the eager size (Open MPI 4 KiB, MPICH 8) a message needs its receiver more than once.
            self._wake(state)

    # Arrivals

    def progress(self) -> bool:
        """Take a bounded number of frames and chunks, call `on_frame` and `on_done`; say if there may be more."""
        is_more = self._take_frames()
        if self._streams and self._advance_streams():
            is_more = True
        if self._sends:
            self._retire_sends()
        if is_more:
            self._last_traffic = monotonic()
        return is_more

    def _take_frames(self) -> bool:
        if self._owed:
            self._acknowledge()
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
            self._last_traffic = monotonic()
        return taken == _FRAMES_PER_TURN

    def _deliver(self, state: _Peer, frame: bytes) -> None:
        state.taken += 1
        if not state.is_owed and state.taken - state.told >= _ACK_AFTER:
            state.is_owed = True
            self._owed.append(state)
        self.on_frame(state.rank, frame)

    def _acknowledge(self) -> None:
        # Late, so that the frames sent at the end of the turn could carry the count for nothing.
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

        stream = _Stream(self._comm, state.rank, _LARGE_TAG, memoryview(frame), received, is_send=False)
        self._add_stream(stream)

    def _deliver_waiting(self, state: _Peer) -> None:
        waiting = state.waiting
        while waiting:
            following = waiting[0]
            if isinstance(following, int):
                self._receive_large(state, following)
                return
            waiting.popleft()
            self._deliver(state, following)

    # Bulk data

    def new_tag(self, peer: int) -> int:
        """Return a tag for `receive_into`, to be told to the sending peer. Freed when the transfer is done.

        Raises:
            RuntimeError: Thousands of transfers from this peer are under way.
        """
        state = self._peers[peer]
        if state.bulk_tags_free:
            return state.bulk_tags_free.popleft()
        if state.bulk_tags_made == _MOST_BULK_TAGS:
            raise RuntimeError(f"{_MOST_BULK_TAGS} transfers from rank {peer} are under way")
        state.bulk_tags_made += 1
        return _FIRST_BULK_TAG + state.bulk_tags_made - 1

    def receive_into(self, peer: int, tag: int, buffer: memoryview, on_done: OnDone) -> None:
        """Fill `buffer` from the peer's `send_from` with the same tag and the same size, without a copy here.

        `on_done(error)` is called from `progress`, or from here if there is nothing to wait for; the buffer
        must stay mapped until then.
        """

        def received(error: str | None) -> None:
            self._peers[peer].bulk_tags_free.append(tag)
            on_done(error)

        self._add_stream(_Stream(self._comm, peer, tag, buffer, received, is_send=False))

    def cancel_receive(self, peer: int, tag: int, error: str) -> None:
        """End a `receive_into` for which the peer says that it has nothing; calls its `on_done(error)`."""
        for stream in self._streams:
            if stream.tag == tag and stream.peer == peer and not stream.is_send:
                stream.abandon()
                self._streams.remove(stream)
                stream.on_done(error)
                return

    def send_from(self, peer: int, tag: int, buffer: memoryview, on_done: OnDone) -> None:
        """Send `buffer` to the peer's `receive_into` with the same tag and size; `on_done` as there."""

        self._add_stream(_Stream(self._comm, peer, tag, buffer, on_done, is_send=True))
        state = self._peers[peer]
        self._wake(state)

    def _add_stream(self, stream: _Stream) -> None:
        self._streams.append(stream)
        self._last_traffic = monotonic()
        self._advance(stream)

    def _advance_streams(self) -> bool:
        moved = False
        for stream in tuple(self._streams):
            if self._advance(stream):
                moved = True
        return moved

    def _advance(self, stream: _Stream) -> bool:
        error = None
        try:
            moved = stream.advance()
        except MPI.Exception as exception:
            moved = True
            error = str(exception)
            stream.abandon()
        if error is not None or stream.is_done:
            self._streams.remove(stream)
            stream.on_done(error)
        return moved

    # Sleeping

    def prepare_sleep(self) -> float:
        """Set the asleep flag and look once more; return the most seconds to sleep."""
        if self._owed:
            self._acknowledge()
        quiet = monotonic() - self._last_traffic
        # A small send has left even where MPI calls it pending: its completion can wait for the next turn.
        if self._has_far_peers or self._polled_sends or self._streams:
            if quiet < _SPIN:
                os.sched_yield()
                return 0.0
            limit = min(quiet * 0.5, _POLL_SLEEP if quiet < _QUIET else _POLL_SLEEP_QUIET)
        else:
            limit = min(max(quiet, _SLEEP_MIN), _SLEEP_MAX)
        self._arena.asleep = True
        fence = self._fence
        fence.acquire()  # pairs with the one in _wake
        fence.release()
        # Not Get_status, which deactivates a persistent request in MPICH 5.0.2.
        self._has_arrived = self._has_arrived or self._ring[self._head].Test()
        return 0.0 if self._has_arrived else limit

    def woke(self) -> None:
        """Clear the asleep flag."""
        self._arena.asleep = False

    # The end

    def close(self, timeout: float = 5.0) -> bool:
        """Block until no rank has anything pending with another; every rank of the communicator calls it.

        Frames that still arrive are dropped, transfers under way are abandoned without `on_done`.

        Args:
            timeout: Seconds to wait for the others.

        Returns:
            Whether all came. If not, MPI_Finalize may block for ever: leave without it.
        """
        deadline = monotonic() + timeout
        self.on_frame = _drop
        bulk = [stream for stream in self._streams if stream.tag != _LARGE_TAG]
        self._streams = [stream for stream in self._streams if stream.tag == _LARGE_TAG]
        abandoned = [chunk for stream in bulk for chunk in stream.chunks]
        barrier = None
        while barrier is None or not barrier.Test():
            if monotonic() > deadline:
                return False
            self.progress()
            self._swallow_bulk(abandoned)
            if barrier is None and not self._is_sending(bulk):
                barrier = self._comm.Ibarrier()
            sleep(_CLOSE_SLEEP)
        for request in (*self._ring, *abandoned):
            _cancel(request)
        return True

    def _is_sending(self, bulk: list[_Stream]) -> bool:
        if self._sends or any(state.large_out for state in self._peers):
            return True
        return any(stream.is_send and not chunk.Test() for stream in bulk for chunk in stream.chunks)

    def _swallow_bulk(self, receives: list[MPI.Request]) -> None:
        # What was sent before its sender knew of the end, so that the sender can finish.
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status) and status.tag >= _FIRST_BULK_TAG:
            scratch = bytearray(status.Get_count(MPI.BYTE))
            receives.append(self._comm.Irecv((scratch, MPI.BYTE), status.source, status.tag))


def _cancel(request: MPI.Request) -> None:
    if request != MPI.REQUEST_NULL:
        request.Cancel()
        request.Wait()
    if request != MPI.REQUEST_NULL:
        request.Free()


def _drop(_source: int, _frame: bytes) -> None:
    """Nobody is there to take it."""

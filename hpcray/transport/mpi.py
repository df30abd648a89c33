"""What one rank says to the others, over MPI: frames (frames.py) and bulk data (bulk.py), and when to sleep.

Rules:
  1. One thread, and nothing blocks except `close`.
  2. Frames overtake bulk data: own tag, tested first, and few chunks are under way to each peer.
  3. The asleep flag is set before the last test for traffic, and tested by peers after their send.
  4. MPI may call a small send complete before it has left the process, and tells nobody when a peer's
     half-done message needs us. So sleeps grow with the quiet after traffic: a stall at most doubles it.
  5. While chunks move, the loop does not sleep: MPI moves bytes only while it is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import TYPE_CHECKING

import mpi4py

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

from hpcray.transport.bells import AsleepFlag, Bells  # noqa: E402
from hpcray.transport.bulk import Bulk, Filling, OnDone, Receive, Send, cancel  # noqa: E402
from hpcray.transport.frames import Frames, OnFrame  # noqa: E402
from hpcray.transport.tags import FIRST_TAG, Tags  # noqa: E402

if TYPE_CHECKING:
    from hpcray.transport.doorbell import Doorbell
    from hpcray.transport.poller import EventLoop

# Seconds. What has to be polled is polled without sleep at first, then the sleeps grow with the quiet.
_SPIN = 50e-6
_BULK_SPIN = 5e-3  # a chunk takes so long at 200 MB/s; below that, what the kernel buffers lasts while we sleep
_BULK_TURN = 200e-6  # of a turn's time; frames that arrive end it, sockets wait for it
_POLL_SLEEP = 1e-3
_POLL_SLEEP_QUIET = 5e-3
_QUIET = 10.0
# With doorbells only, the sleep is a net under rule 4 and under lost wake-ups.
_SLEEP_MIN = 1e-3
_SLEEP_MAX = 1.0
_CLOSE_SLEEP = 1e-4


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
        self.on_handed_over: Callable[[bytes, int], None] = lambda _, fd: os.close(fd)
        self._comm = comm
        self._doorbell = doorbell
        self._arena = arena
        self._bells = Bells(doorbell, same_host)
        self._bulk = Bulk(comm)
        self._tags = Tags()
        self._frames = Frames(comm, self._bells, self._bulk, on_frame)
        self._has_far_peers = len(same_host) < comm.Get_size() - 1

    @property
    def on_frame(self) -> OnFrame:
        """Who is given the frames."""
        return self._frames.on_frame

    @on_frame.setter
    def on_frame(self, on_frame: OnFrame) -> None:
        self._frames.on_frame = on_frame

    def attach(self, loop: EventLoop) -> None:
        """Let the doorbell wake `loop`. Descriptors that come over it go to `on_handed_over`."""
        loop.add_reader(self._doorbell.fd, self._answer_doorbell)
        loop.add_reader(self._doorbell.bell, self._doorbell.silence)

    def _answer_doorbell(self) -> None:
        for payload, fd in self._doorbell.drain():
            self.on_handed_over(payload, fd)

    def hand_over(self, rank: int, payload: bytes, fd: int) -> bool:
        """Hand a duplicate of `fd` to another rank of this host; False if that is not possible now."""
        return self._bells.hand_over(rank, payload, fd)

    def add_peer_arena(self, rank: int, arena: AsleepFlag, bell: int) -> None:
        """Wake this peer by its eventfd, and only while its asleep flag is set; until now it was rung at each send."""
        self._bells.add(rank, arena, bell)

    # ----------------------------------------------------------------------------------------------------------- frames
    def can_send(self, peer: int) -> bool:
        """Whether the peer keeps up. While it does not, collect messages for a larger frame instead."""
        return self._frames.can_send(peer)

    def send(self, peer: int, frame: bytes) -> None:
        """Send one frame, after all earlier ones to this peer. Accepted whatever `can_send` says."""
        self._frames.send(peer, frame)

    # -------------------------------------------------------------------------------------------------------- bulk data
    def new_tag(self, peer: int) -> int:
        """Return a tag for `receive_into`, to be told to the sending peer. Freed when the transfer is done.

        Raises:
            RuntimeError: Thousands of transfers from this peer are under way.
        """
        return self._tags.new(peer)

    def receive_into(
        self, peer: int, tag: int, buffer: memoryview, on_done: OnDone, filling: Filling | None = None
    ) -> None:
        """Fill `buffer` from the peer's `send_from` with the same tag and the same size, without a copy here.

        `on_done(error)` is called from `progress`, or from here if there is nothing to wait for; the buffer
        must stay mapped until then. `filling` is raised as bytes arrive, from what it says at first.
        """

        def received(error: str | None) -> None:
            self._tags.free(peer, tag)
            on_done(error)

        self._bulk.receive(Receive(peer, tag, buffer, received, filling))

    def send_from(
        self,
        peer: int,
        tag: int,
        buffer: memoryview,
        on_done: OnDone,
        *,
        priority: int = 0,
        filling: Filling | None = None,
        start: int = 0,
    ) -> None:
        """Send `buffer` to the peer's `receive_into` with the same tag and size; `on_done` as there.

        Transfers to one peer with a smaller `priority` go first. With `filling`, the buffer begins `start` bytes into
        memory that is being filled itself, and what is not there yet is sent when it is.
        """
        self._bulk.send(Send(peer, tag, buffer, on_done, priority, filling, start))
        self._bells.wake(peer)

    def hasten(self, peer: int, tag: int, priority: int) -> None:
        """Raise the priority of a `send_from`. Does nothing if it is over."""
        self._bulk.hasten(peer, tag, priority)

    def end_send(self, peer: int, tag: int, error: str) -> int:
        """Cut a `send_from` short: the bytes sent, to be told to the peer; `on_done(error)` follows when they have left."""
        return self._bulk.end_send(peer, tag, error)

    def end_receive(self, peer: int, tag: int, size: int, error: str) -> None:
        """The peer says that it has sent `size` bytes of a `receive_into` and no more: `on_done(error)` when they are here."""
        self._bulk.end_receive(peer, tag, size, error)

    # --------------------------------------------------------------------------------------------------------- progress
    def progress(self) -> bool:
        """Take a bounded number of frames and chunks, call `on_frame` and `on_done`; say if there may be more."""
        frames, bulk = self._frames, self._bulk
        is_more = frames.take()
        if bulk.is_active and self._move_bulk():
            is_more = True
        frames.retire_sends()
        return is_more

    def _move_bulk(self) -> bool:
        # MPI moves a little at each call, so that a turn of the loop for each would cost a sixth of the rate.
        frames, bulk = self._frames, self._bulk
        began = monotonic()
        moved = bulk.progress()
        while bulk.is_active and not frames.has_arrived():
            now = monotonic()
            if now - began > _BULK_TURN or now - bulk.last_moved > _BULK_SPIN:
                break
            if bulk.progress():
                moved = True
            else:
                os.sched_yield()
        return moved

    def prepare_sleep(self) -> float:
        """Set the asleep flag and look once more; return the most seconds to sleep."""
        frames, bulk = self._frames, self._bulk
        frames.acknowledge()
        now = monotonic()
        quiet = now - max(frames.last_traffic, bulk.last_moved)
        # A small send has left even where MPI calls it pending: its completion can wait for the next turn.
        if self._has_far_peers or frames.has_polled_sends or bulk.is_active:
            if quiet < _SPIN or (bulk.is_active and now - bulk.last_moved < _BULK_SPIN):
                os.sched_yield()
                return 0.0
            limit = min(quiet * 0.5, _POLL_SLEEP if quiet < _QUIET else _POLL_SLEEP_QUIET)
        else:
            limit = min(max(quiet, _SLEEP_MIN), _SLEEP_MAX)
        self._arena.asleep = True
        self._bells.fence()  # pairs with the one in Bells.wake
        return 0.0 if frames.has_arrived() else limit

    def woke(self) -> None:
        """Clear the asleep flag."""
        self._arena.asleep = False

    # ---------------------------------------------------------------------------------------------------------- the end
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
        receives, sends = self._bulk.abandon_all(FIRST_TAG)
        barrier = None
        while barrier is None or not barrier.Test():
            if monotonic() > deadline:
                return False
            self.progress()
            self._swallow_bulk(receives)
            sends = [request for request in sends if not request.Test()]
            if barrier is None and not sends and not self._frames.is_sending:
                barrier = self._comm.Ibarrier()
            sleep(_CLOSE_SLEEP)
        self._frames.close()
        for request in receives:
            cancel(request)
        return True

    def _swallow_bulk(self, receives: list[MPI.Request]) -> None:
        # What was sent before its sender knew of the end, so that the sender can finish.
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status) and status.tag >= FIRST_TAG:
            scratch = bytearray(status.Get_count(MPI.BYTE))
            receives.append(self._comm.Irecv((scratch, MPI.BYTE), status.source, status.tag))


def _drop(_source: int, _frame: bytes) -> None:
    """Nobody is there to take it."""

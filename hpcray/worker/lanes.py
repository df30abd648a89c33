"""A worker's ends of lanes: sockets on which drivers of its host send it calls themselves (see `hpcray/lanes.py`).

Rules:
  1. What lies in a lane's socket was sent before any call of that driver that comes by the raylet afterwards: it is looked
     at first (`look`).
  2. A worker never closes a lane, or a call might be lost between the two: it has the driver asked to (`LaneIdle`).
"""

from __future__ import annotations

import socket
from time import monotonic
from typing import TYPE_CHECKING

from hpcray.protocol import messages as m
from hpcray.protocol.codec import decode_from_raylet, split_stream, stream_frame

if TYPE_CHECKING:
    from hpcray.client import Client

IDLE_SECONDS = 0.02
"""After so long without a call a lane is to be closed: others may want the worker's CPU, and the driver has few lanes."""
LEASE_SECONDS = 1.0
"""Likewise, if it holds a CPU, after so long with calls: tasks of other drivers may have waited all the time."""
RECEIVE_SIZE = 1 << 16


class _ServedLane:
    """One lane."""

    __slots__ = ("buffer", "is_offered", "message", "since", "sock")

    def __init__(self, message: m.ServeLane, descriptor: int) -> None:
        self.sock = socket.socket(fileno=descriptor)
        self.message = message
        self.buffer = bytearray()
        self.since = monotonic()
        self.is_offered = False
        """The driver is being asked to close it."""

    def read(self) -> list[m.Run] | None:
        """The calls that have come; None if the driver has closed the lane. Blocks until there is something."""
        try:
            data = self.sock.recv(RECEIVE_SIZE)
        except OSError:
            data = b""
        if not data:
            return None
        self.buffer += data
        return [run for frame in split_stream(self.buffer) for run in decode_from_raylet(frame)]


class ServedLanes:
    """All lanes of a worker, and when it waits for what comes on them."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lanes: dict[int, _ServedLane] = {}
        """By descriptor."""
        self._asked_by: dict[bytes, _ServedLane] = {}
        """Calls that came on lanes and were not answered yet."""
        self._is_new = False

    def add(self, message: m.ServeLane, descriptor: int) -> None:
        """Serve one more."""
        self._lanes[descriptor] = _ServedLane(message, descriptor)
        self._is_new = True
        self._client.watch(descriptor)

    def read(self, descriptor: int) -> None:
        """A lane can be read: what came is to be run next."""
        lane = self._lanes[descriptor]
        runs = lane.read()
        if runs is None:
            self._client.unwatch(descriptor)
            del self._lanes[descriptor]
            lane.sock.close()
            return
        for run in runs:
            self._asked_by[run.task] = lane
            self._client.inbox.append(run)

    def look(self) -> None:
        """Put calls that have come on lanes ahead of what else there is to run: rule 1."""
        inbox = self._client.inbox
        if not self._lanes or (inbox and self.asked_for(inbox[0])):
            return
        others = list(inbox)
        inbox.clear()
        for descriptor in self._client.readable():
            if descriptor in self._lanes:
                self.read(descriptor)
        inbox.extend(others)

    def wait_for_work(self) -> None:
        """Block until there is something to run, or to exit for."""
        client, inbox = self._client, self._client.inbox
        while not (inbox or client.exit_asked):
            self._is_new = False
            is_idle = not all(lane.is_offered for lane in self._lanes.values())
            deadline = monotonic() + IDLE_SECONDS if is_idle else None
            if not client.wait_until(lambda: bool(inbox) or client.exit_asked or self._is_new, deadline):
                for lane in self._lanes.values():
                    self._offer(lane)

    def asked_for(self, work: m.Run) -> bool:
        """Whether a driver sent this itself."""
        return work.task in self._asked_by

    def finish(self, done: m.TaskDone) -> None:
        """Answer whoever asked for this: the raylet, or a driver."""
        client = self._client
        lane = self._asked_by.pop(done.task, None)
        if lane is None:
            client.send(done)
            return
        result = done.results[0]
        try:
            if isinstance(result, m.InlineResult) and not result.nested and not (done.failed and done.retry):
                _reply(lane, done.task, result.data)
            else:
                _reply(lane, done.task, None)
                lane.read()  # The same comes back when the raylets can make something of the result; or the driver's end.
                client.send(done)
                _reply(lane, done.task, None)
        except OSError:
            client.send(done)  # the driver is gone: whatever was kept for it here must be let go
        if lane.message.is_leased and monotonic() - lane.since > LEASE_SECONDS:
            self._offer(lane)

    def _offer(self, lane: _ServedLane) -> None:
        if not lane.is_offered:
            lane.is_offered = True
            self._client.send(m.LaneIdle(lane.message.home, lane.message.client, lane.message.lane))


def _reply(lane: _ServedLane, task: bytes, data: bytes | None) -> None:
    lane.sock.sendall(stream_frame([m.LaneReply(task, data)]))

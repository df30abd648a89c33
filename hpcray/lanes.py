"""A driver's ends of lanes: sockets on which it sends calls to workers itself, past the raylets.

What the raylets do for it is in `raylet/lanes.py`, the worker's end in `worker/lanes.py`.

A driver that waits for each call of a task or actor before it makes the next asks its raylet for a lane to a worker of its
host. From then on such calls cost two wake-ups. Calls with references among their arguments, large results, and calls made
while others are under way go by the raylets as ever.

Rules:
  1. A call on a lane is *unregistered*: the raylet knows nothing of it, nor of its return. Most end so. Before anything
     else is said to the raylet, whatever is unregistered and still of interest is made known (`register`): so no message
     mentions an object that the raylet has not heard of.
  2. A target is busy from a call by the raylets until the answer of the last such call: none goes by a lane meanwhile.
     So a lane is asked for between two calls, and the next one waits for it: it would take the CPU that the lane needs.
  3. Everything here happens under the client's lock, except for completing futures.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hpcray.ids import index_of, task_of
from hpcray.protocol import messages as m
from hpcray.protocol.codec import decode_from_raylet, split_stream, stream_frame

OPEN_AFTER = 8
"""So many calls of a target, each waited for, before a lane is asked for."""
OPEN_AFTER_MOST = 1 << 12
"""To what that grows, fourfold each time that a lane is refused or ends before it was of use."""
OF_USE = 64
"""Calls that pay for the making of a lane."""
MOST_LANES = 64
"""Lanes of a driver at a time: each is a descriptor, of which a process may have a thousand."""
RECEIVE_SIZE = 1 << 16


class _Target:
    """A template or actor that this driver calls."""

    __slots__ = ("actor", "awaited", "is_busy", "lane", "open_after", "streak", "template")

    def __init__(self, message: m.Submit | m.Call) -> None:
        self.template = b"" if isinstance(message, m.Call) else message.template
        self.actor = message.actor if isinstance(message, m.Call) else b""
        self.lane: CallerLane | None = None
        self.streak = 0
        """Calls in a row that were made while none was under way."""
        self.open_after = OPEN_AFTER
        self.is_busy = False
        self.awaited = b""
        """The return of the last call by the raylets."""


class _Flight:
    """A call on a lane."""

    __slots__ = ("goes_by_raylets", "id", "is_answered", "is_dropped", "is_registered", "message")

    def __init__(self, message: m.Submit | m.Call, identifier: bytes) -> None:
        self.message = message
        self.id = identifier
        self.is_registered = False
        self.is_answered = False
        self.goes_by_raylets = False
        """Its result does; the worker still has to say that it is on its way."""
        self.is_dropped = False
        """Its reference died before it was answered or registered."""


class CallerLane:
    """A driver's end of a lane."""

    __slots__ = ("buffer", "calls", "flight", "is_over", "is_wanted", "number", "sock", "target")

    def __init__(self, number: int, target: _Target) -> None:
        self.number = number
        self.target = target
        self.sock: socket.socket | None = None
        self.flight: _Flight | None = None
        self.calls = 0
        self.is_wanted = False
        """To be closed as soon as no call is under way."""
        self.is_over = False
        """The worker's end is closed."""
        self.buffer = bytearray()


class LanesOut(Protocol):
    """What the lanes need of the client, whose lock is held."""

    def later(self, message: Any) -> None:
        """Send this along with the next message to the raylet."""

    def flush(self) -> None:
        """Send it now."""

    def arrived(self, identifier: bytes, data: bytes) -> None:
        """The value of a return came on a lane."""

    def value_of(self, identifier: bytes) -> bytes:
        """A value that `arrived`, of a reference that is still held."""

    def ping(self, then: Callable[[], None]) -> None:
        """Call back when the raylet has handled all that was sent."""

    def watch(self, descriptor: int) -> None:
        """Have the lane read when the descriptor can be."""

    def unwatch(self, descriptor: int) -> None:
        """Not any more."""


class CallerLanes:
    """All lanes of a driver."""

    def __init__(self, out: LanesOut) -> None:
        self._out = out
        self._targets: dict[bytes, _Target] = {}
        self._awaited: dict[bytes, _Target] = {}
        self._lanes: dict[int, CallerLane] = {}
        self._by_descriptor: dict[int, CallerLane] = {}
        self._made = 0
        self.unregistered: dict[bytes, _Flight] = {}
        """By return."""

    # ----------------------------------------------------------------------------------------------------------- calling
    def take(self, message: m.Submit | m.Call, returns: Sequence[bytes]) -> bool:
        """Send a call on a lane if there is one and it may; False: it goes by the raylets."""
        key = message.actor if isinstance(message, m.Call) else message.template
        target = self._targets.get(key)
        if target is None:
            target = self._targets[key] = _Target(message)
        lane = target.lane
        if target.is_busy or len(returns) != 1 or message.dependencies or message.nested or (lane and lane.flight):
            target.streak = 0
            self._await(target, returns)
            return False
        if lane is None or lane.is_wanted or lane.is_over:
            target.streak += 1
            self._await(target, returns)
            return False
        flight = lane.flight = _Flight(message, returns[0])
        self.unregistered[flight.id] = flight
        if lane.sock is not None:
            self._send(lane, flight)
        return True

    def _send(self, lane: CallerLane, flight: _Flight) -> None:
        message = flight.message
        if isinstance(message, m.Call):
            run = m.Run(message.task, b"", message.actor, message.method, message.arguments, [], 1)
        else:
            run = m.Run(message.task, message.template, b"", "", message.arguments, [], 0)
        lane.calls += 1
        assert lane.sock is not None
        with contextlib.suppress(OSError):  # it is over: its raylet says so, and why
            lane.sock.sendall(stream_frame([run]))

    def _await(self, target: _Target, returns: Sequence[bytes]) -> None:
        self._awaited.pop(target.awaited, None)
        target.is_busy = True
        if returns:
            target.awaited = returns[-1]
            self._awaited[target.awaited] = target

    def _open(self, target: _Target) -> None:
        self._made += 1
        lane = target.lane = self._lanes[self._made] = CallerLane(self._made, target)
        self._out.later(m.OpenLane(lane.number, target.template, target.actor))
        self._out.flush()

    # ------------------------------------------------------------------------------------------------------- registering
    def register(self, batch: list[Any]) -> None:
        """Put ahead of a batch what it, or a later one, may mention."""
        news: list[Any] = []
        for flight in self.unregistered.values():
            flight.is_registered = True
            if flight.is_answered:
                news.append(m.PutInline(flight.id, self._out.value_of(flight.id), []))
                continue
            lane = self._lane_of(flight)
            if lane.sock is None:
                # It still waits for the lane: no longer.
                lane.flight = None
                self._await(lane.target, [flight.id])
            else:
                flight.message.lane = lane.number
            news.append(flight.message)
            if flight.is_dropped:
                news.append(m.Release([flight.id]))
        self.unregistered.clear()
        batch[:0] = news

    def _lane_of(self, flight: _Flight) -> CallerLane:
        return next(lane for lane in self._lanes.values() if lane.flight is flight)

    def on_dropped(self, identifier: bytes) -> bool:
        """The last reference to an object died. True: the raylet need not be told."""
        if index_of(identifier) == 0:
            self._targets.pop(task_of(identifier), None)  # an actor's last handle here
            return False
        target = self._awaited.pop(identifier, None)
        if target is not None:
            target.awaited = b""  # busy still: nobody will tell when that call is over
        flight = self.unregistered.get(identifier)
        if flight is None:
            return False
        if flight.is_answered:
            del self.unregistered[identifier]
        else:
            flight.is_dropped = True
        return True

    # -------------------------------------------------------------------------------------------------- from the raylet
    def on_answered(self, identifier: bytes) -> None:
        """A return of a call by the raylets exists."""
        target = self._awaited.pop(identifier, None)
        if target is not None:
            target.is_busy = False
            if target.lane is None and target.streak >= target.open_after and len(self._lanes) < MOST_LANES:
                self._open(target)

    def on_kill(self, actor: bytes) -> None:
        """What is called after a kill must not reach the actor before it."""
        if (target := self._targets.get(actor)) is not None:
            self._await(target, [])

    def on_opened(self, number: int, descriptor: int) -> None:
        """Here is the socket."""
        lane = self._lanes[number]
        lane.sock = socket.socket(fileno=descriptor)
        self._by_descriptor[descriptor] = lane
        self._out.watch(descriptor)
        if lane.flight is not None:
            self._send(lane, lane.flight)
        self._close_if_free(lane)

    def on_wanted(self, number: int) -> None:
        """Somebody else needs the worker."""
        lane = self._lanes.get(number)
        if lane is not None:
            lane.is_wanted = True
            self._close_if_free(lane)

    def on_closed(self, number: int, error: bytes | None) -> None:
        """Refused, or the worker died."""
        lane = self._lanes.get(number)
        if lane is None:
            return  # it was closed here at the same time: no call was under way
        target = lane.target
        if error is None:
            self._forget(lane)
            if (flight := lane.flight) is not None:
                del self.unregistered[flight.id]
                self._await(target, [flight.id])
                self._out.later(flight.message)
                if flight.is_dropped:
                    self._out.later(m.Release([flight.id]))
                self._out.flush()
            return
        if lane.sock is not None:
            lane.sock.setblocking(False)
            while number in self._lanes and not lane.is_over and self._receive(lane):
                pass  # what it had answered before it died
            if number not in self._lanes:
                return  # that was all, and the lane was wanted by others
        if (flight := lane.flight) is not None:
            self._await(target, [flight.id])
        self._out.later(m.CloseLane(number))
        self._out.flush()
        self._forget(lane)

    # -------------------------------------------------------------------------------------------------- from the worker
    def read(self, descriptor: int) -> None:
        """A lane can be read."""
        lane = self._by_descriptor.get(descriptor)
        if lane is not None:
            self._receive(lane)

    def _receive(self, lane: CallerLane) -> bool:
        """Whether there was something."""
        assert lane.sock is not None
        try:
            data = lane.sock.recv(RECEIVE_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            lane.is_over = True
            self._out.unwatch(lane.sock.fileno())
            return False
        lane.buffer += data
        for frame in split_stream(lane.buffer):
            for reply in decode_from_raylet(frame):
                self._on_reply(lane, reply)
        return True

    def _on_reply(self, lane: CallerLane, reply: m.LaneReply) -> None:
        flight = lane.flight
        assert flight is not None
        if reply.data is None:
            if flight.goes_by_raylets:
                lane.flight = None
                self._close_if_free(lane)
            else:
                self._go_by_raylets(lane, flight)
            return
        flight.is_answered = True
        lane.flight = None
        if flight.is_registered:
            self._out.later(m.LaneDone(reply.task, reply.data))
            self._out.flush()
        elif flight.is_dropped:
            del self.unregistered[flight.id]
        self._out.arrived(flight.id, reply.data)
        self._close_if_free(lane)

    def _go_by_raylets(self, lane: CallerLane, flight: _Flight) -> None:
        # The worker waits until our raylet can make something of the result.
        flight.goes_by_raylets = True
        lane.is_wanted = True
        lane.calls = 0  # of no use for large results
        self._await(lane.target, [flight.id])

        def known() -> None:
            if lane.sock is not None:
                with contextlib.suppress(OSError):
                    lane.sock.sendall(stream_frame([m.LaneReply(flight.message.task, None)]))

        self._out.ping(known)

    # ----------------------------------------------------------------------------------------------------------- closing
    def _close_if_free(self, lane: CallerLane) -> None:
        if lane.is_wanted and lane.flight is None and not lane.is_over and lane.sock is not None:
            self._out.later(m.CloseLane(lane.number))
            self._out.flush()
            self._forget(lane)

    def _forget(self, lane: CallerLane) -> None:
        self._lanes.pop(lane.number, None)
        target = lane.target
        target.lane = None
        target.streak = 0
        target.open_after = OPEN_AFTER if lane.calls >= OF_USE else min(target.open_after * 4, OPEN_AFTER_MOST)
        if lane.sock is not None:
            self._by_descriptor.pop(lane.sock.fileno(), None)
            if not lane.is_over:
                self._out.unwatch(lane.sock.fileno())
            lane.sock.close()

    def close(self) -> None:
        """The connection to the raylet ends."""
        for lane in self._lanes.values():
            if lane.sock is not None:
                lane.sock.close()

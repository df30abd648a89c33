"""A client on a real socket, the raylet's end of which is in the test's hands."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from hpcray import ids, payload
from hpcray.client import Client
from hpcray.exceptions import GetTimeoutError
from hpcray.object_ref import counted
from hpcray.protocol import messages as m
from hpcray.protocol.codec import decode_from_client, split_stream, stream_frame
from hpcray.worker.serialization import Serialized

PREFIX = ids.client_prefix(0, b"12345678", 1)
X, Y = (ids.object_id(ids.task_id(PREFIX, number), 0) for number in (1, 2))


class Raylet:
    """Reads what the client says, one message at a time."""

    client: Client

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(10)
        self._sock = sock
        self._buffer = bytearray()
        self._messages: list[object] = []

    def read(self) -> object:
        while not self._messages:
            self._buffer += self._sock.recv(1 << 16)
            for frame in split_stream(self._buffer):
                self._messages += decode_from_client(frame)
        return self._messages.pop(0)

    def send(self, message: m.RayletToClient) -> None:
        self._sock.sendall(stream_frame([message]))


@pytest.fixture
def raylet() -> Iterator[Raylet]:
    ours, theirs = socket.socketpair()
    raylet = Raylet(ours)
    raylet.client = client = Client(theirs, is_driver=False)
    client.prefix = PREFIX
    for ref in (X, Y):
        client.count_up(ref)
    yield raylet
    client.close()
    ours.close()


def start_to_get(raylet: Raylet, ref: bytes) -> threading.Thread:
    """A thread that waits for an object; its raylet has been asked for it."""
    thread = threading.Thread(target=raylet.client.fetch, args=([ref], None))
    thread.start()
    while not isinstance(message := raylet.read(), m.Get):
        assert isinstance(message, m.AddReferences)
    assert message == m.Get([ref], blocks=True)
    return thread


def said_nothing_more(raylet: Raylet) -> bool:
    raylet.client.send(m.KeepForever([]))
    return raylet.read() == m.KeepForever([])


def test_a_worker_is_blocked_until_the_last_of_its_threads_goes_on(raylet):
    # Else its raylet would send it tasks that it hands back at once, over and over.
    waits_for_x, waits_for_y = start_to_get(raylet, X), start_to_get(raylet, Y)
    raylet.send(m.InlineObject(Y, b"\0"))
    waits_for_y.join(10)
    assert said_nothing_more(raylet)
    raylet.send(m.InlineObject(X, b"\0"))
    waits_for_x.join(10)
    assert raylet.read() == m.Unblocked()


def time_out(raylet: Raylet, ref: bytes) -> None:
    """A `get` of this object times out in another thread."""

    def get() -> None:
        with pytest.raises(GetTimeoutError):
            raylet.client.fetch([ref], 0.01)

    thread = threading.Thread(target=get)
    thread.start()
    while not isinstance(message := raylet.read(), m.Query):
        assert isinstance(message, (m.AddReferences, m.Get))
    raylet.send(m.Answer(message.number, ok=True, payload=b""))
    thread.join(10)


def test_a_get_that_times_out_takes_back_what_it_asked_for(raylet):
    time_out(raylet, X)
    assert raylet.read() == m.StopGetting()
    assert raylet.read() == m.Unblocked()


def test_a_get_that_times_out_does_not_end_those_of_other_threads(raylet):
    waits_for_y = start_to_get(raylet, Y)
    time_out(raylet, X)
    assert said_nothing_more(raylet)
    raylet.send(m.InlineObject(Y, b"\0"))
    waits_for_y.join(10)


def test_a_get_that_times_out_does_not_end_a_future(raylet):
    future = raylet.client.future(counted(Y, raylet.client))
    time_out(raylet, X)
    assert raylet.read() == m.Unblocked()
    assert said_nothing_more(raylet)
    raylet.send(m.InlineObject(Y, bytes([payload.RAW]) + b"value"))
    assert future.result(10) == b"value"


@pytest.mark.parametrize("has_it", [False, True])
def test_a_put_that_is_interrupted_gives_its_memory_back(raylet, has_it, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    client = raylet.client
    client.rank = 0
    client.send(m.KeepForever([]))
    while raylet.read() != m.KeepForever([]):
        pass
    value = Serialized([bytes(1 << 20)], [])
    if has_it:
        client._arenas[0] = SimpleNamespace(write=interrupted, close=lambda: None)
        raylet.send(m.Reserved(X, 4096))
    else:
        monkeypatch.setattr(client, "wait_until", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.write_to_arena(X, value)
    assert [raylet.read(), raylet.read()] == [m.Reserve(X, value.size), m.Unreserve(X)]
    monkeypatch.undo()
    raylet.send(m.Reserved(X, 4096))  # it was on its way when the put ended
    raylet.send(m.InlineObject(Y, payload.NONE))
    client.fetch([Y], None)
    assert not client._reservations

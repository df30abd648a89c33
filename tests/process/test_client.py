"""A client on a real socket, the raylet's end of which is in the test's hands."""

from __future__ import annotations

import socket
import threading

from hpcray import ids
from hpcray.client import Client
from hpcray.protocol import messages as m
from hpcray.protocol.codec import decode_from_client, split_stream, stream_frame

PREFIX = ids.client_prefix(0, b"12345678", 1)
X, Y = (ids.object_id(ids.task_id(PREFIX, number), 0) for number in (1, 2))


class Raylet:
    """Reads what the client says, one message at a time."""

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


def test_a_worker_is_blocked_until_the_last_of_its_threads_goes_on():
    # Else its raylet would send it tasks that it hands back at once, over and over.
    ours, theirs = socket.socketpair()
    client = Client(theirs, is_driver=False)
    client.prefix = PREFIX
    raylet = Raylet(ours)
    held = [client.adopt(identifier) for identifier in (X, Y)]
    client.flush()
    assert [raylet.read() for _ in held] == [m.AddReferences([X]), m.AddReferences([Y])]
    waiting = [threading.Thread(target=client.fetch, args=([ref], None), daemon=True) for ref in (X, Y)]
    for thread in waiting:
        thread.start()
    assert {raylet.read().ids[0] for _ in waiting} == {X, Y}
    raylet.send(m.InlineObject(Y, b"\0"))
    waiting[1].join(10)
    client.send(m.KeepForever([]))
    assert raylet.read() == m.KeepForever([])
    raylet.send(m.InlineObject(X, b"\0"))
    waiting[0].join(10)
    assert raylet.read() == m.Unblocked()
    client.close()
    ours.close()

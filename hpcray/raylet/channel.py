"""The raylet's end of a client's socket: batches out, frames in, descriptors along with the batch that needs them."""

from __future__ import annotations

import array
import contextlib
import select
import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from hpcray.protocol.codec import LENGTH_SIZE, decode_from_client, split_stream, stream_frame
from hpcray.protocol.messages import ClientMessage
from hpcray.raylet.clients import Client
from hpcray.transport.poller import EventLoop

_received = memoryview(bytearray(1 << 18))
"""Where all channels of the rank's one thread receive: what is decoded or kept is copied out of it."""


class Channel:
    """One client's socket in the event loop. Never blocks."""

    def __init__(
        self,
        loop: EventLoop,
        sock: socket.socket,
        client: Client,
        on_message: Callable[[Client, ClientMessage], None],
        on_end: Callable[[Channel], None],
    ) -> None:
        sock.setblocking(False)
        self.client = client
        self.is_open = True
        self.outbox: list[Any] = []
        """Messages of this loop turn; `flush` sends them as one frame."""
        self.descriptors: list[int | socket.socket] = []
        """To go with that frame; sockets are closed when they have gone."""
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._on_message = on_message
        self._on_end = on_end
        self._incoming = bytearray()
        self._unsent: deque[tuple[memoryview, list[int | socket.socket]]] = deque()
        loop.add_reader(self._fd, self.read)

    def flush(self) -> None:
        """Send the batch that has collected; what the socket does not take waits."""
        messages, self.outbox = self.outbox, []
        descriptors, self.descriptors = self.descriptors, []
        if not self.is_open or not messages:
            _close(descriptors)
            return
        frame = stream_frame(messages)
        if not self._unsent and not descriptors:
            try:
                sent = self._sock.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # the reader sees the end
            if sent == len(frame):
                return
            self._unsent.append((memoryview(frame)[sent:], []))
            self._loop.set_writer(self._fd, self._send_unsent)
            return
        self._unsent.append((memoryview(frame), descriptors))
        self._send_unsent()

    def _send_unsent(self) -> None:
        unsent = self._unsent
        try:
            while unsent:
                data, descriptors = unsent[0]
                numbers = array.array("i", [d if isinstance(d, int) else d.fileno() for d in descriptors])
                sent = self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else [])
                _close(descriptors)
                if sent < len(data):
                    unsent[0] = (data[sent:], [])
                else:
                    unsent.popleft()
        except BlockingIOError:
            self._loop.set_writer(self._fd, self._send_unsent)
            return
        except OSError:
            self._forget_unsent()
        self._loop.set_writer(self._fd, None)

    def _forget_unsent(self) -> None:
        for _, descriptors in self._unsent:
            _close(descriptors)
        self._unsent.clear()

    def read(self) -> None:
        """Handle what has arrived, at most one buffer's worth."""
        try:
            size = self._sock.recv_into(_received)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self._end()
            return
        data = _received[:size]
        client, on_message = self.client, self._on_message
        incoming = self._incoming
        if not incoming and int.from_bytes(data[:LENGTH_SIZE], "big") == size - LENGTH_SIZE:
            for message in decode_from_client(data[LENGTH_SIZE:]):
                on_message(client, message)
            return
        incoming += data
        for frame in split_stream(incoming):
            for message in decode_from_client(frame):
                on_message(client, message)

    def read_all(self) -> None:
        """Handle everything that the ended client has sent."""
        while self.is_open and select.select([self._fd], [], [], 0)[0]:
            self.read()

    def _end(self) -> None:
        if self.is_open:
            self.close()
            self._on_end(self)

    def close(self) -> None:
        """Close the socket; nothing is called any more."""
        if self.is_open:
            self.is_open = False
            self._loop.set_writer(self._fd, None)
            self._loop.remove_reader(self._fd)
            with contextlib.suppress(OSError):
                self._sock.close()
            _close(self.descriptors)
            self._forget_unsent()


def _close(descriptors: Iterable[int | socket.socket]) -> None:
    for descriptor in descriptors:
        if not isinstance(descriptor, int):
            descriptor.close()

"""Doorbells: how ranks of one host wake each other, and hand over descriptors.

A doorbell is an abstract Unix datagram socket, so there is no file to leave behind. Its random name is told
to the ranks of the job only, and the kernel tells who sent each datagram: other users' are dropped.
"""

from __future__ import annotations

import array
import contextlib
import os
import secrets
import socket
import struct

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_DESCRIPTOR_SIZE = array.array("i").itemsize
_ANCILLARY_SIZE = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(_DESCRIPTOR_SIZE)
_PAYLOAD_SIZE = 4096
_RECEIVE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class Doorbell:
    """One rank's doorbell. Nothing here blocks.

    Peers reach it by its socket's name, until they have been handed `bell`: an eventfd, a fifth of the socket's cost.
    """

    def __init__(self) -> None:
        self._uid = os.getuid()
        self.name = f"\0hpcray-{self._uid}-{secrets.token_hex(16)}".encode()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self.name)
        self.fd = self._socket.fileno()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self, peer_name: bytes) -> None:
        """Make the peer's `fd` readable. A full queue means that it is already; a gone peer is no error."""
        try:
            self._socket.sendto(b"", peer_name)
        except (BlockingIOError, ConnectionError, FileNotFoundError):
            pass

    def send_fd(self, peer_name: bytes, payload: bytes, fd: int) -> None:
        """Hand a duplicate of `fd` to the peer with up to 4096 bytes that say what it is; rings as well.

        Raises:
            BlockingIOError: The peer's queue is full; try again later.
            OSError: The peer is gone.
        """
        if not 0 < len(payload) <= _PAYLOAD_SIZE:
            raise ValueError(f"a descriptor's payload is 1 to {_PAYLOAD_SIZE} bytes, not {len(payload)}")
        descriptor = array.array("i", [fd])
        self._socket.sendmsg([payload], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)], 0, peer_name)

    def drain(self) -> list[tuple[bytes, int]]:
        """Take what was handed over, up to the first bare ring; the caller owns the ``(payload, fd)`` pairs.

        `fd` stays readable while there is more: to find out here would cost as much as the ring itself.
        """
        handed: list[tuple[bytes, int]] = []
        while True:
            try:
                payload, ancillary, _, _ = self._socket.recvmsg(_PAYLOAD_SIZE, _ANCILLARY_SIZE, _RECEIVE_FLAGS)
            except BlockingIOError:
                return handed
            uid, fds = _parse(ancillary)
            if uid == self._uid and payload and len(fds) == 1:
                handed.append((payload, fds[0]))
                continue
            for fd in fds:
                os.close(fd)
            if not payload:
                return handed

    def silence(self) -> None:
        """Answer the bell, after it was found readable."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.bell)

    def close(self) -> None:
        """Free the socket, whose name is gone with it, and the bell."""
        self._socket.close()
        os.close(self.bell)


def _parse(ancillary: list[tuple[int, int, bytes]]) -> tuple[int | None, list[int]]:
    uid = None
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors = array.array("i")
            descriptors.frombytes(data[: len(data) - len(data) % _DESCRIPTOR_SIZE])
            fds.extend(descriptors)
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            _, uid, _ = _CREDENTIALS.unpack(data)
    return uid, fds

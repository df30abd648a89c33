"""The user's own stdin, stdout and stderr for the driver of `hpcray run -n N`, past mpirun.

mpirun is no faithful pipe: Open MPI 5.0.11 never passes the end of stdin on, repeats parts of what is longer
than 64 KiB (openpmix #4024, prrte #2579), and gives ranks a terminal for stdout whatever the user's is. So
`hpcray run` lends its three descriptors over a Unix socket, and rank 0 hands them to the driver. If rank 0 is
on another host the driver keeps what mpirun gives: output, and an empty stdin.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Mapping

VARIABLE = "HPCRAY_STDIO"
"""Names the lender's socket to rank 0. Not for children: the environment of workers and driver lacks it."""

_STANDARD = (0, 1, 2)
_PATIENCE = 5.0  # seconds; the lender is one select away


class Lender:
    """In `hpcray run`: lends this process's standard descriptors to one process of the same user."""

    def __init__(self) -> None:
        # An abstract name: no file, gone with the socket, and too random to be guessed by another user.
        self.name = f"hpcray-{os.getuid()}-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._socket.bind("\0" + self.name)
        self._socket.listen(1)

    def fileno(self) -> int:
        """Readable when `lend_nowait` has something to do."""
        return self._socket.fileno()

    def lend_nowait(self) -> None:
        """Answer whoever has asked. Never blocks; a stranger gets nothing."""
        try:
            peer, _ = self._socket.accept()
        except OSError:
            return
        with peer:
            if _uid(peer) == os.getuid():
                try:
                    socket.send_fds(peer, [b"stdio"], _STANDARD, socket.MSG_DONTWAIT)
                except OSError:  # gone already, or one of ours is closed
                    return

    def close(self) -> None:
        self._socket.close()


def borrow(env: Mapping[str, str] = os.environ) -> list[int] | None:
    """Descriptors to use as the driver's stdin, stdout and stderr; the caller closes them. Blocks up to 5 s.

    None if the job was not started by `hpcray run -n`, or from another host: keep one's own then.
    """
    name = env.get(VARIABLE)
    if not name:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as lender:
        lender.settimeout(_PATIENCE)
        try:
            lender.connect("\0" + name)
            if _uid(lender) != os.getuid():
                return None
            _, descriptors, _, _ = socket.recv_fds(lender, 16, len(_STANDARD))
        except OSError:
            return None
    if len(descriptors) != len(_STANDARD):
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    return descriptors


def _uid(peer: socket.socket) -> int:
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)

"""How a driver finds and reaches a job that runs on its host: Linux abstract sockets, which leave nothing behind."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

DRIVER_SETTINGS = "HPCRAY_DRIVER_SETTINGS"
"""Environment variable by which `hpcray run` tells its script's `init()` the job's options, as JSON."""

_LISTENS = 0x10000  # __SO_ACCEPTCON in the kernel's net.h: the socket accepts connections


def address_of(nonce: bytes) -> str:
    """The address of a job, as `init(address=…)` takes it."""
    return f"hpcray-{os.getuid()}-job-{nonce.hex()}"


def socket_name(address: str) -> bytes:
    """The abstract socket behind an address."""
    return b"\0" + address.encode()


def running_jobs(table: str | None = None) -> list[str]:
    """Addresses of this user's jobs on this host that take drivers.

    Args:
        table: Text of /proc/net/unix, for tests.
    """
    if table is None:
        table = Path("/proc/net/unix").read_text()
    prefix = f"@hpcray-{os.getuid()}-job-"
    found: list[str] = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[7].startswith(prefix) and int(fields[3], 16) & _LISTENS:
            found.append(fields[7][1:])
    return sorted(set(found))


def connect(address: str) -> socket.socket:
    """A connection to the job of this address, or to the only one for "auto".

    Raises:
        ConnectionError: There is none, there are several, or it belongs to somebody else.
        ValueError: Not an address of a job.
    """
    if address == "auto":
        jobs = running_jobs()
        if not jobs:
            raise ConnectionError(
                "no job of yours runs on this host: start one with 'mpirun -n 4 python -m hpcray', or call init() without an "
                "address to start one here"
            )
        if len(jobs) > 1:
            raise ConnectionError(
                f"several jobs of yours run on this host; choose one by its address: {', '.join(jobs)}"
            )
        address = jobs[0]
    elif not address.startswith("hpcray-"):
        raise ValueError(f"address must be None, 'auto', 'local' or the address that a job prints, not {address!r}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(socket_name(address))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] != os.getuid():
            raise ConnectionError(f"the job at {address} belongs to another user")
    except OSError as error:
        sock.close()
        if isinstance(error, ConnectionRefusedError):
            raise ConnectionError(f"no job answers at {address}: it has ended") from None
        raise
    return sock

"""What Linux offers for keeping track of child processes and theirs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int | bytes) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def set_process_name(name: str) -> None:
    """Set what `ps` and `top` show; 15 bytes count."""
    _prctl(_PR_SET_NAME, name.encode())


def adopt_orphans() -> None:
    """Become the parent of all descendants whose parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """In a child: be killed when the parent dies, at once if it has."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def kill(pid: int, signum: int) -> None:
    """Send a signal; that the process is gone or another user's is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signum)


def has_children() -> bool:
    """Whether there is a child, running or not yet waited for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def children() -> list[int]:
    """The children of this single-threaded process; none on a kernel without CONFIG_PROC_CHILDREN."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def descendants(root: int) -> list[int]:
    """All processes below `root`, found by a walk through /proc."""
    below: dict[int, list[int]] = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((directory / "stat").read_bytes().rpartition(b")")[2].split()[1])
                below.setdefault(parent, []).append(int(directory.name))
    found: list[int] = []
    queue = [root]
    while queue:
        next_below = below.get(queue.pop(), [])
        found += next_below
        queue += next_below
    return found


def close_inherited(kept: int) -> None:
    """Close all descriptors but stdin, stdout, stderr and one more."""
    # Not `os.closerange`: without the close_range call it tries every number, and the limit may be a billion.
    for entry in list(Path("/proc/self/fd").iterdir()):
        fd = int(entry.name)
        if fd > 2 and fd != kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(fd)

"""How bytes travel: the event loop, the doorbells of one host, and MPI between ranks."""

from __future__ import annotations

from typing import Protocol


class Transport(Protocol):
    """What the event loop asks of a transport that it cannot wait for with epoll alone."""

    def progress(self) -> bool:
        """Do a bounded amount of work; say whether anything happened. Never blocks."""

    def prepare_sleep(self) -> float | None:
        """Ask the peers to wake us; return the most seconds to sleep: 0 not at all, None without limit."""

    def woke(self) -> None:
        """The loop is awake again: peers need not wake us."""

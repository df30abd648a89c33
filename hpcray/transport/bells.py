"""Waking the ranks of this host that sleep: by their eventfd if their asleep flag is set.

The flag is set before the last test for traffic, and tested by peers after their send: with a full memory barrier on either
side no wake-up is lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hpcray.transport.doorbell import Doorbell


class AsleepFlag(Protocol):
    """The part of an arena that the transport uses: a flag that the ranks of one host share."""

    asleep: bool


class Bells:
    """The bells of the other ranks of this host."""

    def __init__(self, own: Doorbell, same_host: Mapping[int, bytes]) -> None:
        self._own = own
        self._doorbells = dict(same_host)
        self._handed: dict[int, tuple[AsleepFlag, int]] = {}
        self._fence = Lock()

    def add(self, rank: int, arena: AsleepFlag, bell: int) -> None:
        """From now on, wake this rank by its eventfd, and only if it sleeps; until now it was rung at each send."""
        self._handed[rank] = (arena, bell)

    def wake(self, rank: int) -> None:
        """Something was sent to this rank. Does nothing for ranks of other hosts, which poll."""
        doorbell = self._doorbells.get(rank)
        if doorbell is None:
            return
        self.fence()
        handed = self._handed.get(rank)
        if handed is None:
            self._own.ring(doorbell)
            return
        arena, bell = handed
        if arena.asleep:
            arena.asleep = False  # whoever clears it rings, so that a burst rings once
            os.eventfd_write(bell, 1)

    def hand_over(self, rank: int, payload: bytes, fd: int) -> bool:
        """Hand a duplicate of `fd` to a rank of this host; False if that is not possible now."""
        doorbell = self._doorbells.get(rank)
        if doorbell is None:
            return False
        try:
            self._own.send_fd(doorbell, payload, fd)
        except OSError:
            return False
        return True

    def fence(self) -> None:
        """A full memory barrier: the message is visible before the flag is read, the flag set before messages are."""
        fence = self._fence
        fence.acquire()
        fence.release()

"""The tags of bulk transfers: each is in use once at a time between a receiver and a sender."""

from __future__ import annotations

from collections import deque

FIRST_TAG = 16
"""Below are the tags of frames."""
MOST_TAGS = 4096
"""Transfers at once from one peer; MPI promises tags up to 32767 only."""


class Tags:
    """The tags of one receiver, who chooses them."""

    def __init__(self) -> None:
        self._made: dict[int, int] = {}
        self._free: dict[int, deque[int]] = {}

    def new(self, peer: int) -> int:
        """A tag for a transfer from this peer.

        Raises:
            RuntimeError: Thousands of transfers from this peer are under way.
        """
        if free := self._free.get(peer):
            return free.popleft()
        made = self._made.get(peer, 0)
        if made == MOST_TAGS:
            raise RuntimeError(f"{MOST_TAGS} transfers from rank {peer} are under way")
        self._made[peer] = made + 1
        return FIRST_TAG + made

    def free(self, peer: int, tag: int) -> None:
        """The transfer is over: the tag may serve again."""
        self._free.setdefault(peer, deque()).append(tag)

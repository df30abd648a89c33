"""Who has waited for a place for so long that users should be told, once. Pure."""

from __future__ import annotations

from collections.abc import Collection

PATIENCE = 10.0
"""Seconds after which users are told of what finds no place."""
LOOK_SECONDS = 1.0
"""How often is looked, at most: it takes a step for each that waits."""


class Patience:
    """Keeps the time for those who wait."""

    def __init__(self) -> None:
        self._since: dict[bytes, float] = {}
        self._told: set[bytes] = set()
        self._next_look = 0.0
        self.due: float | None = None
        """When somebody will have waited long enough."""

    def is_time(self, now: float) -> bool:
        """Whether to look, since somebody waits; if not, it is to be asked again when `due`."""
        if now >= self._next_look:
            return True
        if self.due is None:
            self.due = self._next_look
        return False

    def overdue(self, now: float, waiting: Collection[bytes]) -> list[bytes]:
        """Those of `waiting`, all that wait now, who have done so for long, and of whom this was not said before."""
        self._next_look = now + LOOK_SECONDS
        self._since = {one: self._since.get(one, now) for one in waiting}
        self._told &= self._since.keys()
        late = [one for one, since in self._since.items() if now - since >= PATIENCE and one not in self._told]
        self._told.update(late)
        first = min((since for one, since in self._since.items() if one not in self._told), default=None)
        self.due = None if first is None else max(first + PATIENCE, self._next_look)
        return late

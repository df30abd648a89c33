"""What a raylet or the GCS says to `hpcray explain`: where something is, and what it waits for."""

from __future__ import annotations

import msgspec


class Finding(msgspec.Struct, frozen=True, array_like=True):
    """One task, actor, object or placement group, as one rank knows it."""

    kind: str
    """"task", "tasks" (all of a function), "actor", "call", "object", "placement group"."""
    id: str
    """In hexadecimal digits; of "tasks", empty."""
    name: str
    rank: int
    story: str
    """What it does or waits for: the end of a sentence that begins with its name."""
    waiting: bytes = b""
    """The class for which a place is sought: the GCS knows why there is none."""
    why: str = ""
    """Lines that say why it waits, where this rank knows."""
    others: list[str] = []
    """Ids of what it waits for."""

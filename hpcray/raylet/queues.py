"""The queue of one scheduling class: first come, first served, but what somebody waits for goes first.

A worker that waits for a task which is queued keeps its process and its memory until that task has run, so to start others
before it only makes more processes that wait. What was asked for last is first among those that are awaited: of nested tasks
the innermost, so that as many processes exist as tasks are nested, and not as many as there are tasks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Queueable(Protocol):
    """What can be in such a queue."""

    is_awaited: bool


Item = TypeVar("Item", bound=Queueable)


class ClassQueue(Generic[Item]):
    """Items by their task's id. Each operation takes the same time, however long the queue is."""

    __slots__ = ("awaited", "others")

    def __init__(self) -> None:
        self.awaited: OrderedDict[bytes, Item] = OrderedDict()
        self.others: OrderedDict[bytes, Item] = OrderedDict()

    def __len__(self) -> int:
        return len(self.awaited) + len(self.others)

    def __iter__(self) -> Iterator[Item]:
        yield from self.awaited.values()
        yield from self.others.values()

    def push(self, task: bytes, item: Item) -> None:
        """Put an item behind all others of its kind."""
        (self.awaited if item.is_awaited else self.others)[task] = item

    def push_first(self, task: bytes, item: Item) -> None:
        """Put an item before all others of its kind."""
        part = self.awaited if item.is_awaited else self.others
        part[task] = item
        part.move_to_end(task, last=False)

    def pop(self) -> Item:
        """Take the first.

        Raises:
            KeyError: There is none.
        """
        return (self.awaited or self.others).popitem(False)[1]

    def hasten(self, task: bytes) -> bool:
        """Somebody waits for an item: it is the first now. False if it is not here."""
        item = self.others.pop(task, None) or self.awaited.pop(task, None)
        if item is None:
            return False
        item.is_awaited = True
        self.push_first(task, item)
        return True

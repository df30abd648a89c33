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
        if (item := self.take(task)) is None:
            return False
        item.is_awaited = True
        self.push_first(task, item)
        return True

    def take(self, task: bytes) -> Item | None:
        """Take an item out, if it is here."""
        return self.others.pop(task, None) or self.awaited.pop(task, None)


class HomeQueue(ClassQueue[Item]):
    """Tasks of a class at their home. Those whose arguments lie on another host wait apart, for places near these."""

    __slots__ = ("away",)

    def __init__(self) -> None:
        super().__init__()
        self.away: dict[int, ClassQueue[Item]] = {}
        """By the rank that has most of their arguments."""

    def __len__(self) -> int:
        return self.count_here + sum(map(len, self.away.values()))

    def __iter__(self) -> Iterator[Item]:
        yield from super().__iter__()
        for queue in self.away.values():
            yield from queue

    @property
    def count_here(self) -> int:
        """How many may as well run here."""
        return super().__len__()

    def near(self) -> dict[int, int]:
        """How many would rather run on which rank."""
        return {rank: len(queue) for rank, queue in self.away.items()}

    def part(self, rank: int | None) -> ClassQueue[Item]:
        """Where those go that would rather run on a rank; None: those that may as well run here."""
        return self if rank is None else self.away.setdefault(rank, ClassQueue())

    def pop_for(self, rank: int) -> Item:
        """Take the first that would rather run on this rank, else the first of all."""
        if rank not in self.away:
            if self.count_here:
                return self.pop()
            rank = next(iter(self.away))
        queue = self.away[rank]
        item = queue.pop()
        if not queue:
            del self.away[rank]
        return item

    def hasten(self, task: bytes) -> bool:
        """Who is waited for does not wait for a place far away, either."""
        for rank, queue in self.away.items():
            if (item := queue.take(task)) is not None:
                item.is_awaited = True
                self.push_first(task, item)
                if not queue:
                    del self.away[rank]
                return True
        return super().hasten(task)

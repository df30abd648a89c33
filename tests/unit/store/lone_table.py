"""One object table by itself: what it says is kept, and the other ranks, the disk and the clock are the test's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcray import ids
from hpcray.store.entry import GET, Extent
from hpcray.store.memory import Block
from hpcray.store.pulls import Done, Transfer
from hpcray.store.table import ObjectTable

ME, NEIGHBOUR, FAR, FARTHER = 0, 1, 2, 3
SIZE = 4096
PATIENCE = 5.0


def name(home: int, number: int) -> bytes:
    return ids.object_id(ids.task_id(ids.client_prefix(home, b"12345678", 1), number), 0)


class Out:
    """Keeps what the table says."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Any]] = []
        self.receiving: dict[int, tuple[int, Block, Callable[[str | None], None]]] = {}
        self.serving: list[tuple[int, int, Block, Callable[[str | None], None]]] = []
        self.writing: list[tuple[list[Block], Callable[[list[Extent], str | None], None]]] = []
        self.reading: list[tuple[Extent, Block, Callable[[str | None], None]]] = []
        self.forgotten: list[Extent] = []

    def send(self, rank: int, message: Any) -> None:
        self.sent.append((rank, message))

    def share_host(self, rank: int, other: int) -> bool:
        return rank == other or {rank, other} == {ME, NEIGHBOUR}

    def new_tag(self, rank: int) -> int:
        return len(self.sent) + 1

    def receive(self, transfer: Transfer, done: Done) -> None:
        self.receiving[transfer.tag] = (transfer.rank, transfer.block, done)

    def end_receive(self, rank: int, tag: int, size: int, why: str) -> None:
        if tag in self.receiving:
            self.receiving.pop(tag)[2](why)

    def serve(self, transfer: Transfer, done: Done) -> None:
        self.serving.append((transfer.rank, transfer.tag, transfer.block, done))

    def hasten(self, rank: int, tag: int, urgency: int) -> None:
        raise AssertionError("nothing here is served while it becomes more urgent")

    def end_serve(self, rank: int, tag: int, why: str) -> int:
        raise AssertionError("nothing here is served and cut short")

    def spill(self, blocks: list[Block], done: Callable[[list[Extent], str | None], None]) -> None:
        self.writing.append((blocks, done))

    def restore(self, extent: Extent, block: Block, done: Callable[[str | None], None]) -> None:
        self.reading.append((extent, block, done))

    def forget(self, extent: Extent) -> None:
        self.forgotten.append(extent)

    def holders(self) -> list[str]:
        return ["somebody looks at some bytes"]

    def take(self) -> list[tuple[int, Any]]:
        sent, self.sent = self.sent, []
        return sent

    def arrive(self, error: str | None = None) -> None:
        """The one transfer that is under way ends."""
        ((tag, (_, _, done)),) = self.receiving.items()
        del self.receiving[tag]
        done(error)


def write(table: ObjectTable, identifier: bytes, size: int = 1024) -> Block:
    blocks: list[Block | None] = []
    table.memory.reserve(identifier, size, blocks.append)
    (block,) = blocks
    assert block is not None
    return block


def need(table: ObjectTable, identifier: bytes, ranks: list[int], size: int = 1024) -> None:
    """A task that came here needs the object; who sent it says where the object is."""
    table.references.add_guest(identifier)
    table.learn_copies(identifier, size, ranks)


def fetch(table: ObjectTable, out: Out, identifier: bytes, size: int = 1024) -> None:
    """A task's argument comes here from afar; when the task is done it stays as a copy that may be evicted."""
    need(table, identifier, [FAR], size)
    assert not table.when_local(identifier, lambda _: None)
    out.arrive()
    table.references.drop_guest(identifier)
    out.take()


def ask(table: ObjectTable, size: int, urgency: int = GET) -> list[Block | None]:
    """What a creator is told, once it is told."""
    told: list[Block | None] = []
    table.memory.reserve(name(ME, 99), size, told.append, urgency=urgency)
    return told


def borrowed(table: ObjectTable, out: Out, identifier: bytes) -> None:
    """Hold a reference that is homed elsewhere, and have the home count it."""
    table.references.hold(identifier)
    table.references.on_borrowed(ids.home_of(identifier))
    out.take()

"""Bringing objects to this node: which are fetched when, from where, and what follows if that fails. A pure core.

Rules:
  1. An object is fetched once, however many want it, as urgently as the most impatient of them: a waiting `get` before the
     arguments of a task that could run now before those of one that waits in a queue.
  2. So many bytes are on their way at a time (`budget`), of `MOST` objects, but one object always may be. The more urgent ones
     do not wait for less urgent ones, and before they have all started, no less urgent one starts. A prefetch takes free
     memory only.
  3. A copy on this host is mapped, never moved. Else a rank that has it is asked for the bytes; it may name another rank, that
     is receiving them from it (`on_redirected`). A source that fails is passed over; without any left, the home is asked; but if
     one of them has it on disk and no room for it, that is what those who wait are told.
  4. What has arrived of an object is sent on while the rest arrives (`Filling`), also when it goes on from another source.
     A receiver is fed only by who has the object or by who is fed itself by the rank that said so: never in a circle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

from hpcray.exceptions import InternalError
from hpcray.ids import home_of
from hpcray.protocol import messages as m
from hpcray.store.entry import AWAY, GET, HERE, MAPPED, PREFETCH, Entry
from hpcray.store.memory import Block, Memory

BUDGET_SHARE = 0.4
"""Part of the arena that objects on their way may take, and that the arguments of tasks which have not begun may hold."""
MOST = 256
"""Objects on their way at a time: a rank's transfers from one peer have 4,096 tags, and each of the three urgencies may have as
many under way."""
NOBODY = -1


class Filling:
    """How many bytes of a block are there, counted from its start."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0


class Transfer(NamedTuple):
    """Bytes that go from one rank to another."""

    rank: int
    """The other one."""
    tag: int
    block: Block
    start: int
    """Bytes of the object that the receiver has already."""
    filling: Filling | None
    """How much of the block is there: raised by a receiver, and minded by a sender who receives it itself."""
    urgency: int


Done = Callable[[str | None], None]


class PullsOut(Protocol):
    """The only way out of the raylet."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...
    def share_host(self, rank: int, other: int) -> bool: ...
    def new_tag(self, rank: int) -> int: ...
    def receive(self, transfer: Transfer, done: Done) -> None: ...
    def end_receive(self, rank: int, tag: int, size: int, why: str) -> None:
        """No more than `size` bytes will come; `done(why)` follows when these are here."""


class Receiver(Protocol):
    """Who waits for what is fetched."""

    def on_arrived(self, entry: Entry) -> None:
        """The object can be read on this node."""

    def on_no_room(self, entry: Entry, error: bytes = b"") -> None:
        """No room came for it, here or (`error`) where it would have to be restored from disk."""

    def on_stranded(self, entry: Entry) -> None:
        """No rank that is known to have a copy has it any more."""


class Server(Protocol):
    """Who serves others with what comes here."""

    def on_map(self, identifier: bytes, mapper: int, urgency: int) -> None:
        """The object that this rank of the host waits to map is here."""

    def on_given_up(self, block: Block) -> None:
        """This block will not be filled any more: whoever is sent what has arrived of it gets no more."""


class Pull:
    """One object on its way here."""

    __slots__ = (
        "block", "counted", "entry", "filling", "is_mapping", "mappers", "no_room", "redirect", "source", "tag", "tried",
        "urgency", "via",
    )  # fmt: skip

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.urgency = entry.urgency
        self.source = NOBODY
        self.via = NOBODY
        """Who named the source."""
        self.redirect = NOBODY
        """Whom the source named in its place."""
        self.tag = 0
        """Of the transfer, while bytes are to come."""
        self.is_mapping = False
        self.block: Block | None = None
        self.filling = Filling()
        self.counted = 0
        """Bytes for which it counts while it is under way."""
        self.tried: set[int] = set()
        self.no_room = b""
        """What one of these said that has the object on disk, and no room to read it back."""
        self.mappers: list[int] = []
        """Ranks of this host that map it once it is here."""


class Pulls:
    """All objects on their way to one raylet: a pure core, see the module's rules."""

    def __init__(
        self, rank: int, entries: dict[bytes, Entry], memory: Memory, out: PullsOut, receiver: Receiver, server: Server
    ) -> None:
        self._rank = rank
        self._entries = entries
        self._memory = memory
        self._out = out
        self._receiver = receiver
        self._server = server
        self._is_pumping = False
        self.budget = int(memory.size * BUDGET_SHARE)
        self.received_bytes = 0
        self._pulls: dict[bytes, Pull] = {}
        self._queues: list[dict[bytes, Pull]] = [{} for _ in range(PREFETCH + 1)]
        """Those that wait for their turn, by urgency, in order."""
        self._under_way = [0] * (PREFETCH + 1)
        """Bytes by urgency."""
        self._number_under_way = [0] * (PREFETCH + 1)
        """Objects by urgency."""

    def fetch(self, entry: Entry) -> None:
        """Bring an object that is AWAY to this node, as urgently as the entry says; or hasten it."""
        pull = self._pulls.get(entry.id)
        if pull is None:
            pull = self._pulls[entry.id] = Pull(entry)
            self._seek(pull)
            return
        pull.entry = entry
        if entry.urgency < pull.urgency:
            self._hasten(pull, entry.urgency)

    def _hasten(self, pull: Pull, urgency: int) -> None:
        identifier = pull.entry.id
        is_queued = self._queues[pull.urgency].pop(identifier, None) is not None
        counted = pull.counted
        self._count(pull, 0)
        pull.urgency = urgency
        self._count(pull, counted)
        if is_queued:
            self._queues[urgency][identifier] = pull
            self.pump()
        elif pull.tag or pull.is_mapping:
            self._out.send(pull.source, m.HastenPull(identifier, pull.tag, urgency))
        else:
            self._memory.hasten(identifier, urgency)

    # ------------------------------------------------------------------------------------------------------ where from
    def is_mappable(self, entry: Entry) -> bool:
        """Whether the object takes no room here: it lies in the arena of another rank of this host."""
        return entry.state == MAPPED or (entry.state == AWAY and bool(self._neighbours(entry.copies or ())))

    def _neighbours(self, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if rank != self._rank and self._out.share_host(rank, self._rank)]

    def _is_wanted(self, pull: Pull) -> bool:
        entry = pull.entry
        return entry.state == AWAY and self._entries.get(entry.id) is entry

    def _seek(self, pull: Pull) -> None:
        """Choose a source that was not tried yet."""
        if not self._is_wanted(pull):
            self._end(pull)
            return
        untried = sorted((pull.entry.copies or set()) - pull.tried - {self._rank})
        neighbours = self._neighbours(untried)
        if neighbours:
            self._map(pull, neighbours[0])
        elif not untried:
            self._end(pull)
            if pull.no_room:
                self._receiver.on_no_room(pull.entry, pull.no_room)
            else:
                self._receiver.on_stranded(pull.entry)
        elif pull.block is not None:
            # Not all at one source; ranks of one host at the same, which then has one of them map the other's copy.
            host = next(rank for rank in range(self._rank + 1) if self._out.share_host(rank, self._rank))
            self._start(pull, untried[host % len(untried)])
        else:
            self._queues[pull.urgency][pull.entry.id] = pull
            self.pump()

    def _map(self, pull: Pull, neighbour: int) -> None:
        self._give_up_block(pull)
        pull.source = neighbour
        pull.via = NOBODY
        pull.is_mapping = True
        self._out.send(neighbour, m.MapObject(pull.entry.id, pull.urgency))

    # ------------------------------------------------------------------------------------------------------------ queue
    def pump(self) -> None:
        """Start what may start. Also called at the end of turns, since memory may have come free."""
        if self._is_pumping:
            return  # the loop below goes on
        self._is_pumping = True
        try:
            self._pump()
        finally:
            self._is_pumping = False

    def _pump(self) -> None:
        for queue in self._queues:
            while queue:
                pull = next(iter(queue.values()))
                is_wanted = self._is_wanted(pull)
                if is_wanted and not self._may_start(pull):
                    return
                del queue[pull.entry.id]
                if is_wanted:
                    self._reserve(pull)
                else:
                    self._end(pull)

    def _may_start(self, pull: Pull) -> bool:
        size, urgency = pull.entry.size, pull.urgency
        if urgency == PREFETCH and not self._memory.is_free(size):
            return False
        before, number = sum(self._under_way[: urgency + 1]), sum(self._number_under_way[: urgency + 1])
        if number and self._memory.stands_still:
            # Those that only wait for room keep no other waiting, which may fit and be what they wait for.
            receiving = [p.counted for p in self._pulls.values() if p.block is not None and p.urgency <= urgency]
            before, number = sum(receiving), len(receiving)
        return not number or (before + size <= self.budget and number < MOST)

    def _reserve(self, pull: Pull) -> None:
        size = pull.entry.size
        self._count(pull, size)
        self._memory.reserve(
            pull.entry.id,
            size,
            partial(self._reserved, pull),
            partial(self._is_wanted, pull),
            urgency=pull.urgency,
        )

    def _count(self, pull: Pull, size: int) -> None:
        """From now on it counts for so many bytes: 0 if it is not under way."""
        self._under_way[pull.urgency] += size - pull.counted
        self._number_under_way[pull.urgency] += bool(size) - bool(pull.counted)
        pull.counted = size

    @property
    def is_waiting(self) -> bool:
        """Whether `pump` may have something to do."""
        return any(self._queues)

    def _reserved(self, pull: Pull, block: Block | None) -> None:
        pull.block = block
        if block is not None:
            self._seek(pull)  # since it waited for room, copies may have come and gone
            return
        is_wanted = self._is_wanted(pull)
        self._end(pull)
        if is_wanted:
            self._receiver.on_no_room(pull.entry)

    # --------------------------------------------------------------------------------------------------------- transfers
    def _start(self, pull: Pull, source: int, via: int = NOBODY) -> None:
        assert pull.block is not None
        pull.source = source
        pull.via = via
        tag = pull.tag = self._out.new_tag(source)
        start = pull.filling.size
        transfer = Transfer(source, tag, pull.block, start, pull.filling, pull.urgency)
        self._out.receive(transfer, lambda error: self._done(pull, error))
        self._out.send(source, m.Pull(pull.entry.id, tag, pull.urgency, via, start))

    def _done(self, pull: Pull, error: str | None) -> None:
        pull.tag = 0
        redirect, pull.redirect = pull.redirect, NOBODY
        if error is None:
            self._arrived(pull)
        elif redirect == NOBODY or not self._is_wanted(pull):
            self._pass_over(pull)
        elif self._out.share_host(redirect, self._rank):
            self._map(pull, redirect)
        else:
            self._start(pull, redirect, via=pull.source)

    def _pass_over(self, pull: Pull) -> None:
        self._refuse_mappers(pull)
        if pull.via == NOBODY:  # one that was named by another is no known copy: who named it may be asked again
            pull.tried.add(pull.source)
        self._seek(pull)

    def _arrived(self, pull: Pull) -> None:
        block, entry = pull.block, pull.entry
        assert block is not None
        pull.block = None
        self.received_bytes += block.size
        if not self._is_wanted(pull):
            self._end(pull)
            self._memory.abandon(block)
            return
        mappers, pull.mappers = pull.mappers, []
        # First this, as the next pulls start when this one ends, and who is told of them may let go of this object.
        entry.state = HERE
        entry.block = block
        self._add_copy(entry, mapped=False)
        self._end(pull)
        self._receiver.on_arrived(entry)
        for mapper in mappers:
            self._server.on_map(entry.id, mapper, pull.urgency)

    def _end(self, pull: Pull) -> None:
        """It is under way no more, whatever came of it."""
        if self._pulls.get(pull.entry.id) is pull:
            del self._pulls[pull.entry.id]
        self._queues[pull.urgency].pop(pull.entry.id, None)
        self._give_up_block(pull)
        self._refuse_mappers(pull)
        self.pump()

    def _give_up_block(self, pull: Pull) -> None:
        self._count(pull, 0)
        block, pull.block = pull.block, None
        if block is not None:
            pull.filling = Filling()
            self._server.on_given_up(block)
            self._memory.abandon(block)

    # ------------------------------------------------------------------------------------------------ what sources say
    def on_redirected(self, message: m.PullFrom, source: int) -> None:
        """The source serves as many as it does at a time: have the bytes from this one of them."""
        pull = self._pulls.get(message.id)
        if pull is not None and pull.source == source and pull.tag == message.tag:
            pull.redirect = message.rank
        self._out.end_receive(source, message.tag, 0, "the source named another one")

    def on_pull_failed(self, message: m.PullFailed, source: int) -> None:
        """The source has no such object, or no room for it, or (`sent`) has lost it on the way."""
        pull = self._pulls.get(message.id)
        if pull is not None and (pull.source != source or pull.tag != message.tag):
            pull = None  # it was given up meanwhile
        if pull is not None and message.error:
            pull.no_room = message.error
        if message.tag:
            self._out.end_receive(source, message.tag, message.sent, "the source has no such object any more")
        elif pull is not None and pull.is_mapping:
            pull.is_mapping = False
            self._pass_over(pull)

    def on_mapped(self, message: m.ObjectMapped, source: int) -> None:
        """Another rank of this host keeps the object in place for us."""
        entry = self._entries.get(message.id)
        if entry is not None and entry.block is not None and entry.block.rank == source:
            return
        pull = self._pulls.get(message.id)
        if entry is None or entry.state != AWAY:
            self._out.send(source, m.UnmapObject(message.id))
            if pull is not None and pull.is_mapping:
                self._end(pull)
            return
        entry.state = MAPPED
        entry.block = Block(message.id, source, message.offset, message.size)
        entry.size = message.size
        self._add_copy(entry, mapped=True)
        if pull is not None and pull.is_mapping:
            self._end(pull)
        self._receiver.on_arrived(entry)

    def _add_copy(self, entry: Entry, *, mapped: bool) -> None:
        home = home_of(entry.id)
        if home != self._rank:
            self._out.send(home, m.CopyAdded(entry.id, mapped))

    # ------------------------------------------------------------------------------------- those who want it from here
    def receiving(self, identifier: bytes, source: int = NOBODY) -> Pull | None:
        """The pull of this object, if its bytes are coming, and from that source."""
        pull = self._pulls.get(identifier)
        return pull if pull is not None and pull.tag and source in (NOBODY, pull.source) else None

    def _refuse_mappers(self, pull: Pull) -> None:
        mappers, pull.mappers = pull.mappers, []
        for mapper in mappers:
            self._out.send(mapper, m.PullFailed(pull.entry.id, 0, 0))

    # ------------------------------------------------------------------------------------------------------------- loss
    def on_rank_lost(self, rank: int) -> None:
        """A rank has died: what it was sending comes from elsewhere."""
        for pull in list(self._pulls.values()):
            if rank in pull.mappers:
                pull.mappers.remove(rank)
            if pull.source != rank:
                continue
            if pull.tag:
                self._out.end_receive(rank, pull.tag, 0, f"rank {rank} died")
            elif pull.is_mapping:
                pull.is_mapping = False
                self._pass_over(pull)

    def check(self) -> None:
        """Raise InternalError if the books disagree. Slow: tests and HPCRAY_CHECK=1."""
        for urgency, size in enumerate(self._under_way):
            counted = [pull.counted for pull in self._pulls.values() if pull.urgency == urgency and pull.counted]
            if (size, self._number_under_way[urgency]) != (sum(counted), len(counted)):
                raise InternalError(f"rank {self._rank}: {size} bytes of urgency {urgency} are not under way")
        for urgency, queue in enumerate(self._queues):
            for identifier, pull in queue.items():
                if pull.urgency != urgency or self._pulls.get(identifier) is not pull or pull.counted:
                    raise InternalError(f"rank {self._rank}: {identifier.hex()} waits in the wrong queue")
        for identifier, pull in self._pulls.items():
            if self._is_wanted(pull) and not (
                pull.counted or pull.is_mapping or identifier in self._queues[pull.urgency]
            ):
                raise InternalError(f"rank {self._rank}: {identifier.hex()} is fetched, and nothing happens")
        if self._queues[GET] and not any(self._under_way[: GET + 1]):
            raise InternalError(f"rank {self._rank}: a get waits for its turn, and nothing is under way")

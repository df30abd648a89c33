"""Questions of clients that every raylet answers for itself: the store's figures, and who holds which object.

Rules:
  1. The raylet of the client that asks sends `Survey` to all, itself included, and answers when all have `Surveyed`.
  2. Answers are made at the end of a turn, when the time is known. They change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nlargest
from typing import TYPE_CHECKING, Protocol

import msgspec

from hpcray import payload
from hpcray.exceptions import InternalError
from hpcray.ids import client_of, home_of, index_of
from hpcray.observe.findings import Finding
from hpcray.observe.statistics import Amount, ObjectReport, ObjectsWanted, StoreStatistics, Traffic
from hpcray.protocol import messages as m
from hpcray.raylet.clients import Client
from hpcray.store.allocator import Allocator
from hpcray.store.entry import AWAY, HERE, INLINE, MAPPED, PENDING, SPILLED, Entry
from hpcray.store.table import ObjectTable

if TYPE_CHECKING:
    from hpcray.raylet.core import NodeInfo
    from hpcray.raylet.states import Report

_STATES = {PENDING: "pending", INLINE: "inline", MAPPED: "mapped", AWAY: "elsewhere", SPILLED: "spilled"}

STATISTICS, OBJECTS, EXPLAIN, STATES = "store_statistics", "objects", "explain", "states"
TOPICS = (STATISTICS, OBJECTS, EXPLAIN, STATES)
"""Topics of `Query` that are surveys."""


class SurveysOut(Protocol):
    """The only way out of the surveys."""

    def send(self, rank: int, message: m.PeerMessage) -> None: ...
    def answer(self, client: int, answer: m.Answer) -> None: ...
    def client_name(self, client: Client) -> str: ...
    def template(self, identifier: bytes) -> m.Template: ...
    def explain(self, asked: str) -> list[Finding]: ...
    def states(self, kind: str) -> list[Report]: ...


class Surveys:
    """What is asked of all raylets, and this raylet's part of the answers."""

    def __init__(
        self, rank: int, nodes: list[NodeInfo], clients: dict[int, Client], table: ObjectTable, allocator: Allocator,
        out: SurveysOut,
    ) -> None:  # fmt: skip
        self._rank = rank
        self._nodes = nodes
        self._clients = clients
        self._table = table
        self._allocator = allocator
        self._out = out
        self._open: dict[tuple[int, int], dict[int, bytes]] = {}
        """Answers that have come so far, by client and number."""
        self.asked: list[tuple[int, m.Survey]] = []
        """What `answer` has to do at the end of the turn."""
        self.hits = self.misses = 0
        self.received = Traffic()
        self.sent = Traffic()

    # ---------------------------------------------------------------------------------------------------------- asking
    def ask(self, client: Client, query: m.Query) -> None:
        """A client's question; it is answered when all raylets have answered."""
        if query.topic == OBJECTS:
            try:
                msgspec.msgpack.decode(query.arguments, type=ObjectsWanted)
            except msgspec.MsgspecError as error:
                refusal = payload.system_error("ValueError", f"not a choice of objects: {error}")
                self._out.answer(client.number, m.Answer(query.number, ok=False, payload=refusal))
                return
        self._open[client.number, query.number] = {}
        for node in self._nodes:
            self._out.send(node.rank, m.Survey(client.number, query.number, query.topic, query.arguments))

    def on_survey(self, rank: int, message: m.Survey) -> None:
        """Another raylet, or this one, asks for our part."""
        self.asked.append((rank, message))

    def on_surveyed(self, rank: int, message: m.Surveyed) -> None:
        """A raylet's part of an answer."""
        key = message.client, message.number
        parts = self._open[key]
        parts[rank] = message.payload
        if len(parts) == len(self._nodes):
            del self._open[key]
            together = msgspec.msgpack.encode([msgspec.Raw(parts[rank]) for rank in sorted(parts)])
            self._out.answer(message.client, m.Answer(message.number, ok=True, payload=together))

    def answer(self, now: float) -> None:
        """Send what this raylet has to say."""
        asked, self.asked = self.asked, []
        for rank, survey in asked:
            answer: StoreStatistics | list[ObjectReport] | list[Finding] | list[Report]
            if survey.topic == STATISTICS:
                answer = self.statistics(now)
            elif survey.topic == EXPLAIN:
                answer = self._out.explain(msgspec.msgpack.decode(survey.arguments, type=str))
            elif survey.topic == STATES:
                answer = self._out.states(msgspec.msgpack.decode(survey.arguments, type=str))
            else:
                answer = self.report(msgspec.msgpack.decode(survey.arguments, type=ObjectsWanted))
            self._out.send(rank, m.Surveyed(survey.client, survey.number, msgspec.msgpack.encode(answer)))

    # ------------------------------------------------------------------------------------------------------- statistics
    def statistics(self, now: float) -> StoreStatistics:
        """This raylet's store. Takes some 0.2 s per million objects."""
        amounts: dict[str, list[int]] = {}
        pinned: dict[int, int] = {}

        def count(state: str, size: int) -> None:
            amount = amounts.setdefault(state, [0, 0])
            amount[0] += 1
            amount[1] += size

        for entry in self._table.entries.values():
            block = entry.block
            size = entry.size
            if entry.state == HERE and block is not None:
                size = self._allocator.size_of(block.offset)
                if block.pins:
                    pinned[block.offset] = size
            count(self._state(entry), size)
        freed = [self._allocator.size_of(offset) for offset in self._table.memory.freed]
        spiller = self._table.pressure.spiller
        states = {state: Amount(*amount) for state, amount in amounts.items()}
        primary, secondary, unused = (states.get(state, Amount()) for state in ("primary", "copy", "unused"))
        freed_bytes = sum(freed)
        return StoreStatistics(
            rank=self._rank,
            host=self._nodes[self._rank].host,
            size=self._allocator.size,
            free=self._allocator.available,
            largest_free=self._allocator.largest_free,
            writing=self._allocator.used - primary.bytes - secondary.bytes - unused.bytes - freed_bytes,
            primary=primary,
            secondary=secondary,
            unused=unused,
            freed=Amount(len(freed), freed_bytes),
            pinned=Amount(len(pinned) + len(freed), sum(pinned.values()) + freed_bytes),
            spilled=states.get("spilled", Amount()),
            mapped=states.get("mapped", Amount()),
            inline=states.get("inline", Amount()),
            hits=self.hits,
            misses=self.misses,
            spills=Amount(spiller.spilled_objects, spiller.spilled_bytes),
            restores=Amount(spiller.restored_objects, spiller.restored_bytes),
            received=self.received.total,
            sent=self.sent.total,
            received_per_second=self.received.rate(now),
            sent_per_second=self.sent.rate(now),
        )

    def check(self) -> None:
        """Raise InternalError if objects have more memory than there is in blocks. Slow: tests and HPCRAY_CHECK=1."""
        if (writing := self.statistics(0.0).writing) < 0:
            raise InternalError(f"rank {self._rank}: objects have {-writing} bytes more than the blocks of the arena")

    def _state(self, entry: Entry) -> str:
        if entry.state != HERE:
            return _STATES[entry.state]
        if entry.is_primary:
            return "primary"
        return "copy" if entry.holds or entry.guests else "unused"

    # ---------------------------------------------------------------------------------------------------------- objects
    def report(self, wanted: ObjectsWanted) -> list[ObjectReport]:
        """What this raylet knows of the wanted objects."""
        table = self._table.entries
        entries: Iterable[Entry]
        if wanted.ids:
            entries = [table[identifier] for identifier in wanted.ids if identifier in table]
        elif wanted.limit >= 0:
            entries = nlargest(wanted.limit, table.values(), key=lambda entry: entry.size)
        else:
            entries = table.values()
        names = {number: self._out.client_name(client) for number, client in self._clients.items()}
        mappers: dict[bytes, list[str]] = {}
        for rank, block in self._table.transfers.mapped_out():
            mappers.setdefault(block.id, []).append(f"rank {rank}")
        return [self._report(entry, names, mappers) for entry in entries]

    def _report(self, entry: Entry, names: dict[int, str], mappers: dict[bytes, list[str]]) -> ObjectReport:
        identifier = entry.id
        clients = [names[number] for number, client in self._clients.items() if identifier in client.held]
        pinned_by = [names[number] for number, client in self._clients.items() if identifier in client.pins]
        return ObjectReport(
            id=identifier,
            rank=self._rank,
            size=entry.size,
            state=self._state(entry),
            made_by=self._made_by(entry, names) if home_of(identifier) == self._rank else "",
            clients=clients,
            holds=entry.holds - len(clients),
            guests=entry.guests,
            borrowers=dict(entry.borrowers or {}),
            pinned_by=pinned_by + mappers.get(identifier, []),
        )

    def _made_by(self, entry: Entry, names: dict[int, str]) -> str:
        number = client_of(entry.id)
        client = names.get(number, "a worker that has ended")
        if isinstance(entry.maker, bytes):
            return f"{self._out.template(entry.maker).name}() for {client}"
        if isinstance(entry.maker, tuple):
            return f"put by {client} at {':'.join(map(str, entry.maker))}"
        if entry.maker is not None:
            return f"actor method {entry.maker}() for {client}"
        return f"{'put' if index_of(entry.id) == 0 else 'call'} by {client}"

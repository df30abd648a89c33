"""A fake cluster: real raylet and GCS cores, an in-memory network, fake processes.

Everything that is said travels through the codec on a *link*: rank to rank, process to raylet, raylet to process, or the
bytes of one transfer. A link keeps its order; which link delivers next is the test's choice, so that each order that a
real network could bring about can be brought about here, and brought about again. Nothing happens by itself: no thread,
no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Any
from zlib import crc32

import msgspec

from hpcray.gcs.core import GcsCore
from hpcray.protocol import messages as m
from hpcray.protocol.codec import decode_from_client, decode_from_peer, decode_from_raylet, encode
from hpcray.raylet.clients import Client
from hpcray.raylet.core import LOAD_DELAY, NodeInfo, RayletCore
from hpcray.raylet.lanes import Key
from hpcray.resources import UNIT, Shape
from hpcray.store.entry import Extent
from hpcray.store.memory import Block
from hpcray.store.pulls import Done, Transfer
from hpcray.testing.bulk import FakeBulk
from hpcray.testing.process import Process

NONCE = b"a nonce!"
ARENA_START = 4096
TURN_SECONDS = 0.0001

Link = tuple[str, int, int]
"""("rank", source, destination), ("up" or "down", rank, process), ("bulk", receiver, number of the transfer), or ("disk", rank,
number of the file or read)."""


class Node:
    """One rank: its cores, its memory, and what a real rank's shell would do for them."""

    def __init__(self, cluster: Cluster, rank: int, store_timeout: float, inline_limit: int) -> None:
        self.rank = rank
        self.memory = bytearray(cluster.nodes[rank].arena_size + ARENA_START)
        self.processes: dict[int, Process] = {}
        self.outboxes: dict[Link, list[Any]] = {}
        self.tokens: dict[int, int] = {}
        """Per worker that was sent tasks behind others, how many it has not started."""
        self.disk: dict[Extent, bytearray] = {}
        self.disk_is_full = False
        self.disk_jobs: dict[int, Callable[[], None]] = {}
        """Writes and reads that are under way."""
        self._files = 0
        self._cluster = cluster
        self.core = RayletCore(
            rank,
            cluster.nodes,
            NONCE,
            arena_start=ARENA_START,
            inline_limit=inline_limit,
            store_timeout=store_timeout,
            out=self,
        )
        self.gcs: GcsCore | None = None
        if rank == 0:
            self.gcs = self.core.gcs = GcsCore(cluster.nodes, NONCE, self.core.template, _GcsOut(self))

    @property
    def would_retry(self) -> bool:
        """Whether time alone brings it on: a write that failed would be tried again, and succeed."""
        table = self.core.table
        return table.memory.is_waited_for and table.pressure.spiller.retry_at is not None and not self.disk_is_full

    def end_turn(self) -> None:
        """What a turn of the event loop ends with: the cores act, then each peer gets one frame."""
        self._cluster.now += TURN_SECONDS
        self.core.end_turn(self._cluster.now)
        for link, messages in self.outboxes.items():
            self._cluster.push(link, encode(messages))
        self.outboxes.clear()

    # --------------------------------------------------------------------------------------------------------- RayletOut
    def send(self, rank: int, message: m.PeerMessage) -> None:
        assert rank != self.rank
        self.outboxes.setdefault(("rank", self.rank, rank), []).append(message)

    def to_client(self, client: Client, message: m.RayletToClient) -> None:
        if client.number in self.processes:
            self.outboxes.setdefault(("down", self.rank, client.number), []).append(message)

    def send_arena(self, client: Client, rank: int) -> None:
        self.to_client(client, m.MapArena(rank, self._cluster.nodes[rank].arena_size))

    def start_worker(self, client: Client) -> None:
        self.processes[client.number] = Process(client, self.rank, self)

    def kill_client(self, client: Client) -> None:
        if client.number in self.processes:
            self.kill(client.number)

    def close_client(self, client: Client) -> None:
        self.kill_client(client)

    def add_tokens(self, worker: Client, count: int) -> None:
        self.tokens[worker.number] = self.tokens.get(worker.number, 0) + count

    def take_tokens(self, worker: Client) -> int:
        return self.tokens.pop(worker.number, 0)

    def take_token(self, number: int) -> bool:
        left = self.tokens.get(number, 0)
        self.tokens[number] = max(0, left - 1)
        return left > 0

    def new_tag(self, rank: int) -> int:
        return self._cluster.bulk.new_tag(self.rank, rank)

    def receive(self, transfer: Transfer, done: Done) -> None:
        self._cluster.bulk.receive(self.rank, transfer, done)

    def end_receive(self, rank: int, tag: int, size: int, why: str) -> None:
        self._cluster.bulk.end_receive(self.rank, rank, tag, size, why)

    def serve(self, transfer: Transfer, done: Done) -> None:
        self._cluster.bulk.serve(self.rank, transfer, done)

    def hasten(self, rank: int, tag: int, urgency: int) -> None:
        """Which transfer goes on next is the test's choice."""

    def end_serve(self, rank: int, tag: int, why: str) -> int:
        return self._cluster.bulk.end_serve(rank, self.rank, tag, why)

    def spill(self, blocks: list[Block], done: Callable[[list[Extent], str | None], None]) -> None:
        self._files += 1
        file = self._files

        def write() -> None:
            # Of a disk that fills up, the first half of a file may still have found room.
            extents: list[Extent] = []
            for block in blocks[: len(blocks) // 2] if self.disk_is_full else blocks:
                data = self.memory[block.offset : block.offset + block.size]
                extents.append(Extent(file, len(extents), block.size, crc32(data)))
                self.disk[extents[-1]] = data
            done(extents, "No space left on device" if self.disk_is_full else None)

        self.disk_jobs[file] = write

    def restore(self, extent: Extent, block: Block, done: Done) -> None:
        data = self.disk[extent]
        self._files += 1

        def read() -> None:
            self.memory[block.offset : block.offset + block.size] = data
            done(None if crc32(data) == extent.checksum else "the checksum does not match")

        self.disk_jobs[self._files] = read

    def forget(self, extent: Extent) -> None:
        del self.disk[extent]

    def join(self, worker: Client, key: Key, *, is_leased: bool) -> bool:
        return False  # no fake process asks for a lane

    def show(self, lines: m.LogLines) -> None:
        self._cluster.shown.extend(lines.lines)

    # -------------------------------------------------------------------------------------------------------- ProcessOut
    def read(self, rank: int, offset: int, size: int) -> bytes:
        return bytes(self._cluster.ranks[rank].memory[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.memory[offset : offset + len(data)] = data

    def send_up(self, number: int, message: m.ClientMessage) -> None:
        process = self.processes.get(number)
        if process is not None and not process.is_gone:
            self._cluster.push(("up", self.rank, number), encode([message]))

    def end(self, number: int) -> None:
        self.kill(number)

    # ------------------------------------------------------------------------------------------------------------ events
    def kill(self, number: int) -> None:
        """The process ends; its raylet notices after it has read what the process had sent."""
        process = self.processes[number]
        if not process.is_gone:
            process.is_gone = True
            self._cluster.links.pop(("down", self.rank, number), None)
            self._cluster.push(("up", self.rank, number), None)

    def on_frame(self, link: Link, frame: bytes | None) -> None:
        """Deliver what came first on a link."""
        kind, _, other = link
        if kind == "down":
            process = self.processes.get(other)
            for down in decode_from_raylet(frame or b""):
                if process is not None and not process.is_gone:
                    process.on_message(down)
            return
        if kind == "up":
            process = self.processes[other]
            if frame is None:
                del self.processes[other]
                self.core.on_client_gone(process.client, "it was killed by the test")
            else:
                for up in decode_from_client(frame):
                    self.core.on_client_message(process.client, up)
        else:
            for message in decode_from_peer(frame or b""):
                self._on_peer_message(link[1], message)
        self.end_turn()

    def _on_peer_message(self, source: int, message: m.PeerMessage) -> None:
        if not self.core.on_peer_message(source, message):
            assert self.gcs is not None, f"rank {source} sent {message} to rank {self.rank}"
            self.gcs.on_message(source, message)


class _GcsOut:
    def __init__(self, node: Node) -> None:
        self._node = node

    def send(self, rank: int, message: m.PeerMessage) -> None:
        if rank == self._node.rank:
            self._node.core.deliver_here(message)
        else:
            self._node.send(rank, message)


class Cluster:
    """A job of several ranks in this process.

    Args:
        cpus: Per rank, how many CPUs it offers.
        machines: Per rank, where it runs; ranks of one machine map each other's memory. Default: all apart.
        arena_size: Bytes of each rank's arena, or of each one's by rank; multiples of 64.
        store_timeout: Seconds that the creator of an object waits for room.
        extra: Resources that each rank offers besides CPUs.
    """

    def __init__(
        self,
        cpus: Sequence[int],
        *,
        machines: Sequence[str] = (),
        arena_size: int | Sequence[int] = 1 << 16,
        store_timeout: float = 1e9,
        inline_limit: int = 1000,
        extra: Shape | None = None,
    ) -> None:
        self.now = 0.0
        self.nodes = [
            NodeInfo(
                rank,
                f"host{rank}",
                machines[rank] if machines else f"machine{rank}",
                1000 + rank,
                {**({"CPU": count * UNIT} if count else {}), **(extra or {})},
                arena_size if isinstance(arena_size, int) else arena_size[rank],
            )
            for rank, count in enumerate(cpus)
        ]
        self.links: dict[Link, deque[bytes | None]] = {}
        self.bulk = FakeBulk(self._copy)
        self.shown: list[str] = []
        self.ranks = [Node(self, rank, store_timeout, inline_limit) for rank in range(len(cpus))]
        self._drivers = 0

    def add_driver(self) -> Process:
        """A driver of a new job connects to rank 0."""
        node = self.ranks[0]
        client = node.core.add_client(is_driver=True)
        process = node.processes[client.number] = Process(client, 0, node)
        self._drivers += 1
        client.job = b"job %d" % self._drivers
        config = m.JobConfig(self._drivers.to_bytes(4, "little").hex(), "", "/", [], False)
        node.core.define(m.Define(client.job, msgspec.json.encode(config)))
        node.core.welcome(client, client.job)
        node.end_turn()
        self.deliver(("down", 0, client.number))
        return process

    def template(self, process: Process, name: str, **fields: Any) -> bytes:
        """Define a function (or, with `actor=ActorOptions(…)`, a class) in a process; the template's id."""
        values: dict[str, Any] = {"num_returns": 1, "resources": {"CPU": UNIT}, "max_retries": 0, **fields}
        template = m.Template(job=process.job, function=b"function " + name.encode(), name=name, **values)
        return process.define(encode(template), template)

    # ----------------------------------------------------------------------------------------------------------- network
    def push(self, link: Link, frame: bytes | None) -> None:
        """Put a frame on a link; None: its process has ended."""
        self.links.setdefault(link, deque()).append(frame)

    def choices(self) -> list[Link]:
        """All links that can deliver something now."""
        served = (("bulk", *key) for key in self.bulk.choices())
        disks = (("disk", node.rank, number) for node in self.ranks for number in node.disk_jobs)
        return sorted([*self.links, *served, *disks])

    def deliver(self, link: Link) -> None:
        """Let the first frame of a link, or the bytes of a transfer, arrive."""
        kind, first, second = link
        if kind == "bulk":
            self.ranks[self.bulk.proceed(second)].end_turn()
            return
        if kind == "disk":
            self.ranks[first].disk_jobs.pop(second)()
            self.ranks[first].end_turn()
            return
        queue = self.links[link]
        frame = queue.popleft()
        if not queue:
            del self.links[link]
        self.ranks[second if kind == "rank" else first].on_frame(link, frame)

    def _copy(self, source: Transfer, target: Transfer, start: int, end: int) -> None:
        of, to = source.block, target.block
        into = self.ranks[to.rank].memory
        into[to.offset + start : to.offset + end] = self.ranks[of.rank].memory[of.offset + start : of.offset + end]

    def run(
        self,
        choose: Callable[[list[Link]], Link] = lambda links: links[0],
        *,
        hold: Container[Link] = (),
        check: bool = True,
    ) -> None:
        """Deliver until nothing is under way, in the order that `choose` says; what is on links of `hold` stays there."""
        while True:
            while links := [link for link in self.choices() if link not in hold]:
                self.deliver(choose(links))
                if check:
                    self.check()
            if any(node.core.report_due is not None for node in self.ranks):
                self.advance(LOAD_DELAY)
            elif any(node.would_retry for node in self.ranks):
                self.advance(1.0)
            else:
                return

    def advance(self, seconds: float) -> None:
        """Let time pass; every rank looks at the clock."""
        self.now += seconds
        for node in self.ranks:
            node.end_turn()

    # ------------------------------------------------------------------------------------------------------------- state
    @property
    def processes(self) -> list[Process]:
        """All processes that are alive."""
        return [process for node in self.ranks for process in node.processes.values() if not process.is_gone]

    @property
    def workers(self) -> list[Process]:
        """All workers that are alive."""
        return [process for process in self.processes if not process.is_driver]

    def worker_on(self, rank: int) -> Process:
        """The only worker of a rank that runs something."""
        (worker,) = [worker for worker in self.running if worker.rank == rank]
        return worker

    @property
    def running(self) -> list[Process]:
        """All workers that run something and are not blocked."""
        return [worker for worker in self.workers if worker.running is not None and not worker.is_blocked]

    def kill(self, process: Process) -> None:
        """End a process without warning."""
        self.ranks[process.rank].kill(process.number)

    def check(self) -> None:
        """Raise if a core disagrees with itself, memory changed under somebody's eyes, or somebody waits for a turn that does
        not come."""
        for node in self.ranks:
            core = node.core
            core.check()
            if core.memory.is_waited_for and (core.memory.has_news or core.table.pressure.next_expiry is None):
                raise AssertionError(f"rank {node.rank}: somebody waits for room, and nobody looks at the clock for it")
        for process in self.processes:
            process.check()

    def leftovers(self) -> list[str]:
        """What a cluster still has that should have nothing: for the end of tests that have released everything."""
        found: list[str] = []
        for node in self.ranks:
            core, name = node.core, f"rank {node.rank}"
            found += [f"{name}: object {i.hex()} ({e.holds} holds)" for i, e in core.table.entries.items()]
            found += [f"{name}: task {i.hex()}" for i in core.tasks.tasks]
            found += [f"{name}: call {i.hex()}" for i in core.calls.sent]
            found += [f"{name}: calls of {i.hex()} wait" for i, view in core.calls.views.items() if view.queues]
            found += [f"{name}: actor {i.hex()}" for i in (*core.calls.created, *core.hosted.actors)]
            if used := core.memory.in_use:
                found.append(f"{name}: {used} bytes are allocated")
            if node.disk:
                found.append(f"{name}: {len(node.disk)} objects are on disk")
            if core.ledger.free != core.ledger.total:
                found.append(f"{name}: free {core.ledger.free} of {core.ledger.total}")
            if core.pool.ready or core.pool.leases:
                found.append(f"{name}: work waits or leases are open")
            found += [f"{name}: bundles of group {group.hex()}" for group in core.ledger.groups]
            found += [f"{name}: objects wait for group {group.hex()}" for group in core.groups.awaited]
            if node.gcs is not None:
                found += [f"group {group.hex()}" for group in node.gcs.groups.groups]
        return found

"""Objects from host to host, as JSON: ``mpirun -n 4 python tests/bench/bench_transfer.py [--quick] [--huge]``.

Each rank has a real arena, object table, transport and event loop, and takes all others to be on other hosts, so nothing is
mapped. Run it on real hosts, on the virtual ones of tests/slurm, or on one machine, where MPI copies through shared memory.
From rank 0 to rank 1, and as a broadcast from rank 0 to all others; without others for these, that part is left out.

Yardsticks, of the same round: mpi4py's Isend and Irecv with as many chunks of the same size under way, from arena to arena; and
`MPI_Bcast` of the same bytes. A turn of the event loop is what a control message may have to wait for.
"""

from __future__ import annotations

import argparse
import statistics
from collections import deque
from collections.abc import Callable
from time import perf_counter, sleep, thread_time
from typing import Any

from common import Bench, Ratio, options

from hpcray import ids
from hpcray.protocol import messages as m
from hpcray.protocol.codec import decode_from_peer, encode
from hpcray.store.allocator import Allocator
from hpcray.store.arena import CONTROL_PAGE, Arena
from hpcray.store.entry import ARGUMENT, GET
from hpcray.store.pulls import Done, Transfer
from hpcray.store.table import ObjectTable
from hpcray.transport.bulk import CHUNK_SIZE, CHUNKS_IN_FLIGHT
from hpcray.transport.doorbell import Doorbell
from hpcray.transport.mpi import MPI, MpiTransport
from hpcray.transport.poller import EventLoop

PING, PONG = b"\0ping", b"\0pong"
PINGS = 200
HUGE = (1 << 31) + (512 << 20)
NONCE = b"a bench!"
RAW_TAG = 5


class Rank:
    """What a rank of a job has for objects, without workers."""

    def __init__(self, room: int) -> None:
        self.world = MPI.COMM_WORLD.Dup()
        self.me, self.size = self.world.Get_rank(), self.world.Get_size()
        self.loop = EventLoop()
        self.bell = Doorbell()
        self.arena = Arena.create(room)
        while self.arena.prefault_step():
            pass
        self.comm = MPI.COMM_WORLD.Dup()
        self.transport = MpiTransport(self.comm, self.bell, self.arena, {}, self._on_frame)
        self.table = ObjectTable(self.me, Allocator(CONTROL_PAGE, self.arena.size), self, patience=60.0)
        self.round_trips: list[float] = []
        self._pinged = 0.0
        self._is_pinging = False
        self._made = 0
        self._cpu_before = 0.0
        self.longest_cpu = 0.0
        transfers, references = self.table.transfers, self.table.references
        self._handlers: dict[type, Callable[[int, Any], None]] = {
            m.Pull: lambda rank, x: transfers.on_pull(x, rank),
            m.PullFailed: lambda rank, x: transfers.pulls.on_pull_failed(x, rank),
            m.PullFrom: lambda rank, x: transfers.pulls.on_redirected(x, rank),
            m.HastenPull: lambda rank, x: transfers.on_hasten(x, rank),
            m.CopyAdded: lambda rank, x: transfers.on_copy_added(x, rank),
            m.Free: lambda _, x: [self.table.on_free(identifier) for identifier in x.ids],
            m.Borrowed: lambda rank, _: references.on_borrowed(rank),
        }

    # ------------------------------------------------------------------------------------------------- the table's out
    def send(self, rank: int, message: m.PeerMessage) -> None:
        self.transport.send(rank, encode([message]))

    def share_host(self, rank: int, other: int) -> bool:
        return rank == other

    def new_tag(self, rank: int) -> int:
        return self.transport.new_tag(rank)

    def receive(self, transfer: Transfer, done: Done) -> None:
        self.transport.receive_into(transfer.rank, transfer.tag, self._view(transfer), done, transfer.filling)

    def end_receive(self, rank: int, tag: int, size: int, why: str) -> None:
        self.transport.end_receive(rank, tag, size, why)

    def serve(self, transfer: Transfer, done: Done) -> None:
        start, filling = transfer.start, transfer.filling
        view = self._view(transfer)
        self.transport.send_from(
            transfer.rank, transfer.tag, view, done, priority=transfer.urgency, filling=filling, start=start
        )

    def hasten(self, rank: int, tag: int, urgency: int) -> None:
        self.transport.hasten(rank, tag, urgency)

    def end_serve(self, rank: int, tag: int, why: str) -> int:
        return self.transport.end_send(rank, tag, why)

    def holders(self) -> list[str]:
        return []

    def spill(self, *_: object) -> None:
        raise RuntimeError("the arena is too small for this bench")

    restore = forget = spill

    def _view(self, transfer: Transfer) -> memoryview:
        return self.arena.view(transfer.block.offset + transfer.start, transfer.block.size - transfer.start)

    # ------------------------------------------------------------------------------------------------------- the shell
    def _on_frame(self, source: int, frame: bytes) -> None:
        if frame == PING:
            self.transport.send(source, PONG)
        elif frame == PONG:
            self.round_trips.append(perf_counter() - self._pinged)
            if self._is_pinging:
                self.ping()
        else:
            for message in decode_from_peer(frame):
                self._handlers[type(message)](source, message)

    def ping(self) -> None:
        """Send rank 0 a small message, and another when its answer is here."""
        self._is_pinging = True
        self._pinged = perf_counter()
        self.transport.send(0, PING)

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Turn the loop until `is_over()` here and in all other ranks."""
        barrier: list[MPI.Request] = []

        def end_of_turn() -> None:
            used = thread_time()
            self.longest_cpu = max(self.longest_cpu, used - self._cpu_before)
            self._cpu_before = used
            if not barrier and is_over():
                barrier.append(self.world.Ibarrier())
            if barrier and barrier[0].Test():
                self.loop.stop()

        self._cpu_before = thread_time()
        self.loop.run(self.transport, end_of_turn)

    def meet(self) -> None:
        """Wait for all, without keeping a core busy."""
        barrier = self.world.Ibarrier()
        while not barrier.Test():
            sleep(0.0005)

    def slowest(self, seconds: float) -> float:
        """What the slowest rank took."""
        self.meet()
        return self.world.allreduce(seconds, MPI.MAX)

    # ---------------------------------------------------------------------------------------------------------- objects
    def send_object(self, size: int, receivers: range, *, urgency: int = ARGUMENT, pinging: bool = False) -> float:
        """Move a new object of rank 0 to these ranks; the seconds until all of them have it."""
        self._made += 1
        identifier = ids.object_id(ids.task_id(ids.client_prefix(0, NONCE, 1), self._made), 0)
        table = self.table
        if self.me == 0:
            table.references.create(identifier)
            table.memory.reserve(identifier, size, lambda block: table.set_here(identifier, block, []))
            block = table.entries[identifier].block
            self.arena.view(block.offset, 8)[:] = self._made.to_bytes(8, "big")
            self.arena.view(block.offset + size - 8, 8)[:] = identifier[-8:]
        self.meet()
        self.loop.longest_turn = self.longest_cpu = 0.0
        came: list[float] = []
        began = perf_counter()
        if self.me in receivers:

            def arrived(error: bytes | None) -> None:
                assert error is None
                came.append(perf_counter() - began)
                self._is_pinging = False

            table.references.add_guest(identifier)
            table.learn_copies(identifier, size, [0])
            assert not table.when_local(identifier, arrived, urgency)
            if pinging:
                self.round_trips.clear()
                self.ping()
        self.run_until(lambda: bool(came) or self.me not in receivers)
        if self.me in receivers:
            block = table.entries[identifier].block
            assert bytes(self.arena.view(block.offset, 8)) == self._made.to_bytes(8, "big")
            assert bytes(self.arena.view(block.offset + size - 8, 8)) == identifier[-8:]
            table.references.drop_guest(identifier)
        self.run_until(lambda: self.me != 0 or len(table.entries[identifier].copies or ()) == len(receivers))
        if self.me == 0:
            table.references.drop(identifier)
        self.run_until(lambda: not table.memory.in_use)
        return self.slowest(came[0] if came else 0.0)

    def round_trip(self) -> float:
        """Microseconds of a small message from rank 1 to rank 0 and back, while nothing else happens."""
        self.round_trips.clear()
        if self.me == 1:
            self.ping()

        def is_over() -> bool:
            self._is_pinging = len(self.round_trips) < PINGS
            return self.me != 1 or not self._is_pinging

        self.run_until(is_over)
        return self.median_round_trip()

    def median_round_trip(self) -> float:
        mine = statistics.median(self.round_trips) * 1e6 if self.me == 1 else 0.0
        return self.slowest(mine)

    # ------------------------------------------------------------------------------------------------------- yardsticks
    def raw_pipeline(self, size: int) -> float:
        """The seconds of mpi4py alone from rank 0 to rank 1, between the same arenas."""
        view = self.arena.view(CONTROL_PAGE, size)
        chunks: deque[MPI.Request] = deque()
        posted = 0
        self.meet()
        began = perf_counter()
        start = self.world.Isend if self.me == 0 else self.world.Irecv
        while self.me < 2 and (chunks or posted < size):
            while chunks and chunks[0].Test():
                chunks.popleft()
            while len(chunks) < CHUNKS_IN_FLIGHT and posted < size:
                chunk = view[posted : posted + CHUNK_SIZE]
                chunks.append(start((chunk, MPI.BYTE), 1 - self.me, RAW_TAG))
                posted += len(chunk)
        return self.slowest(perf_counter() - began if self.me < 2 else 0.0)

    def raw_broadcast(self, size: int) -> float:
        """The seconds of `MPI_Bcast` from rank 0 to all, from and into the same arenas."""
        view = self.arena.view(CONTROL_PAGE, size)
        self.meet()
        began = perf_counter()
        self.world.Bcast((view, MPI.BYTE), 0)
        return self.slowest(perf_counter() - began)

    def close(self) -> None:
        self.meet()
        if self.transport.close():
            self.comm.Free()
            self.world.Free()
            MPI.Finalize()


def main() -> None:
    """Measure all in turns; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--huge", action="store_true", help="also move an object of more than 2 GiB, once")
    parsed = options(parser)
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_FUNNELED)
    size, large = (8 << 20, 16 << 20) if parsed.quick else (256 * 10**6, 10**9)
    rank = Rank(max(large, HUGE if parsed.huge else 0) + (16 << 20))
    bench = Bench("transfer")
    ranks = rank.size
    bench.facts |= {
        "mpi": MPI.Get_library_version().split(",")[0].split("\n")[0].strip(),
        "ranks": ranks,
        "bytes": size,
        "bytes with control messages": large,
        "chunks": f"{CHUNKS_IN_FLIGHT} of {CHUNK_SIZE} bytes",
    }
    for _ in range(parsed.rounds):
        bench.add("raw pipeline", "GB/s", size / rank.raw_pipeline(size) / 1e9)
        bench.add("transfer", "GB/s", size / rank.send_object(size, range(1, 2)) / 1e9)
        bench.add("round trip, idle", "us", rank.round_trip())
        bench.add(
            "transfer with control messages",
            "GB/s",
            large / rank.send_object(large, range(1, 2), urgency=GET, pinging=True) / 1e9,
        )
        bench.add("longest turn", "ms", rank.slowest(rank.loop.longest_turn) * 1e3)
        bench.add("longest turn, CPU time", "ms", rank.slowest(rank.longest_cpu) * 1e3)
        bench.add("round trip, during a transfer", "us", rank.median_round_trip())
        if ranks > 2:
            bench.add("MPI_Bcast", "s", rank.raw_broadcast(size))
            bench.add("broadcast", "s", rank.send_object(size, range(1, ranks)))
    if parsed.huge:
        bench.facts["an object of more than 2 GiB, GB/s"] = round(HUGE / rank.send_object(HUGE, range(1, 2)) / 1e9, 2)
    if rank.me == 0:
        bench.report(
            {
                "transfer": Ratio("transfer", "raw pipeline", at_least=0.9),
                "broadcast": Ratio("broadcast", "MPI_Bcast", at_most=1.5),
                "round trip": Ratio("round trip, during a transfer", "round trip, idle"),
            },
            {"longest turn, CPU time": {"at_most": 5.0}},
        )
    rank.close()


if __name__ == "__main__":
    main()

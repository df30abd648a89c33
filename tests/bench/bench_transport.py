"""What the transport costs, as JSON on standard output: `mpirun -n 2 python tests/bench/bench_transport.py`.

Times in microseconds are medians; each figure has its yardstick, taken in the same run. With `--idle`, and
any number of ranks: the CPU time that they use while nothing happens.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import statistics
from dataclasses import dataclass, field
from time import monotonic, perf_counter, process_time
from typing import TYPE_CHECKING

from hpcray.store.arena import CONTROL_PAGE, Arena
from hpcray.transport.doorbell import Doorbell
from hpcray.transport.mpi import MPI, MpiTransport
from hpcray.transport.poller import EventLoop

if TYPE_CHECKING:
    from collections.abc import Callable

_MIB = 1024 * 1024
_FRAME = bytes(200)  # about one task


@dataclass
class Rank:
    """One rank with all that it needs to talk to the others."""

    comm: MPI.Comm
    loop: EventLoop = field(default_factory=EventLoop)
    bell: Doorbell = field(default_factory=Doorbell)
    arena: Arena = field(default_factory=lambda: Arena.create(_MIB))

    def __post_init__(self) -> None:
        me = self.comm.Get_rank()
        names = self.comm.allgather(self.bell.name)
        peers = {rank: name for rank, name in enumerate(names) if rank != me}
        self.transport = MpiTransport(self.comm, self.bell, self.arena, peers, lambda _source, _frame: None)
        handed: list[int] = []
        bells: dict[int, int] = {}

        def take() -> None:
            for payload, fd in self.bell.drain():
                if (rank := int(payload)) in bells:
                    self.transport.add_peer_arena(rank, Arena.attach(fd), bells[rank])
                    handed.append(fd)
                else:
                    bells[rank] = fd

        self.loop.add_reader(self.bell.fd, take)
        self.loop.add_reader(self.bell.bell, self.bell.silence)
        for name in peers.values():
            for fd in (self.bell.bell, self.arena.fd):
                self.bell.send_fd(name, str(me).encode(), fd)
        self.run_until(lambda: len(handed) == len(peers))
        self.comm.Barrier()

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Turn the loop until `is_over()`, tested at the end of each turn."""

        def end_of_turn() -> None:
            if is_over():
                self.loop.stop()

        self.loop.run(self.transport, end_of_turn)


def ping_pong(rank: Rank, *, pause: float, rounds: int) -> float:
    """Return the median one-way time in microseconds, with so many seconds of quiet before each round."""
    other = 1 - rank.comm.Get_rank()
    is_first = other == 1
    times: list[float] = []
    started = 0.0
    rounds_left = rounds

    def start() -> None:
        nonlocal started
        started = perf_counter()
        rank.transport.send(other, _FRAME)

    def on_frame(source: int, frame: bytes) -> None:
        nonlocal rounds_left
        rounds_left -= 1
        if not is_first:
            rank.transport.send(source, frame)
            return
        times.append((perf_counter() - started) / 2 * 1e6)
        if rounds_left == 0:
            return
        if pause:
            rank.loop.call_at(monotonic() + pause, start)
        else:
            start()

    rank.transport.on_frame = on_frame
    rank.comm.Barrier()
    if is_first:
        start()
    rank.run_until(lambda: rounds_left == 0)
    rank.comm.Barrier()
    return statistics.median(times) if times else 0.0


def burst(rank: Rank, frames: int) -> float:
    """Return frames per second from rank 0 to rank 1, each sent as soon as the transport allows it."""
    me = rank.comm.Get_rank()
    left = frames
    arrived = 0

    def on_frame(_source: int, _frame: bytes) -> None:
        nonlocal arrived
        arrived += 1

    def turn() -> bool:
        nonlocal left
        if me == 1:
            if arrived == frames:
                rank.transport.send(0, b"all")
            return arrived == frames
        while left and rank.transport.can_send(1):
            rank.transport.send(1, _FRAME)
            left -= 1
        return arrived == 1

    rank.transport.on_frame = on_frame
    rank.comm.Barrier()
    started = perf_counter()
    if me == 0:
        turn()
    rank.run_until(turn)
    elapsed = perf_counter() - started
    rank.comm.Barrier()
    return frames / elapsed


def bandwidth(rank: Rank, size: int, rounds: int) -> float:
    """Return gigabytes per second of bulk transfers from arena to arena, the pages warm."""
    me = rank.comm.Get_rank()
    arena = Arena.create(size)
    view = arena.view(CONTROL_PAGE, size)
    done: list[str | None] = []
    best = 0.0
    for _ in range(rounds):
        done.clear()
        rank.comm.Barrier()
        started = perf_counter()
        if me == 0:
            rank.transport.send_from(1, 16, view, done.append)
        else:
            rank.transport.receive_into(0, 16, view, done.append)
        rank.run_until(lambda: bool(done))
        rank.comm.Barrier()
        if done != [None]:
            raise RuntimeError(done[0])
        best = max(best, size / (perf_counter() - started) / 1e9)
    view.release()
    return best


def raw_ping_pong(comm: MPI.Comm, size: int, rounds: int) -> float:
    """Return the median one-way time in microseconds of mpi4py alone, both ranks spinning."""
    me = comm.Get_rank()
    message, arrived = bytearray(size), bytearray(size)
    times = []
    for _ in range(rounds):
        started = perf_counter()
        for turn in (0, 1):
            if turn == me:
                comm.Send((message, MPI.BYTE), 1 - me, 9)
            else:
                request = comm.Irecv((arrived, MPI.BYTE), 1 - me, 9)
                while not request.Test():
                    os.sched_yield()
        times.append((perf_counter() - started) / 2 * 1e6)
    return statistics.median(times)


def socket_one_way(rounds: int) -> float:
    """Return half the median round trip in microseconds over a socketpair, to `cat` and back."""
    ours, theirs = socket.socketpair()
    child = os.posix_spawn(
        "/bin/cat",
        ["cat"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), 1),
        ],
    )
    theirs.close()
    poller = select.epoll()
    poller.register(ours.fileno(), select.EPOLLIN)
    times = []
    for _ in range(rounds):
        started = perf_counter()
        ours.send(_FRAME)
        poller.poll()
        ours.recv(4096)
        times.append((perf_counter() - started) / 2 * 1e6)
    ours.close()
    poller.close()
    os.waitpid(child, 0)
    return statistics.median(times)


def idle_cpu(rank: Rank, seconds: float) -> list[float]:
    """Return each rank's CPU time in seconds over so many seconds of idleness."""
    before = process_time()
    until = monotonic() + seconds
    rank.loop.call_at(until, lambda: None)
    rank.run_until(lambda: monotonic() >= until)
    return rank.comm.allgather(process_time() - before)


def main() -> None:
    """Print the figures of this run; rank 0 alone prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=float, default=0.0, help="only be idle, for so many seconds")
    options = parser.parse_args()
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_FUNNELED)
    comm = MPI.COMM_WORLD.Dup()
    rank = Rank(comm)
    figures: dict[str, object] = {"mpi": MPI.Get_library_version().split(",")[0].split("\n")[0]}
    if options.idle:
        used = idle_cpu(rank, options.idle)
        figures["idle_cpu_seconds"] = [round(each, 4) for each in used]
        figures["idle_cpu_percent"] = round(100 * sum(used) / options.idle, 3)
    else:
        figures["one_way_awake_us"] = ping_pong(rank, pause=0, rounds=1000)
        figures["one_way_asleep_us"] = ping_pong(rank, pause=0.003, rounds=200)
        figures["frames_per_second"] = burst(rank, 20_000)
        figures["bulk_64_mib_gb_per_second"] = bandwidth(rank, 64 * _MIB, 5)
        figures["raw_one_way_us"] = raw_ping_pong(comm, len(_FRAME), 1000)
        figures["raw_64_mib_gb_per_second"] = 64 * _MIB / raw_ping_pong(comm, 64 * _MIB, 5) / 1e3
        figures["socket_one_way_us"] = socket_one_way(1000) if comm.Get_rank() == 0 else 0.0
        comm.Barrier()
    if comm.Get_rank() == 0:
        print(json.dumps(figures), flush=True)
    if rank.transport.close():
        comm.Free()
        MPI.Finalize()


if __name__ == "__main__":
    main()

"""The transport between real ranks: `mpirun -n {1,2,4} python -m pytest --with-mpi tests/mpi`.

Every rank runs every test. A failed assertion in one rank would leave the others waiting, so they give up
after a while, and nothing after that is reliable.
"""

from __future__ import annotations

import random
from statistics import median
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING

import pytest

# First, so that MPI is initialised now and finalised at exit: pytest-mpi asks for its rank after the tests.
from mpi4py import MPI

from hpcray.transport.doorbell import Doorbell
from hpcray.transport.mpi import MpiTransport
from hpcray.transport.poller import EventLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.mpi

MIB = 1024 * 1024
SIZES = [0, 1, 100, 4000, 5000, 20_000, 65_515, 65_516, 65_517, 70_000, 300_000, 1_000_000]


class Flag:
    """Stands for the arena: these tests look at the flag of their own rank only."""

    asleep = False


class Rank:
    """One rank: a transport in an event loop, and what has arrived."""

    def __init__(self) -> None:
        self.comm = MPI.COMM_WORLD.Dup()
        self.me = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        self.others = [rank for rank in range(self.size) if rank != self.me]
        self.loop = EventLoop()
        self.bell = Doorbell()
        self.flag = Flag()
        names = self.comm.allgather(self.bell.name)
        self.arrived: dict[int, list[bytes]] = {rank: [] for rank in range(self.size)}
        peers = {rank: names[rank] for rank in self.others}
        self.transport = MpiTransport(self.comm, self.bell, self.flag, peers, self._on_frame)
        self.transport.attach(self.loop)

    def _on_frame(self, source: int, frame: bytes) -> None:
        self.arrived[source].append(frame)

    def run_until(self, is_over: Callable[[], bool], timeout: float = 60.0) -> None:
        """Turn the loop until `is_over()`, looked at in each turn."""

        def end_of_turn() -> None:
            if is_over():
                self.loop.stop()

        def give_up() -> None:
            counts = {source: len(frames) for source, frames in self.arrived.items()}
            raise TimeoutError(f"rank {self.me} waited for {timeout} s; frames arrived: {counts}")

        timer = self.loop.call_at(monotonic() + timeout, give_up)
        self.loop.run(self.transport, end_of_turn)
        timer.cancel()

    def meet(self) -> None:
        """Wait for all ranks, turning the loop, so that nobody waits for a rank that blocks here."""
        barrier = self.comm.Ibarrier()
        while not barrier.Test():
            self.transport.progress()
            sleep(0.0002)

    def all_agree(self, good: bool) -> bool:
        """Whether `good` holds in every rank, asked without blocking the transport."""
        self.meet()
        return all(self.comm.allgather(good))


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    yield rank
    assert rank.transport.close()
    rank.comm.Free()
    rank.bell.close()
    rank.loop.close()


@pytest.fixture
def pair(rank: Rank) -> Rank:
    """The same rank, where there are at least two; tests use the first two, the others only meet."""
    if rank.size < 2:
        pytest.skip("needs two ranks")
    return rank


def test_frames_of_all_sizes_arrive_whole_and_in_order_from_every_rank(rank: Rank) -> None:
    def frame(source: int, target: int, index: int) -> bytes:
        choice = random.Random(f"{source} {target} {index}")
        return choice.randbytes(16) * (choice.choice(SIZES) // 16) + bytes(choice.choice(SIZES) % 16)

    count = 40
    todo = [(target, index) for index in range(count) for target in range(rank.size)]

    def turn() -> bool:
        for target, index in todo[:3]:
            rank.transport.send(target, frame(rank.me, target, index))
        del todo[:3]
        return not todo and all(len(frames) == count for frames in rank.arrived.values())

    rank.run_until(turn)
    for source, frames in rank.arrived.items():
        assert frames == [frame(source, rank.me, index) for index in range(count)]


def test_a_large_frame_does_not_let_smaller_ones_pass(rank: Rank) -> None:
    frames = [b"before", bytes(9 * MIB), b"between", bytes(5 * MIB), b"", b"after"]
    for target in range(rank.size):
        for frame in frames:
            rank.transport.send(target, frame)
    rank.run_until(lambda: all(len(arrived) == len(frames) for arrived in rank.arrived.values()))
    assert all(arrived == frames for arrived in rank.arrived.values())


def test_a_receiver_that_takes_nothing_stops_its_sender_until_it_does(pair: Rank) -> None:
    sent = 0
    if pair.me == 0:
        while pair.transport.can_send(1):
            pair.transport.send(1, b"x")
            sent += 1
        for _ in range(100):
            pair.transport.progress()
        assert not pair.transport.can_send(1)
        assert 4 <= sent <= 16
    pair.comm.Barrier()
    if pair.me == 0:
        pair.run_until(lambda: pair.transport.can_send(1))
    elif pair.me == 1:
        pair.run_until(lambda: len(pair.arrived[0]) >= 8)
    pair.meet()


def test_many_one_way_frames_all_arrive_although_the_sender_waits_for_credit(pair: Rank) -> None:
    count = 3000
    left = count

    def send() -> bool:
        nonlocal left
        while left and pair.transport.can_send(1):
            pair.transport.send(1, left.to_bytes(4, "big"))
            left -= 1
        return not left

    if pair.me == 0:
        pair.run_until(send)
    elif pair.me == 1:
        pair.run_until(lambda: len(pair.arrived[0]) == count)
        assert [int.from_bytes(frame, "big") for frame in pair.arrived[0]] == list(range(count, 0, -1))
    pair.meet()


def test_a_frame_wakes_a_rank_that_sleeps(pair: Rank) -> None:
    delays: list[float] = []
    for _ in range(5):
        if pair.me == 1:
            pair.run_until(lambda: bool(pair.arrived[0]))
            pair.arrived[0].clear()
            pair.transport.send(0, b"woken")
        elif pair.me == 0:
            sleep(0.4)  # by now the other sleeps for hundreds of milliseconds at a time
            started = perf_counter()
            pair.transport.send(1, b"wake up")
            pair.run_until(lambda: bool(pair.arrived[1]))
            delays.append(perf_counter() - started)
            pair.arrived[1].clear()
    assert not delays or median(delays) < 0.1


def test_a_frame_that_needs_its_receiver_several_times_wakes_it_each_time(pair: Rank) -> None:
    delays: list[float] = []
    for _ in range(5):
        if pair.me == 1:
            pair.run_until(lambda: bool(pair.arrived[0]))
            pair.arrived[0].clear()
            pair.transport.send(0, b"woken")
        elif pair.me == 0:
            sleep(0.4)
            started = perf_counter()
            pair.transport.send(1, bytes(60_000))
            pair.run_until(lambda: bool(pair.arrived[1]))
            delays.append(perf_counter() - started)
            pair.arrived[1].clear()
    assert not delays or median(delays) < 0.1


def transfer(pair: Rank, size: int, alongside: Callable[[], None]) -> list[str | None]:
    """Move `size` bytes from rank 0 to rank 1, call `alongside()` in each turn; return what `on_done` got."""
    done: list[str | None] = []
    buffer = memoryview(bytearray(size))
    marks = range(0, size, max(1, size // 1000))
    if pair.me == 1:
        tag = pair.transport.new_tag(0)
        pair.transport.receive_into(0, tag, buffer, done.append)
        pair.transport.send(0, b"tag" + tag.to_bytes(4, "big"))
    elif pair.me == 0:
        for mark in marks:
            buffer[mark] = mark % 251
        buffer[-1] = 99
        pair.run_until(lambda: any(frame.startswith(b"tag") for frame in pair.arrived[1]))
        [frame] = [frame for frame in pair.arrived[1] if frame.startswith(b"tag")]
        pair.transport.send_from(1, int.from_bytes(frame[3:], "big"), buffer, done.append)

    def turn() -> bool:
        alongside()
        return bool(done)

    if pair.me < 2:
        pair.run_until(turn, timeout=120)
    if pair.me == 1:
        assert all(buffer[mark] == mark % 251 for mark in marks[:-1])
        assert buffer[-1] == 99
    return done


def test_frames_overtake_bulk_data(pair: Rank) -> None:
    round_trips: list[float] = []
    asked = 0.0

    def ping_or_pong() -> None:
        nonlocal asked
        if pair.me == 1 and b"ping" in pair.arrived[0]:
            pair.arrived[0].clear()
            pair.transport.send(0, b"pong")
        elif pair.me == 0 and (not asked or b"pong" in pair.arrived[1]):
            if asked:
                round_trips.append(perf_counter() - asked)
            pair.arrived[1].clear()
            asked = perf_counter()
            pair.transport.send(1, b"ping")

    started = perf_counter()
    done = transfer(pair, 300 * MIB, ping_or_pong)
    elapsed = perf_counter() - started
    pair.meet()
    assert done == ([None] if pair.me < 2 else [])
    if pair.me == 0:
        assert len(round_trips) >= 3
        assert median(round_trips) < elapsed / 3


@pytest.mark.parametrize("size", [1, 4 * MIB, 4 * MIB + 1, 33 * MIB + 17])
def test_bulk_data_arrives_whatever_its_size(pair: Rank, size: int) -> None:
    done = transfer(pair, size, lambda: None)
    pair.meet()
    assert done == ([None] if pair.me < 2 else [])


@pytest.mark.slow
def test_a_transfer_may_be_larger_than_an_mpi_count(pair: Rank) -> None:
    done = transfer(pair, 2**31 + 5 * MIB, lambda: None)
    pair.meet()
    assert done == ([None] if pair.me < 2 else [])


def test_an_empty_transfer_is_done_at_once(rank: Rank) -> None:
    done: list[str | None] = []
    tag = rank.transport.new_tag(rank.me)
    rank.transport.receive_into(rank.me, tag, memoryview(b""), done.append)
    rank.transport.send_from(rank.me, tag, memoryview(b""), done.append)
    assert done == [None, None]


def test_tags_under_way_differ_and_are_used_again_when_done(rank: Rank) -> None:
    tags = [rank.transport.new_tag(rank.me) for _ in range(50)]
    assert len(set(tags)) == 50
    done: list[str | None] = []
    for tag in tags:
        rank.transport.receive_into(rank.me, tag, memoryview(bytearray(1000)), done.append)
    for tag in reversed(tags):
        rank.transport.send_from(rank.me, tag, memoryview(bytes(1000)), done.append)
    rank.run_until(lambda: len(done) == 100)
    assert {rank.transport.new_tag(rank.me) for _ in range(50)} == set(tags)


def test_a_receive_of_what_never_comes_can_be_cancelled(rank: Rank) -> None:
    done: list[str | None] = []
    peer = (rank.me + 1) % rank.size
    tag = rank.transport.new_tag(peer)
    rank.transport.receive_into(peer, tag, memoryview(bytearray(20 * MIB)), done.append)
    rank.transport.progress()
    rank.transport.end_receive(peer, tag, 0, "it is gone")
    rank.transport.end_receive(peer, tag, 0, "twice does nothing")
    assert done == ["it is gone"]
    assert rank.transport.new_tag(peer) == tag
    rank.meet()


def test_the_asleep_flag_is_set_only_around_a_sleep(rank: Rank) -> None:
    rank.run_until(lambda: rank.transport.prepare_sleep() > 0)
    rank.transport.prepare_sleep()
    assert rank.flag.asleep
    rank.transport.woke()
    assert not rank.flag.asleep
    rank.meet()


def test_what_was_sent_before_the_end_is_delivered_or_dropped_but_holds_nobody_up(rank: Rank) -> None:
    for target in range(rank.size):
        for size in SIZES:
            rank.transport.send(target, bytes(size))


def test_transfers_that_the_end_cuts_off_hold_nobody_up(pair: Rank) -> None:
    if pair.me == 0:
        pair.transport.send_from(1, 1000, memoryview(bytes(40 * MIB)), lambda error: None)
    elif pair.me == 1:
        pair.transport.receive_into(0, 1001, memoryview(bytearray(40 * MIB)), lambda error: None)
    pair.meet()

"""Bulk data between real ranks: relays, priorities, ends before the end (`mpirun -n N python -m pytest --with-mpi tests/mpi`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

# First, so that MPI is initialised now and finalised at exit: pytest-mpi asks for its rank after the tests.
from mpi4py import MPI  # noqa: F401

from hpcray.store.pulls import Filling
from hpcray.transport.bulk import CHUNK_SIZE, CHUNKS_IN_FLIGHT, Bulk, Receive, Send
from hpcray.transport.frames import Frames

from .test_transport import Rank, rank  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.mpi

SIZE = 24 * CHUNK_SIZE + 17


@pytest.fixture
def two(rank: Rank) -> Rank:  # noqa: F811
    if rank.size < 2:
        pytest.skip("needs two ranks")
    return rank


def pattern(size: int) -> bytearray:
    data = bytearray(size)
    for mark in range(0, size, 4099):
        data[mark] = mark % 251
    return data


def run(two: Rank, is_over: Callable[[], bool]) -> None:
    """Turn until it is over here, then meet."""
    two.run_until(is_over)
    two.meet()


def agree_on_tags(two: Rank, source: int, receiver: int, count: int) -> list[int]:
    """Tags that the receiver makes for transfers from `source`, known to all."""
    tags = [two.transport.new_tag(source) for _ in range(count)] if two.me == receiver else []
    two.meet()
    return two.comm.bcast(tags, receiver)


def test_what_arrives_is_sent_on_while_the_rest_arrives(two):
    # 0 → 1 → 2, or back to 0 where there are two ranks only
    last = 2 % two.size
    (first,), (second,) = agree_on_tags(two, 0, 1, 1), agree_on_tags(two, 1, last, 1)
    done: list[str | None] = []
    expected = 0
    came = bytearray(SIZE)
    fillings: list[int] = []
    filling = Filling()
    if two.me == last:
        expected += 1
        two.transport.receive_into(1, second, memoryview(came), done.append)
    if two.me == 1:
        expected += 2
        passing = bytearray(SIZE)
        two.transport.send_from(last, second, memoryview(passing), done.append, filling=filling)
        two.transport.receive_into(0, first, memoryview(passing), done.append, filling)
        fillings.append(filling.size)
    if two.me == 0:
        expected += 1
        two.transport.send_from(1, first, memoryview(pattern(SIZE)), done.append)
    run(two, lambda: len(done) == expected)
    assert done == [None] * expected
    if two.me == last:
        assert came == pattern(SIZE)
    if two.me == 1:
        assert fillings[0] < filling.size == SIZE
    assert two.all_agree(True)


def test_a_transfer_that_its_sender_cuts_short_ends_with_what_was_sent_and_its_tag_serves_again(two):
    (tag,) = agree_on_tags(two, 0, 1, 1)
    done: list[str | None] = []
    came = bytearray(SIZE)
    sent = 0
    if two.me == 1:
        two.transport.receive_into(0, tag, memoryview(came), done.append)
    elif two.me == 0:
        data = pattern(SIZE)
        two.transport.send_from(1, tag, memoryview(data), done.append)
        sent = two.transport.end_send(1, tag, "cut short")
        assert 0 < sent <= CHUNKS_IN_FLIGHT * CHUNK_SIZE
        two.transport.send(1, sent.to_bytes(8, "big"))

    def turn() -> bool:
        if two.me == 1 and two.arrived[0]:
            two.transport.end_receive(0, tag, int.from_bytes(two.arrived[0].pop(), "big"), "cut short")
        return bool(done) or two.me > 1

    run(two, turn)
    assert done == (["cut short"] if two.me < 2 else [])
    sent = two.comm.bcast(sent, 0)
    if two.me == 1:
        assert came[:sent] == pattern(SIZE)[:sent]
        assert not any(came[sent:])
    done.clear()
    again = bytearray(SIZE)
    if two.me == 1:
        assert two.transport.new_tag(0) == tag
        two.transport.receive_into(0, tag, memoryview(again), done.append)
    elif two.me == 0:
        two.transport.send_from(1, tag, memoryview(pattern(SIZE)), done.append)
    run(two, lambda: bool(done) or two.me > 1)
    assert two.me != 1 or again == pattern(SIZE)


def test_a_transfer_goes_on_from_where_an_earlier_one_stopped(two):
    (tag,) = agree_on_tags(two, 0, 1, 1)
    done: list[str | None] = []
    start = 5 * CHUNK_SIZE
    whole = pattern(SIZE)
    came = bytearray(whole[:start]) + bytearray(SIZE - start)
    filling = Filling()
    filling.size = start
    if two.me == 1:
        two.transport.receive_into(0, tag, memoryview(came)[start:], done.append, filling)
    elif two.me == 0:
        two.transport.send_from(1, tag, memoryview(whole)[start:], done.append, start=start)
    run(two, lambda: bool(done) or two.me > 1)
    assert two.me != 1 or (came == whole and filling.size == SIZE)


def test_more_urgent_transfers_to_a_rank_are_through_before_less_urgent_ones(two):
    tags = agree_on_tags(two, 0, 1, 3)
    order: list[int] = []
    done: list[str | None] = []
    if two.me == 1:
        for index, tag in enumerate(tags):
            two.transport.receive_into(0, tag, memoryview(bytearray(SIZE)), lambda _, index=index: order.append(index))
    two.meet()
    if two.me == 0:
        for priority, tag in zip((2, 1, 2), tags, strict=True):
            two.transport.send_from(1, tag, memoryview(bytes(SIZE)), done.append, priority=priority)
        two.transport.hasten(1, tags[2], 0)
        two.transport.hasten(1, 9999, 0)  # long over: does nothing
    run(two, lambda: len(done) == 3 or len(order) == 3 or two.me > 1)
    if two.me == 1:
        assert order.index(2) < order.index(1) < order.index(0)


def test_many_transfers_in_both_directions_all_arrive_whole(two):
    count = 20
    tags = agree_on_tags(two, 1, 0, count), agree_on_tags(two, 0, 1, count)
    done: list[str | None] = []
    came = [bytearray(3 * CHUNK_SIZE + index) for index in range(count)]
    if two.me < 2:
        other = 1 - two.me
        for index in range(count):
            two.transport.receive_into(other, tags[two.me][index], memoryview(came[index]), done.append)
            data = memoryview(pattern(3 * CHUNK_SIZE + index))
            two.transport.send_from(other, tags[other][index], data, done.append, priority=index % 3)
    run(two, lambda: two.me > 1 or len(done) == 2 * count)
    assert done == [None] * len(done)
    assert two.me > 1 or all(data == pattern(len(data)) for data in came)


# ----------------------------------------------------------------------------------- in an order that real ranks seldom take
class Comm:
    """An MPI in which nothing has left or come before the test says so, and then all has."""

    is_through = False

    def Get_rank(self) -> int:  # noqa: N802
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 2

    def Isend(self, *_: Any) -> Request:  # noqa: N802
        return Request(self)

    Recv_init = Irecv = Isend


class Request:
    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def Test(self) -> bool:  # noqa: N802
        return self.comm.is_through

    def Start(self) -> None:  # noqa: N802
        pass

    Cancel = Wait = Free = Start


class Bells:
    def wake(self, peer: int) -> None:
        pass


def test_a_large_frame_that_follows_another_may_leave_together_with_a_transfer():
    comm: Any = Comm()
    bulk = Bulk(comm)
    frames = Frames(comm, Bells(), bulk, lambda *_: None)
    done: list[str | None] = []
    bulk.send(Send(1, 20, memoryview(bytes(1000)), done.append, 0, None, 0))
    for _ in range(2):
        frames.send(1, bytes(100_000))
    comm.is_through = True
    bulk.progress()
    assert done == [None]
    while bulk.is_active:
        bulk.progress()
    assert not frames._peers[1].large_out


def test_what_has_come_of_a_transfer_whose_sender_died_does_not_keep_it_waiting():
    comm: Any = Comm()
    bulk = Bulk(comm)
    done: list[str | None] = []
    bulk.receive(Receive(1, 20, memoryview(bytearray(SIZE)), done.append))
    comm.is_through = True
    bulk.progress()
    assert not done
    bulk.end_receive(1, 20, 0, "it died")
    assert done == ["it died"]
    assert not bulk.is_active
